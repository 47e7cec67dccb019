"""Compiled blocks are the blocks."""

import copy

import pytest
import torch

from tests.conftest import WARNS_OF_ITSELF
from triglot.config import BlockOptions, ExpertOptions, ModelConfig
from triglot.data.batch import LanguageBatch, PairBatch
from triglot.models.factory import build_model
from triglot.objective import Objective
from triglot.training.compiling import compile_blocks

VOCAB, LENGTH = 13, 7
pytestmark = [pytest.mark.usefixtures("compiler"), *WARNS_OF_ITSELF]


def make(kind, **options):
    torch.manual_seed(1)
    config = ModelConfig(
        kind=kind,
        d_model=8,
        num_heads=2,
        num_layers=2,
        d_ff=11,
        max_seq_length=19,
        dropout=0.0,
        vocab_size=VOCAB,
        src_vocab_size=VOCAB,
        options=BlockOptions(norm_order="pre", **options),
    )
    return build_model(config)


def batch_of(kind):
    ids = torch.randint(3, VOCAB, (3, LENGTH + 1))
    if kind == "decoder_only":
        return LanguageBatch(ids[:, :-1], ids[:, 1:])
    return PairBatch(torch.randint(3, VOCAB, (3, 5)), ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("decoder_only", {"norm": "rms", "positions": "rotary", "activation": "swiglu"}),
        ("decoder_only", {"experts": ExpertOptions(num_experts=3)}),
        ("encoder_decoder", {"activation": "gelu"}),
    ],
    ids=["today's", "experts", "pairs"],
)
def test_losses_and_gradients_are_those_of_the_plain_blocks(kind, options):
    torch.compiler.reset()
    plain = make(kind, **options)
    compiled, batch = copy.deepcopy(plain), batch_of(kind)
    compile_blocks(compiled, backend="aot_eager")
    results = []
    for model in (plain, compiled):
        totals = Objective(model).train()(batch)
        totals.loss.backward()
        results.append([totals.loss.detach(), *(weight.grad for weight in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_evaluation_is_not_compiled():
    model, calls = make("decoder_only"), []

    def backend(graph, _):
        calls.append(graph)
        return graph

    torch.compiler.reset()
    compile_blocks(model, backend=backend)
    with torch.no_grad():
        Objective(model).eval()(batch_of("decoder_only"))
        assert not calls
        Objective(model).train()(batch_of("decoder_only"))
        assert calls
