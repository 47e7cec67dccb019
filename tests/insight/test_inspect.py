"""What `inspect` tells is what a real pass does, and costs are torch's own count."""

import io

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from triglot.config import BlockOptions, ModelConfig
from triglot.errors import ConfigError
from triglot.insight.inspect import look, random_pass, show
from triglot.models.factory import build_model

BATCH, LENGTH, SRC_VOCAB, VOCAB, HEADS, D_MODEL, D_FF, LAYERS = 2, 7, 101, 103, 4, 32, 53, 3
KINDS = ("encoder_decoder", "decoder_only")


def model_of(kind, options, layers=LAYERS):
    vocab = SRC_VOCAB if options.tie_embeddings else VOCAB
    config = ModelConfig(
        kind=kind, d_model=D_MODEL, num_heads=HEADS, num_layers=layers, d_ff=D_FF, max_seq_length=61,
        vocab_size=vocab, src_vocab_size=SRC_VOCAB, options=options,
    )  # fmt: skip
    return build_model(config).eval()


def find(part, path):
    for name in path.split("."):
        part = next(below for below in part.parts if below.name == name)
    return part


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind, options):
    model = model_of(kind, options)
    found = look(model, BATCH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        random_pass(model, BATCH, LENGTH)(need_weights=True)
    assert found.tree.flops == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_costs_twice_the_forward(kind):
    model = model_of(kind, BlockOptions(positions="rotary", num_kv_heads=2))
    found = look(model, BATCH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        random_pass(model, BATCH, LENGTH)(need_weights=True).sum().backward()
    assert 3 * found.tree.flops == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_flops_per_token_add_up_to_the_batch(kind, options):
    found = look(model_of(kind, options), BATCH, LENGTH)
    tokens = {"token": LENGTH, "source token": LENGTH, "target token": LENGTH + 1}
    assert sum(BATCH * tokens[name] * flops for name, flops in found.costs.flops.items()) == pytest.approx(
        found.tree.flops
    )


@pytest.mark.parametrize("kind", KINDS)
def test_cached_bytes_per_token_are_what_the_cache_holds(kind, options):
    model = model_of(kind, options)
    cached = look(model, BATCH, LENGTH).costs.cached
    ids = torch.randint(1, SRC_VOCAB, (BATCH, LENGTH))
    if kind == "decoder_only":
        _, steps = model.start(ids, torch.full((BATCH,), LENGTH), 5)
        assert cached["token"] * BATCH * (LENGTH + 5) == steps.cache.keys.nbytes + steps.cache.values.nbytes
        return
    steps = model.start(ids, None, 5)
    steps.step(ids[:, 0])
    assert cached["target token"] * BATCH * 5 == steps.cache.keys.nbytes + steps.cache.values.nbytes
    memory = sum(tensor.nbytes for layer in steps.cache.memory for tensor in layer.held)
    assert cached["source token"] * BATCH * LENGTH == memory


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_the_parts_are_those_of_the_model(kind, options):
    model = model_of(kind, options)
    found = look(model, BATCH, LENGTH)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    untied = sum(part.parameters for part in found.tree.parts)
    assert untied >= found.parameters
    assert options.tie_embeddings or untied == found.parameters
    assert (found.active < found.parameters) == (options.experts is not None)


def test_axes_have_the_sizes_that_their_names_have_in_the_config():
    model = model_of("encoder_decoder", BlockOptions(num_kv_heads=2, activation="swiglu"))
    tree = look(model, BATCH, LENGTH).tree
    sizes = {
        "batch": BATCH, "source": LENGTH, "target": LENGTH + 1, "d_model": D_MODEL, "heads": HEADS, "kv_heads": 2,
        "head_dim": D_MODEL // HEADS, "d_ff": 2 * D_FF, "width": D_MODEL, "kv_width": 2 * D_MODEL // HEADS,
        "vocab": VOCAB,
    }  # fmt: skip
    seen, parts = set(), [tree]
    while parts:
        part = parts.pop()
        parts += part.parts
        for shape in part.shapes:
            assert all(sizes[name] == size for name, size in shape.axes), (part.name, shape)
            seen |= {name for name, _ in shape.axes}
    assert seen == set(sizes)


def test_every_attention_tells_scores_of_queries_by_keys():
    tree = look(model_of("encoder_decoder", BlockOptions()), BATCH, LENGTH).tree
    for path, axes in (
        ("encoder.layers.0.self_attention", f"[batch {BATCH}, heads {HEADS}, source {LENGTH}, source {LENGTH}]"),
        (
            "decoder.layers.1.self_attention",
            f"[batch {BATCH}, heads {HEADS}, target {LENGTH + 1}, target {LENGTH + 1}]",
        ),
        ("decoder.layers.2.cross_attention", f"[batch {BATCH}, heads {HEADS}, target {LENGTH + 1}, source {LENGTH}]"),
    ):
        assert [str(shape) for shape in find(tree, path).shapes if shape.what == "scores, weights"] == [axes]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_afterwards_as_it_was(kind, options):
    model = model_of(kind, options)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    first = random_pass(model, BATCH, LENGTH)(need_weights=False)
    look(model, BATCH, LENGTH)
    assert torch.equal(first, random_pass(model, BATCH, LENGTH)(need_weights=False))
    assert torch.equal(state, torch.get_rng_state())
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name])
        assert not module.training
        assert not module._forward_hooks


def test_more_layers_keep_more_for_the_backward_pass():
    few, many = (look(model_of("decoder_only", BlockOptions(), layers), BATCH, LENGTH).costs.kept for layers in (1, 3))
    assert few < many < 3 * few


@pytest.mark.parametrize("width", [60, 100, 140])
def test_prints_totals_and_like_layers_once(width):
    found = look(model_of("decoder_only", BlockOptions()), BATCH, LENGTH)
    console = Console(file=io.StringIO(), width=width)
    show(found, "[bold]a run", console)
    text = console.file.getvalue()
    assert f"Parameters: {found.parameters:,}" in text
    assert text.count("as 0") == LAYERS - 1
    assert "[bold]a run" in text  # a name is no markup


@pytest.mark.parametrize(("batch", "length", "name"), [(0, 7, "batch"), (2, 0, "length"), (2, 62, "length")])
def test_refuses_sizes_that_the_model_does_not_have(batch, length, name):
    with pytest.raises(ConfigError, match=f"`{name}` must be"):
        look(model_of("decoder_only", BlockOptions()), batch, length)
