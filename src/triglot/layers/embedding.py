"""From token ids to vectors that know their position."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.layers.dropout import Dropout
from triglot.layers.positions import LearnedPositions, PositionalEncoding, RotaryPositions, Rotation


class Embedded(NamedTuple):
    """Vectors of tokens, and how attention is to rotate them, if it is."""

    x: Float[Tensor, "batch length d_model"]
    rotation: Rotation | None


class Embedding(nn.Module):
    """Token vectors, times √d_model if `scale`, with positions added to them, or as rotations beside them."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        max_seq_length: int,
        dropout: float,
        *,
        positions: Literal["sinusoidal", "learned", "rotary"] = "sinusoidal",
        head_dim: int = 0,
        rope_theta: float = 10_000.0,
        scale: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.scale = math.sqrt(d_model) if scale else 1.0
        self.added: PositionalEncoding | LearnedPositions | Dropout
        self.rotary = RotaryPositions(head_dim, max_seq_length, rope_theta) if positions == "rotary" else None
        match positions:
            case "sinusoidal":
                self.added = PositionalEncoding(d_model, max_seq_length, dropout)
            case "learned":
                self.added = LearnedPositions(d_model, max_seq_length, dropout)
            case "rotary":
                self.added = Dropout(dropout)

    def forward(
        self, tokens: Int[Tensor, "batch length"], positions: Int[Tensor, "#batch length"] | None = None
    ) -> Embedded:
        x = self.tokens(tokens) * self.scale
        if self.rotary is None:
            return Embedded(self.added(x, positions), None)
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        return Embedded(self.added(x), self.rotary(positions))
