"""Compiled models compute what they compute uncompiled: as a traced graph always, as machine code in slow runs."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import WARNS_OF_ITSELF
from triglot.config import BlockOptions, ExpertOptions
from triglot.layers.masks import create_masks
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer

pytestmark = WARNS_OF_ITSELF
MODEL = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(
    params=["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compile])],
)
def backend(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue("compiler" if request.param == "inductor" else "without_shape_checks")
    torch.compiler.reset()
    return request.param


@pytest.mark.parametrize("num_experts", [0, 3])
def test_a_compiled_language_model_gives_the_same_logits_and_gradients(num_experts, backend):
    experts = ExpertOptions(num_experts=num_experts) if num_experts else None
    model = DecoderLLM(29, 22, 11, 1, 17, 53, options=BlockOptions(positions="learned", experts=experts)).eval()
    ids = torch.randint(29, (2, 5))
    results = []
    for run in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        out = run(ids, ids)
        out.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((out.logits.detach(), out.loss.detach(), gradients))
    torch.testing.assert_close(*results, **MODEL)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("num_experts", [0, 3])
def test_a_compiled_transformer_gives_the_same_logits(num_experts, compiler):
    experts = ExpertOptions(num_experts=num_experts) if num_experts else None
    model = Transformer(23, 29, 22, 1, 11, 17, 53, options=BlockOptions(experts=experts)).eval()
    src, tgt = torch.randint(1, 23, (2, 7)), torch.randint(1, 29, (2, 5))
    src[0, 4:], tgt[1, 3:] = 0, 0
    masks = create_masks(src, tgt)
    with torch.no_grad():
        expected = model(src, tgt, *masks, need_weights=False).logits
        result = torch.compile(model)(src, tgt, *masks, need_weights=False).logits
    torch.testing.assert_close(result, expected, **MODEL)


IN_ONE_PIECE = """
import torch
from triglot.layers.masks import create_masks
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
ids = torch.randint(1, 23, (2, 5))
shape = dict(backend="eager", fullgraph=True)
torch.compile(DecoderLLM(29, 22, 11, 1, 17, 53), **shape)(ids, ids).loss.backward()
torch.compile(Transformer(23, 29, 22, 1, 11, 17, 53), **shape)(ids, ids, *create_masks(ids, ids))
"""


def test_dense_models_are_traced_in_one_piece():
    """In a process of its own: the shape types' hook, if it is on, wraps functions in what cannot be traced."""
    subprocess.run([sys.executable, "-c", IN_ONE_PIECE], check=True)
