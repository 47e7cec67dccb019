"""Choosing the next token from logits: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020).

Everything is computed in fp32, ties go to the lower id, and a draw takes one uniform number a row, so that a row with a
generator of its own draws the same tokens whatever its batch mates are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.errors import ConfigError, require

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all rows, one for each row, or torch's own."""


def largest(
    values: Float[Tensor, "rows columns"], count: int
) -> tuple[Float[Tensor, "rows count"], Int[Tensor, "rows count"]]:
    """The `count` largest of each row, falling, and their indices; ties by lower index, which `topk` leaves open."""
    count = min(count, values.size(1))
    least = values.topk(count).values[:, -1:]
    above, tied = values > least, values == least
    chosen = above | (tied & (tied.cumsum(1) <= count - above.sum(1, keepdim=True)))
    index = chosen.nonzero()[:, 1].view(-1, count)
    top, order = values.gather(1, index).sort(descending=True, stable=True)
    return top, index.gather(1, order)


def keep_top_k(logits: Float[Tensor, "rows vocab"], top_k: int) -> Float[Tensor, "rows vocab"]:
    """The `top_k` largest logits of each row, −∞ elsewhere; a `top_k` above the vocabulary keeps all."""
    values, index = largest(logits, top_k)
    return torch.full_like(logits, float("-inf")).scatter(1, index, values)


def keep_top_p(logits: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """The fewest largest logits whose probabilities sum to `top_p` or more, at least one; −∞ elsewhere."""
    values, index = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    before[:, 0] = 0.0  # rounding must not cost the first its place
    return torch.full_like(logits, float("-inf")).scatter(1, index, values.masked_fill(before >= top_p, float("-inf")))


def uniforms(rows: int, generator: Generators) -> Float[Tensor, " rows"]:
    """One number in [0, 1) a row, from the row's own generator where there is one each."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(rows, generator=generator, device=generator.device if generator else "cpu")
    require(len(generator) == rows, "generator", f"one for each of {rows} rows", len(generator))
    return torch.cat([torch.rand(1, generator=own, device=own.device) for own in generator])


def draw(probabilities: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The first token whose cumulative probability exceeds uniform · total; never one of probability 0."""
    cumulative = probabilities.cumsum(1).masked_fill(probabilities == 0, 0.0)
    total = cumulative.amax(1, keepdim=True)
    below_total = torch.nextafter(total, torch.zeros_like(total))  # a uniform next to 1 may round up to the total
    threshold = torch.minimum(uniform.to(total.device)[:, None] * total, below_total)
    return (cumulative > threshold).int().argmax(1)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to choose: from softmax(logits / temperature), cut to the `top_k` largest, then to `top_p`."""

    temperature: float = 1.0
    """0 is the arg max, whatever the cuts."""
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < float("inf")
        require(finite, "temperature", "at least 0 and finite", self.temperature, ConfigError)
        require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1, or left out", self.top_k, ConfigError)
        fits = self.top_p is None or 0 < self.top_p <= 1
        require(fits, "top_p", "above 0 and at most 1, or left out", self.top_p, ConfigError)

    def __call__(self, logits: Float[Tensor, "rows vocab"], generator: Generators = None) -> Int[Tensor, " rows"]:
        """One token a row."""
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(1)
        # The largest becomes 0, so that no temperature, however small, overflows.
        logits = (logits - logits.amax(1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits.softmax(1), uniforms(logits.size(0), generator))
