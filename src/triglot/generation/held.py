"""Keys and values of what was read, allocated ahead and written in place, each row at its own end."""

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.layers.attend import FORBIDDEN
from triglot.layers.vectors import round_up

LENGTH = 16
"""Keys are read in multiples of this."""
WIDTH, GRAIN = 32, 2
"""Narrower heads are filled up with zeros to this, since products of narrow ones have other bits in other company, and
wider ones to a multiple of GRAIN, so that they can be copied eight bytes at a time."""

Heads = Float[Tensor, "tokens_and_heads width"]


def held_width(head_dim: int) -> int:
    """What heads are filled up to."""
    return round_up(max(head_dim, WIDTH), GRAIN)


def keep_rows(x: Tensor, dim: int, rows: Int[Tensor, " kept"]) -> Tensor:
    """These rows of a dimension in this order, where they are: what keeps its row is not moved, if there is room."""
    if len(rows) > x.size(dim):
        return x.index_select(dim, rows)
    moved = (rows != torch.arange(len(rows))).nonzero()[:, 0]
    sources, goals = rows[moved].tolist(), moved.tolist()
    if set(goals).isdisjoint(sources):  # each goes where no other comes from, without a copy in between
        for source, goal in zip(sources, goals, strict=True):
            x.select(dim, goal).copy_(x.select(dim, source))
    else:
        x.index_copy_(dim, moved, x.index_select(dim, rows[moved]))
    return x.narrow(dim, 0, len(rows))


class Place(NamedTuple):
    """Where the tokens of a step stand, as many of each row."""

    positions: Int[Tensor, "rows new"]
    length: int
    """Keys that are read of each row, those of this step included."""
    at: Int[Tensor, " tokens_and_heads"]
    """Where the step's keys and values are written."""
    bias: Float[Tensor, "#rows #heads new length"]
    """What hides the keys that a token may not attend to: they weigh exactly nothing."""
    keys: Int[Tensor, "#rows length"]
    """Where the keys that are read stand in their texts; left empty where no relative positions ask for it."""


class Places(Protocol):
    """Where keys and values of rows can be written."""

    window: int | None

    def length_for(self, last: int) -> int:
        """How many keys to read where the last is the one in this place; there is room for them afterwards."""
        ...

    def at(self, places: Int[Tensor, "rows new"]) -> Int[Tensor, "*written"]:
        """Where keys and values of tokens in these places of their rows are."""
        ...

    def place(self, positions: Int[Tensor, "rows new"]) -> Place:
        """Where a step's tokens stand, each row's behind one another, after room has been made for them."""
        length = self.length_for(int(positions.max()))
        keys, queries = torch.arange(length), positions[..., None]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        return Place(positions, length, self.at(positions), (hidden * FORBIDDEN)[:, None], keys[None])


class Held(Places):
    """Keys and values [2, layers, rows, kv_heads, capacity, width]; there is always room for more."""

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        most: int,
        queries: int = 1,
        window: int | None = None,
    ) -> None:
        self.most, self.queries, self.window = round_up(most, LENGTH), queries, window
        self.hold(torch.zeros(2, layers, rows, kv_heads, LENGTH, held_width(head_dim)))

    def hold(self, both: Float[Tensor, "2 layers rows kv_heads capacity width"]) -> None:
        """Hold these instead."""
        self.both = both
        self.layers = list(zip(*both.flatten(2, 3).unbind(), strict=True))
        """Keys and values of each layer, [rows · kv_heads, capacity, width]."""
        self._words = list(zip(*both.view(torch.int64).flatten(2, 4).unbind(), strict=True))
        """The same, head by head, as numbers of eight bytes, of which fewer are copied one by one."""

    @property
    def rows(self) -> int:
        """Rows, in use or not."""
        return self.both.size(2)

    def make_room(self, length: int) -> None:
        """Have room for rows of `length`."""
        capacity = self.both.size(4)
        if length > capacity:  # tight, since what is not read still parts what is
            longer = min(round_up(max(length, capacity * 5 // 4), LENGTH), max(self.most, round_up(length, LENGTH)))
            both = self.both.new_empty(*self.both.shape[:4], longer, self.both.size(5))
            both[:, :, :, :, :capacity], both[:, :, :, :, capacity:] = self.both, 0  # what weighs nothing is a number
            self.hold(both)

    def fill(self, rows: Int[Tensor, " some"], both: Float[Tensor, "2 layers some kv_heads length width"]) -> None:
        """Write the first keys and values of some rows."""
        self.both[:, :, rows, :, : both.size(4)] = both

    def text(self, row: int, length: int) -> Float[Tensor, "2 layers length kv_heads width"]:
        """The first keys and values of a row."""
        return self.both[:, :, row, :, :length].transpose(2, 3)

    def length_for(self, last: int) -> int:
        """How many keys to read, as many as there are where it is more than half of them."""
        length = round_up(last + 1, LENGTH)
        self.make_room(length)
        capacity = self.both.size(4)
        # Memory is read faster in one piece than in parts with gaps between them.
        return capacity if length > capacity // 2 else length

    def at(self, places: Int[Tensor, "rows new"]) -> Int[Tensor, " tokens_and_heads"]:
        """Where keys and values of tokens in these places of their rows are, among those of a layer."""
        rows, kv_heads, capacity = self.both.shape[2:5]
        starts = torch.arange(0, rows * kv_heads * capacity, capacity).view(rows, 1, kv_heads)
        return (starts + places[..., None]).flatten()

    def write(self, layer: int, place: Place, keys: Heads, values: Heads) -> None:
        """Write what a step's tokens give."""
        for part, new in zip(self._words[layer], (keys, values), strict=True):
            part.index_copy_(0, place.at, new.view(torch.int64))

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of a layer, each [rows · kv_heads, length, width]."""
        keys, values = self.layers[layer]
        return (keys, values) if keys.size(1) == length else (keys[:, :length], values[:, :length])

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order, some of them perhaps twice."""
        self.hold(keep_rows(self.both, 2, rows))
