"""Texts that go on by a captured step: all that a GPU does for a token of each of them is launched at once.

A step of a language model is hundreds of small operations, and launching one from Python takes longer than many of
them do. A CUDA graph records them once, with the memory that they read and write, and replays them by one call. So
texts stand in places of memory that stays: `Room` is so many of them, of one capacity.

By default a step reads SLOTS places whether there are texts in all of them or in one (and `captured_prompts.py` so many
prompts): products then have one shape, and a text's bits do not depend on its company, since our kernel for attention
reads a text in parts that its room has no influence on (without it, a text's capacity follows from the text alone).
With `compiled` there are as many places as texts, rounded up: faster, and not the same bits.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from triglot.decoding.logits import Scored
from triglot.generation.captured_prompts import PromptReader, Read
from triglot.generation.cuda_graph import captured
from triglot.generation.token_reader import TokenReader
from triglot.models.decoder_only import DecoderLLM

SLOTS = 32
"""Places of a step in any company: half as many would cost many texts nearly as much again."""
HELD = 1, 8, SLOTS
"""Of these places, the first so many have memory: the least of these numbers that the texts need."""
COMPILED_SLOTS = 1, 8, 64
"""Places of a compiled step: the least of these that is enough. Each takes some seconds to compile."""
CAPACITY, GROWTH = 256, 4
"""A place has room for a multiple of so many tokens; compiled, each size is so many times the one before."""
RECOMPILED = 64
"""Sizes of rooms, at most, whose step is compiled."""
KEPT = 4
"""Rooms that nobody is in and that are kept once the next texts have theirs."""


class Room:
    """`rows` places, `held` of them for texts of at most `capacity` tokens, and the step that reads a token of each."""

    def __init__(self, reader: TokenReader, rows: int, held: int, capacity: int) -> None:
        model = reader.model
        like, size = model.lm_head.weight, (len(model.layers), held, model.num_kv_heads, capacity, model.head_dim)
        self.reader, self.size, self.capacity = reader, (rows, held, capacity), capacity
        self.last = capacity - 1
        self.tokens, self.ends = (torch.zeros(rows, dtype=torch.long, device=like.device) for _ in range(2))
        # Two pieces of memory: of parts of one piece the compiler would not know that they have nothing in common.
        self.held = [torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(2)]
        self.taken_by: Callable[[], object] = lambda: None
        """Whoever is in this room; None once they are gone."""
        self.scored: Scored | None = None
        self.launch = captured(self._read, like.device)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is in it."""
        return self.taken_by() is None

    def _read(self) -> None:
        self.scored = self.reader(self.tokens, self.ends, *self.held)
        self.ends.add_(1).clamp_(max=self.last)  # places without a text go nowhere

    def step(self) -> Scored:
        """Read `tokens`; what is known of all places is valid until the next step."""
        self.launch()
        assert self.scored is not None
        return self.scored

    def put(self, place: int, text: Read) -> None:
        """Have a text of so many tokens stand at a place."""
        for held, part in zip(self.held, text, strict=True):
            held[:, place, :, : text.size(3)] = part
        self.ends[place] = text.size(3)

    def text(self, place: int) -> Read:
        """The text at a place."""
        return torch.stack([held[:, place, :, : int(self.ends[place])] for held in self.held])


class Captured:
    """A model ready to go on from texts by captured steps, of which it keeps the rooms."""

    def __init__(self, model: DecoderLLM, banned: Sequence[int] = (), *, compiled: bool = False) -> None:
        self.model, self.compiled = model, compiled
        with torch.inference_mode(mode=False), torch.no_grad():  # or its weights could be trained no more
            self.reader = TokenReader(model, banned, compiled=compiled)
        self.read = PromptReader(model, COMPILED_SLOTS if compiled else None)
        self.rooms: list[Room] = []

    def slots(self, texts: int) -> int:
        """Places of the rooms that so many texts go to."""
        if not self.compiled:
            return SLOTS
        return next((slots for slots in COMPILED_SLOTS if slots >= texts), COMPILED_SLOTS[-1])

    def capacity(self, most: int) -> int:
        """What a room holds of a text that comes to have so many tokens."""
        capacity = CAPACITY
        while capacity < most:
            capacity = capacity * GROWTH if self.compiled else capacity + CAPACITY
        return min(capacity, self.model.max_seq_length)

    def held(self, texts: int) -> int:
        """Places of such a room that have memory: all unless attention by our kernel leaves the others out."""
        if self.compiled or not self.reader.has_kernel:
            return self.slots(texts)
        return next(held for held in HELD if held >= texts)

    def room(self, rows: int, held: int, capacity: int, of: object) -> Room:
        """One of this size that is free as long as `of` is there; the last one made or used stands last."""
        size = rows, held, capacity
        fits = next((room for room in self.rooms if room.size == size and room.is_idle), None)
        if fits is not None:
            self.rooms.remove(fits)
        else:
            with suppress(torch.OutOfMemoryError):
                fits = self._made(*size)
        if fits is None:  # when nothing refers any more to what was begun
            self.leave(kept=0)
            self.read.passes.clear()
            fits = self._made(*size)
        fits.ends.zero_()
        fits.taken_by = weakref.ref(of)
        self.rooms.append(fits)
        return fits

    def leave(self, kept: int = KEPT) -> None:
        """Give up the rooms that nobody is in, but for the last ones."""
        idle = [number for number, room in enumerate(self.rooms) if room.is_idle]
        for number in reversed(idle[: max(0, len(idle) - kept)]):
            del self.rooms[number]

    def _made(self, rows: int, held: int, capacity: int) -> Room:
        with torch.inference_mode(mode=False), torch.no_grad(), ExitStack() as also:
            if self.compiled:
                from torch._dynamo import config  # which takes a second to import

                also.enter_context(config.patch(recompile_limit=RECOMPILED))
            return Room(self.reader, rows, held, capacity)


class Part(NamedTuple):
    """The texts of one room."""

    room: Room
    texts: Tensor | slice
    """Which of all they are."""
    places: Tensor | slice
    """Where each stands."""


class CapturedTexts:
    """Texts that go on by captured steps (`decoding.search.ScoredSteps`)."""

    ahead = True

    def __init__(self, captured: Captured, texts: Sequence[Read], capacities: Sequence[int]) -> None:
        self.captured = captured
        self._stand(self._arranged(texts, capacities))

    def _arranged(self, texts: Sequence[Read], capacities: Sequence[int]) -> list[tuple[Room, int]]:
        """The room and the place of each text, put there."""
        arranged = dict[int, tuple[Room, int]]()
        for capacity in sorted(set(capacities)):
            numbers = [number for number, own in enumerate(capacities) if own == capacity]
            rows = self.captured.slots(len(numbers))
            for place, number in enumerate(numbers):
                if place % rows == 0:
                    held = self.captured.held(min(rows, len(numbers) - place))
                    room = self.captured.room(rows, held, capacity, self)
                room.put(place % rows, texts[number])
                arranged[number] = room, place % rows
        return [arranged[number] for number in range(len(texts))]

    def _stand(self, at: Sequence[tuple[Room, int]]) -> None:
        self.at, self.parts, device = list(at), list[Part](), at[0][0].tokens.device
        order = list[int]()
        for room in dict.fromkeys(room for room, _ in at):
            texts = [text for text, (own, _) in enumerate(at) if own is room]
            self.parts.append(Part(room, index(texts, device), index([at[text][1] for text in texts], device)))
            order += texts
        self.back = index(sorted(range(len(order)), key=order.__getitem__), device)
        """Where each text is in all parts behind one another."""

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " texts"]) -> Scored:
        """Feed each text its next token; logits of the one after, valid until the next step."""
        found = list[Scored]()
        for room, texts, places in self.parts:
            room.tokens[places] = tokens[texts]
            found.append(room.step()[places])
        if len(found) == 1:
            return found[0]
        parts = zip(*((one.logits, one.best, one.normaliser) for one in found), strict=True)
        return Scored(*map(torch.cat, parts))[self.back]

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these texts, in this order; one may be taken more than once."""
        chosen = [self.at[row] for row in rows.tolist()]
        if len(set(chosen)) < len(chosen):
            texts = [room.text(place) for room, place in chosen]
            chosen = self._arranged(texts, [room.capacity for room, _ in chosen])
        self._stand(chosen)


def can_be_captured(model: nn.Module) -> bool:
    """Whether it is on a GPU, and a step of one shape: not with experts, each of which takes what tokens come to it."""
    return isinstance(model, DecoderLLM) and model.options.experts is None and model.lm_head.weight.is_cuda


def index(numbers: Sequence[int], device: torch.device) -> Tensor | slice:
    """What picks these rows: a slice where they are the first, in their order."""
    if list(numbers) == list(range(len(numbers))):
        return slice(0, len(numbers))
    return torch.tensor(numbers, device=device)


@torch.inference_mode()
def start_captured(
    captured: Captured, prompts: Sequence[Sequence[int]], mosts: Sequence[int]
) -> tuple[Scored, CapturedTexts]:
    """Read prompts, of which each text is to have `mosts` tokens at most; logits after each, and what goes on.

    Equal prompts are read once. The last token of each is read by a step, as those that follow.
    """
    different = list(dict.fromkeys(tuple(ids[:-1]) for ids in prompts))
    read = dict(zip(different, captured.read(different), strict=True))
    capacities = list(map(captured.capacity, mosts))
    if captured.compiled or captured.reader.has_kernel:  # which reads no more of a room than its text
        capacities = [max(capacities)] * len(capacities)
    steps = CapturedTexts(captured, [read[tuple(ids[:-1])] for ids in prompts], capacities)
    captured.leave()
    last = torch.tensor([ids[-1] for ids in prompts], device=captured.model.lm_head.weight.device)
    return steps.step(last), steps
