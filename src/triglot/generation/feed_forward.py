"""The feed-forward of a prepared model (`prepared.py`): two products with an activation between them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from triglot.generation.int8 import KernelInt8
from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.activations import Activation, is_gated
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.packed import Packed, PackedFloat, Packer
from triglot.layers.vectors import filled_up, in_whole_vectors

Hidden = Float[Tensor, "rows d_model"]
FUSED = PackedFloat, KernelInt8
"""Projections that can have negative numbers become 0 as they come."""

_gelu_tanh = partial(torch.ops.aten.gelu_, approximate="tanh")
IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": _gelu_tanh,
    "silu": torch.ops.aten.silu_,
    "swiglu": torch.ops.aten.silu_,
    "geglu_tanh": _gelu_tanh,
}
"""What is done to all numbers, or to the gates."""
OPENS: dict[Activation, str] = {"swiglu": "silu", "geglu_tanh": "gelu_tanh"}
"""What the kernel calls it, where it is not called the same."""
COST = 16
"""What an activated number costs, in products."""


def activate_apart(x: Float[Tensor, "rows inner"], activation: Activation) -> Float[Tensor, "rows d_ff"]:
    """`layers.activations.activate`, each number's bits its own; may write over `x`."""
    if activation == "relu":
        return F.relu(x)
    if not is_gated(activation):
        return in_whole_vectors(filled_up(x), IN_PLACE[activation])[:, : x.size(1)]
    gate, up = x.chunk(2, dim=-1)
    return in_whole_vectors(filled_up(gate).contiguous(), IN_PLACE[activation])[:, : up.size(1)] * up


def activate_by_kernel(
    x: Float[Tensor, "rows inner"], activation: Activation, dtype: torch.dtype
) -> Float[Tensor, "rows d_ff"]:
    """The same in `dtype` by a kernel, of a multiple of LANES numbers."""
    gated = is_gated(activation)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.size(0), x.size(1) // (1 + gated), dtype=dtype)
    given = {"Input": x.dtype, "Output": dtype, "OPEN": OPENS.get(activation, activation), "GATED": int(gated)}
    run = kernel("activations.cpp", "activate", "ppnnnn", **given)
    run(address(x), address(y), *y.shape, x.stride(0), threads_for(x.size(0), y.numel() * COST))
    return y


class PreparedFeedForward:
    """Two products with an activation between them."""

    def __init__(self, inner: Packed, outer: Packed, activation: Activation) -> None:
        self.inner, self.outer, self.activation = inner, outer, activation
        self.by_kernel = False

    @classmethod
    def of(cls, feed: PointwiseFeedForward, packer: Packer) -> "PreparedFeedForward":
        """Its projections packed."""
        inner, outer = (packer.beside([part]) for part in (feed.inner, feed.outer))
        return cls(inner, outer, feed.activation)

    def __call__(self, x: Hidden) -> Hidden:
        inner, outer = self.inner, self.outer
        if self.activation == "relu" and isinstance(inner, FUSED) and isinstance(outer, FUSED):
            return outer.narrow(inner.narrow(x, "relu"))  # which is the same in bf16
        opened = inner.narrow(x)
        if self.by_kernel and opened.size(1) % (2 * LANES) == 0:
            return outer.narrow(activate_by_kernel(opened, self.activation, outer.dtype))
        return outer.narrow(activate_apart(opened.float(), self.activation))
