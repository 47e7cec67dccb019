"""Projections x Wᵀ + b; on a processor in bf16 the product adds b itself, where PyTorch writes it out first."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def has_onednn() -> bool:
    """Whether oneDNN is here with products of bf16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def project(
    x: Float[Tensor, "*lead inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "*lead outputs"]:
    """x Wᵀ + b, all of one type, by the path that writes the result once; it has no gradient by itself."""
    if bias is None or x.device.type != "cpu" or x.dtype != torch.bfloat16 or not has_onednn():
        return F.linear(x, weight, bias)
    projected: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return projected


class Linear(nn.Linear):
    """`nn.Linear`, to the bit; under bf16 autocast on a processor by a gradient of our own."""

    def forward(self, x: Float[Tensor, "*lead inputs"]) -> Float[Tensor, "*lead outputs"]:
        plain = type(x) is Tensor and type(self.weight) is nn.Parameter  # and no part of a tensor of several machines
        if self.bias is None or not plain or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return super().forward(x)
        x, weight, bias = (part.to(torch.bfloat16) for part in (x, self.weight, self.bias))
        with torch.autocast("cpu", enabled=False):  # it would undo the casts in the gradient
            projected: Tensor = _Project.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch's
        return projected


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return project(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            grad @ weight if of_x else None,
            rows.T @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
