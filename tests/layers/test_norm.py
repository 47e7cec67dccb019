"""Norms and residual connections are what their names say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triglot.layers.norm import Residual, add, make_norm
from triglot.layers.rms_norm import inverse_rms

BATCH, LENGTH, D_MODEL = 2, 5, 11


@pytest.fixture
def x() -> torch.Tensor:
    return 3 + 2 * torch.randn(BATCH, LENGTH, D_MODEL)


def test_layer_norm_and_rms_norm_are_their_formulas(x):
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(make_norm("layer", D_MODEL, 1e-5)(x), expected)
    torch.testing.assert_close(
        make_norm("rms", D_MODEL, 1e-3)(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_norm_stands_before_the_sublayer_or_after_the_sum(norm, x):
    pre, post = (Residual(D_MODEL, 0.0, norm=norm, order=order) for order in ("pre", "post"))
    extra = object()
    plain = make_norm(norm, D_MODEL, 1e-5)
    assert pre(x, lambda h: (h.square(), extra))[1] is extra
    torch.testing.assert_close(pre(x, lambda h: (h.square(), None))[0], x + plain(x).square())
    torch.testing.assert_close(post(x, lambda h: (h.square(), None))[0], plain(x + x.square()))


def test_dropout_falls_on_the_sublayer_and_never_on_what_passes_by(x):
    residual = Residual(D_MODEL, 0.5, order="pre")
    assert torch.equal(residual(x, lambda h: (torch.zeros_like(h), None))[0], x)
    dropped = residual(x, lambda h: (torch.ones_like(h), None))[0] - x
    assert sorted({round(value, 4) for value in dropped.flatten().tolist()}) == [0.0, 2.0]
    torch.testing.assert_close(residual.eval()(x, lambda h: (torch.ones_like(h), None))[0], x + 1)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16])
def test_a_sum_is_torchs_to_the_bit_whatever_the_types_and_leaves_both_as_they_are(first, second):
    x, output = torch.randn(2, 3, 7, dtype=first), torch.randn(2, 3, 7, dtype=second)
    sums, gradients = [], []
    for summed in (add, torch.add):
        leaves = [part.clone().requires_grad_() for part in (x, output)]
        sums.append(summed(*leaves))
        sums[-1].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
        assert all(torch.equal(leaf, part) for leaf, part in zip(leaves, (x, output), strict=True))
    assert sums[0].dtype == sums[1].dtype
    assert torch.equal(*sums)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_is_torchs_gradients_included(dtype, scale):
    ours, theirs = make_norm("rms", 17, 1e-5).to(dtype), nn.RMSNorm(17, eps=1e-5).to(torch.float64)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(17))
        theirs.weight.copy_(ours.weight)
    x = (scale * torch.randn(3, 5, 17)).to(dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    grad = torch.randn(3, 5, 17).to(dtype)
    found, expected = ours(x), theirs(y)
    found.backward(grad)
    expected.backward(grad.double())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    for one, other in ((found, expected), (x.grad * scale, y.grad * scale), (ours.weight.grad, theirs.weight.grad)):
        torch.testing.assert_close(one.double(), other, atol=10 * tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 1500), st.lists(st.integers(0, 59), min_size=1, max_size=90))
def test_rms_norm_gives_a_row_the_same_bits_in_any_company(width, chosen):
    x = torch.randn(60, width, generator=torch.Generator().manual_seed(0))
    eps = torch.tensor(1e-5)
    assert inverse_rms(x[chosen], eps).equal(inverse_rms(x, eps)[chosen])
