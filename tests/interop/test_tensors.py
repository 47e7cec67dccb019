"""Files of tensors: whole ones are read as they were written, damaged ones named, and none takes more than it is."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from triglot.config import ModelConfig
from triglot.errors import CheckpointError, TriglotError
from triglot.files import write_json
from triglot.interop.convert import FAMILIES, RUNS_CODE, config_of, read_model
from triglot.interop.tensors import INDEX, ONE, read_object, tensors_of, write_tensors
from triglot.models.factory import build_model

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c.d": torch.zeros(4, 0)}
LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [10, 30, 10**9])
def test_tensors_come_back_from_one_file_or_several(shard_bytes, tmp_path):
    write_tensors(tmp_path, [{name: tensor} for name, tensor in TENSORS.items()], shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    found = tensors_of(tmp_path)
    assert found.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found.read(name), tensor)
        assert found.read(name).dtype == tensor.dtype


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_file_is_an_error_and_nothing_worse(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / ONE
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(CheckpointError):
        found = tensors_of(path.parent)
        for name in found.entries:
            found.read(name)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "in this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "in this folder"),
        ({"weight_map": {"a": "other.safetensors"}}, "not there"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "in this folder"),
        ({"weight_map": [1]}, "weight_map"),
        ([], "names with values"),
    ],
)
def test_an_index_leads_nowhere_else(index, told, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=told):
        tensors_of(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"must be a file of safetensors, but is \['pytorch_model.bin'\] instead"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("name", [*RUNS_CODE, "quantization_config"])
def test_a_config_that_asks_to_run_code_is_refused(name):
    with pytest.raises(CheckpointError, match=f"`{name}` must be left out"):
        config_of(LLAMA | {name: {"AutoModel": "model.Model"}})


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "foo"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.type"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "olmoe", "clip_qkv": 8.0, "num_experts": 4, "num_experts_per_tok": 2}, "clip_qkv"),
    ],
)
def test_what_is_computed_otherwise_is_refused_by_name(setting, named):
    with pytest.raises(TriglotError, match=rf"^`{named}` must be .* instead\.$"):
        config_of(LLAMA | setting)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=4) | st.just("default"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), inner),
    max_leaves=4,
)
NAMES = sorted(
    {*LLAMA, "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types", "head_dim", "n_embd",
     "n_head", "d_model", "encoder_layers", "feed_forward_proj", "num_experts", "num_local_experts",
     "num_experts_per_tok", "activation_function", "norm_topk_prob", "rms_norm_eps", "tie_word_embeddings",
     "num_key_value_heads"}
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(NAMES), anything, max_size=8))
def test_any_config_is_a_model_or_an_error_of_ours(kind, values):
    try:
        _, config = config_of(LLAMA | values | {"model_type": kind})
    except TriglotError:
        return
    assert isinstance(config, ModelConfig)


def make(folder: Path, width: int, layers: int = 1) -> int:
    """A checkpoint of Llama; its bytes."""
    from triglot.interop import llama
    from triglot.interop.links import theirs_of

    values = LLAMA | {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    folder.mkdir()
    write_json(folder / "config.json", values)
    config = llama.read(values)
    write_tensors(folder, theirs_of(build_model(config), llama.links(config)))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path):
    make(tmp_path / "a", 16)
    found = tensors_of(tmp_path / "a")
    tensors = {name: found.read(name) for name in found.entries}
    tensors["model.norm.weight"] = torch.ones(15)
    tensors["model.odd"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "a" / ONE)
    told = r"lm_head.weight is missing; model.norm.weight is \[15\], not \[16\]; model.odd is unknown"
    with pytest.raises(CheckpointError, match=told):
        read_model(tmp_path / "a")


PEAK = """
import sys
from pathlib import Path
from triglot.interop.convert import read_model
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
read_model(Path(sys.argv[1]))
before = peak()
read_model(Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what a process held at most")
def test_a_checkpoint_takes_little_more_memory_than_its_weights(tmp_path):
    make(tmp_path / "small", 16)
    size = make(tmp_path / "large", 1024, layers=12)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    found = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert size > 500_000_000
    assert found <= 1.15 * size


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[" * 10**5, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        read_object(tmp_path / "config.json")
