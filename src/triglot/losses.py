"""What training minimises."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.config import ExpertOptions
from triglot.layers.routing import Routing

IGNORED = -100
"""The target of a position that is not scored."""


class TokenLoss(NamedTuple):
    """Sums over the scored tokens, in nats, and how many they were."""

    total: Float[Tensor, ""]
    """With label smoothing; differentiable."""
    nll: Float[Tensor, ""]
    """Without, detached: what perplexity is made of."""
    tokens: Int[Tensor, ""]


def token_cross_entropy(
    logits: Float[Tensor, "*lead vocab"], targets: Int[Tensor, "*lead"], *, label_smoothing: float = 0.0
) -> TokenLoss:
    """Σ (1 − ε)·(−log p_y) + ε·mean of −log p, in fp32; targets of −100 count nothing (Szegedy et al. 2016, §7)."""
    flat, wanted = logits.flatten(0, -2).float(), targets.flatten()
    nll = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    total = nll
    if label_smoothing:
        total = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return TokenLoss(total, nll.detach(), (wanted != IGNORED).sum())


class ExpertLosses(NamedTuple):
    """Means over the layers that have experts; zero where none has."""

    balance: Float[Tensor, ""]
    importance: Float[Tensor, ""]
    z: Float[Tensor, ""]

    def weighted(self, options: ExpertOptions) -> Float[Tensor, ""]:
        """What stands beside the mean loss of a token."""
        own = options.balance_weight * self.balance + options.z_weight * self.z
        return own + options.importance_weight * self.importance


def expert_losses(routing: Sequence[Routing]) -> ExpertLosses:
    """The losses of a model's routers, in units that do not depend on its depth; balance is 1 when perfect."""
    if not routing:
        return ExpertLosses(*[torch.zeros(())] * 3)
    balance, importance, z = (
        torch.stack([getattr(layer, name) for layer in routing]).mean() for name in ("balance", "importance", "z")
    )
    return ExpertLosses(balance, importance, z)
