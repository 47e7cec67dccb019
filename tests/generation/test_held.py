"""Keys and values are where they were written, whatever their width, also after there is more room."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.generation.held import LENGTH, Held, held_width, keep_rows


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 70), st.integers(1, 3), st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
def test_what_is_written_is_read(head_dim, kv_heads, places):
    held, width = Held(2, 3, kv_heads, head_dim, 100), held_width(head_dim)
    generator, expected = torch.Generator().manual_seed(0), torch.zeros(2, 2, 3, kv_heads, 100, width)
    for at in places:
        place = held.place(torch.full((3, 1), at))
        for layer in range(2):
            new = torch.randn(2, 3, kv_heads, width, generator=generator)
            expected[:, layer, :, :, at] = new
            held.write(layer, place, *new.flatten(1, 2))
    for layer in range(2):
        found = torch.stack(held.read(layer, held.length_for(max(places))))
        assert found.size(2) % LENGTH == 0
        length = min(found.size(2), 100)
        assert found[:, :, :length].equal(expected[:, layer, :, :, :length].flatten(1, 2))


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 8).flatmap(lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, rows - 1), max_size=12)))
)
def test_rows_are_kept_in_any_order_and_more_than_once(given_rows):
    rows, kept = given_rows
    x, chosen = torch.arange(2.0 * rows * 3).view(2, rows, 3), torch.tensor(kept, dtype=torch.long)
    expected = x.index_select(1, chosen)
    assert keep_rows(x, 1, chosen).equal(expected)
