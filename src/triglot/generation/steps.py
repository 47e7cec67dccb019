"""Decoding token by token with a prepared model: what the searches work over."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from triglot.decoding.beam import Beams, BeamSearch
from triglot.decoding.search import Decoded
from triglot.generation.held import LENGTH, Held, round_up
from triglot.generation.prepared import Memory, Prepared
from triglot.layers.attend import FORBIDDEN

SPARSE = 0.8
"""Rows are moved together when no more than this share of them is in use."""
REFILL = 8
"""New sentences begin when so many places are empty, since they are encoded together."""

ROWS = 320
"""Hypotheses that are read together at most."""
POSITIONS = 65_536
"""Positions, of all hypotheses and their sources, whose keys and values are held at a time."""
TOGETHER = 32
"""Rows whose logits are made and used at a time, so that they stay in the cache."""


class SentenceSteps:
    """Hypotheses of sentences that begin and end at times of their own.

    A hypothesis that goes on keeps its row, and another one that goes on from the same beginning is copied to a row of
    its sentence that nobody has any more.
    """

    def __init__(self, prepared: Prepared, places: int, beam: int, longest_source: int, most: int) -> None:
        stack, length = prepared.decoder.stack, round_up(longest_source, LENGTH)
        self.prepared, self.beam = prepared, beam
        self.held = prepared.hold(places * beam, most)
        width = self.held.both.size(-1)
        self.memory = torch.zeros(2, len(stack.layers), places, stack.num_kv_heads, length, width)
        self.bias = torch.full((places, 1, 1, length), FORBIDDEN)
        self.bias[..., 0] = 0.0
        self.lengths = torch.full((places,), LENGTH)
        """Of each place's source, filled up."""
        self.rows = torch.arange(places * beam).view(places, beam)
        """The row of each hypothesis."""
        self.read = torch.zeros(places, dtype=torch.long)

    def begin(self, places: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        """Have sentences begin at these places, their sources encoded beside others of their own length alone."""
        lengths = torch.tensor([round_up(len(ids), LENGTH) for ids in sources])
        at = torch.tensor(places)
        self.bias[at] = FORBIDDEN
        for length in lengths.unique().tolist():
            ones = (lengths == length).nonzero()[:, 0]
            memory, bias = self.prepared.encode([sources[one] for one in ones.tolist()], length)
            self.memory[:, :, at[ones], :, :length], self.bias[at[ones], :, :, :length] = memory, bias
        self.lengths[at], self.read[at] = lengths, 0

    def step(self, tokens: Int[Tensor, "places beam"]) -> Iterator[Float[Tensor, "rows filled_up_vocab"]]:
        """Feed each hypothesis its next token; logits of the one after, −∞ for what is no token, some places each."""
        rows, length = self.rows.flatten(), int(self.lengths.max())
        placed = torch.zeros(self.held.rows, dtype=torch.long)
        placed[rows] = tokens.flatten()
        positions = torch.zeros_like(placed)
        positions[: len(rows)] = self.read.repeat_interleave(self.beam)
        keys, values = self.memory[:, :, :, :, :length]
        memory = Memory(keys, values, self.bias[..., :length], self.beam)
        hidden = self.prepared.decoder.step(placed[:, None], positions[:, None], self.held, memory)
        self.read += 1
        some = max(1, TOGETHER // self.beam) * self.beam
        return map(self.prepared.logits, hidden.index_select(0, rows).split(some))

    def follow(self, parents: Int[Tensor, "places beam"], live: Sequence[int]) -> None:
        """Have each hypothesis go on from its parent; empty places read position 0 again."""
        empty = torch.ones(len(parents), dtype=torch.bool)
        empty[list(live)] = False
        if self.beam > 1:
            self.rows = self._rows_after(parents, empty)
        self.read[empty], self.lengths[empty] = 0, LENGTH

    def _rows_after(
        self, parents: Int[Tensor, "places beam"], empty: Bool[Tensor, " places"]
    ) -> Int[Tensor, "places beam"]:
        """The row of each hypothesis, once those that need one of their own have been copied there."""
        base = torch.arange(0, self.rows.numel(), self.beam)[:, None]
        local = self.rows.gather(1, parents) - base
        again = (local[:, :, None] == local[:, None]).tril(-1).any(2)  # an earlier hypothesis goes on in that row
        free = torch.ones_like(local).scatter_(1, local, 0).argsort(dim=1, descending=True, stable=True)
        nth = (again.cumsum(1) - 1).clamp_(min=0)
        rows = torch.where(again, free.gather(1, nth), local) + base
        moved = again & ~empty[:, None]
        ends = self.read[:, None].expand_as(rows)[moved].tolist()
        for to, from_, end in zip(rows[moved].tolist(), (local + base)[moved].tolist(), ends, strict=True):
            self.held.copy(to, from_, end)
        return rows

    def keep(self, places: Int[Tensor, " kept"]) -> None:
        """Keep these places, in this order."""
        self.held.keep(self.rows[places].flatten(), self.prepared.least_rows)
        self.memory, self.bias = self.memory.index_select(2, places), self.bias[places]
        self.lengths, self.read = self.lengths[places], self.read[places]
        self.rows = torch.arange(len(places) * self.beam).view(-1, self.beam)


@torch.no_grad()
def search(
    prepared: Prepared,
    sources: Sequence[Sequence[int]],
    limits: Sequence[int],
    how: BeamSearch,
    bos_id: int,
    places: int | None = None,
) -> list[list[Decoded]]:
    """The best texts of each source; as soon as some sentences end, the next begin in their places."""
    if not sources:
        return []
    waiting = sorted(range(len(sources)), key=lambda row: len(sources[row]))
    most = how.beam * (max(map(len, sources)) + max(limits))
    places = min(len(sources), places or max(1, min(ROWS // how.beam, POSITIONS // most)))
    longest = max(limits)
    beams = Beams(places, how, longest)
    steps = SentenceSteps(prepared, places, how.beam, max(map(len, sources)), longest)
    results: dict[int, list[Decoded]] = {}
    while True:
        live = beams.live
        empty = sorted(set(range(len(beams.pools))).difference(live))
        if waiting and (not live or len(empty) >= REFILL):
            new = [waiting.pop() for _ in empty[: len(waiting)]]
            for place, request in zip(empty, new, strict=False):
                beams.begin(place, request, limits[request], bos_id)
            steps.begin(empty[: len(new)], [sources[request] for request in new])
            live = beams.live
        elif not live:
            return [results[row] for row in range(len(sources))]
        elif not waiting and len(live) <= SPARSE * len(beams.pools):
            kept = torch.tensor(live)
            beams.keep(kept)
            steps.keep(kept)
        results |= beams.advance(steps.step(beams.tokens), how.beam)
        steps.follow(beams.parents, beams.live)


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
        hidden = self.prepared.decoder.step(placed, self.ends[:, None] + torch.arange(new), self.held)
        self.ends.index_add_(0, self.rows, torch.full_like(self.rows, new))
        hidden = hidden.view(len(self.ends), new, -1).index_select(0, self.rows)
        return self.prepared.logits(hidden.flatten(0, 1)).view(len(self.rows), new, -1)

    def forget(self, counts: Int[Tensor, " texts"]) -> None:
        """Forget so many of the last tokens of each text."""
        self.ends.index_add_(0, self.rows, -counts)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these texts, in this order; one may be taken more than once."""
        chosen, few = self.rows[rows], max(self.prepared.least_rows, 1)
        again = len(chosen.unique()) < len(chosen)
        if again or (self.held.rows > few and len(chosen) <= SPARSE * self.held.rows):
            self.held.keep(chosen, few)
            ends = torch.zeros(self.held.rows, dtype=torch.long)
            ends[: len(chosen)] = self.ends[chosen]
            self.ends, chosen = ends, torch.arange(len(chosen))
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
