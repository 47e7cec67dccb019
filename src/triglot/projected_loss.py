"""The loss of tokens from what stands before the projection, as training takes it: `losses.py` says what it is."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from triglot.losses import IGNORED, TokenLoss

CHUNK = (1 << 21, 1 << 26)
"""Logits that are made at a time: on a processor as many as its caches hold, on a GPU as many as keep it busy."""


def projected_cross_entropy(
    hidden: Float[Tensor, "*rows d_model"],
    projection: nn.Linear,
    targets: Int[Tensor, "*lead"],
    *,
    label_smoothing: float = 0.0,
    r_drop: float | None = None,
) -> TokenLoss:
    """`token_cross_entropy(projection(hidden), …)` without ever holding the logits of all tokens.

    Logits are made a chunk at a time and turned into gradients on the way (as in Wijmans et al. 2024), so that the
    largest tensor of a step is never written out; tokens that are not scored are not projected at all.

    With `r_drop`, `hidden` has the batch twice, one behind the other, under different dropout: the loss is the mean of
    both, and in the total stands r_drop / 4 · (KL(p‖q) + KL(q‖p)) beside it (R-Drop, Liang et al. 2021, half of eq. 4).
    """
    copies = 1 if r_drop is None else 2
    flat, wanted = hidden.reshape(copies, -1, hidden.size(-1)), targets.flatten()
    scored = (wanted != IGNORED).nonzero()[:, 0]
    if len(scored) < len(wanted):
        flat, wanted = flat.index_select(1, scored), wanted[scored]
    on, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(on):
        dtype = torch.get_autocast_dtype(on)
    with torch.autocast(on, enabled=False):
        total, nll = _ProjectedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's
            flat.to(dtype), projection.weight, projection.bias, wanted, label_smoothing, r_drop or 0.0
        )
    return TokenLoss(total, nll, torch.tensor(len(wanted), device=hidden.device))


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Σ of the total and of the plain loss; gradients are made in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, smoothing: float, r_drop: float
    ) -> tuple[Tensor, Tensor]:
        needed = any(ctx.needs_input_grad[:3])
        matrix, offsets = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        grads = [torch.zeros_like(one) if needed and one is not None else None for one in (hidden, weight, bias)]
        total, nll = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        copies = hidden.size(0)
        size = max(1, CHUNK[hidden.device.type == "cuda"] // (weight.size(0) * copies))
        for first in range(0, hidden.size(1), size):
            rows, picked = hidden[:, first : first + size], wanted[first : first + size].expand(copies, -1)[..., None]
            log_p = F.linear(rows, matrix, offsets).log_softmax(-1, dtype=torch.float32)
            chunk_nll = -log_p.gather(2, picked).sum() / copies
            nll += chunk_nll
            total += (1 - smoothing) * chunk_nll
            if smoothing:
                total -= smoothing * log_p.mean(2).sum() / copies
            divergence = _divergence(log_p, r_drop / 4) if r_drop else None
            if divergence is not None:
                total += divergence.total
            if needed:
                of_logits = _of_logits(log_p, picked, smoothing)
                if divergence is not None:
                    of_logits = divergence.of_logits.add_(of_logits, alpha=1 / copies)
                _add_gradients(grads, first, rows, matrix, of_logits)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if one is None else one.mul_(grad) for one in ctx.saved_tensors), None, None, None)


def _of_logits(log_p: Tensor, picked: Tensor, smoothing: float) -> Tensor:
    """softmax − (1 − ε)·one-hot − ε/V, in the place of `log_p`."""
    gradient = log_p.exp_()
    if smoothing:
        gradient -= smoothing / gradient.size(-1)
    return gradient.scatter_add_(2, picked, torch.full_like(picked, -(1 - smoothing), dtype=gradient.dtype))


class _Divergence(NamedTuple):
    total: Tensor
    of_logits: Tensor


def _divergence(log_p: Float[Tensor, "2 rows vocab"], weight: float) -> _Divergence:
    """weight · Σ (KL(p‖q) + KL(q‖p)), p and q being the two copies, with its gradient by the logits of both."""
    gap = (log_p[0] - log_p[1]).mul_(weight)
    p, q = log_p.exp()
    there, back = (p * gap).sum(-1, keepdim=True), -(q * gap).sum(-1, keepdim=True)
    apart = (p - q).mul_(weight)
    of_logits = torch.stack([p.mul_(gap - there).add_(apart), q.mul_(-gap - back).sub_(apart)])
    return _Divergence((there + back).sum(), of_logits)


def _add_gradients(grads: list[Tensor | None], first: int, rows: Tensor, matrix: Tensor, of_logits: Tensor) -> None:
    of_hidden, of_weight, of_bias = grads
    if of_bias is not None:
        of_bias += of_logits.sum((0, 1))
    of_logits = of_logits.to(rows.dtype)
    if of_hidden is not None:
        of_hidden[:, first : first + rows.size(1)] = of_logits @ matrix
    if of_weight is not None:
        of_weight += of_logits.flatten(0, 1).T @ rows.flatten(0, 1)
