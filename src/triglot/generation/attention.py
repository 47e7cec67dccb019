"""Attention of a prepared model (`prepared.py`): over a text's own tokens, and over a sentence's memory."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from triglot.generation.held import Held, Place, held_width, keep_rows
from triglot.generation.paged import New, Pages
from triglot.layers.attend import FORBIDDEN
from triglot.layers.attention import MultiHeadAttention
from triglot.layers.packed import PackedFloat, Packer
from triglot.layers.positions import RotaryPositions

Hidden = Float[Tensor, "rows d_model"]
KEYS = 256
"""Keys whose values are summed up at a time: a library sums more in parts that depend on how many there are in all."""
Turn = tuple[Tensor, Tensor]
"""Cosine and sine [rows, 1, head_dim] of each row's position, the first half of the sines with its sign changed."""


class Memory(NamedTuple):
    """What a decoder attends to besides its own text."""

    both: Float[Tensor, "2 layers sentences kv_heads length width"]
    """Keys and values."""
    bias: Float[Tensor, "sentences 1 1 length"]
    """What hides padding."""

    def fill(self, layer: int, rows: slice, both: Float[Tensor, "2 some kv_heads length head_dim"]) -> None:
        """Write what a layer has of some sentences."""
        own = self.both[:, layer, rows]
        own[:, :, :, : both.size(3)] = fill_up(both, own.size(4))

    def keep(self, rows: Int[Tensor, " kept"]) -> "Memory":
        """Those of these sentences, in this order."""
        return Memory(keep_rows(self.both, 2, rows), keep_rows(self.bias, 0, rows))


class PagedMemory(NamedTuple):
    """The same in pages."""

    pages: Pages
    bias: Float[Tensor, "sentences 1 1 length"]

    def fill(self, layer: int, rows: slice, both: Float[Tensor, "2 some kv_heads length head_dim"]) -> None:
        """Write what a layer has of some sentences."""
        self.pages.fill(rows, both[:, None], slice(layer, layer + 1))

    def keep(self, rows: Int[Tensor, " kept"]) -> "PagedMemory":
        """Those of these sentences, in this order."""
        self.pages.keep(rows)
        return self._replace(bias=keep_rows(self.bias, 0, rows))


class Part(NamedTuple):
    """Rows of a step whose texts are held together: the next tokens of each, as many, text by text."""

    place: Place
    held: Held | Pages
    memory: Memory | PagedMemory | None = None

    @property
    def rows(self) -> int:
        """How many."""
        return self.place.positions.numel()


class Whole(NamedTuple):
    """Rows that are texts of one length, one token behind another."""

    texts: int
    length: int
    bias: Float[Tensor, "#texts #heads #length length"]

    @property
    def real(self) -> Bool[Tensor, "texts length"]:
        """Which rows are no padding: those that may attend to themselves."""
        own = self.bias[:, 0].expand(self.texts, self.length, self.length).diagonal(dim1=1, dim2=2)
        return own > FORBIDDEN / 2


def attend(
    query: Float[Tensor, "rows_and_heads queries width"],
    keys: Float[Tensor, "rows_and_heads length width"],
    values: Float[Tensor, "rows_and_heads length width"],
    bias: Float[Tensor, "#rows #heads #queries length"],
) -> Float[Tensor, "rows_and_heads queries width"]:
    """softmax(Q Kᵀ + bias) V, queries scaled already; summed up KEYS by KEYS."""
    scores = products(query, keys.mT)
    scores.view(-1, len(query) // len(bias) if len(bias) > 1 else bias.size(1), *scores.shape[1:]).add_(bias)
    weights = scores.softmax(-1)
    if keys.size(1) <= KEYS:
        return products(weights, values)
    parts = zip(weights.split(KEYS, -1), values.split(KEYS, 1), strict=True)
    mixed = products(*next(parts))
    for some, of_some in parts:
        mixed += products(some, of_some)
    return mixed


def products(
    left: Float[Tensor, "pairs rows inner"], right: Float[Tensor, "pairs inner columns"]
) -> Float[Tensor, "pairs rows columns"]:
    """Matrix by matrix; one alone beside itself, since threads would share it and take its sums in another order."""
    if len(left) > 1:
        return torch.bmm(left, right)
    return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]


def fill_up(x: Float[Tensor, "*lead narrow"], width: int) -> Float[Tensor, "*lead width"]:
    """Heads of this width."""
    return x if x.size(-1) == width else F.pad(x, (0, width - x.size(-1)))


def in_order(x: Float[Tensor, "*sizes"], dtype: torch.dtype) -> Float[Tensor, "*sizes"]:
    """The same in this type, one number behind another, by one copy where it takes any."""
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def at_most(x: Float[Tensor, "filled d_model"], rows: int) -> Hidden:
    """The first rows; where these are all, without the call that a step of one text would wait for."""
    return x if x.size(0) == rows else x[:rows]


def at_least(x: Hidden, rows: int) -> Float[Tensor, "filled d_model"]:
    """The rows and as many zeros as are missing."""
    missing = rows - x.size(0)
    return x if missing <= 0 else F.pad(x, (0, 0, 0, missing))


def by_part(rows: Sequence[Tensor], parts: Sequence[Part]) -> Iterable[Sequence[Tensor]]:
    """Of each of these the rows of each part; where there is one part, without the calls that a step would wait for."""
    if len(parts) == 1:
        return [rows]
    sizes = [part.rows for part in parts]
    return zip(*(of_all.split(sizes) for of_all in rows), strict=True)


def turned(heads: Float[Tensor, "rows heads head_dim"], turn: Turn) -> Float[Tensor, "rows heads head_dim"]:
    """`layers.positions.rotate` for one token a row."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * turn[0], torch.cat([second, first], dim=-1), turn[1])


def scale_of(attention: MultiHeadAttention) -> float:
    """What scores are multiplied by."""
    return attention.head_dim**-0.5 if attention.scale else 1.0


def norms_of(attention: MultiHeadAttention) -> list[Callable[[Tensor], Tensor]] | None:
    """What norms do to heads of queries, which are scaled besides, and of keys [*, heads, head_dim]."""
    norms: list[Callable[[Tensor], Tensor]] = []
    for norm, scale in ((attention.query_norm, scale_of(attention)), (attention.key_norm, 1.0)):
        if norm is None:
            return None
        weight = norm.weight.detach() * scale
        shape = [attention.head_dim] if len(weight) == attention.head_dim else [-1, attention.head_dim]
        weight = weight.view(shape)
        norms.append(partial(F.rms_norm, normalized_shape=list(weight.shape), weight=weight, eps=norm.eps))
    return norms


def turn_table(rotary: RotaryPositions) -> Turn:
    """What turns a head at each position."""
    sign = torch.ones(rotary.sin.size(1))
    sign[: len(sign) // 2] = -1
    return rotary.cos[:, None], (rotary.sin * sign)[:, None]


class PreparedAttention:
    """Self-attention: queries, keys and values by one product."""

    def __init__(self, attention: MultiHeadAttention, packer: Packer) -> None:
        self.heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.width = held_width(self.head_dim)
        parts, self.norms = [attention.query, attention.key, attention.value], norms_of(attention)
        self.inner = packer.beside(parts, scale=scale_of(attention) if self.norms is None else 1.0)
        self.outer = packer.beside([attention.output])

    def comes_in(self, turns: object) -> torch.dtype:
        """The type of queries, keys and values."""
        plain = self.norms is None and turns is None
        return self.inner.dtype if plain and isinstance(self.inner, PackedFloat) else torch.float32

    def normalised(self, heads: Tensor) -> Tensor:
        """The heads of queries and keys after their norms, those of values as they are."""
        assert self.norms is not None
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        return torch.cat([self.norms[0](query), self.norms[1](key), value], 1)

    def project(self, x: Hidden, rows: int, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [rows, heads, head_dim] of the first rows, in the type in which they come."""
        heads = at_most(self.inner.narrow(x), rows).view(rows, -1, self.head_dim)
        if self.norms is not None:
            heads = self.normalised(heads.float())
        if turn is None:
            query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        else:
            both, value = heads.float().split([self.heads + self.kv_heads, self.kv_heads], 1)
            query, key = turned(both, turn).split([self.heads, self.kv_heads], 1)
        return query, key, value

    def step(self, x: Hidden, parts: Sequence[Part], layer: int, turn: Turn | None) -> Hidden:
        """Rows are those of the parts, one behind another."""
        rows = sum(part.rows for part in parts)
        of_parts = by_part(self.project(x, rows, turn), parts)
        mixed = [self.mix(q, k, v, part, layer) for (q, k, v), part in zip(of_parts, parts, strict=True)]
        return self.outer.narrow(at_least(mixed[0] if len(mixed) == 1 else torch.cat(mixed), len(x)))

    def mix(
        self,
        query: Float[Tensor, "rows heads head_dim"],
        key: Float[Tensor, "rows kv_heads head_dim"],
        value: Float[Tensor, "rows kv_heads head_dim"],
        part: Part,
        layer: int,
    ) -> Hidden:
        """What the rows of a part attend to, themselves included."""
        place, held = part.place, part.held
        if isinstance(held, Pages):
            return held.attend(layer, query, place.bias, self.outer.dtype, New(key, value, place.at))
        query, key, value = (fill_up(part, self.width) for part in (query, key, value))
        (texts, new), groups = place.positions.shape, self.heads // self.kv_heads
        key, value = (part.float().reshape(-1, self.width) for part in (key, value))
        held.write(layer, place, key, value)
        query = in_order(query.view(texts, new, self.kv_heads, groups, -1).transpose(1, 2), torch.float32)
        query = query.view(texts * self.kv_heads, new * groups, -1)
        bias = place.bias if new == 1 or groups == 1 else place.bias.repeat_interleave(groups, 2)
        if (missing := held.queries - new * groups) > 0:
            query = F.pad(query, (0, 0, 0, missing))
            bias = bias if new == 1 else F.pad(bias, (0, 0, 0, missing))
        mixed = attend(query, *held.read(layer, place.length), bias)
        if mixed.shape[1:] != (new * groups, self.head_dim):
            mixed = mixed[:, : new * groups, : self.head_dim]
        mixed = mixed.reshape(texts, self.kv_heads, new, groups, self.head_dim).transpose(1, 2)
        return in_order(mixed, self.outer.dtype).view(texts * new, -1)

    def whole(self, x: Hidden, whole: Whole, turn: Turn | None, held: Tensor | None) -> Hidden:
        """Rows are whole texts, whose keys and values go to `held` [2, texts, kv_heads, length, width]."""
        texts, length = whole.texts, whole.length
        query, key, value = (
            fill_up(part.float(), self.width).view(texts, length, self.kv_heads, -1, self.width).permute(0, 2, 3, 1, 4)
            for part in self.project(x, len(x), turn)
        )  # [texts, kv_heads, group, length, width]
        key, value = key[:, :, 0], value[:, :, 0]
        if held is not None:
            held[0], held[1] = key, value
        groups = query.size(2)
        bias = whole.bias if whole.bias.size(2) == 1 else whole.bias.repeat(1, 1, groups, 1)
        flat = [part.reshape(texts * self.kv_heads, -1, part.size(-1)) for part in (query, key, value)]
        mixed = attend(flat[0], flat[1], flat[2], bias)[..., : self.head_dim]
        mixed = mixed.view(texts, self.kv_heads, groups, length, -1).permute(0, 3, 1, 2, 4)
        return self.outer.narrow(mixed.reshape(len(x), -1))


class PreparedMemory:
    """Attention over a memory whose keys and values are the same for all hypotheses of a sentence."""

    def __init__(self, attention: MultiHeadAttention, packer: Packer) -> None:
        self.kv_heads, self.head_dim, self.norms = attention.num_kv_heads, attention.head_dim, norms_of(attention)
        self.width = held_width(self.head_dim)
        self.both = packer.beside([attention.key, attention.value])
        self.query = packer.beside([attention.query], scale=scale_of(attention) if self.norms is None else 1.0)
        self.outer = packer.beside([attention.output])

    @property
    def comes_in(self) -> torch.dtype:
        """The type of queries, keys and values."""
        packed = all(isinstance(part, PackedFloat) for part in (self.query, self.both)) and self.norms is None
        return self.query.dtype if packed else torch.float32

    def read(self, memory: Hidden, sentences: int) -> Float[Tensor, "2 sentences kv_heads length head_dim"]:
        """The keys and values of sentences of one length, in the type in which they come."""
        both = self.both.narrow(memory).view(sentences, -1, 2, self.kv_heads, self.head_dim)
        if self.norms is not None:
            both = torch.stack([self.norms[1](both[:, :, 0].float()), both[:, :, 1].float()], 2)
        return both.permute(2, 0, 3, 1, 4)

    def step(self, x: Hidden, parts: Sequence[Part], layer: int) -> Hidden:
        """Rows are those of the parts, each of them a hypothesis."""
        query = at_most(self.query.narrow(x), sum(part.rows for part in parts))
        if self.norms is not None:
            query = self.norms[0](query.float().view(len(query), -1, self.head_dim)).flatten(1)
        of_parts = by_part((query,), parts)
        mixed = [self.mix(own, part, layer) for (own,), part in zip(of_parts, parts, strict=True)]
        return self.outer.narrow(at_least(mixed[0] if len(mixed) == 1 else torch.cat(mixed), len(x)))

    def mix(self, query: Hidden, part: Part, layer: int) -> Hidden:
        """What hypotheses find in the memories of their sentences."""
        memory = part.memory
        assert memory is not None
        if isinstance(memory, PagedMemory):
            heads = query.view(len(query), -1, self.head_dim)
            return memory.pages.attend(layer, heads, memory.bias, self.outer.dtype)
        keys, values = memory.both[:, layer].flatten(1, 2)
        sentences, hypotheses = len(memory.bias), len(query) // len(memory.bias)
        query = fill_up(query.view(sentences, hypotheses, self.kv_heads, -1, self.head_dim), self.width).transpose(1, 2)
        query = in_order(query, torch.float32).view(sentences * self.kv_heads, -1, query.size(-1))
        mixed = attend(query, keys, values, memory.bias)
        mixed = mixed if mixed.size(2) == self.head_dim else mixed[..., : self.head_dim]
        mixed = mixed.view(sentences, self.kv_heads, hypotheses, -1, self.head_dim).transpose(1, 2)
        return in_order(mixed, self.outer.dtype).view(sentences * hypotheses, -1)
