"""Scaled dot-product attention and the multi-head layer around it (Vaswani et al. 2017, §3.2)."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from triglot.errors import require
from triglot.layers.attend import attend, cast_once, fused_kernel_pays
from triglot.layers.cache import LayerCache, MemoryCache
from triglot.layers.linear import Linear
from triglot.layers.masks import check_mask, create_look_ahead_mask
from triglot.layers.norm import make_norm
from triglot.layers.positions import Rotation, rotate

Hidden = Float[Tensor, "batch length d_model"]
Heads = Float[Tensor, "batch heads length head_dim"]
Queries = Float[Tensor, "batch heads query head_dim"]
Held = Float[Tensor, "batch kv_heads held head_dim"]
Bias = Float[Tensor, "#batch heads query held"]


class Attention(NamedTuple):
    """What attention returns; `weights` are None where they were not asked for."""

    output: Float[Tensor, "batch query d_model"]
    weights: Float[Tensor, "batch heads query key"] | None


def attention_weights(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch heads key head_dim"],
    may_attend: Bool[Tensor, "*lead #query key"] | None = None,
    bias: Float[Tensor, "#batch heads query key"] | None = None,
) -> Float[Tensor, "batch heads query key"]:
    """softmax(Q Kᵀ / √head_dim + bias), in fp32, over the keys that `may_attend` allows; zeros where there are none."""
    scores = (query / math.sqrt(query.size(-1)) @ key.mT).float()  # scaled first: fp16 ends at 65,504
    if bias is not None:
        scores = scores + bias.float()
    if may_attend is None:
        return scores.softmax(-1).to(query.dtype)
    scores = scores.masked_fill(~may_attend, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~may_attend, 0.0).to(query.dtype)


class MultiHeadAttention(nn.Module):
    """Attention over `num_heads` projections of width `head_dim`, by default d_model / num_heads, side by side.

    With `num_kv_heads` below `num_heads`, groups of query heads share keys and values (Ainslie et al. 2023); the other
    options are those of `BlockOptions`. With `need_weights` the weights are written out (before dropout, so that rows
    sum to 1 in training too); without, the same output comes by whichever path is faster and they are None. `mask` is
    True where a query may attend to a key.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float = 0.1,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qkv_bias: bool | None = None,
        qk_norm: Literal["head", "width"] | None = None,
        norm_eps: float = 1e-5,
        scale: bool = True,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", "at least 1", d_model)
        require(num_heads >= 1, "num_heads", "at least 1", num_heads)
        require(0 <= dropout < 1, "dropout", "at least 0 and below 1", dropout)
        divisible = head_dim is not None or d_model % num_heads == 0
        require(divisible, "d_model", f"divisible by num_heads ({num_heads})", d_model)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        shared = num_kv_heads >= 1 and num_heads % num_kv_heads == 0
        require(shared, "num_kv_heads", f"a divisor of num_heads ({num_heads})", num_kv_heads)
        head_dim = d_model // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads, self.head_dim, self.scale = num_heads, num_kv_heads, head_dim, scale
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.query = Linear(d_model, width, bias=qkv_bias)
        self.key = Linear(d_model, kv_width, bias=qkv_bias)
        self.value = Linear(d_model, kv_width, bias=qkv_bias)
        self.output = Linear(width, d_model, bias=bias)
        widths = (head_dim, head_dim) if qk_norm == "head" else (width, kv_width)
        self.query_norm, self.key_norm = (make_norm("rms", one, norm_eps) if qk_norm else None for one in widths)
        self.dropout = dropout

    def forward(
        self,
        query: Float[Tensor, "batch query d_model"],
        key: Float[Tensor, "batch key d_model"],
        value: Float[Tensor, "batch key d_model"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        causal: bool = False,
        rotation: Rotation | None = None,
        bias: Bias | None = None,
        cache: LayerCache | MemoryCache | None = None,
        need_weights: bool = True,
    ) -> Attention:
        """`causal` says that `mask` is the look-ahead mask without its being written out; both together are refused.

        `bias` is added to the scores.
        """
        require(not causal or mask is None, "mask", "None when `causal` is set", mask)
        if mask is not None:
            check_mask(mask)
        query, key, value = cast_once(query, key, value)
        q = self.split(normalised(self.query(query), self.query_norm))
        if rotation is not None:
            q = rotate(q, rotation)
        if not self.scale:
            q = q * math.sqrt(self.head_dim)  # which whatever comes next divides by
        k, v = self.keys_and_values(key, value, rotation, cache)
        output, weights = self.attend(q, k, v, mask, causal, need_weights, bias)
        return Attention(self.output(output.transpose(1, 2).flatten(2)), weights)

    def keys_and_values(
        self, key: Hidden, value: Hidden, rotation: Rotation | None, cache: LayerCache | MemoryCache | None
    ) -> tuple[Held, Held]:
        if isinstance(cache, MemoryCache) and cache.held is not None:
            return cache.held
        k, v = self.split(normalised(self.key(key), self.key_norm)), self.split(self.value(value))
        if rotation is not None:
            k = rotate(k, rotation)
        return (k, v) if cache is None else cache.append(k, v)

    def attend(
        self, q: Queries, k: Held, v: Held, mask: Tensor | None, causal: bool, need_weights: bool, bias: Bias | None
    ) -> tuple[Queries, Float[Tensor, "batch heads query held"] | None]:
        dropout = self.dropout if self.training else 0.0
        if causal and bias is not None:
            mask, causal = create_look_ahead_mask(q.size(2), device=q.device), False
        if not need_weights and fused_kernel_pays(q, k):  # which gives zeros, too, where nothing may be attended to
            if bias is not None:
                mask = (bias if mask is None else torch.where(mask, bias, -math.inf)).to(q.dtype)
            grouped = self.num_kv_heads < self.num_heads
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
            )
            return mixed, None
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if not need_weights and dropout == 0.0 and bias is None and not torch.compiler.is_compiling():
            return attend(q, k, v, mask, causal=causal), None
        mask = create_look_ahead_mask(q.size(2), device=q.device) if causal else mask
        weights = attention_weights(q, k, mask, bias)
        return F.dropout(weights, dropout) @ v, weights if need_weights else None

    def split(self, x: Hidden) -> Heads:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, length, head_dim]


def normalised(x: Hidden, norm: nn.LayerNorm | nn.RMSNorm | None) -> Hidden:
    """`x`, or all of its parts that are as wide as the norm, normalised in the norm's own type."""
    if norm is None:
        return x
    parts = x.unflatten(2, (-1, norm.normalized_shape[0])).flatten(1, 2)
    return norm(parts.to(norm.weight.dtype)).view_as(x).to(x.dtype)
