"""The position-wise feed-forward layer (Vaswani et al. 2017, §3.3; gated: Shazeer 2020)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triglot.errors import require
from triglot.layers.activations import PLAIN, ActivatedTwice, Activation, activate, is_gated
from triglot.layers.dropout import Dropout
from triglot.layers.linear import Linear


class PointwiseFeedForward(nn.Module):
    """W₂ · dropout(activation(W₁ x)), at every position alike."""

    def __init__(
        self, d_model: int, d_ff: int, dropout: float = 0.1, *, activation: Activation = "relu", bias: bool = True
    ) -> None:
        super().__init__()
        for name, width in {"d_model": d_model, "d_ff": d_ff}.items():
            require(width >= 1, name, "at least 1", width)
        require(activation in PLAIN, "activation", f"one of {', '.join(PLAIN)}", activation)
        self.inner = Linear(d_model, 2 * d_ff if is_gated(activation) else d_ff, bias=bias)
        self.outer = Linear(d_ff, d_model, bias=bias)
        self.dropout = Dropout(dropout)
        self.activation: Activation = activation

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        inner = self.inner(x)
        if not self.activates_twice():
            return self.outer(self.dropout(activate(inner, self.activation)))
        weight = self.outer.weight.to(inner.dtype)
        bias = None if self.outer.bias is None else self.outer.bias.to(inner.dtype)
        with torch.autocast(inner.device.type, enabled=False):  # it would undo the casts in the gradient
            outer: Tensor = ActivatedTwice.apply(inner, weight, bias, self.activation)  # type: ignore[no-untyped-call]  # torch's
        return outer

    def activates_twice(self) -> bool:
        """Whether the gradient is better off without the activations kept; relu's own are all that it keeps anyway."""
        dropping = self.training and self.dropout.p > 0
        idle = not torch.is_grad_enabled() or torch.compiler.is_compiling()
        return self.activation != "relu" and not dropping and not idle
