"""Normalisation, and the residual connection that places it before or after a sublayer."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from triglot.layers.dropout import Dropout

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


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last axis; on a processor by a gradient of our own, in a third of the time."""

    def forward(self, x: Hidden) -> Hidden:
        if x.device.type != "cpu" or x.dtype != self.weight.dtype or torch.compiler.is_compiling():
            return super().forward(x)
        normalised: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch's
        return normalised


class _RMSNorm(torch.autograd.Function):
    """y = x / √(mean x² + ε) · w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        weight_grad = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(x.size(-1))
        return grad.addcmul_(unit, along, value=-1).mul_(scale), weight_grad, None


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
