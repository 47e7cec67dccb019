"""A decoder-only model's blocks and projection as they read one token of one text: what `compiled.py` compiles.

The blocks are the model's own (`blocks.py`); what they are given instead is projections that read few bytes, and keys
and values that are attended to where they stand.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triglot.blocks import Block
from triglot.layers.attention import Queries
from triglot.layers.cache import LayerCache
from triglot.layers.packed import LEAST, Precision
from triglot.layers.positions import Rotation
from triglot.models.decoder_only import DecoderLLM

Row = Float[Tensor, "1 1 width"]
Held = Float[Tensor, "before kv_heads head_dim"]
Own = Float[Tensor, "kv_heads head_dim"]
Turn = tuple[Tensor, ...]
"""The parts of a `Rotation`."""


class RowLinear(nn.Module):
    """x Wᵀ + b of one row, in fp32, whatever the weights are held in: int8 with a scale for each output, bf16, fp32."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None, precision: Precision) -> None:
        super().__init__()
        scale, weight = None, weight.detach().float()
        if precision == "int8":
            scale = weight.abs().amax(1).clamp_min(LEAST) / 127
            weight = (weight / scale[:, None]).round().to(torch.int8)
        elif precision == "bf16":
            weight = weight.to(torch.bfloat16)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Row) -> Float[Tensor, "1 1 outputs"]:
        row = written(x.flatten())
        # Two sums in one loop: neither waits for its own last addition.
        y = torch.cat([(row * part).sum(1) for part in self.weight.chunk(2)])
        y = y if self.scale is None else y * self.scale
        return (y if self.bias is None else y + self.bias)[None, None]


def written(x: Tensor) -> Tensor:
    """`x`, which the compiler would else make anew for each output that is made of it."""
    return torch.as_strided(x, x.shape, x.stride())


class Token(LayerCache):
    """One layer's keys and values of the tokens before one, and where its own are written."""

    def __init__(self, before: tuple[Held, Held], own: tuple[Own, Own]) -> None:
        self.before, self.own = before, own

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a token's keys and values [1, kv_heads, 1, head_dim]; only these are returned."""
        for own, new in zip(self.own, (keys, values), strict=True):
            own.copy_(new[0, :, 0])
        return keys, values

    def attend(
        self, q: Queries, k: Tensor, v: Tensor, _mask: Any, _causal: bool, _need_weights: bool, bias: Tensor | None
    ) -> tuple[Queries, Tensor | None]:
        """`MultiHeadAttention.attend` of one query to all before it and itself."""
        keys, values = self.before
        groups, width = q.size(1) // k.size(1), q.size(3)
        query = written(q.view(-1, groups, width) / math.sqrt(width))
        before, own = (query * keys[:, :, None]).sum(-1), (query * k.view(-1, 1, width)).sum(-1)
        scores = torch.cat([before, own[None]])  # [length, kv_heads, group]
        if bias is not None:
            scores = scores + bias[0, :, 0].T.view_as(scores)
        weights = (scores - scores.amax(0)).exp()[..., None]
        mixed = (weights[:-1] * values[:, :, None]).sum(0) + weights[-1] * v.view(-1, 1, width)
        return (mixed / weights.sum(0)).view(q.shape), None  # divided once, and not each weight


class OneToken(nn.Module):
    """A block that reads one token of one text, its projections replaced."""

    def __init__(self, block: Block, precision: Precision) -> None:
        super().__init__()
        self.block = with_row_linears(block, precision)

    def forward(
        self,
        x: Row,
        before: tuple[Held, Held],
        own: tuple[Own, Own],
        rotation: Turn | None,
        position_bias: Tensor | None,
    ) -> Row:
        token, attention = Token(before, own), self.block.self_attention
        attention.attend = token.attend  # type: ignore[method-assign,assignment]  # of this copy alone
        return self.block.run(
            x,
            rotation=None if rotation is None else Rotation(*rotation),
            position_bias=position_bias,
            cache=token,
        ).x


class Head(nn.Module):
    """The norm after the last block and the projection; logits of what is banned are −∞."""

    def __init__(self, model: DecoderLLM, precision: Precision, banned: Sequence[int]) -> None:
        super().__init__()
        bias = torch.zeros(model.vocab_size) if model.lm_head.bias is None else model.lm_head.bias.detach().clone()
        bias[list(banned)] = -math.inf
        self.norm, self.scale = copy.deepcopy(model.final_norm), model.output_scale
        self.projection = RowLinear(model.lm_head.weight, bias, precision)

    def forward(self, x: Row) -> Float[Tensor, "1 1 vocab"]:
        hidden = self.norm(x)
        return self.projection(hidden if self.scale is None else hidden * self.scale)


def with_row_linears(block: Block, precision: Precision) -> Block:
    """A copy with RowLinear in the place of each nn.Linear."""
    block = copy.deepcopy(block)
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, RowLinear(module.weight, module.bias, precision))
    return block.eval()
