"""Choosing the next token from logits: temperature, and cuts of what is unlikely.

The cuts are top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024) and typical-p (Meister et
al. 2022).

Everything is computed in fp32, ties go to the lower id, and a draw takes one uniform number a row, so that a row with a
generator of its own draws the same tokens whatever its batch mates are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from triglot.errors import ConfigError, require
from triglot.layers.vectors import VECTOR, in_whole_vectors, round_up

BLOCK = 128
PER_LOG = 1 / math.log(2)
"""Exponents of 2 for one of e."""
NOTHING = -1e30
"""Stands for −∞ where that would make NaN."""
MODERATE = 46.0
"""Where a row's largest exponent of 2 is no further from 0, powers are made of all as they are."""
LEAST_POWER, MOST_POWER = math.exp(-45), math.exp(-10)
"""Between them a row's largest power of e is what σ makes of it, and those e⁴² times smaller are there."""
IN_CACHE = 2**17
"""Numbers that are worked on at a time, several times over."""
ROWS = 16
"""Rows that a GPU adds up at a time."""
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all rows, one for each row, or torch's own."""


def largest(
    values: Float[Tensor, "rows columns"], count: int
) -> tuple[Float[Tensor, "rows count"], Int[Tensor, "rows count"]]:
    """The `count` largest of each row, falling, and their indices; ties by lower index, which `topk` leaves open.

    In wide rows only those blocks are looked at that have the largest maxima: the others have none of the `count`.
    """
    rows, columns = values.shape
    count = min(count, columns)
    if columns % BLOCK or columns < 4 * count * BLOCK:
        return _largest(values, count)
    blocks = values.view(rows, -1, BLOCK)
    chosen = _largest(blocks.amax(2), count)[1].sort(1).values  # in their order, so that ties stay in theirs
    picked = blocks[torch.arange(rows, device=values.device)[:, None], chosen].flatten(1)
    top, place = _largest(picked, count)
    return top, chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    top, index = values.topk(min(count + 1, values.size(1)))
    ties = (top[:, 1:] == top[:, :-1]).any(1)
    if ties.any():
        some = ties.nonzero()[:, 0]
        top[some, :count], index[some, :count] = _by_index(values[some], top[some], index[some], count)
    return top[:, :count], index[:, :count]


def _by_index(values: Tensor, top: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `topk` should have taken, and in which order, of rows that have ties among the largest."""
    least = top[:, count - 1 : count]
    if (top[:, count:] == least).any():  # it may have taken any of those that tie for the last places
        above, tied = values > least, values == least
        chosen = above | (tied & (tied.cumsum(1) <= count - above.sum(1, keepdim=True)))
        index = chosen.nonzero()[:, 1].view(-1, count)
    index = index[:, :count].sort(1).values
    top, order = values.gather(1, index).sort(descending=True, stable=True)
    return top, index.gather(1, order)


def first_largest(values: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    """The first index of each row's largest number; by blocks, which takes a fifth of the time."""
    if values.size(1) % BLOCK:
        return values.argmax(1)
    blocks = values.view(len(values), -1, BLOCK)
    block = blocks.amax(2).argmax(1)
    starts = torch.arange(0, blocks.size(0) * blocks.size(1), blocks.size(1), device=values.device)
    return block * BLOCK + blocks.flatten(0, 1).index_select(0, block + starts).argmax(1)


def log_sum_exp(
    values: Float[Tensor, "rows columns"], maxima: Float[Tensor, "rows _"] | None = None
) -> Float[Tensor, "rows 1"]:
    """log Σ exp of each row, given its maximum, or those of its blocks, where known; 0 for a row of −∞.

    It is never below a row's maximum. On processors PyTorch makes powers of 2 four times as fast as powers of e. A
    row's bits are its own: it is summed by blocks, and never by several threads.
    """
    if values.size(1) % BLOCK:
        values = F.pad(values, (0, -values.size(1) % BLOCK), value=-math.inf)
    if maxima is None:
        maxima = values
    top = maxima.amax(1, keepdim=True).clamp_min_(NOTHING)
    rows, columns = values.shape
    sums, some = _ones(values), max(1, IN_CACHE // columns)
    powers = values.new_empty(min(rows, some), columns)
    for part, largest_ones, total in zip(values.split(some), top.split(some), sums[:rows].split(some), strict=True):
        into = powers if part.shape == powers.shape else powers[: len(part)]
        torch.sub(part, largest_ones, out=into).mul_(PER_LOG)  # so that the largest becomes exactly 1
        _sum(in_whole_vectors(into, Tensor.exp2_), total)
    return torch.maximum(sums.log_()[:rows].add_(top), top).masked_fill_(top == NOTHING, 0.0)


def to_powers(
    exponents: Float[Tensor, "rows whole_blocks"], maxima: Float[Tensor, "rows blocks"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Turn exponents of 2 into 2^(exponents − off), given the maxima of blocks: the quickest way to normalise them.

    Returns log₂ Σ 2^exponents, which is a number for a row of −∞, too, and the same less `off`: what logarithms of
    powers are above log₂ p. `off` is the largest exponent where that is far from 0, else 0; what is less than
    2^(off − 126) becomes nothing.
    """
    top, rows = maxima.amax(1, keepdim=True).clamp_min_(NOTHING), len(exponents)
    near, off = float(top.abs().max()) <= MODERATE, top
    if not near:
        off = torch.where(top.abs() > MODERATE, top, 0.0)
        exponents.sub_(off)
    sums = _ones(exponents)
    _sum(in_whole_vectors(exponents, Tensor.exp2_), sums[:rows])
    of_powers = sums.log2_()[:rows]
    total = torch.maximum(of_powers if near else of_powers + off, top)
    return total, total if near else total - off


def settle_powers(
    powers: BFloat16[Tensor, "rows whole_blocks"],
    logits: Callable[[Int[Tensor, " some"]], Float[Tensor, "some vocab"]],
) -> tuple[Float[Tensor, "rows blocks"], Float[Tensor, "rows 1"]]:
    """The logarithms of the maxima of blocks of powers of e, and of each row's sum.

    Rows whose largest power is too large for σ to have been one, or small enough for others to be missing, are made
    anew from their logits.
    """
    rows, (maxima, sums) = len(powers), _of_blocks(powers)
    top = maxima[:rows].amax(1)
    if len(some := ((top < LEAST_POWER) | (top > MOST_POWER)).nonzero()[:, 0]):
        again = logits(some).float()
        powers[some] = in_whole_vectors(again.sub_(again.amax(1, keepdim=True)), Tensor.exp_).to(powers.dtype)
        anew = _of_blocks(powers[some])
        maxima[some], sums[some] = (found[: len(some)] for found in anew)
    totals = _ones(maxima[:rows])
    torch.sum(sums[:rows], 1, keepdim=True, out=totals[:rows])
    of_blocks = in_whole_vectors(maxima, Tensor.log_)[:rows]
    return of_blocks, torch.maximum(totals.log_()[:rows], of_blocks.amax(1, keepdim=True))


def _of_blocks(powers: BFloat16[Tensor, "rows whole_blocks"]) -> Float[Tensor, "2 whole_vectors blocks"]:
    """Maxima and sums of blocks, of as many rows at a time as stay in a core's cache.

    Numbers of 16 bits that are not below 0 are in the order of what those bits are as whole numbers.
    """
    rows, columns = powers.shape
    found = powers.new_ones(2, round_up(rows, VECTOR), columns // BLOCK)
    some = max(1, 4 * IN_CACHE // columns)
    for part, maxima, sums in zip(powers.split(some), *(one[:rows].split(some) for one in found), strict=True):
        blocks = part.view(len(part), -1, BLOCK)
        torch.amax(blocks.view(torch.int16), 2, out=maxima.view(torch.int16))
        torch.sum(blocks, 2, out=sums)
    return found.float()


def _ones(rows: Float[Tensor, "rows _"]) -> Float[Tensor, "whole_vectors 1"]:
    return rows.new_ones(round_up(len(rows), VECTOR), 1)


def _sum(powers: Float[Tensor, "rows whole_blocks"], total: Float[Tensor, "rows 1"]) -> None:
    blocks = powers.view(-1, powers.size(1) // BLOCK, BLOCK).sum(2)
    if powers.device.type == "cpu":
        torch.sum(blocks, 1, keepdim=True, out=total)
    else:
        total.copy_(running_sum(blocks)[:, -1:])


def keep_top_k(logits: Float[Tensor, "rows vocab"], top_k: int) -> Float[Tensor, "rows vocab"]:
    """The `top_k` largest logits of each row, −∞ elsewhere; a `top_k` above the vocabulary keeps all."""
    values, index = largest(logits, top_k)
    return torch.full_like(logits, float("-inf")).scatter(1, index, values)


def keep_top_p(logits: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """The fewest largest logits whose probabilities sum to `top_p` or more, at least one; −∞ elsewhere."""
    return _until(top_p, *logits.sort(descending=True, stable=True))


def keep_min_p(logits: Float[Tensor, "rows vocab"], min_p: float) -> Float[Tensor, "rows vocab"]:
    """The logits whose probability is at least `min_p` times the largest one of the row; −∞ elsewhere."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits - logits.amax(1, keepdim=True) < math.log(min_p), float("-inf"))


def keep_typical_p(logits: Float[Tensor, "rows vocab"], typical_p: float) -> Float[Tensor, "rows vocab"]:
    """The fewest logits with |−log p − H| smallest whose probabilities sum to `typical_p` or more; −∞ elsewhere.

    H = −Σ p log p is the entropy of the row: the information a token is expected to have.
    """
    log_probs = logits.log_softmax(1)
    # A running sum, since `sum` adds a row that is alone in another order than rows in company.
    entropy = -running_sum(logits.softmax(1) * log_probs.clamp_min(NOTHING))[:, -1:]
    index = (-log_probs - entropy).abs().sort(dim=1, stable=True).indices
    return _until(typical_p, logits.gather(1, index), index)


def _until(mass: float, values: Tensor, index: Tensor) -> Tensor:
    """The first logits, at least one, whose probabilities sum to `mass`, each back at its `index`; −∞ elsewhere."""
    probabilities = values.softmax(1)
    before = running_sum(probabilities) - probabilities
    before[:, 0] = 0.0  # rounding must not cost the first its place
    return torch.empty_like(values).scatter(1, index, values.masked_fill(before >= mass, float("-inf")))


def running_sum(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """`cumsum` of each row, which a GPU takes in an order that depends on how many rows there are: ROWS at a time."""
    if values.device.type == "cpu":
        return values.cumsum(1)
    parts = values.split(ROWS)
    return torch.cat([F.pad(part, (0, 0, 0, ROWS - len(part))).cumsum(1)[: len(part)] for part in parts])


def uniforms(rows: int, generator: Generators) -> Float[Tensor, " rows"]:
    """One number in [0, 1) a row, from the row's own generator where there is one each."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(rows, generator=generator, device=generator.device if generator else "cpu")
    require(len(generator) == rows, "generator", f"one for each of {rows} rows", len(generator))
    return torch.cat([torch.rand(1, generator=own, device=own.device) for own in generator])


def draw(probabilities: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The first token whose cumulative probability exceeds uniform · total; never one of probability 0."""
    cumulative = running_sum(probabilities).masked_fill(probabilities == 0, 0.0)
    total = cumulative.amax(1, keepdim=True)
    below_total = torch.nextafter(total, torch.zeros_like(total))  # a uniform next to 1 may round up to the total
    threshold = torch.minimum(uniform.to(total.device)[:, None] * total, below_total)
    return (cumulative > threshold).int().argmax(1)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to choose: from softmax(logits / temperature), cut by `top_k`, `top_p`, `min_p`, `typical_p`.

    The cuts come in this order, transformers' own, each of the distribution that the one before it left.
    """

    temperature: float = 1.0
    """0 is the arg max, whatever the cuts."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < float("inf")
        require(finite, "temperature", "at least 0 and finite", self.temperature, ConfigError)
        require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1, or left out", self.top_k, ConfigError)
        for name, share in (("top_p", self.top_p), ("typical_p", self.typical_p)):
            fits = share is None or 0 < share <= 1
            require(fits, name, "above 0 and at most 1, or left out", share, ConfigError)
        fits = self.min_p is None or 0 <= self.min_p <= 1
        require(fits, "min_p", "between 0 and 1, or left out", self.min_p, ConfigError)

    def __call__(self, logits: Float[Tensor, "rows vocab"], generator: Generators = None) -> Int[Tensor, " rows"]:
        """One token a row."""
        logits = logits.float()
        if self.temperature == 0:
            return first_largest(logits)
        # The largest becomes 0, so that no temperature, however small, overflows.
        logits = (logits - logits.amax(1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        if self.typical_p is not None and self.typical_p < 1:
            logits = keep_typical_p(logits, self.typical_p)
        return draw(logits.softmax(1), uniforms(logits.size(0), generator))
