"""Attention of a prepared model is PyTorch's, and what is hidden behind a text's own keys changes no bit of it."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.generation.attention import KEYS, QUERIES, attend
from triglot.generation.held import OWN
from triglot.layers.attend import FORBIDDEN
from triglot.layers.packed import multiplies_tiles
from triglot.layers.vectors import round_up

lengths = st.integers(1, 4 * KEYS)
types = st.sampled_from(list(OWN) if multiplies_tiles() else [torch.float32])
"""In bf16 nothing is promised where a processor has no tiles, and nothing is multiplied so."""


def made(
    length: int, dtype: torch.dtype, heads: int = 6, queries: int = QUERIES, width: int = 32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = [(heads, queries, width), (heads, length, width), (heads, length, width)]
    query, keys, values = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return [query / 4, keys, values]


@settings(deadline=None, max_examples=50)
@given(lengths, st.sampled_from(list(OWN)))
def test_it_is_softmax_of_scores_times_values(length, dtype):
    query, keys, values = made(length, dtype)
    bias = torch.randn(2, 1, 1, length, generator=torch.Generator().manual_seed(0))
    whole = [part.float() for part in (query, keys, values)]
    expected = F.scaled_dot_product_attention(*whole, bias.repeat_interleave(3, 0)[:, 0], scale=1.0)
    found = attend(query, keys, values, bias)
    assert found.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected)
    else:
        assert (found.float() - expected).norm() / expected.norm() < 0.02


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(0, 60), types)
def test_hidden_keys_change_no_bit(length, more, dtype):
    own = round_up(length, OWN[dtype])
    query, keys, values = made(own + more * OWN[dtype], dtype)
    bias = (torch.arange(keys.size(1)) >= length)[None, None, None] * FORBIDDEN
    alone = attend(query, keys[:, :own], values[:, :own], bias[..., :own])
    assert attend(query, keys, values, bias).equal(alone)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(QUERIES, 12), st.sampled_from([32, 40, 64, 128]), st.integers(1, 200), types)
def test_texts_in_company_change_no_bit(length, queries, width, alone, dtype):
    query, keys, values = made(16 * length, dtype, 200, queries, width)
    bias = torch.zeros(1, 1, 1, 16 * length)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    together = attend(query, keys, values, bias)
    apart = attend(query[:alone], keys[:alone], values[:alone], bias)
    torch.set_num_threads(threads)
    assert apart.equal(together[:alone])
