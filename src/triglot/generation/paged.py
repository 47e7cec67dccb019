"""Keys and values in pages, and attention to them by a kernel of ours (`cpp/paged.cpp`).

What the products, masks and softmaxes of `attention.py` do for all sentences, one operation after another, the kernel
does for a sentence at a time. It passes over pages that no hypothesis attends to, reads keys and values in the type in
which they came, and moves none when a sentence ends.
"""

import ctypes
import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.vectors import round_up

Heads = Float[Tensor, "rows heads head_dim"]


class New(NamedTuple):
    """Keys and values of a step."""

    key: Float[Tensor, "rows kv_heads head_dim"]
    value: Float[Tensor, "rows kv_heads head_dim"]
    places: Int[Tensor, "sentences hypotheses"]
    """Where they are written."""


class Pages:
    """Keys and values of sentences, of LANES places a page; a new page joins when those that are there are full."""

    def __init__(self, layers: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.sizes = layers, rows, kv_heads, LANES * (head_dim + round_up(head_dim, LANES))
        self.pages: list[Float[Tensor, "layers rows kv_heads size"]] = []
        self.rows_of = torch.arange(rows)
        """Where each sentence's keys and values are: they stay when others end."""

    @property
    def rows(self) -> int:
        """Sentences."""
        return len(self.rows_of)

    def length_for(self, last: int) -> int:
        """Places of as many pages as it takes where the last is this one; they are there afterwards."""
        length = round_up(last + 1, LANES)
        while len(self.pages) * LANES < length:
            self.pages.append(torch.zeros(self.sizes, dtype=self.dtype))  # what weighs nothing is a number, too
        return length

    def at(self, places: Int[Tensor, "sentences hypotheses"]) -> Int[Tensor, "sentences hypotheses"]:
        """Where keys and values of tokens in these places are."""
        return places.contiguous()

    def fill(self, layer: int, rows: slice, both: Float[Tensor, "2 some kv_heads length head_dim"]) -> None:
        """Write the first keys and values of some sentences."""
        self.length_for(both.size(3) - 1)
        for page, (keys, values) in zip(self.pages, both.split(LANES, 3), strict=False):
            of_keys, of_values = page[layer, rows].tensor_split([LANES * self.head_dim], 2)
            places = keys.size(2)
            of_keys.unflatten(2, (-1, LANES))[..., :places] = keys.mT
            of_values.unflatten(2, (LANES, -1))[:, :, :places, : self.head_dim] = values

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these sentences, in this order."""
        self.rows_of = self.rows_of[rows]

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
        rows, heads = query.shape[:2]
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        given = {"HEADS": heads, "KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim}
        types = {"HYPOTHESES": rows // self.rows, "Input": self.dtype, "Output": dtype}
        run = kernel("paged.cpp", "step", "pnpnpnppnppppnn", **given, **types)
        offset = layer * self.pages[0].stride(0) * self.pages[0].element_size()
        pages = (ctypes.c_void_p * len(self.pages))(*(page.data_ptr() + offset for page in self.pages))
        strides = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
        output = torch.empty(rows, heads * self.head_dim, dtype=dtype)
        of_rows = [(address(part), part.stride(0)) for part in (query, key, value)]
        where = [address(places), pages, bias.size(3) // LANES, address(self.rows_of)]
        others = [address(bias), (ctypes.c_int64 * 4)(*strides), address(output)]
        arguments = list(itertools.chain(*of_rows, where, others))
        run(*arguments, self.rows, threads_for(rows))
        return output


def _in_rows(heads: Heads) -> Heads:
    """Heads side by side, whatever stands between rows."""
    return heads if heads.stride()[1:] == (heads.size(2), 1) else heads.contiguous()
