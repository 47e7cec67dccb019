"""Attention whose weights nobody asked for, as processors like it: what `attention_weights` would give, faster.

Products are made in the queries' own type, of contiguous tensors; the softmax is in fp32 (in bf16 it is five times
slower at short lengths); masks are added rather than filled in (operations on bool are not vectorised); under the
look-ahead mask, blocks of queries leave out the keys that none of them may attend to; only the weights are kept.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries of one block under the look-ahead mask."""
FORBIDDEN = -1e30
"""Added to the score of a key that may not be attended to: its weight becomes exactly 0 beside any other's."""


def attend(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch heads key head_dim"],
    value: Float[Tensor, "batch heads key head_dim"],
    mask: Bool[Tensor, "*lead #query key"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "batch heads query head_dim"]:
    """softmax(Q Kᵀ / √head_dim) V over the keys that `mask` allows, or all up to the query's own place if `causal`.

    A query that may attend to nothing gets zeros.
    """
    allowed = mask
    if causal:
        allowed = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril()
    scores_type = torch.promote_types(query.dtype, torch.float32)
    bias = None if allowed is None else torch.where(allowed, 0.0, FORBIDDEN).to(scores_type)
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
            query / math.sqrt(query.size(-1)), key.to(query.dtype), value.to(query.dtype), bias, causal
        )
    if mask is not None:
        output = output * mask.any(-1, keepdim=True).to(output.dtype)
    return output


def _blocks(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    if not causal:
        return [(slice(0, queries), slice(0, keys))]
    return [
        (slice(first, min(first + BLOCK, queries)), slice(0, min(first + BLOCK, queries)))
        for first in range(0, queries, BLOCK)
    ]


class _Attend(torch.autograd.Function):
    """softmax(Q Kᵀ + bias) V in blocks of queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        wide = torch.promote_types(query.dtype, torch.float32)
        outputs, kept = [], []
        for rows, columns in _blocks(query.size(2), key.size(2), causal):
            scores = (query[:, :, rows] @ key[:, :, columns].mT).to(wide)
            if bias is not None:
                scores += bias[..., columns] if bias.size(-2) == 1 else bias[..., rows, columns]
            weights = scores.softmax(-1).to(query.dtype)
            outputs.append(weights @ value[:, :, columns])
            kept.append(weights)
        ctx.causal = causal
        ctx.save_for_backward(query, key, value, *kept)
        return _joined(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        grad, wide = grad.contiguous(), torch.promote_types(query.dtype, torch.float32)
        blocks = _blocks(query.size(2), key.size(2), ctx.causal)
        query_grads: list[Tensor] = []
        key_grad, value_grad = None, None
        for (rows, columns), weights in reversed(list(zip(blocks, kept, strict=True))):  # the first has all keys
            of_weights = (grad[:, :, rows] @ value[:, :, columns].mT).to(wide)
            of_scores = torch._softmax_backward_data(of_weights, weights.to(wide), -1, wide).to(query.dtype)
            query_grads.insert(0, of_scores @ key[:, :, columns])
            of_key, of_value = of_scores.mT @ query[:, :, rows], weights.mT @ grad[:, :, rows]
            if key_grad is None or value_grad is None:
                key_grad, value_grad = of_key, of_value
            else:
                key_grad[:, :, columns] += of_key
                value_grad[:, :, columns] += of_value
        assert key_grad is not None
        assert value_grad is not None
        return _joined(query_grads), key_grad, value_grad, None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
