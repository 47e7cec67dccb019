"""The position-wise feed-forward layer (Vaswani et al. 2017, §3.3; gated: Shazeer 2020)."""

from typing import Literal, assert_never

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triglot.layers.dropout import Dropout

Activation = Literal["relu", "gelu", "swiglu"]


def is_gated(activation: Activation) -> bool:
    """Whether the first projection is twice as wide, one half opening or closing the other."""
    return activation == "swiglu"


def activate(x: Float[Tensor, "*lead inner"], activation: Activation) -> Float[Tensor, "*lead d_ff"]:
    """relu(x), gelu(x), or silu(x₁)·x₂ with x₁ and x₂ the halves of x."""
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        case _:
            assert_never(activation)


class PointwiseFeedForward(nn.Module):
    """W₂ · dropout(activation(W₁ x)), at every position alike."""

    def __init__(
        self, d_model: int, d_ff: int, dropout: float = 0.1, *, activation: Activation = "relu", bias: bool = True
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, 2 * d_ff if is_gated(activation) else d_ff, bias=bias)
        self.outer = nn.Linear(d_ff, d_model, bias=bias)
        self.dropout = Dropout(dropout)
        self.activation: Activation = activation

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        return self.outer(self.dropout(activate(self.inner(x), self.activation)))
