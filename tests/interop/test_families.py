"""A checkpoint of transformers computes here what it computes there, and comes back as it was."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from triglot.decoding.beam import BeamSearch, beam_search  # noqa: E402
from triglot.decoding.rules import MinLength  # noqa: E402
from triglot.files import write_json  # noqa: E402
from triglot.interop.convert import family_for, read_model  # noqa: E402
from triglot.interop.links import theirs_of  # noqa: E402
from triglot.interop.tensors import read_object, tensors_of, write_tensors  # noqa: E402
from triglot.layers.masks import create_look_ahead_mask, create_padding_mask  # noqa: E402

VOCAB, LENGTH = 67, 24
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = LLAMA | {"num_experts_per_tok": 2}
PAIRS = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 10_000.0, **settings}}


LONGER = {"factor": 4.0, "original_max_position_embeddings": 16}
QWEN_MOE = {"num_experts": 5, "moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 2}
LAST, GATED = VOCAB - 1, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MARIAN = {
    "activation_function": "swish", "scale_embedding": True, "pad_token_id": LAST, "decoder_start_token_id": LAST,
    "eos_token_id": 0, "forced_eos_token_id": 0,
}  # fmt: skip
ONLY = {
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama", LLAMA),
    "llama-tied-biased": ("Llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", LLAMA | rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": ("Llama", LLAMA | rope(rope_type="dynamic", factor=4.0)),
    "llama3": ("Llama", LLAMA | rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **LONGER)),
    "llama-yarn": ("Llama", LLAMA | rope(rope_type="yarn", **LONGER)),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7}),
    "mistral-whole": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "mixtral": ("Mixtral", MOE | {"num_local_experts": 5}),
    "olmoe": ("Olmoe", MOE | {"num_experts": 5}),
    "qwen3_moe": ("Qwen3Moe", MOE | QWEN_MOE),
}  # fmt: skip
BOTH = {
    "marian": ("Marian", "MarianMTModel", PAIRS | MARIAN),
    "bart": ("Bart", "BartForConditionalGeneration", PAIRS),
    "t5": ("T5", "T5ForConditionalGeneration", T5),
    "t5-gated": ("T5", "T5ForConditionalGeneration", T5 | GATED),
}


def spread(model):
    """Weights large enough that every part of a model matters."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:  # sinusoids
                continue
            norm = weight.dim() == 1 and "bias" not in name
            weight.normal_(1.0 if norm else 0.0, 0.15)
            if name.endswith("embed_positions.weight"):
                weight[:2] = 0  # no token stands there
    return model.eval()


@pytest.fixture(params=ONLY)
def writer(request):
    name, settings = ONLY[request.param]
    config = getattr(transformers, f"{name}Config")(**settings)
    classes = [f"{name}LMHeadModel", f"{name}ForCausalLM"]
    return spread(next(getattr(transformers, one) for one in classes if hasattr(transformers, one))(config))


@pytest.fixture(params=BOTH)
def translator(request):
    name, kind, settings = BOTH[request.param]
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**settings))
    if request.param == "t5-gated":  # as released: tied only in what transformers 5 says
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    return spread(model)


@torch.no_grad()
def test_a_decoder_gives_the_same_logits(writer, tmp_path):
    writer.save_pretrained(tmp_path)
    ids = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    found = read_model(tmp_path).model(ids).logits
    torch.testing.assert_close(found, writer(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_decoder_continues_as_it_does(writer, tmp_path):
    writer.save_pretrained(tmp_path)
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = writer.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(read_model(tmp_path).model.generate(ids, 20, temperature=0.0), expected)


@torch.no_grad()
def test_a_translator_gives_the_same_logits(translator, tmp_path):
    translator.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.randint(3, VOCAB - 1, (3, length), generator=draw) for length in (LENGTH, 17))
    expected = translator(input_ids=source, decoder_input_ids=target).logits
    found = read_model(tmp_path).model(source, target, tgt_mask=create_look_ahead_mask(17)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def export(folder: Path, again: Path) -> None:
    """Out again, by the family that fits what was read."""
    model, config = read_model(folder)
    family, values = family_for(config)
    again.mkdir()
    ids = {name: id for name, id in read_object(folder / "config.json").items() if name.endswith("_token_id")}
    write_json(again / "config.json", values | ids)
    write_tensors(again, theirs_of(model, family.links(config)))


def goes_round(model, folder: Path) -> None:
    """In, out, and in again; transformers loads what came out as what it was, and says nothing."""
    model.save_pretrained(folder / "first")
    export(folder / "first", folder / "second")
    before, after = tensors_of(folder / "first"), tensors_of(folder / "second")
    assert after.entries.keys() == before.entries.keys()
    for name in after.entries:
        assert torch.equal(after.read(name), before.read(name)), name
    again, told = type(model).from_pretrained(folder / "second", output_loading_info=True)
    assert not any(told.values())
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    once, twice = (read_model(folder / name).model.state_dict() for name in ("first", "second"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_decoder_goes_out_as_it_came_in(writer, tmp_path):
    goes_round(writer, tmp_path)


def test_a_translator_goes_out_as_it_came_in(translator, tmp_path):
    goes_round(translator, tmp_path)


@torch.no_grad()
def test_a_translators_beam_of_four_finds_the_same(translator, tmp_path):
    translator.save_pretrained(tmp_path)
    sources = torch.randint(3, VOCAB - 1, (3, 11), generator=torch.Generator().manual_seed(1))
    start, limit = translator.config.decoder_start_token_id, 12
    expected = translator.generate(
        input_ids=sources, attention_mask=torch.ones_like(sources), num_beams=4, num_return_sequences=4,
        max_new_tokens=limit, min_new_tokens=limit, do_sample=False, length_penalty=1.0, early_stopping="never",
        bad_words_ids=None, forced_eos_token_id=None, forced_bos_token_id=None, no_repeat_ngram_size=0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=start, renormalize_logits=True,
    )  # fmt: skip
    model = read_model(tmp_path).model
    steps = model.start(sources, create_padding_mask(torch.ones_like(sources)), limit)
    first = steps.step(torch.full((3,), start))
    how = BeamSearch(beam=4, nbest=4, eos_ids=[2], rules=[MinLength([2], limit)])
    found = beam_search(first, steps, how, limit)
    assert [list(text.ids) for texts in found for text in texts] == expected[:, 1:].tolist()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
@torch.no_grad()
def test_routers_choose_the_same_experts(name, tmp_path):
    kind, settings = ONLY[name]
    theirs = spread(getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = theirs(ids, output_router_logits=True).router_logits
    routings = [routing for routing in read_model(tmp_path).model.run(ids).routing if routing is not None]
    assert len(routings) == len(logits) > 0
    for routing, values in zip(routings, logits, strict=True):
        chosen = routing.experts.flatten(0, -2)
        assert torch.equal(chosen.sort(-1).values, values.topk(chosen.size(-1)).indices.sort(-1).values)
