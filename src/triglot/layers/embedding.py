"""From token ids to vectors that know their position."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.layers.dropout import Dropout
from triglot.layers.norm import make_norm
from triglot.layers.positions import LearnedPositions, PositionalEncoding, RotaryPositions, Rotation


class Embedded(NamedTuple):
    """Vectors of tokens, and how attention is to rotate them, if it is."""

    x: Float[Tensor, "batch length d_model"]
    rotation: Rotation | None


class Embedding(nn.Module):
    """Token vectors, times √d_model if `scale`, with positions added to them, or as rotations beside them.

    With a `norm` it stands before the dropout.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        max_seq_length: int,
        dropout: float,
        *,
        positions: Literal["sinusoidal", "learned", "rotary", "relative"] = "sinusoidal",
        head_dim: int = 0,
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        scale: bool = True,
        norm: Literal["layer", "rms"] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.scale = math.sqrt(d_model) if scale else 1.0
        self.added: PositionalEncoding | LearnedPositions | Dropout
        self.rotary: RotaryPositions | None = None
        self.norm = nn.Identity() if norm is None else make_norm(norm, d_model, norm_eps)
        self.dropout = Dropout(0.0 if norm is None else dropout)
        dropout = dropout if norm is None else 0.0
        match positions:
            case "sinusoidal":
                self.added = PositionalEncoding(d_model, max_seq_length, dropout)
            case "learned":
                self.added = LearnedPositions(d_model, max_seq_length, dropout)
            case "rotary":
                self.added = Dropout(dropout)
                self.rotary = RotaryPositions(head_dim, max_seq_length, rope_theta, rope_scaling)
            case "relative":
                self.added = Dropout(dropout)

    def forward(
        self, tokens: Int[Tensor, "batch length"], positions: Int[Tensor, "#batch length"] | None = None
    ) -> Embedded:
        x = self.tokens(tokens) * self.scale
        x = self.added(x) if isinstance(self.added, Dropout) else self.added(x, positions)
        x = self.dropout(self.norm(x))
        if self.rotary is None:
            return Embedded(x, None)
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        return Embedded(x, self.rotary(positions))
