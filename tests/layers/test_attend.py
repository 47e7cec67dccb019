"""Attention without weights is attention with them, gradients included, in blocks or not."""

import pytest
import torch

from triglot.layers import attend as module
from triglot.layers.attend import attend
from triglot.layers.attention import attention_weights

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 11
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def plain(query, key, value, mask, causal):
    if causal:
        mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool).tril()
    return attention_weights(query, key, mask) @ value


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As attention has them: heads between, not contiguous."""
    shapes = [(BATCH, length, HEADS, WIDTH) for length in (queries, keys, keys)]
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def some_mask() -> torch.Tensor:
    mask = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.6
    mask[0, :, 2] = False  # one query may attend to nothing
    return mask


MASKS = {
    "none": lambda: None,
    "of keys": lambda: torch.tensor([[True] * 7, [True] * 3 + [False] * 4])[:, None, None],
    "of each query": some_mask,
    "of each head": lambda: torch.rand(BATCH, HEADS, QUERIES, KEYS) < 0.7,
    "of rank 2": lambda: torch.rand(QUERIES, KEYS) < 0.7,
    "of one for all": lambda: torch.zeros(1, 1, 1, KEYS, dtype=torch.bool),
}


def assert_alike(query, key, value, mask, causal):
    dtype = query.dtype
    wide = [one.detach().double().requires_grad_() for one in (query, key, value)]
    expected, found = plain(*wide, mask, causal), attend(query, key, value, mask, causal=causal)
    assert found.dtype == dtype
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    grad = torch.randn(expected.shape).to(dtype)
    expected.backward(grad.double())
    found.backward(grad)
    for ours, theirs in zip((query, key, value), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=4 * tolerance["atol"], rtol=tolerance["rtol"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", MASKS)
def test_is_attention_with_weights_under_any_mask(mask, dtype):
    torch.manual_seed(1)
    assert_alike(*inputs(QUERIES, KEYS, dtype), MASKS[mask](), False)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 3, 4, 11, 12, 13])
def test_is_attention_with_weights_under_the_look_ahead_mask_whole_blocks_or_not(length, dtype, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(module, "BLOCK", 4)
    assert_alike(*inputs(length, length, dtype), None, True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [module.LONG_FOR_GRADIENT, module.LONG, module.BLOCK + module.LONG + 1])
def test_is_attention_with_weights_at_lengths_where_bf16_rows_need_no_copies(length, causal):
    torch.manual_seed(1)
    mask = None if causal else torch.rand(BATCH, 1, length, length) < 0.7
    assert_alike(*inputs(length, length, torch.bfloat16), mask, causal)


def test_blocks_change_no_bit_of_an_earlier_token(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    query, key, value = inputs(11, 11, torch.float32)
    before = attend(query, key, value, None, causal=True)
    with torch.no_grad():
        for one in (query, key, value):
            one[:, :, 6:] += 1.0
    assert torch.equal(attend(query, key, value, None, causal=True)[:, :, :6], before[:, :, :6])


def test_a_query_that_may_attend_to_nothing_gets_zeros_and_sends_no_gradient():
    query, key, value = inputs(QUERIES, KEYS, torch.float32)
    out = attend(query, key, value, some_mask(), causal=False)
    assert not out[0, :, 2].any()
    out.sum().backward()
    assert not query.grad[0, :, 2].any()
    assert all(one.grad.isfinite().all() for one in (query, key, value))


def test_under_autocast_a_cache_in_full_precision_is_read():
    query, key, value = inputs(QUERIES, KEYS, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(query.bfloat16(), key, value, None, causal=False).dtype == torch.bfloat16
