"""Keys and values in pages, and attention to them by a kernel of ours (`cpp/paged.cpp`).

What the products, masks and softmaxes of `attention.py` do for all sentences, one operation after another, the kernel
does for a sentence at a time, or for each token of a text. It passes over pages that nothing attends to, reads keys and
values in the type in which they came, and moves none when a sentence ends, and those of texts once half have ended.
"""

import ctypes
import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.generation.held import Places
from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.vectors import round_up

Heads = Float[Tensor, "rows heads head_dim"]


class New(NamedTuple):
    """Keys and values of a step."""

    key: Float[Tensor, "rows kv_heads head_dim"]
    value: Float[Tensor, "rows kv_heads head_dim"]
    places: Int[Tensor, "sentences hypotheses"]
    """Where they are written."""


class Pages(Places):
    """Keys and values of sentences, of LANES places a page; a new page joins when those that are there are full.

    Hypotheses of a sentence are read side by side; what is new of a text is read token by token, so that its bits do
    not depend on how many there are.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        of_texts: bool = False,
        window: int | None = None,
    ) -> None:
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.of_texts, self.window = of_texts, window
        self.sizes = layers, rows, kv_heads, LANES * (head_dim + round_up(head_dim, LANES))
        self._hold([])
        self.rows_of = torch.arange(rows)
        """Where each sentence's keys and values are: they stay when others end."""

    @property
    def rows(self) -> int:
        """Sentences."""
        return self.rows_of.size(0)

    def length_for(self, last: int) -> int:
        """Places of as many pages as it takes where the last is this one; they are there afterwards."""
        length = round_up(last + 1, LANES)
        while len(self.pages) * LANES < length:
            page = torch.zeros(self.sizes, dtype=self.dtype)  # what weighs nothing is a number, too
            self._hold([*self.pages, page])
        return length

    def _hold(self, pages: list[Float[Tensor, "layers rows kv_heads size"]]) -> None:
        self.pages, self._pointers = pages, (ctypes.c_void_p * len(pages))(*map(address, pages))

    def at(self, places: Int[Tensor, "sentences hypotheses"]) -> Int[Tensor, "sentences hypotheses"]:
        """Where keys and values of tokens in these places are."""
        return places.contiguous()

    def fill(
        self,
        rows: slice | Int[Tensor, " some"],
        both: Float[Tensor, "2 #layers some kv_heads length width"],
        layers: slice = slice(None),
    ) -> None:
        """Write the first keys and values of some sentences, of all layers or some, before any is left out."""
        self.length_for(both.size(4) - 1)
        for page, (keys, values) in zip(self.pages, both[..., : self.head_dim].split(LANES, 4), strict=False):
            (of_keys, of_values), places = self._parts(page), keys.size(3)
            of_keys[layers, rows, :, :, :places] = keys.mT.to(self.dtype)
            of_values[layers, rows, :, :places, : self.head_dim] = values.to(self.dtype)

    def text(self, row: int, length: int) -> Float[Tensor, "2 layers length kv_heads head_dim"]:
        """The first keys and values of a text."""
        own = [self._parts(page[:, self.rows_of[row]]) for page in self.pages]
        keys = torch.cat([of_keys.mT for of_keys, _ in own], 2)
        values = torch.cat([of_values for _, of_values in own], 2)[..., : self.head_dim]
        return torch.stack([keys, values])[:, :, :, :length].transpose(2, 3).float()

    def _parts(self, page: Float[Tensor, "*lead size"]) -> tuple[Tensor, Tensor]:
        """Keys [*lead, head_dim, LANES] and values [*lead, LANES, filled_up]."""
        keys, values = page.tensor_split([LANES * self.head_dim], -1)
        return keys.unflatten(-1, (-1, LANES)), values.unflatten(-1, (LANES, -1))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these, in this order; of texts one may be taken twice, and is written apart then."""
        self.rows_of = self.rows_of[rows]
        few = 2 * len(rows) <= self.sizes[1]  # so that no memory is for texts that have long ended
        if self.of_texts and (few or len(self.rows_of.unique()) < len(rows)):
            self._hold([page.index_select(1, self.rows_of) for page in self.pages])
            self.sizes, self.rows_of = (self.sizes[0], len(rows), *self.sizes[2:]), torch.arange(len(rows))

    def attend(
        self,
        layer: int,
        query: Heads,
        bias: Float[Tensor, "#sentences #heads #hypotheses length"],
        dtype: torch.dtype,
        new: New | None = None,
    ) -> Float[Tensor, "rows width"]:
        """softmax(Q Kᵀ + bias) V in `dtype`, queries scaled already, after what is `new` has been written."""
        key, value, places = (query, query, None) if new is None else new
        query, key, value = (_in_rows(part.to(self.dtype)) for part in (query, key, value))
        (rows, heads, _), of_rows = query.shape, self.rows_of
        if self.of_texts and rows > self.rows:  # each token as if it were a text's only one
            of_rows, bias = of_rows.repeat_interleave(rows // self.rows), bias.transpose(1, 2).flatten(0, 1)[:, :, None]
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        given = {"HEADS": heads, "KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim}
        types = {"HYPOTHESES": rows // of_rows.size(0), "Input": self.dtype, "Output": dtype}
        run = kernel("paged.cpp", "step", "pnpnpnppnnppnnnpnn", **given, **types)
        strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        output = torch.empty(rows, heads * self.head_dim, dtype=dtype)
        heads_of = itertools.chain(*((address(part), part.stride(0)) for part in (query, key, value)))
        where = address(places), self._pointers, bias.size(3) // LANES, layer * self.sizes[1] * self.kv_heads
        biases, threads = (address(bias), *strides[:3]), threads_for(rows, output.numel() * bias.size(3))
        run(*heads_of, *where, address(of_rows), *biases, address(output), of_rows.size(0), threads)
        return output


def _in_rows(heads: Heads) -> Heads:
    """Heads side by side, whatever stands between rows."""
    return heads if heads.stride()[1:] == (heads.size(2), 1) else heads.contiguous()
