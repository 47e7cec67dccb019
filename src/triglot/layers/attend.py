"""Attention whose weights nobody asked for, as processors like it: what `attention_weights` would give, faster.

Products are made in the queries' own type, of contiguous tensors; masks are added rather than filled in (operations on
bool are not vectorised); under the look-ahead mask, blocks of queries leave out the keys that none of them may attend
to; only the weights are kept, and every softmax is written over what it is made of: writing to memory that no cache
holds is what costs most. PyTorch's softmax of bf16 rows computes in fp32 inside: it gives what a softmax of fp32
copies does, at long rows in half the time and its gradient in a seventh, at short ones five times slower.
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

LONG, LONG_FOR_GRADIENT = 96, 32
"""Keys from which on the softmax, and its gradient, of bf16 rows beats that of fp32 copies."""


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
        output: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]  # torch's
            query, key.to(query.dtype), value.to(query.dtype), bias, causal
        )
    if mask is not None:
        output = output * mask.any(-1, keepdim=True).to(output.dtype)
    return output


def fused_kernel_pays(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's fused kernel is the faster path: on processors not at short lengths, least of all in bf16."""
    if query.device.type != "cpu":
        return True
    return key.size(2) > (128 if query.dtype == torch.float32 else 512)


def cast_once(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What three projections read, in autocast's type, which else each of them would cast for itself."""
    on = query.device.type
    if not torch.is_autocast_enabled(on):
        return query, key, value
    dtype = torch.get_autocast_dtype(on)
    cast = query.to(dtype)
    of_key = cast if key is query else key.to(dtype)
    return cast, of_key, of_key if value is key else value.to(dtype)


def _blocks(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    if not causal:
        return [(slice(0, queries), slice(0, keys))]
    return [
        (slice(first, min(first + BLOCK, queries)), slice(0, min(first + BLOCK, queries)))
        for first in range(0, queries, BLOCK)
    ]


class _Attend(torch.autograd.Function):
    """softmax(Q Kᵀ / √head_dim + bias) V in blocks of queries.

    What comes out, and the gradient of the queries, lies in memory as [batch, length, heads, head_dim], as the
    projections around want it.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        ctx.blocks = _blocks(query.size(2), key.size(2), causal)
        output, kept = _as_projected(query), []
        for rows, columns in ctx.blocks:
            block = query[:, :, rows]
            block = torch.div(block, math.sqrt(query.size(-1)), out=query.new_empty(block.shape))
            scores = block @ key[:, :, columns].mT
            scores = scores.to(_softmax_type(scores, LONG))
            if causal and bias is not None:  # every key before the block's first query is allowed
                scores[..., rows.start :] += bias[rows, rows.start : columns.stop].to(scores.dtype)
            elif bias is not None:
                scores += bias.to(scores.dtype)
            weights = torch._softmax(scores, -1, False, out=scores).to(query.dtype)
            output[:, :, rows] = weights @ value[:, :, columns]
            kept += [block, weights]
        ctx.save_for_backward(key, value, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        key, value, *kept = ctx.saved_tensors
        query_grad = _as_projected(grad)
        key_grad, value_grad = None, None
        for number in reversed(range(len(ctx.blocks))):  # the last one has all keys
            (rows, columns), (block, weights) = ctx.blocks[number], kept[2 * number : 2 * number + 2]
            of_output = grad[:, :, rows].contiguous()
            of_weights = of_output @ value[:, :, columns].mT
            of_weights = of_weights.to(_softmax_type(of_weights, LONG_FOR_GRADIENT))
            like = of_weights.dtype
            torch._softmax_backward_data(of_weights, weights.to(like), -1, like, grad_input=of_weights)
            of_scores = of_weights.to(block.dtype)
            torch.div(of_scores @ key[:, :, columns], math.sqrt(key.size(-1)), out=query_grad[:, :, rows])
            of_key, of_value = of_scores.mT @ block, weights.mT @ of_output
            if key_grad is None or value_grad is None:
                key_grad, value_grad = of_key, of_value
            else:
                key_grad[:, :, columns] += of_key
                value_grad[:, :, columns] += of_value
        assert key_grad is not None
        assert value_grad is not None
        return query_grad, key_grad, value_grad, None, None


def _softmax_type(rows: Tensor, long: int) -> torch.dtype:
    if rows.dtype == torch.bfloat16 and rows.size(-1) >= long:
        return rows.dtype
    return torch.promote_types(rows.dtype, torch.float32)


def _as_projected(like: Tensor) -> Tensor:
    batch, heads, length, head_dim = like.shape
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)
