"""Keys and values of what was read before, so that a decoding step reads one token.

Rows of a batch have lengths of their own: a row's next token is written where that row ends, and what a shorter row
holds beyond its end is hidden by the mask and overwritten later.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Heads = Float[Tensor, "batch kv_heads length head_dim"]
Held = Float[Tensor, "batch kv_heads held head_dim"]


class LayerCache:
    """One layer's view of a `Cache`: attention gives it new keys and values and gets all of them back."""

    def __init__(self, cache: "Cache", layer: int) -> None:
        self.cache, self.layer = cache, layer

    def append(self, keys: Heads, values: Heads) -> tuple[Held, Held]:
        """Write behind each row's end; return keys and values of the whole rows, longest row's length wide."""
        return self.cache.write(self.layer, keys, values)


class MemoryCache:
    """Keys and values of cross-attention, to a memory that does not change: projected once, reused at every step."""

    def __init__(self) -> None:
        self.held: tuple[Heads, Heads] | None = None

    def append(self, keys: Heads, values: Heads) -> tuple[Held, Held]:
        """Hold these, which are all: nothing comes behind a memory."""
        self.held = (keys, values)
        return self.held


class Cache:
    """Preallocated keys and values [layers, rows, kv_heads, capacity, head_dim] of all layers of a decoder."""

    def __init__(
        self,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: bool = False,
    ) -> None:
        shape = (num_layers, rows, num_kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0
        self.layers = [LayerCache(self, layer) for layer in range(num_layers)]
        self.memory = [MemoryCache() if memory else None for _ in range(num_layers)]

    def positions(self, num_new: int) -> Int[Tensor, "rows new"]:
        """Where each row's next tokens will stand."""
        return self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device)

    def mask(self, num_new: int, window: int | None = None) -> Bool[Tensor, "rows 1 new length"]:
        """Which cached positions each new token may attend to: all up to itself, or the last `window` of these."""
        key = torch.arange(self.longest + num_new, device=self.lengths.device)
        query = self.positions(num_new)[:, :, None]
        mask = key <= query
        return (mask if window is None else mask & (key > query - window))[:, None]

    def write(self, layer: int, keys: Heads, values: Heads) -> tuple[Held, Held]:
        num_new, end = keys.size(2), self.longest + keys.size(2)
        held_keys, held_values = self.keys[layer], self.values[layer]
        if self.longest == 0:
            held_keys[:, :, :end], held_values[:, :, :end] = keys, values
        else:
            row, position = torch.arange(keys.size(0), device=keys.device)[:, None], self.positions(num_new)
            held_keys[row, :, position] = keys.transpose(1, 2).to(held_keys.dtype)
            held_values[row, :, position] = values.transpose(1, 2).to(held_values.dtype)
        return held_keys[:, :, :end], held_values[:, :, :end]

    def advance(self, num_new: int, lengths: Int[Tensor, " rows"] | None = None) -> None:
        """Make the tokens just written count: `num_new` in each row, or only the first `lengths` of a padded prompt."""
        self.lengths = self.lengths + (num_new if lengths is None else lengths)
        self.longest += num_new

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order; a row may be taken more than once (beams). Only what is held is moved."""
        held = self.longest
        self.keys = _select(self.keys, rows, held)
        self.values = _select(self.values, rows, held)
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
        for memory in self.memory:
            if memory is not None and memory.held is not None:
                memory.held = (memory.held[0][rows], memory.held[1][rows])


def _select(store: Tensor, rows: Tensor, held: int) -> Tensor:
    chosen = store[:, rows, :, :held]
    if len(rows) > store.size(1):
        store = store.new_zeros(store.size(0), len(rows), *store.shape[2:])
    store = store[:, : len(rows)]
    store[:, :, :, :held] = chosen
    return store
