"""Kernels in C++ compute what PyTorch's operations do, and give a row the same bits in any company."""

import math
from contextlib import contextmanager
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import needs_compiler
from triglot.decoding.sampling import largest
from triglot.errors import ConfigError
from triglot.generation import int4, int8, kernels, top
from triglot.generation.feed_forward import activate_by_kernel
from triglot.generation.int4 import KernelInt4
from triglot.generation.int8 import KernelInt8, multiplies_bytes
from triglot.generation.paged import LANES, New, Pages
from triglot.generation.residual import NormKernel
from triglot.generation.top import TopKernel
from triglot.layers import packed
from triglot.layers.activations import Activation, activate, is_gated
from triglot.layers.attend import FORBIDDEN
from triglot.layers.packed import GROUP, PackedInt4, four_bits, multiplies_int8, multiplies_tiles, pack_int8

pytestmark = needs_compiler
HALF = torch.finfo(torch.bfloat16).eps / 2
"""What rounding to bf16 may change."""
TYPES = [torch.float32, torch.bfloat16]
SIZES = [(4, 4, 32), (6, 2, 7), (2, 1, 40)]
"""Heads, heads of keys, numbers of a head: few sizes, since each is compiled."""
few = settings(deadline=None, max_examples=30)


def made(sentences: int, hypotheses: int, pages: int, size: tuple[int, int, int], dtype: torch.dtype, seed: int):
    """Pages, queries, what is new, and a bias that shows each hypothesis some places, its own among them."""
    heads, kv_heads, head_dim = size
    pages = max(pages, math.ceil(hypotheses / LANES))  # each writes to a place of its own
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


@contextmanager
def several_threads(number: int):
    """So many, who share whatever there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "GRAIN", 1)
            patch.setattr(kernels, "WORK", 1)
            yield
    finally:
        torch.set_num_threads(before)


def pages_of(held, dtype, **how):
    """What is held, in pages, some of them full."""
    _, layers, sentences, kv_heads, _, head_dim = held.shape
    pages = Pages(layers, sentences, kv_heads, head_dim, dtype, **how)
    for layer, both in enumerate(held.unbind(1)):
        for rows in (slice(0, 1), slice(1, sentences)):
            pages.fill(rows, both[:, None, rows], slice(layer, layer + 1))
    return pages


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
    st.integers(1, 5), st.sampled_from([1, 3, 13]), st.integers(1, 4), st.sampled_from(SIZES), st.sampled_from(TYPES),
    st.integers(0, 999),
)  # fmt: skip


@few
@given(*shapes, st.booleans())
def test_attention_to_pages_is_attention(sentences, hypotheses, pages, size, dtype, seed, by_head):
    held, query, new, bias = made(sentences, hypotheses, pages, size, dtype, seed)
    if by_head:
        bias = bias.mT.contiguous().mT + torch.randn(1, size[0], 1, 1)  # in another order in memory
    expected, paged = by_torch(held, query, new, bias, 2), pages_of(held, dtype)
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
    together = pages_of(held, dtype).attend(1, query, bias, torch.float32, new)
    kept = data.draw(st.permutations(range(sentences)))[: data.draw(st.integers(1, sentences))]
    paged, rows = pages_of(held, dtype), torch.arange(sentences * hypotheses).view(sentences, -1)[kept]
    paged.keep(torch.tensor(kept))
    some = New(new.key[rows.flatten()], new.value[rows.flatten()], new.places[kept])
    more = F.pad(bias[kept], (0, data.draw(st.integers(0, 2)) * LANES), value=FORBIDDEN)
    paged.length_for(more.size(3) - 1)
    with several_threads(data.draw(st.integers(1, 3))):
        found = paged.attend(1, query[rows.flatten()], more, torch.float32, some)
    assert found.equal(together[rows.flatten()])


@few
@given(st.integers(1, 4), st.sampled_from([1, 3, 13]), st.integers(1, 3), st.sampled_from(SIZES), st.integers(0, 999),
       st.integers(1, 3))  # fmt: skip
def test_tokens_of_a_text_attend_as_if_each_were_the_only_one(texts, new, pages, size, seed, threads):
    held, query, of_new, bias = made(texts, new, pages, size, torch.float32, seed)
    bias = bias.expand(-1, size[0], -1, -1) + torch.arange(1.0, 1 + size[0]).view(-1, 1, 1)  # by head
    paged, tokens = pages_of(held, torch.float32, of_texts=True), torch.arange(texts * new).view(texts, new)
    with several_threads(threads):
        together = paged.attend(1, query, bias, torch.float32, of_new)
    torch.testing.assert_close(together, by_torch(held, query, of_new, bias, 1), rtol=1e-5, atol=1e-5)
    for number, rows in enumerate(tokens.T):  # of all that were written
        alone = paged.attend(1, query[rows], bias[:, :, number, None], torch.float32)
        assert alone.equal(together[rows])


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from(SIZES), st.sampled_from(TYPES))
def test_texts_that_are_kept_twice_are_written_apart(kept, size, dtype):
    held, *_ = made(4, 1, 2, size, dtype, 0)
    paged = pages_of(held, dtype, of_texts=True)
    paged.keep(torch.tensor(kept))
    assert paged.rows == len(kept)
    length = 2 * LANES - 3
    expected = held[:, :, kept, :, :length].clone()
    for row in range(len(kept)):
        new = torch.full((2, 3, 1, size[1], 1, size[2]), float(row))
        paged.fill(torch.tensor([paged.rows_of[row]]), new)
        expected[:, :, row, :, 0] = row
    for row in range(len(kept)):
        assert paged.text(row, length).equal(expected[:, :, row].transpose(2, 3))


def test_what_is_far_below_weighs_nothing_and_what_is_no_number_stays_none():
    held, query, _, bias = made(1, 1, 1, SIZES[0], torch.float32, 0)
    bias[..., 1:], bias[..., 0] = -81.0, 0.0
    held[:, 2] = 0  # scores are what is added to them
    held[1, 2, :, :, 0], query[:] = 1.0, 0.0
    paged = pages_of(held, torch.float32)
    assert paged.attend(2, query, bias, torch.float32).eq(1).all()
    query[0, 0, 0] = math.nan
    paged = pages_of(torch.ones_like(held), torch.float32)
    found = paged.attend(2, query, bias, torch.float32).view(1, SIZES[0][0], -1)
    assert found[0, 0].isnan().all()
    assert not found[0, 1:].isnan().any()


@few
@given(st.sampled_from([nn.LayerNorm, partial(nn.LayerNorm, bias=False), partial(nn.RMSNorm, eps=1e-5)]),
       st.integers(1, 9), st.sampled_from([16, 128]), st.sampled_from(TYPES), st.sampled_from(TYPES),
       st.floats(1e-3, 1e3))  # fmt: skip
def test_norms_are_pytorchs(make, rows, width, of_added, dtype, scale):
    draw = torch.Generator().manual_seed(rows)
    x, added = torch.randn(2, rows, width, generator=draw) * scale
    norm, added = make(width), added.to(of_added)
    for part in norm.parameters():
        nn.init.normal_(part)
    run, sums = NormKernel(norm, dtype), x + added.float()
    found = run(x, added)
    torch.testing.assert_close(found.full, norm(sums).detach(), rtol=1e-4, atol=1e-5)
    assert found.read.equal(found.full.to(dtype))
    with several_threads(2):
        alone = [run(x[row, None], added[row, None]).full for row in range(rows)]
    assert found.full.equal(torch.cat(alone))
    torch.testing.assert_close(run.read_alone(x).float(), norm(x).detach(), rtol=HALF, atol=HALF)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_norms_keep_what_is_no_number(bits):
    x = torch.randn(2, 16)
    x.view(torch.int32)[1, 3] = bits
    found = NormKernel(nn.LayerNorm(16), torch.bfloat16)(x, torch.zeros(2, 16))
    assert found.read[1].isnan().all()
    assert not found.read[0].isnan().any()


@few
@given(st.sampled_from(get_args(Activation)), st.integers(1, 9), st.sampled_from([16, 48]), st.sampled_from(TYPES),
       st.sampled_from(TYPES), st.floats(1e-3, 1e3), st.integers(1, 3))  # fmt: skip
def test_activations_are_pytorchs_and_each_numbers_own(activation, rows, width, given, dtype, scale, threads):
    inner = width * (1 + is_gated(activation))
    x = (rows_of(rows, inner + 16) * scale).to(given)[:, :inner]
    expected, found = activate(x.float(), activation), activate_by_kernel(x, activation, dtype)
    rounding = 1e-5 if dtype == torch.float32 else HALF
    torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=rounding * min(scale, 1.0) ** 2)
    with several_threads(threads):
        assert activate_by_kernel(x[-1:], activation, dtype).equal(found[-1:])


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("value", [math.nan, 1e15, -1e15, 100.0, -100.0])
def test_activations_of_what_is_large_or_no_number_are_pytorchs(activation, value):
    x = torch.full((1, 64), value)
    x[:, 32:] = 2.0
    torch.testing.assert_close(
        activate_by_kernel(x, activation, torch.float32), activate(x, activation), equal_nan=True, rtol=1e-5, atol=1e-30
    )


whole_numbers = pytest.mark.skipif(not multiplies_bytes(), reason="kernels have no products of bytes here")
IN_BYTES = ["int8", *["int8 in pairs"] * multiplies_int8()]
"""As this processor sums products of bytes, and as one without VNNI does."""


@contextmanager
def in_bytes(how: str):
    """What is made within sums products so."""
    with pytest.MonkeyPatch.context() as patch:
        if how == "int8 in pairs":
            for module in (packed, int4, int8, top):
                patch.setattr(module, "multiplies_int8", lambda: False)
        yield


KINDS = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(not multiplies_tiles(), reason="this processor multiplies no tiles")),
    *(pytest.param(one, marks=whole_numbers) for one in IN_BYTES),
]
either_kind = pytest.mark.parametrize("precision", KINDS)
COUNTS = [1, 6]
"""Few, since each is compiled."""


def head(precision, inputs: int = 24, blocks: int = 3, whole: bool = False):
    """By PyTorch's operations and by its kernel: a projection with tokens that never come; whole numbers make ties."""
    draw = torch.Generator().manual_seed(blocks)
    weight, bias = torch.randn(blocks * 128, inputs, generator=draw), torch.randn(blocks * 128, generator=draw)
    weight, bias = (weight.round(), bias.round()) if whole else (weight, bias)
    bias[[0, 2]] = -math.inf
    if precision in IN_BYTES:
        with in_bytes(precision):
            return pack_int8(weight, bias), kernel_of(weight, bias, precision)
    kernel = kernel_of(weight, bias, precision)
    rounded = weight.to(kernel.dtype).float()
    return (lambda rows: rows.to(kernel.dtype).float() @ rounded.T + bias), kernel


def kernel_of(weight, bias, precision):
    """The kernel alone."""
    with in_bytes(precision):
        return TopKernel(weight, bias, "int8" if precision in IN_BYTES else precision)


def rows_of(number: int, inputs: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, inputs, generator=torch.Generator().manual_seed(seed))


def unasked(_):
    pytest.fail("these are near enough to 0")


@either_kind
@few
@given(st.integers(1, 70), st.sampled_from([24, 64]), st.sampled_from(COUNTS), st.booleans())
def test_the_likeliest_tokens_are_the_largest_logits(precision, rows, inputs, count, whole):
    logits, kernel = head(precision, inputs, whole=whole)
    hidden = rows_of(rows, inputs)
    hidden = hidden.round() if whole else hidden
    found, expected = kernel(hidden, count, unasked), logits(hidden)
    values, ids = largest(expected, count)  # ties by lower id
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected.gather(1, found.ids), values, rtol=1e-5, atol=1e-5)
    assert found.ids.equal(ids) or precision in IN_BYTES  # whose logits may be alike to a rounding's difference
    torch.testing.assert_close(found.normaliser[:, 0], expected.logsumexp(1), rtol=1e-5, atol=1e-5)
    assert (found.values[:, :1] <= found.normaliser).all()


@either_kind
@few
@given(st.integers(1, 70), st.randoms(use_true_random=False), st.sampled_from(COUNTS), st.integers(1, 3))
def test_a_rows_likeliest_tokens_are_its_own_in_any_company(precision, rows, draw, count, threads):
    _, kernel = head(precision)
    hidden, order = rows_of(rows), draw.sample(range(rows), draw.randint(1, rows))
    together = kernel(hidden, count, unasked)
    with several_threads(threads):
        some = kernel(hidden[order], count, unasked)
    for name in ("values", "ids", "normaliser"):
        assert getattr(some, name).equal(getattr(together, name)[order])


@either_kind
def test_rows_whose_logits_are_far_from_0_are_made_anew(precision):
    logits, kernel = head(precision)
    hidden = torch.stack([rows_of(1)[0] * by for by in (1.0, 1e3, 1.0, 30.0)])
    expected = logits(hidden)
    asked = []
    found = kernel(hidden, 6, lambda some: asked.append(some) or expected[some])
    assert [some.tolist() for some in asked] == [[1, 3]]
    torch.testing.assert_close(found.values, largest(expected, 6)[0])
    torch.testing.assert_close(found.normaliser[:, 0], expected.logsumexp(1))


@either_kind
@pytest.mark.parametrize(("by", "anew"), [(-45.0, True), (-30.0, False), (50.0, False), (70.0, True)])
def test_a_normaliser_misses_nothing_wherever_logits_are(precision, by, anew):
    bias = torch.full((128,), by - 21)
    bias[7] = by
    kernel = kernel_of(torch.zeros(128, 32), bias, precision)
    asked = []
    found = kernel(torch.zeros(1, 32), 1, lambda some: asked.append(some) or bias[None].expand(len(some), -1))
    assert bool(asked) == anew
    torch.testing.assert_close(found.normaliser[0, 0], bias.logsumexp(0), rtol=1e-6, atol=1e-5)


@either_kind
def test_there_are_no_more_tokens_than_the_vocabulary_has(precision):
    logits, kernel = head(precision, blocks=1)
    found, expected = kernel(hidden := rows_of(3), 200, unasked), logits(hidden)
    assert found.values.shape == (3, 128)
    torch.testing.assert_close(found.values, largest(expected, 200)[0], rtol=1e-5, atol=1e-5)
    again = kernel(hidden * 1e3, 200, lambda some: logits(hidden * 1e3)[some])
    torch.testing.assert_close(again.values, largest(logits(hidden * 1e3), 200)[0])


@either_kind
def test_where_less_tokens_are_possible_the_others_are_not(precision):
    weight, bias = torch.randn(128, 24), torch.full((128,), -math.inf)
    bias[[3, 7]] = 0.0
    kernel = kernel_of(weight, bias, precision)
    found = kernel(hidden := rows_of(2), 6, unasked)
    assert found.ids[:, :2].sort(1).values.tolist() == [[3, 7]] * 2
    assert found.values[:, 2:].isneginf().all()
    hidden[1, 0] = math.nan
    again = kernel(hidden, 6, lambda some: hidden[some] @ weight.T + bias)
    assert again.values[0].equal(found.values[0])
    assert (again.values[1] - again.normaliser[1])[0].isnan()


LINEARS = [(5, 24), (128, 64), (200, 7), (96, 200)]
"""Outputs and inputs."""


either_sum = pytest.mark.parametrize("how", [pytest.param(one, marks=whole_numbers) for one in IN_BYTES])


def linear_of(outputs: int, inputs: int, biased: bool):
    draw = torch.Generator().manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)
    return weight, bias if biased else None


@either_sum
@few
@given(st.integers(1, 70), st.sampled_from(LINEARS), st.booleans(), st.booleans(), st.floats(1e-6, 1e6))
def test_products_in_whole_numbers_are_pytorchs(how, rows, size, biased, by_step, scale):
    given = linear_of(*size, biased)
    with in_bytes(how):
        ours, others = KernelInt8(*given), pack_int8(*given)
    x = rows_of(rows, size[1]) * scale
    x = x.expand(2, -1, -1).mT.contiguous().mT[1] if by_step else x  # in another order in memory
    torch.testing.assert_close(ours(x), others(x), rtol=1e-5, atol=1e-5 * max(1, scale))
    assert ours.narrow(x, "relu").equal(ours(x).relu())


@either_sum
@few
@given(st.integers(1, 70), st.sampled_from(LINEARS), st.randoms(use_true_random=False), st.integers(1, 3))
def test_a_rows_products_in_whole_numbers_are_its_own_in_any_company(how, rows, size, draw, threads):
    with in_bytes(how):
        ours, x = KernelInt8(*linear_of(*size, True)), rows_of(rows, size[1])
    order = draw.sample(range(rows), draw.randint(1, rows))
    together = ours(x)
    with several_threads(threads):
        assert ours(x[order]).equal(together[order])


@pytest.mark.skipif(not multiplies_tiles(), reason="this processor multiplies no tiles")
@few
@given(st.integers(1, 70), st.sampled_from(LINEARS))
def test_products_by_tiles_are_those_without(rows, size):
    x, given = rows_of(rows, size[1]), linear_of(*size, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "multiplies_tiles", lambda: False)
        without = KernelInt8(*given)
    assert KernelInt8(*given)(x).equal(without(x))


@either_sum
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_products_of_what_is_no_number_are_none(how, wrong):
    x = rows_of(3)
    x[1, 5] = wrong
    weight, bias = linear_of(5, 24, True)
    with in_bytes(how):
        ours = KernelInt8(weight, bias)
    found = ours(x)
    assert found[1].isnan().all()
    assert not found[[0, 2]].isnan().any()
    assert ours(torch.zeros(2, 24)).equal(bias.expand(2, -1))


FOURS = [(16, 32), (37, 96), (256, 288)]
"""Outputs and inputs."""


def four_of(rows: int, size: tuple[int, int], experts: tuple[int, ...] = (), whole: bool = False):
    """Rows [rows, inputs], `whole` ones from −127 to 127, and what multiplies them with four bits."""
    draw = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(*experts, *size, generator=draw), torch.randn(*experts, size[0], generator=draw)
    x = torch.randint(-127, 128, (rows, size[1]), generator=draw).float()
    x[:, ::GROUP] = 127  # nothing is to be rounded
    return x if whole else torch.randn(rows, size[1], generator=draw), weight, bias


def by_four(how: str, weight, bias, x, *expert):
    with in_bytes(how):
        return KernelInt4(weight, bias)(x[:, None], *expert)[:, 0]


@either_sum
@few
@given(st.integers(1, 9), st.sampled_from(FOURS), st.sampled_from([0, 2]))
def test_products_with_four_bits_are_those_of_the_weights_that_they_stand_for(how, rows, size, expert):
    x, weight, bias = four_of(rows, size, (3,), whole=True)
    found = by_four(how, weight, bias, x, torch.tensor([expert]))
    assert found.equal(by_four(how, weight[expert], bias[expert], x))
    whole, step, middle = (part.double() for part in four_bits(weight[expert]))
    stand_for = (whole.unflatten(1, (-1, GROUP)) - 8) * step[..., None] + middle[..., None]
    expected = x.double() @ stand_for.flatten(1).T + bias[expert]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
    if PackedInt4.takes(weight[expert]):  # of which a row's sums are in bf16
        theirs = PackedInt4(weight[expert], bias[expert])(x)
        assert (found - theirs).norm() < 0.01 * theirs.norm()


@either_sum
@few
@given(st.integers(1, 9), st.sampled_from(FOURS), st.floats(1e-6, 1e6))
def test_rows_are_rounded_to_bytes_by_groups_before_four_bits_multiply_them(how, rows, size, scale):
    x, weight, _ = four_of(rows, size)
    x = x * scale
    x[0, :GROUP] *= 1e4  # which costs the other groups nothing
    whole, step, middle = (part.double() for part in four_bits(weight))
    stand_for = (whole.unflatten(1, (-1, GROUP)) - 8) * step[..., None] + middle[..., None]
    rounding = x.double().unflatten(1, (-1, GROUP)).abs().amax(2) / 127 * 0.51
    most = torch.einsum("rg,ogi->ro", rounding, stand_for.abs())
    expected = x.double() @ stand_for.flatten(1).T
    error = (by_four(how, weight, None, x) - expected).abs()
    assert (error <= most + 1e-5 * expected.abs().amax()).all()


@either_sum
@few
@given(st.integers(1, 9), st.sampled_from(FOURS), st.randoms(use_true_random=False), st.integers(1, 3))
def test_a_rows_products_with_four_bits_are_its_own_in_any_company(how, rows, size, draw, threads):
    x, weight, bias = four_of(rows, size)
    order, together = draw.sample(range(rows), draw.randint(1, rows)), by_four(how, weight, bias, x)
    with several_threads(threads):
        assert by_four(how, weight, bias, x[order]).equal(together[order])


@whole_numbers
def test_rows_in_another_order_or_type_are_multiplied_with_four_bits_as_they_are():
    x, weight, bias = four_of(8, (64, 96))
    layer = KernelInt4(weight, bias)
    for other in (x.T.contiguous().T, x.double(), x[:, None].expand(-1, 2, -1)[:, 1]):
        assert layer(other[:, None]).equal(layer(x[:, None]))


@either_sum
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_products_of_four_bits_with_what_is_no_number_are_none(how, wrong):
    x, weight, bias = four_of(3, (16, 64))
    x[1, 40] = wrong
    found = by_four(how, weight, bias, x)
    assert found[1].isnan().all()
    assert not found[[0, 2]].isnan().any()
    assert by_four(how, weight, bias, torch.zeros(2, 64)).equal(bias.expand(2, -1))


@few
@given(st.integers(0, 400), st.integers(1, 9))
def test_threads_are_all_or_one(rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert kernels.threads_for(rows) == (threads if rows >= kernels.GRAIN else 1)
    finally:
        torch.set_num_threads(before)


def test_what_the_compiler_says_of_a_kernel_is_told():
    with pytest.raises(ConfigError, match=r"`compiled` must be False .*: the C\+\+ compiler does not take them:\n"):
        kernels.kernel("norms.cpp", "normalise", "p", WIDTH=16, Added="no type", Read="float")
