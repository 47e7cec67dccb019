"""A decoder-only model's blocks and projection as they read one token of each text: what `compiled.py` compiles.

The blocks are the model's own (`blocks.py`), with other parts: projections that read few bytes, attention and experts
of a few rows, written so that the compiler makes few loops of them, since threads wait for each other after each.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.blocks import Block
from triglot.decoding.sampling import BLOCK
from triglot.generation.int4 import KernelInt4
from triglot.generation.prepared import filled_up_projection
from triglot.layers.activations import activate
from triglot.layers.attention import Attention, MultiHeadAttention, normalised
from triglot.layers.embedding import Embedding
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.packed import LEAST, Precision
from triglot.layers.positions import Rotation, signed, turned
from triglot.layers.routing import choose
from triglot.models.decoder_only import DecoderLLM

Rows = Float[Tensor, "rows 1 width"]
Held = Float[Tensor, "before rows kv_heads head_dim"]
Own = Float[Tensor, "rows kv_heads head_dim"]
Module = TypeVar("Module", bound=nn.Module)
Turn = tuple[Tensor, ...]
"""The parts of a `Rotation`."""
LANES = 16
"""Outputs whose sums are taken side by side."""
LONGEST_SUM = 4096
"""Numbers that are added up one after another."""
FEW = 300
"""Sums that are more than so many times as long as they are many are each shared by threads, if the compiler can."""


class RowLinear(nn.Module):
    """x Wᵀ + b of few rows, in fp32, whatever weights are held in: bf16, fp32.

    They are held as they are read, for LANES outputs at a time: a vector of sums, one for each, needs no adding up.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "*experts outputs inputs"],
        bias: Float[Tensor, "*experts outputs"] | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.outputs = weight.size(-2)
        weight = weight.detach().to(torch.bfloat16 if precision == "bf16" else torch.float32)
        weight = F.pad(weight, (0, 0, 0, -self.outputs % LANES)).unflatten(-2, (-1, LANES))
        self.register_buffer("weight", weight.transpose(-1, -2).contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Rows, expert: Int[Tensor, "1"] | None = None) -> Float[Tensor, "rows 1 outputs"]:
        """By the weights, or those of one `expert`, which are read where they stand."""
        rows = written(x.flatten(1)).unbind()
        weight, bias = of_expert(expert, self.weight, self.bias)
        # One loop over the weights for all rows.
        parts = weight.chunk(in_turns(len(weight), weight.size(1), len(x)))
        sums = [torch.cat([total(row, part) for part in parts]) for row in rows]
        y = torch.stack(sums).flatten(1)[:, : self.outputs]
        return (y if bias is None else y + bias)[:, None]


def of_expert(expert: Int[Tensor, "1"] | None, *parts: Any) -> Any:
    """All of these parts of a layer, or what one `expert` has of them; what is None stays so."""
    return [part if part is None or expert is None else part.index_select(0, expert)[0] for part in parts]


def total(
    row: Float[Tensor, " inputs"], weight: Float[Tensor, "vectors inputs lanes"]
) -> Float[Tensor, "vectors lanes"]:
    """Sums of products; long ones in parts, which the compiler would else make by a function, and one row's not."""
    parts = zip(row.split(LONGEST_SUM), weight.split(LONGEST_SUM, 1), strict=True)
    return functools.reduce(torch.add, [(some[:, None] * part).sum(1) for some, part in parts])


def in_turns(vectors: int, inputs: int, rows: int) -> int:
    """How many vectors of sums a loop makes in turns, so that none of them waits for its last addition.

    Not so many that the compiler had threads share the sums, which it does where they are few and long.
    """
    threads = torch.get_num_threads()
    shared = (some for some in (4, 3, 2) if vectors % (some * threads) == 0 and vectors // some * FEW >= inputs)
    return 1 if rows > 1 else next(shared, 1)


class WholeLinear(nn.Module):
    """x Wᵀ + b of few rows in whole numbers: weights of 8 bits, rows of 16 at most, a scale for each output and row.

    Compilers know such sums (of two products at a time; with VNNI one instruction), and no order gives another one.
    """

    weight: Tensor
    scale: Tensor
    largest: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Float[Tensor, "*experts outputs inputs"], bias: Float[Tensor, "*experts outputs"] | None
    ) -> None:
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(-1).clamp_min(LEAST) / 127
        whole = (weight / scale[..., None]).round()
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("scale", scale)
        # So that no sum is more than 32 bits.
        most = torch.iinfo(torch.int32).max / whole.abs().sum(-1, dtype=torch.float64).amax()
        self.register_buffer("largest", most.clamp_max(torch.iinfo(torch.int16).max).floor().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Rows, expert: Int[Tensor, "1"] | None = None) -> Float[Tensor, "rows 1 outputs"]:
        """By the weights, or those of one `expert`, which are read where they stand."""
        weight, scale, bias = of_expert(expert, self.weight, self.scale, self.bias)
        rows = written(x.flatten(1))
        step = rows.abs().amax(1, keepdim=True).clamp_min(LEAST) / self.largest
        whole = written((rows / step).round().short())
        # One loop over the weights for all rows.
        outputs, inputs = weight.shape
        parts = weight.chunk(in_turns(outputs, inputs, len(x)))
        sums = [torch.cat([(row.int() * part.int()).sum(1, dtype=torch.int32) for part in parts]) for row in whole]
        y = torch.stack(sums).float() * scale * step
        return (y if bias is None else y + bias)[:, None]


def row_linear(
    weight: Float[Tensor, "*experts outputs inputs"],
    bias: Float[Tensor, "*experts outputs"] | None,
    precision: Precision,
) -> nn.Module:
    """x Wᵀ + b of few rows; in whole numbers of eight bits where those of four do not fit."""
    if precision == "int4" and KernelInt4.takes(weight):
        return KernelInt4(weight, bias)
    return WholeLinear(weight, bias) if precision in ("int8", "int4") else RowLinear(weight, bias, precision)


class RowNorm(nn.Module):
    """`nn.LayerNorm`, its sums written out: how the compiler takes a variance depends on how many rows there are."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Rows) -> Rows:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return normed * self.weight + self.bias


class RowExperts(nn.Module):
    """`MixtureOfExperts` of few rows, one after another."""

    selection_bias: Tensor | None

    def __init__(self, moe: MixtureOfExperts, precision: Precision) -> None:
        super().__init__()
        self.choose = functools.partial(choose, router=moe.kind, k=moe.k, renormalize=moe.renormalize)
        self.activation, self.k = moe.activation, moe.k
        self.register_buffer("selection_bias", moe.selection_bias)
        self.router = RowLinear(moe.router.weight, moe.router.bias, "fp32")
        self.inner = row_linear(moe.inner, moe.inner_bias, precision)
        self.outer = row_linear(moe.outer, moe.outer_bias, precision)
        self.shared = None if moe.shared is None else with_rows(moe.shared, precision)

    def forward(self, x: Rows) -> Rows:
        choice = self.choose(self.router(x), torch.ones(len(x), 1, dtype=torch.bool), bias=self.selection_bias)
        y = torch.zeros_like(x) if self.shared is None else self.shared(x)
        parts = zip(x.split(1), y.split(1), choice.experts.flatten(0, 1), choice.weights.flatten(0, 1), strict=True)
        return torch.cat([self.mix(*of_row) for of_row in parts])

    def mix(
        self,
        x: Float[Tensor, "1 1 width"],
        y: Float[Tensor, "1 1 width"],
        experts: Int[Tensor, " k"],
        weights: Float[Tensor, " k"],
    ) -> Float[Tensor, "1 1 width"]:
        """What the experts of one row say, weighted, and `y`."""
        for rank in range(self.k):
            inner = activate(self.inner(x, experts[rank, None]), self.activation)
            y = y + weights[rank] * self.outer(inner, experts[rank, None])
        return y


def written(x: Tensor) -> Tensor:
    """`x`, row by row, which the compiler would else make anew for each output that is made of it, or turn over."""
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


class Token(NamedTuple):
    """What a layer has read of each text before one token, and where it writes what it reads of that."""

    before: tuple[Held, Held]
    """Keys and values."""
    own: tuple[Own, Own]


class OneTokenAttention(nn.Module):
    """What `MultiHeadAttention` of one token of each text is made of, whatever its products are."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        self.scale = self.head_dim**-0.5 if attention.scale else 1.0

    def parts(self, x: Rows, rotation: Rotation | None) -> list[Float[Tensor, "rows some head_dim"]]:
        """Queries, keys and values, of a product that has them side by side, and a `signed` rotation."""
        sizes = [self.num_heads, self.kv_heads, self.kv_heads]
        heads = x.view(len(x), -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = (part.reshape(len(x), 1, -1) for part in heads.split(sizes, 1))
            parts = normalised(query, self.query_norm), normalised(key, self.key_norm), value
            heads = torch.cat(parts, -1).view_as(heads)
        if rotation is None:
            return list(heads.split(sizes, 1))
        both, value = heads.split([self.num_heads + self.kv_heads, self.kv_heads], 1)
        query, key = written(turned(both, rotation)).split(sizes[:2], 1)
        return [query, key, value]


class RowAttention(OneTokenAttention):
    """`MultiHeadAttention` of one token of each text, to what was read of it before and to itself."""

    def __init__(self, attention: MultiHeadAttention, precision: Precision) -> None:
        super().__init__(attention)
        parts = [attention.query, attention.key, attention.value]
        bias = None if attention.query.bias is None else torch.cat([part.bias for part in parts])
        self.inner = row_linear(torch.cat([part.weight for part in parts]), bias, precision)
        self.outer = row_linear(attention.output.weight, attention.output.bias, precision)

    def forward(
        self, x: Rows, *_: Any, cache: Token, rotation: Rotation | None, bias: Tensor | None, **_also: Any
    ) -> Attention:
        """As a block calls it, for which queries, keys and values are of the same row."""
        query, key, value = self.parts(self.inner(x), rotation)
        for place, new in zip(cache.own, (key, value), strict=True):
            place.copy_(new)
        # [rows, kv_heads, 1, before, head_dim]
        keys, values = (held.permute(1, 2, 0, 3)[:, :, None] for held in cache.before)
        query = query.unflatten(1, (self.kv_heads, -1))[:, :, :, None]
        before = written((query * keys).sum(-1)) * self.scale  # [rows, kv_heads, group, before]
        own = (query * key[:, :, None, None]).sum(-1) * self.scale
        if bias is not None:
            by_head = bias.expand(-1, self.num_heads, -1, -1).reshape(*before.shape[:3], -1)
            before, own = before + by_head[..., :-1], own + by_head[..., -1:]
        largest = torch.maximum(before.amax(-1, keepdim=True), own)
        before = (before - largest).exp()
        # A full vector for each, since fewer numbers than one would be given another exponential.
        own = written((own - largest).expand(*own.shape[:-1], LANES).exp())[..., :1]
        mixed = (before[..., None] * values).sum(3) + own * value[:, :, None]
        mixed = mixed / (before.sum(-1, keepdim=True) + own)  # once, and not each weight
        return Attention(self.outer(mixed.view(len(x), 1, -1)), None)


class Start(nn.Module):
    """The vectors of tokens, and the parts of their rotations, if they are turned."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        large = {id(embedding.tokens): embedding.tokens}  # which is not copied
        self.embedding = _with_rows(copy.deepcopy(embedding, large), "fp32").eval()

    def forward(self, tokens: Int[Tensor, " rows"], places: Int[Tensor, " rows"]) -> tuple[Tensor, ...]:
        x, rotation = self.embedding(tokens[:, None], places[:, None])
        return x, *(() if rotation is None else signed(rotation))


class OneToken(nn.Module):
    """A block that reads one token of each text, its parts replaced."""

    def __init__(self, block: Block, precision: Precision) -> None:
        super().__init__()
        self.block = with_rows(block, precision)

    def forward(
        self, x: Rows, before: tuple[Held, Held], own: tuple[Own, Own], rotation: Turn | None, bias: Tensor | None
    ) -> Rows:
        turn = None if rotation is None else Rotation(*rotation)
        return self.block.run(x, rotation=turn, position_bias=bias, cache=Token(before, own)).x  # type: ignore[arg-type]  # what RowAttention takes


class Blocks(nn.Module):
    """Some blocks, one after another, which attend to what is held of as many tokens as there are `places`."""

    def __init__(self, blocks: Sequence[OneToken]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x: Rows,
        places: Int[Tensor, " before"],
        held: Sequence[tuple[Held, Held]],
        own: Sequence[tuple[Own, Own]],
        rotation: Turn | None,
        bias: Tensor | None,
    ) -> Rows:
        before = places.size(0)
        for block, (keys, values), of_own in zip(self.blocks, held, own, strict=True):
            x = block(x, (keys[:before], values[:before]), of_own, rotation, bias)
        return x


class Head(nn.Module):
    """The norm after the last block and the projection; the logits of what is banned, or fills up, are −∞."""

    def __init__(self, model: DecoderLLM, precision: Precision, banned: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.scale = with_rows(model.final_norm, precision), model.output_scale
        of_logits = "int8" if precision == "int4" else precision  # four bits are too few
        self.projection = row_linear(*filled_up_projection(model.lm_head, banned), of_logits)

    def forward(self, x: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, filled_up_vocab], the first largest one of each row, and the rows' log Σ exp [rows, 1]."""
        hidden = self.norm(x)
        logits = self.projection(hidden if self.scale is None else hidden * self.scale)[:, 0]
        blocks = written(logits).unflatten(1, (-1, BLOCK))
        maxima = written(blocks.amax(2))
        top, block = maxima.amax(1, keepdim=True), maxima.argmax(1)
        starts = torch.arange(0, maxima.numel(), maxima.size(1))
        within = blocks.flatten(0, 1).index_select(0, block + starts).argmax(1)
        sums = written((blocks - top[..., None]).exp().sum(2)).sum(1, keepdim=True)
        # A full vector for each, since fewer numbers than one would be given another logarithm.
        return logits, block * BLOCK + within, top + written(sums.expand(-1, LANES).log())[:, :1]


def with_rows(module: Module, precision: Precision) -> Module:
    """A copy whose attention, experts, linear layers and norms are those of few rows."""
    return _with_rows(copy.deepcopy(module), precision).eval()  # type: ignore[return-value]  # all but its parts


def _with_rows(module: nn.Module, precision: Precision) -> nn.Module:
    match module:
        case MultiHeadAttention():
            return RowAttention(module, precision)
        case MixtureOfExperts():
            return RowExperts(module, precision)
        case nn.Linear():
            return row_linear(module.weight, module.bias, precision)
        case nn.LayerNorm():
            return RowNorm(module)
    for name, part in list(module.named_children()):
        setattr(module, name, _with_rows(part, precision))
    return module
