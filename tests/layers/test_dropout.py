"""Dropout keeps the mean, drops as often as it says, and sends gradients where it sent values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.layers.dropout import LEVELS, Dropout, dropout, keep_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_mask_has_two_values_and_the_mean_is_one(rate, dtype):
    torch.manual_seed(1)
    mask = keep_mask(torch.empty(1009, 1013, dtype=dtype), rate).double()
    dropped = round(rate * LEVELS) / LEVELS
    assert (mask == 0).double().mean().item() == pytest.approx(dropped, abs=4e-3)
    kept = torch.tensor(1 / (1 - dropped), dtype=dtype).item()
    assert set(mask.unique().tolist()) == {0.0, kept}
    assert dropped == pytest.approx(rate, abs=0.5 / LEVELS)


def test_elements_are_dropped_independently_of_their_neighbours():
    """Eight elements share one draw: none of the pairs among them may be correlated."""
    torch.manual_seed(1)
    mask = (keep_mask(torch.empty(200_000, 8), 0.5) > 0).double()
    correlation = torch.corrcoef(mask.T) - torch.eye(8)
    assert correlation.abs().max() < 0.01
    following = torch.corrcoef(torch.stack([mask.flatten()[:-8], mask.flatten()[8:]]))[0, 1]
    assert following.abs() < 0.01


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=0, max_size=3), st.floats(0, 0.99))
def test_any_shape_is_kept(shape, rate):
    x = torch.ones(shape)
    assert dropout(x, rate, True).shape == x.shape


def test_gradients_go_where_values_went():
    x = torch.randn(31, 37, requires_grad=True)
    out = dropout(x, 0.4, True)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)


def test_the_seed_decides():
    x = torch.ones(31, 37)
    torch.manual_seed(5)
    first = dropout(x, 0.3, True)
    second = dropout(x, 0.3, True)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.3, True), first)
    assert not torch.equal(second, first)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero_and_nothing_is_drawn():
    x, before = torch.randn(5, 7), torch.get_rng_state()
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.0005, 0.0019, 0.002, 0.998, 0.999, 0.9999])
def test_rates_next_to_zero_and_one_are_neither(rate):
    torch.manual_seed(1)
    out = dropout(torch.ones(1009, 1013), rate, True).double()
    noise = 6 * math.sqrt(1 / LEVELS / out.numel())
    assert (out == 0).double().mean().item() == pytest.approx(rate, abs=0.5 / LEVELS + noise)
    assert 0 < (out == 0).sum() < out.numel()
    assert out.mean().item() == pytest.approx(1, abs=0.2)
