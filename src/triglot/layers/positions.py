"""Where a token stands: sinusoids (Vaswani et al. 2017, §3.5), learned vectors, rotation (Su et al. 2021)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.errors import require
from triglot.layers.dropout import Dropout
from triglot.layers.rope_scaling import scaled


def sinusoids(length: int, d_model: int) -> Float[Tensor, "length d_model"]:
    """sin(p·ω) on even and cos(p·ω) on odd columns, ω = 10000^(-2i/d_model) as exp(-2i/d_model · log 10000)."""
    angles = torch.arange(length)[:, None] * _frequencies(d_model, 10_000.0)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model]  # an odd width drops the last cos


def _frequencies(width: int, base: float) -> Float[Tensor, " half"]:
    return torch.exp(torch.arange(0, width, 2) * (-math.log(base) / width))


class PositionalEncoding(nn.Module):
    """Adds sinusoids to embeddings, then dropout; the table grows when a sequence is longer than it."""

    table: Tensor

    def __init__(self, d_model: int, max_seq_length: int = 4096, dropout: float = 0.1) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", "at least 1", d_model)
        self.dropout = Dropout(dropout)
        self.register_buffer("table", sinusoids(max_seq_length, d_model), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        if positions is not None:
            return self.dropout(x + self.table[positions])
        if x.size(1) > self.table.size(0):
            longer = sinusoids(max(x.size(1), 2 * self.table.size(0)), x.size(2))
            self.table = longer.to(self.table.device, self.table.dtype)
        return self.dropout(x + self.table[: x.size(1)])


class LearnedPositions(nn.Module):
    """Adds one learned vector per position, then dropout."""

    def __init__(self, d_model: int, max_seq_length: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_seq_length, d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        table = self.embedding.weight
        return self.dropout(x + (table[: x.size(1)] if positions is None else table[positions]))


class Rotation(NamedTuple):
    """Cosine and sine by which queries and keys at each position are turned."""

    cos: Float[Tensor, "#batch length head_dim"]
    sin: Float[Tensor, "#batch length head_dim"]


class RotaryPositions(nn.Module):
    """Turns pairs (i, i + head_dim/2) of a head by p·θ^(-2i/head_dim): scores then depend on distances only.

    `scaling`: the fields of a `RopeScaling`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, max_seq_length: int, theta: float = 10_000.0, scaling: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        require(head_dim % 2 == 0, "head_dim", "even with rotary positions", head_dim)
        frequencies, amplitude = _frequencies(head_dim, theta), 1.0
        if scaling is not None:
            frequencies, amplitude = scaled(frequencies, theta, max_seq_length, **scaling)
        angles = torch.arange(max_seq_length)[:, None] * frequencies.repeat(2)
        self.register_buffer("cos", angles.cos() * amplitude, persistent=False)
        self.register_buffer("sin", angles.sin() * amplitude, persistent=False)

    def forward(self, positions: Int[Tensor, "#batch length"]) -> Rotation:
        return Rotation(self.cos[positions], self.sin[positions])


def signed(rotation: Rotation) -> Rotation:
    """As `turned` takes it: the first half of the sine negated."""
    first, second = rotation.sin.chunk(2, dim=-1)
    return Rotation(rotation.cos, torch.cat([-first, second], dim=-1))


def turned(heads: Float[Tensor, "rows some head_dim"], rotation: Rotation) -> Float[Tensor, "rows some head_dim"]:
    """`rotate` of one token a row, to the bit: halves change places by their numbers, and are not written side by side.

    Compiled it is one loop.
    """
    swapped = heads.unflatten(2, (2, -1)).flip(2).flatten(2)
    return (heads * rotation.cos + swapped * rotation.sin).to(heads.dtype)


def rotate(
    x: Float[Tensor, "batch heads length head_dim"], rotation: Rotation
) -> Float[Tensor, "batch heads length head_dim"]:
    """x·cos + (−x₂, x₁)·sin, x₁ and x₂ the halves of a head."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * rotation.cos[:, None] + turned * rotation.sin[:, None]).to(x.dtype)
