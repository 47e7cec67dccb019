"""The feed-forward is its formula."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from triglot.layers.activations import Activation, activate
from triglot.layers.dropout import dropout
from triglot.layers.feed_forward import PointwiseFeedForward

BATCH, LENGTH, D_MODEL, D_FF = 2, 5, 11, 17
activations = pytest.mark.parametrize("activation", get_args(Activation))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())


@pytest.mark.parametrize("bias", [True, False])
@activations
def test_is_its_formula(activation, bias):
    layer = PointwiseFeedForward(D_MODEL, D_FF, activation=activation, bias=bias).eval()
    x = torch.randn(BATCH, LENGTH, D_MODEL)
    inner = x @ layer.inner.weight.T + (layer.inner.bias if bias else 0)
    match activation:
        case "relu":
            hidden = torch.where(inner > 0, inner, 0)
        case "gelu":
            hidden = inner * torch.distributions.Normal(0, 1).cdf(inner)
        case "gelu_tanh":
            hidden = gelu_tanh(inner)
        case "silu":
            hidden = inner / (1 + (-inner).exp())
        case "swiglu":
            gate, up = inner[..., :D_FF], inner[..., D_FF:]
            hidden = gate / (1 + (-gate).exp()) * up
        case "geglu_tanh":
            hidden = gelu_tanh(inner[..., :D_FF]) * inner[..., D_FF:]
    expected = hidden @ layer.outer.weight.T + (layer.outer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=0)
    assert (layer.inner.bias is None) == (layer.outer.bias is None) == (not bias)


def test_dropout_lies_between_the_two_projections_and_acts_in_training_only():
    layer = PointwiseFeedForward(D_MODEL, D_FF, dropout=0.5)
    x = torch.randn(BATCH, LENGTH, D_MODEL)
    torch.manual_seed(1)
    result = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(result, layer.outer(dropout(F.relu(layer.inner(x)), 0.5, True)))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@activations
@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_the_formula_in_every_precision(activation, bias, precision):
    layer = PointwiseFeedForward(D_MODEL, D_FF, dropout=0.0, activation=activation, bias=bias)
    x = torch.randn(BATCH, LENGTH, D_MODEL)
    if precision == torch.float64:
        layer, x = layer.double(), x.double()
    found, expected = [], []
    for grads, run in ((found, layer), (expected, lambda x: layer.outer(activate(layer.inner(x), activation)))):
        layer.zero_grad()
        start = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            result = run(start)
        result.float().square().sum().backward()
        grads += [result.detach(), start.grad, *(weight.grad for weight in layer.parameters())]
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain)


def test_every_position_is_computed_alike():
    layer = PointwiseFeedForward(D_MODEL, D_FF).eval()
    x = torch.randn(BATCH, LENGTH, D_MODEL)
    torch.testing.assert_close(layer(x.flip(1)), layer(x).flip(1), atol=2e-6, rtol=0)


@pytest.mark.usefixtures("without_shape_checks")
def test_refuses_what_it_can_not_be_made_of():
    for name, arguments in {"d_model": (0, D_FF), "d_ff": (D_MODEL, 0)}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but is 0 instead"):
            PointwiseFeedForward(*arguments)
    with pytest.raises(ValueError, match="`activation` must be one of relu, .*, but is 'other' instead"):
        PointwiseFeedForward(D_MODEL, D_FF, activation="other")


def test_gating_halves_the_width():
    assert activate(torch.randn(3, 2 * D_FF), "swiglu").shape == (3, D_FF)
