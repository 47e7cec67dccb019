"""Normalisation, and the residual connection that places it before or after a sublayer."""

from collections.abc import Callable
from typing import Literal, TypeVar, assert_never

from jaxtyping import Float
from torch import Tensor, nn

Extra = TypeVar("Extra")
Hidden = Float[Tensor, "batch length d_model"]


def make_norm(norm: Literal["layer", "rms"], d_model: int, eps: float) -> nn.LayerNorm | nn.RMSNorm:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis."""
    match norm:
        case "layer":
            return nn.LayerNorm(d_model, eps=eps)
        case "rms":
            return nn.RMSNorm(d_model, eps=eps)
        case _:
            assert_never(norm)


class Residual(nn.Module):
    """post: norm(x + dropout(sublayer(x))), pre: x + dropout(sublayer(norm(x))) (Xiong et al. 2020, §3).

    A sublayer returns its output and one thing more (attention weights, a routing), which is passed on as it is.
    """

    def __init__(
        self,
        d_model: int,
        dropout: float,
        *,
        norm: Literal["layer", "rms"] = "layer",
        order: Literal["pre", "post"] = "post",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, d_model, eps)
        self.dropout = nn.Dropout(dropout)
        self.pre = order == "pre"

    def forward(self, x: Hidden, sublayer: Callable[[Hidden], tuple[Hidden, Extra]]) -> tuple[Hidden, Extra]:
        output, extra = sublayer(self.norm(x) if self.pre else x)
        x = x + self.dropout(output)
        return x if self.pre else self.norm(x), extra
