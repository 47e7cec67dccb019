"""Our kernel attends as PyTorch's softmax does, and a row's bits are its own.

Without a GPU Triton interprets it, in types that its interpreter knows.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

from triglot.generation.flash_decoding import BLOCK, SPLIT, attend_to_held  # noqa: E402  # which reads the variable

DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def drawn(ends, kv_heads, group, capacity, head_dim, dtype):
    """What is projected, as parts of one tensor, and what is held."""
    rows = len(ends)
    parts = torch.randn(rows, (group + 2) * kv_heads, head_dim, dtype=dtype, device=DEVICE)
    held = torch.randn(2, rows, kv_heads, capacity, head_dim, dtype=dtype, device=DEVICE)
    return parts.split([group * kv_heads, kv_heads, kv_heads], 1), held, torch.tensor(ends, device=DEVICE)


def expected(parts, held, ends, scale, window):
    query, key, value = parts
    keys, values = held.clone()
    row, place = torch.arange(len(ends), device=DEVICE), torch.arange(keys.size(2), device=DEVICE)[None]
    keys[row, :, ends], values[row, :, ends] = key, value
    hidden = place > ends[:, None]
    if window is not None:
        hidden |= place <= ends[:, None] - window
    query = query.unflatten(1, (keys.size(1), -1)).double()
    scores = (query @ keys.double().mT * scale).masked_fill(hidden[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values.double()).flatten(1, 2), keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_it_attends_to_what_is_held_and_to_the_token_itself(dtype, data):
    capacity = data.draw(st.sampled_from([1, BLOCK, BLOCK + 1, SPLIT, SPLIT + 1, 2 * SPLIT + 7]))
    ends = data.draw(st.lists(st.integers(0, capacity - 1), min_size=1, max_size=3))
    window = data.draw(st.none() | st.integers(1, capacity))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3, 17]))
    parts, held, ends = drawn(ends, kv_heads, group, capacity, data.draw(st.sampled_from([10, 64])), dtype)
    output, keys, values = expected(parts, held, ends, 0.2, window)
    found = attend_to_held(*parts, *held, ends, 0.2, window)
    torch.testing.assert_close(found.double(), output, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert held[0].equal(keys)
    assert held[1].equal(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_room(dtype):
    parts, held, ends = drawn([5, SPLIT - 1, SPLIT + 3, 2 * SPLIT], 2, 2, 2 * SPLIT + 1, 24, dtype)
    together = attend_to_held(*parts, *held.clone(), ends, 0.3)
    larger = torch.cat([held, torch.full_like(held, torch.nan)], 3)
    assert attend_to_held(*parts, *larger, ends, 0.3).equal(together)
    for row, end in enumerate(ends.tolist()):
        alone = [part[row, None] for part in parts]
        room = held[:, row, None, :, : end + 1].contiguous()
        assert attend_to_held(*alone, *room, ends[row, None], 0.3).equal(together[row, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [SPLIT, SPLIT + 1])
def test_rows_of_which_nothing_is_held_get_zeros_and_change_no_others(dtype, capacity):
    parts, held, ends = drawn([5, capacity - 1, 7, 0], 2, 3, capacity, 24, dtype)
    texts = held[:, :2].contiguous()
    expected = attend_to_held(*(part[:2] for part in parts), *texts.clone(), ends[:2], 0.3)
    found = attend_to_held(*parts, *texts, ends, 0.3)
    assert found[:2].equal(expected)
    assert found[2:].eq(0).all()
