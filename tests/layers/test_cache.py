"""A cache holds, for every row, what was written to it, in order: a list of lists is the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.layers.attention import MultiHeadAttention
from triglot.layers.cache import Cache, MemoryCache
from triglot.layers.positions import RotaryPositions

LAYERS, KV_HEADS, HEAD_DIM, CAPACITY = 2, 3, 5, 31

prompts = st.lists(st.integers(1, 7), min_size=1, max_size=5)
moves = st.lists(st.one_of(st.integers(1, 2), st.lists(st.integers(0, 4), min_size=1, max_size=5)), max_size=7)


def make_cache(rows: int, **options: bool) -> Cache:
    return Cache(LAYERS, rows, KV_HEADS, CAPACITY, HEAD_DIM, dtype=torch.float32, device=torch.device("cpu"), **options)


@settings(deadline=None, max_examples=40)
@given(prompts, moves)
def test_any_sequence_of_appends_and_selects_leaves_each_row_with_its_own_past(lengths, moves):
    cache, width = make_cache(len(lengths)), max(lengths)

    def written(num_new: int, lengths: list[int] | None = None) -> None:
        """Write to every layer; check what comes back against the list of what each row has seen."""
        rows, mask, positions = len(past), cache.mask(num_new), cache.positions(num_new)
        new = torch.randn(LAYERS, 2, rows, KV_HEADS, num_new, HEAD_DIM)
        for row in range(rows):
            past[row] = [*past[row], *new[:, :, row].unbind(-2)]
        for layer in range(LAYERS):
            held = cache.layers[layer].append(*new[layer])
            for row in range(rows):
                for query in range(num_new):
                    seen = len(past[row]) - num_new + query + 1
                    assert positions[row, query] == seen - 1
                    assert mask[row, 0, query].nonzero().flatten().tolist() == list(range(seen))
                    last = cache.mask(num_new, window=3)[row, 0, query].nonzero().flatten().tolist()
                    assert last == list(range(seen))[-3:]
                    for part in range(2):
                        expected = torch.stack([token[layer, part] for token in past[row][:seen]], -2)
                        assert torch.equal(held[part][row, :, mask[row, 0, query]], expected)
        cache.advance(num_new, None if lengths is None else torch.tensor(lengths))
        if lengths is not None:
            past[:] = [tokens[:length] for tokens, length in zip(past, lengths, strict=True)]

    past: list[list[torch.Tensor]] = [[] for _ in lengths]
    written(width, lengths)
    for move in moves:
        if isinstance(move, int):
            written(move)
        else:
            rows = [row % len(past) for row in move]
            cache.select(torch.tensor(rows))
            past = [list(past[row]) for row in rows]
    assert cache.lengths.tolist() == [len(tokens) for tokens in past]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rotary", [True, False])
def test_attention_with_a_cache_is_attention_over_the_whole(num_kv_heads, rotary):
    layer = MultiHeadAttention(40, 4, num_kv_heads=num_kv_heads).eval()
    table = RotaryPositions(10, 53)
    x = torch.randn(3, 7, 40)

    def rotation(positions: torch.Tensor):
        return table(positions) if rotary else None

    full = layer(x, x, x, causal=True, rotation=rotation(torch.arange(7)[None]))
    cache = Cache(1, 3, num_kv_heads, 7, 10, dtype=x.dtype, device=x.device)
    outputs = []
    for start, end in ((0, 3), (3, 4), (4, 6), (6, 7)):
        part, new = x[:, start:end], end - start
        mask, turn = cache.mask(new), rotation(cache.positions(new))
        result = layer(part, part, part, mask, rotation=turn, cache=cache.layers[0])
        torch.testing.assert_close(result.weights, full.weights[:, :, start:end, :end], atol=2e-6, rtol=0)
        outputs.append(result.output)
        cache.advance(new)
    torch.testing.assert_close(torch.cat(outputs, 1), full.output, atol=2e-6, rtol=0)


def test_a_memory_is_projected_once_and_its_rows_follow_a_selection():
    layer, memory = MultiHeadAttention(33, 3).eval(), torch.randn(3, 7, 33)
    cache = make_cache(3, memory=True)
    [held, _] = cache.memory
    assert isinstance(held, MemoryCache)
    query = torch.randn(3, 1, 33)
    expected = layer(query, memory, memory).output
    assert torch.equal(layer(query, memory, memory, cache=held).output, expected)
    nothing = torch.full_like(memory, torch.nan)  # it is not looked at again
    assert torch.equal(layer(query, nothing, nothing, cache=held).output, expected)
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    result = layer(query[rows], nothing[rows], nothing[rows], cache=held).output
    torch.testing.assert_close(result, expected[rows], atol=2e-6, rtol=0)
