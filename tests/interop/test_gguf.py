"""GGUF files: what goes out comes back, and what their numbers stand for is what `gguf` says."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from triglot.config import ModelConfig  # noqa: E402
from triglot.errors import TriglotError  # noqa: E402
from triglot.interop import llama  # noqa: E402
from triglot.interop.convert import read_model  # noqa: E402
from triglot.interop.gguf import read, write  # noqa: E402
from triglot.models.factory import build_model  # noqa: E402


def make(**options):
    torch.manual_seed(1)
    config = ModelConfig(
        kind="decoder_only", d_model=64, num_heads=4, num_layers=2, d_ff=96, max_seq_length=50, vocab_size=70,
        dropout=0.0,
        options=replace(llama.OPTIONS, num_kv_heads=2, norm_eps=1e-6, **options),
    )  # fmt: skip
    return build_model(config).eval(), config


KINDS = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head", "head_dim": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_as_it_went_out(kind, tmp_path):
    model, config = make(**KINDS[kind])
    write(tmp_path / "a.gguf", model, config, "F32", {})
    again, found = read_model(tmp_path / "a.gguf")
    assert found.options.num_kv_heads == 2
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize(("bits", "apart"), [("F16", 1e-3), ("Q8_0", 1e-2)])
def test_fewer_bits_are_near(bits, apart, tmp_path):
    model, config = make()
    write(tmp_path / "a.gguf", model, config, bits, {})
    again, _ = read_model(tmp_path / "a.gguf")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=apart)


@pytest.mark.parametrize("bits", ["Q4_0", "Q4_1", "Q8_0"])
def test_numbers_are_what_gguf_says_they_stand_for(bits, tmp_path):
    model, config = make()
    kind = getattr(gguf.GGMLQuantizationType, bits)
    write(tmp_path / "a.gguf", model, config, "F32", {})
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    for field in file.fields.values():
        if field.name.startswith("llama."):
            value = field.contents()
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(field.name, value)
    expected = {}
    for one in file.tensors:
        whole = len(one.shape) == 2
        data = gguf.quants.quantize(one.data, kind) if whole else one.data
        expected[one.name] = gguf.quants.dequantize(data, kind) if whole else one.data
        writer.add_tensor(one.name, data, raw_dtype=kind if whole else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again, _ = read_model(tmp_path / "b.gguf")
    assert torch.equal(again.embedding.tokens.weight, torch.from_numpy(expected["token_embd.weight"]))
    assert torch.equal(again.layers[1].self_attention.value.weight, torch.from_numpy(expected["blk.1.attn_v.weight"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    model, config = make()
    write(path, model, config, "Q8_0", {"tokenizer.ggml.tokens": ["a", "b"]})
    return path


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_file_is_an_error_and_nothing_worse(whole, tmp_path_factory, data):
    content = bytearray(whole.read_bytes())
    end = 2000
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("damaged") / "a.gguf"
    path.write_bytes(content)
    with suppress(TriglotError):
        read(path)
