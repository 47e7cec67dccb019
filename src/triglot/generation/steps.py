"""Decoding token by token with a prepared model: what the searches work over."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.beam import BeamSearch, search_in_parts
from triglot.decoding.search import Decoded
from triglot.generation.held import LENGTH, WIDTH, Held, Place, round_up
from triglot.generation.prepared import Memory, Prepared
from triglot.layers.attend import FORBIDDEN

SPARSE = 0.8
"""Rows are moved together when no more than this share of them is in use."""
ROWS = 1024
"""Hypotheses that are read together at most."""
HELD_BYTES = 2**29
"""Of keys and values, if all hypotheses that are read together were as long as they may be."""
SOURCE = 4
"""Sources are encoded in multiples of this, but not below LENGTH."""
ENCODED = 2048
"""Tokens that are encoded together at most, so that they stay in the cache."""
TOGETHER = 128
"""Rows whose logits are made and used at a time: so many do not leave the cache in between."""


class SentenceSteps:
    """Hypotheses of sentences that begin together: one of each at first, then `beam`.

    A sentence keeps the keys and values of all its hypotheses side by side, and each of them knows which are its own:
    going on from a parent moves nothing but that, and new ones take the first places that belong to none any more.
    """

    def __init__(self, prepared: Prepared, sources: Sequence[Sequence[int]], beam: int, most: int) -> None:
        self.prepared, self.beam, self.width, self.count = prepared, beam, 1, 0
        self.held = prepared.hold(len(sources), most, beam)
        self.memory, self.bias = encode(prepared, sources)
        self.rows = torch.arange(len(sources))
        """The row of each sentence that is still searched."""
        self.own = torch.zeros(self.held.rows, beam, 0, dtype=torch.bool)
        """Which places of its row belong to a hypothesis."""

    def step(self, tokens: Int[Tensor, " hypotheses"]) -> Iterator[Float[Tensor, "rows filled_up_vocab"]]:
        """Feed each hypothesis its next token; logits of the one after, of some sentences each, −∞ for no token."""
        given = tokens.view(len(self.rows), -1)
        self.width = width = given.size(1)
        placed = given.new_zeros(self.held.rows, width).index_copy_(0, self.rows, given)
        memory = Memory(self.memory[0], self.memory[1], self.bias, width)
        hidden = self.prepared.decoder.step(placed, self._place(width), self.held, memory)
        self.count += 1
        hidden = hidden.view(self.held.rows, width, -1).index_select(0, self.rows).flatten(0, 1)
        return map(self.prepared.logits, hidden.split(max(1, TOGETHER // width) * width))

    def _place(self, new: int) -> Place:
        """Where the next tokens stand; each attends to its hypothesis' own and to itself."""
        own = F.pad(self.own, (0, new))
        places = own.any(1).to(torch.uint8).sort(dim=1, stable=True).indices[:, :new]
        own[:, :new].scatter_(2, places[..., None], True)
        length = self.held.length_for(int(own.any(1).any(0).nonzero()[-1]))
        self.own = F.pad(own, (0, length - own.size(2)))
        bias = torch.where(self.own[:, None, :new], 0.0, FORBIDDEN)
        return Place(torch.full_like(places, self.count), length, self.held.at(places), bias)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Have hypotheses go on from these, `beam` of each sentence that does, in this order."""
        chosen = rows.view(-1, self.beam)
        kept, parents = self.rows[chosen[:, 0] // self.width], chosen % self.width
        own = self.own[kept[:, None], parents]
        if len(kept) <= SPARSE * self.memory.size(2):
            self.held.keep(kept)
            self.memory, self.bias = self.memory.index_select(2, kept), self.bias[kept]
            kept = torch.arange(len(kept))
        self.rows = kept
        self.own = own.new_zeros(self.held.rows, *own.shape[1:]).index_copy_(0, kept, own)


def encode(prepared: Prepared, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Keys and values [2, layers, sources, kv_heads, length, width], and the bias that hides what fills sources up.

    A source is encoded beside others of its own length, filled up, alone.
    """
    stack = prepared.decoder.stack
    lengths = torch.tensor([max(LENGTH, round_up(len(ids), SOURCE)) for ids in sources])
    most, width = round_up(int(lengths.max()), LENGTH), max(stack.head_dim, WIDTH)
    memory = torch.empty(2, len(stack.layers), len(sources), stack.num_kv_heads, most, width)
    bias = torch.full((len(sources), 1, 1, most), FORBIDDEN)
    for length in lengths.unique().tolist():
        for at in (lengths == length).nonzero()[:, 0].split(max(1, ENCODED // length)):
            found, bias[at, :, :, :length] = prepared.encode([sources[row] for row in at.tolist()], length)
            for layer, of_layer in enumerate(found):
                memory[:, layer, at, :, :length] = of_layer
            memory[:, :, at, :, length:] = 0
    return memory, bias


@torch.no_grad()
def search(
    prepared: Prepared,
    sources: Sequence[Sequence[int]],
    limits: Sequence[int],
    how: BeamSearch,
    bos_id: int,
    places: int | None = None,
) -> list[list[Decoded]]:
    """The best texts of each source, `places` sources of like lengths at a time."""
    order = sorted(range(len(sources)), key=lambda row: len(sources[row]), reverse=True)
    results: dict[int, list[Decoded]] = {}
    while order:
        positions = how.beam * max(limits) + len(sources[order[0]])
        some = places or max(1, min(ROWS // how.beam, HELD_BYTES // (positions * prepared.bytes_held)))
        some = math.ceil(len(order) / math.ceil(len(order) / some))  # no small rest
        rows, order = order[:some], order[some:]
        longest = max(limits[row] for row in rows)
        steps = SentenceSteps(prepared, [sources[row] for row in rows], how.beam, longest)
        first = steps.step(torch.full((len(rows),), bos_id))
        results |= search_in_parts(first, steps.step, steps.select, how, {row: limits[row] for row in rows})
    return [results[row] for row in range(len(sources))]


class TextSteps:
    """Texts of a decoder-only model, each of its own length (`decoding.search.Steps`)."""

    def __init__(self, prepared: Prepared, held: Held, ends: Sequence[int]) -> None:
        self.prepared, self.held = prepared, held
        self.ends = torch.zeros(held.rows, dtype=torch.long)
        """The tokens of each row."""
        self.ends[: len(ends)] = torch.tensor(ends)
        self.rows = torch.arange(len(ends))
        """The row of each text."""

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " texts"]) -> Float[Tensor, "texts filled_up_vocab"]:
        """Feed each text its next token; logits of the one after, −∞ for what is no token."""
        return self.extend(tokens[:, None])[:, 0]

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, "texts new"]) -> Float[Tensor, "texts new filled_up_vocab"]:
        """Feed each text its next tokens; logits of the one after each."""
        new = tokens.size(1)
        placed = tokens.new_zeros(len(self.ends), new).index_copy_(0, self.rows, tokens)
        place = self.held.place(self.ends[:, None] + torch.arange(new))
        hidden = self.prepared.decoder.step(placed, place, self.held)
        self.ends.index_add_(0, self.rows, torch.full_like(self.rows, new))
        hidden = hidden.view(len(self.ends), new, -1).index_select(0, self.rows)
        return self.prepared.logits(hidden.flatten(0, 1)).view(len(self.rows), new, -1)

    def forget(self, counts: Int[Tensor, " texts"]) -> None:
        """Forget so many of the last tokens of each text."""
        self.ends.index_add_(0, self.rows, -counts)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these texts, in this order; one may be taken more than once."""
        chosen = self.rows[rows]
        if len(chosen.unique()) < len(chosen) or len(chosen) <= SPARSE * self.held.rows:
            self.held.keep(chosen)
            self.ends, chosen = self.ends[chosen], torch.arange(len(chosen))
        else:
            ends = torch.zeros_like(self.ends)
            ends[chosen] = self.ends[chosen]
            self.ends = ends
        self.rows = chosen


@torch.no_grad()
def start_texts(
    prepared: Prepared, prompts: Sequence[Sequence[int]], most: int
) -> tuple[Float[Tensor, "texts filled_up_vocab"], TextSteps]:
    """Read prompts, each filled up by its own length alone; logits after each, and what goes on from there."""
    held = prepared.hold(len(prompts), most)
    lengths = torch.tensor([round_up(len(ids), LENGTH) for ids in prompts])
    held.make_room(int(lengths.max()))
    last = torch.empty(len(prompts), prepared.decoder.stack.d_model)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for place, row in enumerate(rows.tolist()):
            ids[place, : len(prompts[row])] = torch.tensor(prompts[row])
        both = held.both.new_zeros(2, held.both.size(1), len(rows), held.both.size(3), length, held.both.size(5))
        look_ahead = torch.full((length, length), FORBIDDEN).triu(1)[None, None]
        hidden = prepared.decoder.whole(ids, look_ahead, both).view(len(rows), length, -1)
        held.both[:, :, rows, :, :length] = both
        last[rows] = hidden[torch.arange(len(rows)), torch.tensor([len(prompts[row]) - 1 for row in rows.tolist()])]
    return prepared.logits(last), TextSteps(prepared, held, [len(ids) for ids in prompts])
