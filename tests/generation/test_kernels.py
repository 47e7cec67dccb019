"""Kernels in C++ compute what PyTorch's operations do, and give a row the same bits in any company."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from triglot.decoding.sampling import BLOCK, of_blocks
from triglot.errors import ConfigError
from triglot.generation import kernels
from triglot.generation.paged import LANES, New, Pages
from triglot.generation.powers import of_blocks_by_kernel
from triglot.generation.residual import NormKernel
from triglot.layers.attend import FORBIDDEN

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler here")
HALF = torch.finfo(torch.bfloat16).eps / 2
"""What rounding to bf16 may change."""
TYPES = [torch.float32, torch.bfloat16]
SIZES = [(4, 4, 32), (6, 2, 7), (2, 1, 40)]
"""Heads, heads of keys, numbers of a head: few sizes, since each is compiled."""
few = settings(deadline=None, max_examples=30)


def made(sentences: int, hypotheses: int, pages: int, size: tuple[int, int, int], dtype: torch.dtype, seed: int):
    """Pages, queries, what is new, and a bias that shows each hypothesis some places, its own among them."""
    heads, kv_heads, head_dim = size
    draw = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=draw).to(dtype).float()

    held = normal(2, 3, sentences, kv_heads, pages * LANES, head_dim)
    rows = sentences * hypotheses
    query, key = normal(rows, heads + kv_heads, head_dim).split([heads, kv_heads], 1)  # side by side, as in a step
    value = normal(rows, kv_heads, head_dim)
    places = torch.stack([torch.randperm(pages * LANES, generator=draw)[:hypotheses] for _ in range(sentences)])
    shown = torch.rand(sentences, hypotheses, pages, 1, generator=draw) < 0.7  # whole pages are hidden, too
    shown = shown & (torch.rand(sentences, hypotheses, pages, LANES, generator=draw) < 0.7)
    shown = shown.flatten(2).scatter(2, places[..., None], True)
    return held, query, New(key, value, places), torch.where(shown, 0.0, FORBIDDEN)[:, None]


def by_torch(held, query, new, bias, layer):
    """The same, as it is defined."""
    (sentences, hypotheses), (_, heads, head_dim) = new.places.shape, query.shape
    held = held[:, layer].clone()
    for row, (key, value) in enumerate(zip(new.key, new.value, strict=True)):
        sentence, hypothesis = divmod(row, hypotheses)
        held[0, sentence, :, new.places[sentence, hypothesis]] = key
        held[1, sentence, :, new.places[sentence, hypothesis]] = value
    keys, values = held.repeat_interleave(heads // held.size(2), 2)
    query = query.view(sentences, hypotheses, heads, head_dim).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query, keys, values, bias.expand(-1, heads, -1, -1), scale=1.0)
    return mixed.transpose(1, 2).reshape(len(new.key), -1)


shapes = (
    st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 4), st.sampled_from(SIZES), st.sampled_from(TYPES),
    st.integers(0, 999),
)  # fmt: skip


@few
@given(*shapes, st.booleans())
def test_attention_to_pages_is_attention(sentences, hypotheses, pages, size, dtype, seed, by_head):
    held, query, new, bias = made(sentences, hypotheses, pages, size, dtype, seed)
    if by_head:
        bias = bias.mT.contiguous().mT + torch.randn(1, size[0], 1, 1)  # in another order in memory
    expected, paged = by_torch(held, query, new, bias, 2), Pages.of(held, size[2], dtype)
    for written in TYPES:
        found = paged.attend(2, query, bias, written, new)
        exact = written == torch.float32
        torch.testing.assert_close(found.float(), expected, rtol=1e-5 if exact else HALF, atol=1e-5)
    again = paged.attend(2, query, bias, torch.float32)  # of what was written
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@few
@given(*shapes, st.data())
def test_a_sentence_attends_to_its_pages_in_any_company(sentences, hypotheses, pages, size, dtype, seed, data):
    held, query, new, bias = made(sentences, hypotheses, pages, size, dtype, seed)
    together = Pages.of(held, size[2], dtype).attend(1, query, bias, torch.float32, new)
    kept = data.draw(st.permutations(range(sentences)))[: data.draw(st.integers(1, sentences))]
    paged, rows = Pages.of(held, size[2], dtype), torch.arange(sentences * hypotheses).view(sentences, -1)[kept]
    paged.keep(torch.tensor(kept))
    some = New(new.key[rows.flatten()], new.value[rows.flatten()], new.places[kept])
    more = F.pad(bias[kept], (0, data.draw(st.integers(0, 2)) * LANES), value=FORBIDDEN)
    paged.length_for(more.size(3) - 1)
    assert paged.attend(1, query[rows.flatten()], more, torch.float32, some).equal(together[rows.flatten()])


def test_what_is_far_below_weighs_nothing_and_what_is_no_number_stays_none():
    held, query, _, bias = made(1, 1, 1, SIZES[0], torch.float32, 0)
    bias[..., 1:], bias[..., 0] = -81.0, 0.0
    held[:, 2] = 0  # scores are what is added to them
    held[1, 2, :, :, 0], query[:] = 1.0, 0.0
    paged = Pages.of(held, SIZES[0][2], torch.float32)
    assert paged.attend(2, query, bias, torch.float32).eq(1).all()
    query[0, 0, 0] = math.nan
    paged = Pages.of(torch.ones_like(held), SIZES[0][2], torch.float32)
    found = paged.attend(2, query, bias, torch.float32).view(1, SIZES[0][0], -1)
    assert found[0, 0].isnan().all()
    assert not found[0, 1:].isnan().any()


@few
@given(st.integers(1, 9), st.sampled_from([16, 128]), st.sampled_from(TYPES), st.sampled_from(TYPES),
       st.floats(1e-3, 1e3))  # fmt: skip
def test_norms_are_layer_norm(rows, width, of_added, dtype, scale):
    draw = torch.Generator().manual_seed(rows)
    x, added = torch.randn(2, rows, width, generator=draw) * scale
    norm, added = nn.LayerNorm(width), added.to(of_added)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    run = NormKernel(norm, dtype)
    for given_one, sums in ((None, x), (added, x + added.float())):
        found = run(x, given_one)
        torch.testing.assert_close(found.full, norm(sums).detach(), rtol=1e-4, atol=1e-5)
        assert found.read.equal(found.full.to(dtype))
        alone = [run(x[row, None], None if given_one is None else added[row, None]).full for row in range(rows)]
        assert found.full.equal(torch.cat(alone))


@few
@given(st.integers(1, 40), st.integers(1, 4))
def test_blocks_of_powers_are_read_once_for_both(rows, blocks):
    powers = torch.rand(rows, blocks * BLOCK, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    found, (maxima, sums) = of_blocks_by_kernel(powers), of_blocks(powers)
    assert found[0].equal(maxima)
    torch.testing.assert_close(found[1], sums, rtol=2 * HALF, atol=0)
    exact = powers.float().view(rows, -1, BLOCK).sum(2)
    torch.testing.assert_close(found[1, :rows], exact)
    alone = torch.cat([of_blocks_by_kernel(row[None])[:, :1] for row in powers], 1)
    assert found[:, :rows].equal(alone)


@few
@given(st.integers(0, 400), st.integers(1, 9))
@example(kernels.GRAIN * 2, 2)
@example(kernels.GRAIN * 2 - 1, 2)
def test_threads_share_all_rows(rows, threads):
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels.in_shares(rows, lambda first, last: seen.append((first, last)))
    finally:
        torch.set_num_threads(before)
    assert sorted(row for first, last in seen for row in range(first, last)) == list(range(rows))
    assert len(seen) == max(1, min(threads, rows // kernels.GRAIN))


def test_what_the_compiler_says_of_a_kernel_is_told():
    with pytest.raises(ConfigError, match=r"`compiled` must be left out where the C\+\+ compiler does not take"):
        kernels.kernel("norms.cpp", "normalise", "p", WIDTH=16, Added="no type", Read="float")


def test_an_error_of_a_thread_is_an_error(monkeypatch):
    monkeypatch.setattr(kernels, "GRAIN", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            kernels.in_shares(4, lambda first, last: 1 / first)
    finally:
        torch.set_num_threads(before)
