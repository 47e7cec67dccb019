"""Attention of a prepared model is PyTorch's, and what is hidden behind a text's own keys changes no bit of it."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.generation.attention import KEYS, attend, products
from triglot.generation.held import LENGTH
from triglot.layers.attend import FORBIDDEN
from triglot.layers.vectors import round_up

lengths = st.integers(1, 4 * KEYS)


def made(length: int, heads: int = 3, queries: int = 4, width: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    query, keys, values = (
        torch.randn(2 * heads, some, width, generator=generator) for some in (queries, length, length)
    )
    return query / 4, keys, values


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_it_is_softmax_of_scores_times_values(length):
    query, keys, values = made(length)
    bias = torch.randn(2, 1, 1, length, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(query, keys, values, bias.repeat_interleave(3, 0)[:, 0], scale=1.0)
    torch.testing.assert_close(attend(query, keys, values, bias), expected)


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(0, 60))
def test_hidden_keys_change_no_bit(length, more):
    own = round_up(length, LENGTH)
    query, keys, values = made(own + more * LENGTH)
    bias = (torch.arange(keys.size(1)) >= length)[None, None, None] * FORBIDDEN
    alone = attend(query, keys[:, :own], values[:, :own], bias[..., :own])
    assert attend(query, keys, values, bias).equal(alone)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.sampled_from((32, 96, 128, 192, 256)), st.integers(1, 40), st.integers(2, 8))
def test_a_product_alone_has_the_bits_that_it_has_beside_others(rows, inner, sixteens, pairs):
    generator = torch.Generator().manual_seed(inner + sixteens)
    left, right = (torch.randn(pairs, size, inner, generator=generator) for size in (rows, 16 * sixteens))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = products(left, right.mT)
        alone = [products(left[pair : pair + 1], right[pair : pair + 1].mT) for pair in range(pairs)]
    finally:
        torch.set_num_threads(threads)
    assert together.equal(torch.cat(alone))
