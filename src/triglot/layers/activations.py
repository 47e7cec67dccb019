"""What a feed-forward layer does to each number, or half of them to the other half, and how their gradient comes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from triglot.layers.linear import project

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu_tanh"]

Parts = Sequence[Float[Tensor, "*lead d_ff"]]
"""What an activation reads: one tensor, or one that opens and closes another."""
ATEN = torch.ops.aten
PLAIN: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, lambda grad, x, into: ATEN.threshold_backward.grad_input(grad, x, 0, grad_input=into)),
    "gelu": (F.gelu, lambda grad, x, into: ATEN.gelu_backward.grad_input(grad, x, grad_input=into)),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        lambda grad, x, into: ATEN.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=into),
    ),
    "silu": (F.silu, lambda grad, x, into: ATEN.silu_backward.grad_input(grad, x, grad_input=into)),
}
PLAIN |= {"swiglu": PLAIN["silu"], "geglu_tanh": PLAIN["gelu_tanh"]}
"""What becomes of the first part, and how its gradient comes from the gradient of that."""


def is_gated(activation: Activation) -> bool:
    """Whether the first projection is twice as wide, one half opening or closing the other."""
    return activation in ("swiglu", "geglu_tanh")


def parts_of(x: Float[Tensor, "*lead inner"], activation: Activation) -> Parts:
    """The halves of `x`, or all of it."""
    return x.chunk(2, dim=-1) if is_gated(activation) else (x,)


def activate(x: Float[Tensor, "*lead inner"], activation: Activation) -> Float[Tensor, "*lead d_ff"]:
    """relu(x), gelu(x) by erf or tanh, silu(x), or silu(x₁)·x₂ or gelu(x₁)·x₂ with x₁ and x₂ the halves of x."""
    first, *second = parts_of(x, activation)
    opened = PLAIN[activation][0](first)
    return opened * second[0] if second else opened


def activate_again(
    parts: Parts, activation: Activation
) -> tuple[Float[Tensor, "*lead d_ff"], Callable[[Tensor, Parts], None]]:
    """The activation, and what makes the gradients of its parts of its own, which it may write over."""
    forward, backward = PLAIN[activation]
    opened = forward(parts[0])

    def gradient(grad: Tensor, into: Parts) -> None:
        if len(parts) > 1:
            torch.mul(grad, opened, out=into[1])
            grad *= parts[1]
        backward(grad, parts[0], into[0])

    return (opened * parts[1] if len(parts) > 1 else opened), gradient


class ActivatedTwice(torch.autograd.Function):
    """W₂ activation(h) + b that keeps h alone and activates it anew for the gradient.

    Activations are the largest tensors of a block: a processor makes them as fast as it would read them back.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.activation, ctx.biased = activation, bias is not None
        return project(activate(h, activation), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        h, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        activated, gradient = activate_again(parts_of(h, ctx.activation), ctx.activation)
        of_weight = rows.T @ activated.flatten(0, -2)
        del activated  # where memory peaks
        of_activated = grad @ weight
        of_h = torch.empty_like(h) if is_gated(ctx.activation) else of_activated
        gradient(of_activated, parts_of(of_h, ctx.activation))
        return of_h, of_weight, rows.sum(0) if ctx.biased else None, None
