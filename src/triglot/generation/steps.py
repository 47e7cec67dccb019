"""Decoding token by token with a prepared model: what the searches work over."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.beam import Beams, BeamSearch, Logits
from triglot.decoding.logits import Scaled, Top
from triglot.decoding.rules import Within
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Chooser, Decoded, gather, stream_in_parts
from triglot.errors import DeadEndError
from triglot.generation.attention import Memory, PagedMemory, Part
from triglot.generation.held import LENGTH, Held, Place, held_width
from triglot.generation.paged import Pages
from triglot.generation.prepared import Prepared
from triglot.generation.top import MOST
from triglot.layers.attend import FORBIDDEN
from triglot.layers.masks import create_look_ahead_mask
from triglot.layers.vectors import round_up

ROWS = 1280
"""Hypotheses that are read together at most."""
HELD_BYTES = 2**29
"""Of keys and values, if all hypotheses that are read together were as long as they may be."""
SOURCE = 4
"""Sources are encoded in multiples of this, but not below LENGTH."""
ENCODED = 2048
"""Tokens that are encoded together at most, so that they stay in the cache."""
TOGETHER = 256
"""Rows whose logits are made and used at a time: for fewer weights are read more often, more leave every cache."""


class Sentences:
    """Hypotheses of sentences that begin together: one of each at first, then `beam`.

    A sentence keeps the keys and values of all its hypotheses side by side, and each of them knows which are its own:
    going on from a parent moves nothing but that, and new ones take the first places that belong to none any more.
    """

    def __init__(self, prepared: Prepared, sources: Sequence[Sequence[int]], beam: int, most: int) -> None:
        self.prepared, self.beam, self.width, self.count = prepared, beam, 1, 0
        self.held = prepared.hold_hypotheses(len(sources), most, beam)
        self.memory = encode(prepared, sources)
        self.own = torch.zeros(self.held.rows, beam, 0, dtype=torch.bool)
        """Which places of its row belong to a hypothesis."""
        self.written = torch.zeros(self.held.rows, 0, dtype=torch.long)
        """Where in its hypothesis each place's token stands; nothing where no relative positions ask for it."""

    def __len__(self) -> int:
        return self.held.rows

    def part(self) -> Part:
        """What attention needs to know of the hypotheses' next tokens, which are counted as read."""
        part = Part(self._place(), self.held, self.memory)
        self.count += 1
        return part

    def _place(self) -> Place:
        """Where the next tokens stand; each attends to its hypothesis' own and to itself."""
        new = self.width
        own = F.pad(self.own, (0, new))
        places = own.any(1).to(torch.uint8).sort(dim=1, stable=True).indices[:, :new]
        own[:, :new].scatter_(2, places[..., None], True)
        length = self.held.length_for(int(own.any(1).any(0).nonzero()[-1]))
        self.own = F.pad(own, (0, length - own.size(2)))
        bias = torch.where(self.own[:, None, :new], 0.0, FORBIDDEN)
        if self.prepared.decoder.relative is not None:
            written = F.pad(self.written, (0, length - self.written.size(1)))
            self.written = written.scatter_(1, places, self.count)
        return Place(torch.full_like(places, self.count), length, self.held.at(places), bias, self.written)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Have hypotheses go on from these, `beam` of each sentence that does, in this order."""
        chosen = rows.view(-1, self.beam)
        kept = chosen[:, 0] // self.width
        self.own, self.written = self.own[kept[:, None], chosen % self.width], self.written[kept]
        if len(kept) < self.held.rows or not kept.equal(torch.arange(len(kept))):
            self.held.keep(kept)
            self.memory = self.memory.keep(kept)
        self.width = self.beam


class SentenceSteps:
    """Sentences of several beginnings, one behind another, read by the same products."""

    def __init__(self, prepared: Prepared, groups: Sequence[Sentences]) -> None:
        self.prepared, self.groups = prepared, list(groups)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " hypotheses"]) -> Iterator[Float[Tensor, "rows filled_up_vocab"] | Scaled]:
        """Feed each hypothesis its next token; logits of the one after, of some sentences each, −∞ for no token."""
        return self.prepared.logits_in_parts(*self._read(tokens))

    @torch.inference_mode()
    def step_to_powers(self, tokens: Int[Tensor, " hypotheses"]) -> Iterator[Logits]:
        """The same as powers, where they come sooner."""
        prepared = self.prepared
        in_parts = prepared.logits_in_parts if prepared.powers is None else prepared.powers_in_parts
        return in_parts(*self._read(tokens))

    @torch.inference_mode()
    def step_to_top(self, count: int, tokens: Int[Tensor, " hypotheses"]) -> list[Top]:
        """The `count` likeliest tokens of each alone, where a kernel tells them."""
        hidden, _ = self._read(tokens)
        return [self.prepared.top_of(hidden, count)]

    def _read(self, tokens: Int[Tensor, " hypotheses"]) -> tuple[Float[Tensor, "hypotheses d_model"], int]:
        """What stands before the projection, and of how many rows that is to be made at a time."""
        [width] = {group.width for group in self.groups}
        hidden = self.prepared.decoder.step(tokens, [group.part() for group in self.groups])
        return hidden, max(1, TOGETHER // width) * width

    @torch.inference_mode()
    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Have hypotheses go on from these, `beam` of each sentence that does, each group's behind one another."""
        first = 0
        for group in self.groups:
            last = first + len(group) * group.width
            group.select(rows[(rows >= first) & (rows < last)] - first)
            first = last
        self.groups = [group for group in self.groups if len(group)]


def encode(prepared: Prepared, sources: Sequence[Sequence[int]]) -> Memory | PagedMemory:
    """What hypotheses of sources attend to; a source is encoded beside others of its own length, filled up, alone."""
    lengths = [max(LENGTH, round_up(len(ids), SOURCE)) for ids in sources]
    memory = prepared.hold_memory(len(sources), round_up(max(lengths), LENGTH))
    for length, group in itertools.groupby(range(len(sources)), lengths.__getitem__):
        rows, some = list(group), max(1, ENCODED // length)
        for first in range(rows[0], rows[-1] + 1, some):
            at = slice(first, min(first + some, rows[-1] + 1))
            found, memory.bias[at, :, :, :length] = prepared.encode(sources[at], length)
            for layer, of_layer in enumerate(found):
                memory.fill(layer, at, of_layer)
    return memory


@torch.inference_mode()
def search(
    prepared: Prepared,
    sources: Sequence[Sequence[int]],
    limits: Sequence[int],
    how: BeamSearch,
    start_id: int,
    places: int | None = None,
) -> list[list[Decoded]]:
    """The best texts of each source, of `places` sources of like lengths at a time."""
    if not sources:
        return []
    order = sorted(range(len(sources)), key=lambda row: len(sources[row]), reverse=True)
    positions = how.beam * max(limits) + len(sources[order[0]])
    places = places or max(1, min(ROWS // how.beam, HELD_BYTES // (positions * prepared.bytes_held)))

    def begin(rows: Sequence[int]) -> tuple[SentenceSteps, Tensor]:
        longest = max(limits[row] for row in rows)
        sentences = Sentences(prepared, [sources[row] for row in rows], how.beam, longest)
        return SentenceSteps(prepared, [sentences]), torch.full((len(rows),), start_id)

    if how.beam == 1 and (how.patience or 1) <= 1:
        results = dict[int, list[Decoded]]()
        for rows in in_shares(order, places):
            results |= zip(rows, greedy(*begin(rows), how, rows, [limits[row] for row in rows]), strict=True)
    else:
        lengths = {row: round_up(len(sources[row]), LENGTH) for row in order}
        results = search_beams(SentenceSteps(prepared, []), begin, lengths, dict(enumerate(limits)), how, places)
    return [results[row] for row in range(len(sources))]


def in_shares(order: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """These in as few shares as can be, none of which is small beside the others."""
    share = math.ceil(len(order) / math.ceil(len(order) / most))
    return (order[first : first + share] for first in range(0, len(order), share))


def search_beams(
    steps: SentenceSteps,
    begin: Callable[[Sequence[int]], tuple[SentenceSteps, Int[Tensor, " sentences"]]],
    lengths: Mapping[int, int],
    limits: Mapping[int, int],
    how: BeamSearch,
    places: int,
) -> dict[int, list[Decoded]]:
    """The best texts by request, those of `lengths` in their order.

    Where half of the places are free, sentences whose sources take as many keys begin and go on beside those that
    are there, which otherwise, few as they come to be, would have steps of their own.
    """
    waiting, beams, results = list(lengths), Beams({}, how), dict[int, list[Decoded]]()

    def read(steps: SentenceSteps, tokens: Tensor) -> Iterable[Logits | Top]:
        if how.banned or how.rules:
            return steps.step(tokens)
        told = steps.prepared.top is not None and how.candidates <= MOST
        return steps.step_to_top(how.candidates, tokens) if told else steps.step_to_powers(tokens)

    while waiting or len(beams):
        while waiting and len(beams) <= places // 2:
            some = waiting[: places - len(beams)]
            some = [row for row in some if lengths[row] == lengths[some[0]]]
            del waiting[: len(some)]
            new, first = begin(some)
            begun = Beams({row: limits[row] for row in some}, how)
            results |= begun.advance(read(new, first))
            new.select(begun.rows)
            beams.join(begun)
            steps.groups += new.groups
        if len(beams):
            results |= beams.advance(read(steps, beams.tokens.flatten()))
            steps.select(beams.rows)
    return results


def greedy(
    steps: SentenceSteps,
    first: Int[Tensor, " sentences"],
    how: BeamSearch,
    requests: Sequence[int],
    limits: Sequence[int],
) -> list[list[Decoded]]:
    """What a beam of 1 finds, without the bookkeeping of beams; rules know the sentences as these requests."""
    rules = [Within(rule, requests) for rule in how.rules]
    choose = Chooser(sampler=Sampler(temperature=0.0), banned=how.banned, rules=rules, scored=how.scored)
    told = steps.prepared.top is not None and not how.banned and not how.rules
    step: Callable[[Tensor], Iterable[Tensor | Scaled | Top]] = partial(steps.step_to_top, 1) if told else steps.step
    tokens = stream_in_parts(step(first), step, steps.select, choose, limits, how.eos_ids)
    try:
        return [[text] for text in gather(tokens, len(limits), how.eos_ids)]
    except DeadEndError as error:
        raise DeadEndError(requests[error.request]) from error


class TextSteps:
    """Texts of a decoder-only model, each of its own length (`decoding.search.Steps`)."""

    def __init__(self, prepared: Prepared, held: Held | Pages, ends: Sequence[int]) -> None:
        self.prepared, self.held = prepared, held
        self.ends = torch.tensor(ends)
        """The tokens of each text."""

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " texts"]) -> Float[Tensor, "texts filled_up_vocab"]:
        """Feed each text its next token; logits of the one after, −∞ for what is no token."""
        return self.extend(tokens[:, None])[:, 0]

    @torch.inference_mode()
    def extend(self, tokens: Int[Tensor, "texts new"]) -> Float[Tensor, "texts new filled_up_vocab"]:
        """Feed each text its next tokens; logits of the one after each."""
        new = tokens.size(1)
        place = self.held.place(self.ends[:, None] + torch.arange(new))
        hidden = self.prepared.decoder.step(tokens.flatten(), [Part(place, self.held)])
        self.ends = self.ends + new
        return self.prepared.logits(hidden).view(*tokens.shape, -1)

    def forget(self, counts: Int[Tensor, " texts"]) -> None:
        """Forget so many of the last tokens of each text."""
        self.ends = self.ends - counts

    @torch.inference_mode()
    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these texts, in this order; one may be taken more than once."""
        self.held.keep(rows)
        self.ends = self.ends[rows]


@torch.inference_mode()
def start_texts(
    prepared: Prepared, prompts: Sequence[Sequence[int]], most: int
) -> tuple[Float[Tensor, "texts filled_up_vocab"], TextSteps]:
    """Read prompts, each filled up by its own length alone; logits after each, and what goes on from there."""
    held, stack = prepared.hold(len(prompts), most), prepared.decoder.stack
    lengths = torch.tensor([round_up(len(ids), LENGTH) for ids in prompts])
    held.length_for(int(lengths.max()) - 1)
    last = torch.empty(len(prompts), stack.d_model)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for place, row in enumerate(rows.tolist()):
            ids[place, : len(prompts[row])] = torch.tensor(prompts[row])
        heads = stack.num_kv_heads, length, held_width(stack.head_dim)
        both = torch.empty(2, len(stack.layers), len(rows), *heads)
        look_ahead = create_look_ahead_mask(length, window=stack.options.window)
        bias = torch.where(look_ahead, 0.0, FORBIDDEN)[None, None]
        hidden = prepared.decoder.whole(ids, bias, both).view(len(rows), length, -1)
        held.fill(rows, both)
        last[rows] = hidden[torch.arange(len(rows)), torch.tensor([len(prompts[row]) - 1 for row in rows.tolist()])]
    return prepared.logits(last), TextSteps(prepared, held, [len(ids) for ids in prompts])
