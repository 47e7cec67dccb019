"""Normalisation, and the residual connection that places it before or after a sublayer."""

from collections.abc import Callable
from typing import Literal, TypeVar, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triglot.layers.dropout import Dropout
from triglot.layers.rms_norm import RMSNorm

Extra = TypeVar("Extra")
Hidden = Float[Tensor, "batch length d_model"]


def make_norm(norm: Literal["layer", "rms"], d_model: int, eps: float) -> nn.LayerNorm | nn.RMSNorm:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis."""
    match norm:
        case "layer":
            return nn.LayerNorm(d_model, eps=eps)
        case "rms":
            return RMSNorm(d_model, eps=eps)
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
        self.dropout = Dropout(dropout)
        self.pre = order == "pre"

    def forward(self, x: Hidden, sublayer: Callable[[Hidden], tuple[Hidden, Extra]]) -> tuple[Hidden, Extra]:
        output, extra = sublayer(self.norm(x) if self.pre else x)
        x = add(x, self.dropout(output))
        return x if self.pre else self.norm(x), extra


def add(x: Hidden, output: Hidden) -> Hidden:
    """x + output; of another type, the output is cast first and added to in its place, which PyTorch does in two."""
    narrower = output.dtype != x.dtype == torch.promote_types(x.dtype, output.dtype)
    if not narrower or x.device.type != "cpu":
        return x + output
    return output.to(x.dtype).add_(x)
