"""Muon (Jordan et al. 2024) for matrices, AdamW for the rest, as one optimizer.

A matrix moves by its momentum, orthogonalised by Newton–Schulz iterations and scaled so that its entries are as large
as those of an AdamW update (0.2 · √max(rows, columns), Liu et al. 2025, §2.2): both share one learning rate and decay.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose slope at zero is steepest; it takes singular values to about 1, not exactly to 1."""
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalise(
    matrices: Float[Tensor, "number rows columns"], dtype: torch.dtype
) -> Float[Tensor, "number rows columns"]:
    """The nearest orthogonal matrices (U Vᵀ of U S Vᵀ), roughly: X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, all at once."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over `matrices` (of rank 2, or stacks of rank 3), AdamW over the groups of `rest`; one state, one step."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        **adamw: Any,
    ) -> None:
        self.adamw, self.dtype = torch.optim.AdamW(rest, lr=lr, **adamw), dtype
        super().__init__([{"params": list(matrices)}], {"lr": lr, "weight_decay": weight_decay})
        self.param_groups += self.adamw.param_groups
        self._share()

    def _share(self) -> None:
        """AdamW works on this optimizer's own state and groups, which loading replaces."""
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put state and settings back."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Update every weight that has a gradient."""
        group = self.param_groups[0]
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                alike[weight.shape].append(weight)
        for weights in alike.values():
            self._update(weights, group["lr"], group["weight_decay"])
        self.adamw.step()

    def _update(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        """Weights of one shape, orthogonalised together."""
        grads = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, MOMENTUM)  # Nesterov's look ahead
        updates = orthogonalise(torch.stack(ahead).flatten(0, -3), self.dtype).view(len(weights), *weights[0].shape)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates.unbind(), alpha=-lr * 0.2 * max(weights[0].shape[-2:]) ** 0.5)
