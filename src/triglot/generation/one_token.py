"""A decoder-only model's blocks and projection as they read one token of one text: what `compiled.py` compiles.

The blocks are the model's own (`blocks.py`), with other parts: projections that read few bytes, attention and experts
of one row, written so that the compiler makes few loops of them, since threads wait for each other after each.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.blocks import Block
from triglot.generation.prepared import filled_up_projection
from triglot.layers.attention import Attention, MultiHeadAttention, normalised
from triglot.layers.feed_forward import activate
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.packed import LEAST, Precision
from triglot.layers.positions import Rotation
from triglot.layers.routing import choose
from triglot.models.decoder_only import DecoderLLM

Row = Float[Tensor, "1 1 width"]
Held = Float[Tensor, "before kv_heads head_dim"]
Own = Float[Tensor, "kv_heads head_dim"]
Module = TypeVar("Module", bound=nn.Module)
Turn = tuple[Tensor, ...]
"""The parts of a `Rotation`."""


class RowLinear(nn.Module):
    """x Wᵀ + b of one row, in fp32, whatever the weights are held in: int8 with a scale for each output, bf16, fp32."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "*experts outputs inputs"],
        bias: Float[Tensor, "*experts outputs"] | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        scale, weight = None, weight.detach().float()
        if precision == "int8":
            scale = weight.abs().amax(-1).clamp_min(LEAST) / 127
            weight = (weight / scale[..., None]).round().to(torch.int8)
        elif precision == "bf16":
            weight = weight.to(torch.bfloat16)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Row, expert: Int[Tensor, "1"] | None = None) -> Float[Tensor, "1 1 outputs"]:
        """By the weights, or those of one `expert`, which are read where they stand."""
        row = written(x.flatten())
        weight, scale, bias = (
            part if part is None or expert is None else part.index_select(0, expert)[0]
            for part in (self.weight, self.scale, self.bias)
        )
        assert weight is not None
        # Two sums in one loop: neither waits for its own last addition.
        y = torch.cat([(row * part).sum(1) for part in weight.chunk(2)])
        y = y if scale is None else y * scale
        return (y if bias is None else y + bias)[None, None]


class RowExperts(nn.Module):
    """`MixtureOfExperts` of one row."""

    selection_bias: Tensor | None

    def __init__(self, moe: MixtureOfExperts, precision: Precision) -> None:
        super().__init__()
        self.choose = partial(choose, router=moe.kind, k=moe.k, renormalize=moe.renormalize)
        self.activation, self.k = moe.activation, moe.k
        self.register_buffer("selection_bias", moe.selection_bias)
        self.router = RowLinear(moe.router.weight, moe.router.bias, "fp32")
        self.inner = RowLinear(moe.inner, moe.inner_bias, precision)
        self.outer = RowLinear(moe.outer, moe.outer_bias, precision)
        self.shared = None if moe.shared is None else with_rows(moe.shared, precision)

    def forward(self, x: Row) -> Row:
        choice = self.choose(self.router(x), torch.ones(1, 1, dtype=torch.bool), bias=self.selection_bias)
        y = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for rank in range(self.k):
            expert = choice.experts[0, 0, rank, None]
            inner = activate(self.inner(x, expert), self.activation)
            y = y + choice.weights[0, 0, rank] * self.outer(inner, expert)
        return y


def written(x: Tensor) -> Tensor:
    """`x`, which the compiler would else make anew for each output that is made of it."""
    return torch.as_strided(x, x.shape, x.stride())


class Token(NamedTuple):
    """What a layer has read before one token, and where it writes what it reads of that."""

    before: tuple[Held, Held]
    """Keys and values."""
    own: tuple[Own, Own]


class RowAttention(nn.Module):
    """`MultiHeadAttention` of one row, to what was read before and to itself."""

    def __init__(self, attention: MultiHeadAttention, precision: Precision) -> None:
        super().__init__()
        parts = [attention.query, attention.key, attention.value]
        bias = None if attention.query.bias is None else torch.cat([part.bias for part in parts])
        self.inner = RowLinear(torch.cat([part.weight for part in parts]), bias, precision)
        self.outer = RowLinear(attention.output.weight, attention.output.bias, precision)
        self.heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        self.scale = self.head_dim**-0.5 if attention.scale else 1.0

    def forward(
        self, x: Row, *_: Any, cache: Token, rotation: Rotation | None, bias: Tensor | None, **_also: Any
    ) -> Attention:
        """As a block calls it, for which queries, keys and values are of the same row."""
        query, key, value = self.project(x, rotation)
        for place, new in zip(cache.own, (key, value), strict=True):
            place.copy_(new)
        keys, values = (held.transpose(0, 1)[:, None] for held in cache.before)  # [kv_heads, 1, before, head_dim]
        query = query.view(self.kv_heads, -1, 1, self.head_dim)
        before = (query * keys).sum(-1) * self.scale  # [kv_heads, group, before]
        own = (query * key[:, None, None]).sum(-1) * self.scale
        if bias is not None:
            by_head = bias.view(*before.shape[:2], -1)
            before, own = before + by_head[..., :-1], own + by_head[..., -1:]
        largest = torch.maximum(before.amax(-1, keepdim=True), own)
        before, own = (before - largest).exp(), (own - largest).exp()
        mixed = (before[..., None] * values).sum(2) + own * value[:, None]
        mixed = mixed / (before.sum(-1, keepdim=True) + own)  # once, and not each weight
        return Attention(self.outer(mixed.view(1, 1, -1)), None)

    def project(self, x: Row, rotation: Rotation | None) -> list[Float[Tensor, "some head_dim"]]:
        """Queries, keys and values."""
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        heads = self.inner(x).view(-1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = (part.reshape(1, 1, -1) for part in heads.split(sizes))
            parts = normalised(query, self.query_norm), normalised(key, self.key_norm), value
            heads = torch.cat(parts, -1).view(-1, self.head_dim)
        if rotation is not None:
            both, value = heads.split([self.heads + self.kv_heads, self.kv_heads])
            query, key = written(turned(both, rotation)).split(sizes[:2])
            return [query, key, value]
        return list(heads.split(sizes))


def turned(heads: Float[Tensor, "some head_dim"], rotation: Rotation) -> Float[Tensor, "some head_dim"]:
    """`rotate` in one loop: halves change places by their numbers, and are not written side by side."""
    swapped = heads.view(len(heads), 2, -1).flip(1).view_as(heads)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(heads.size(1) // 2)
    return heads * rotation.cos[0] + swapped * (rotation.sin[0] * sign)


class OneToken(nn.Module):
    """A block that reads one token of one text, its parts replaced."""

    def __init__(self, block: Block, precision: Precision) -> None:
        super().__init__()
        self.block = with_rows(block, precision)

    def forward(
        self, x: Row, before: tuple[Held, Held], own: tuple[Own, Own], rotation: Turn | None, bias: Tensor | None
    ) -> Row:
        turn = None if rotation is None else Rotation(*rotation)
        return self.block.run(x, rotation=turn, position_bias=bias, cache=Token(before, own)).x  # type: ignore[arg-type]  # what RowAttention takes


class Head(nn.Module):
    """The norm after the last block and the projection; the logits of what is banned, or fills up, are −∞."""

    def __init__(self, model: DecoderLLM, precision: Precision, banned: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.scale = copy.deepcopy(model.final_norm), model.output_scale
        self.projection = RowLinear(*filled_up_projection(model.lm_head, banned), precision)

    def forward(self, x: Row) -> Float[Tensor, "1 1 filled_up_vocab"]:
        hidden = self.norm(x)
        return self.projection(hidden if self.scale is None else hidden * self.scale)


def with_rows(module: Module, precision: Precision) -> Module:
    """A copy whose attention, experts and linear layers are those of one row."""
    module = copy.deepcopy(module)
    _replace(module, precision)
    return module.eval()


def _replace(module: nn.Module, precision: Precision) -> None:
    for name, part in list(module.named_children()):
        match part:
            case MultiHeadAttention():
                setattr(module, name, RowAttention(part, precision))
            case MixtureOfExperts():
                setattr(module, name, RowExperts(part, precision))
            case nn.Linear():
                setattr(module, name, RowLinear(part.weight, part.bias, precision))
            case _:
                _replace(part, precision)
