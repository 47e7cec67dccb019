"""Normalisation by the root of the mean square (Zhang & Sennrich 2019), with a gradient for processors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Hidden = Float[Tensor, "batch length d_model"]


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last axis; on a processor by a gradient of our own, in a third of the time."""

    def forward(self, x: Hidden) -> Hidden:
        if x.device.type != "cpu" or x.dtype != self.weight.dtype or torch.compiler.is_compiling():
            return super().forward(x)
        normalised: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch's
        return normalised


def inverse_rms(x: Float[Tensor, "*rows d_model"], eps: Float[Tensor, ""]) -> Float[Tensor, "*rows 1"]:
    """1 / √(mean x² + ε) of each row, in three operations."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(eps, norm, norm, value=1 / x.size(-1)).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = x / √(mean x² + ε) · w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, torch.tensor(eps, dtype=x.dtype))
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
