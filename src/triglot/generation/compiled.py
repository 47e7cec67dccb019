"""Texts that go on a few at a time, by compiled code: what a processor does for a token becomes loops over memory.

A token of one text costs its weights, read once, and in Python many operations between them that are too small for
their price. So blocks that read one token (`one_token.py`) are exported and compiled to C++ (`torch.export`,
AOTInductor): a few become one call, and all such calls, being of one shape, share the code. Several texts are read by
code for TOGETHER of them, whose loops over the weights serve all.

Rows are rounded to 16 bits where weights are to eight, and else not at all, unlike in `prepared.py`, so that
log-probabilities are others than there. What a text becomes does not depend on its company here either: both codes
take its sums in the same order, what is hidden weighs exactly nothing, and where a compiler has done otherwise, which
is seen before the first texts are read together, each is read alone.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.decoding.logits import Scored
from triglot.generation.aot import Run, bound, compile_module, state_of
from triglot.generation.int4 import KernelInt4
from triglot.generation.one_token import Blocks, Head, OneToken, Start
from triglot.generation.prepared import Prepared
from triglot.generation.steps import start_texts
from triglot.layers.attend import FORBIDDEN
from triglot.layers.packed import Precision
from triglot.models.decoder_only import DecoderLLM

BLOCKS = 3, 2, 1
"""Blocks that one call goes through: the first of these of which a model has a multiple."""
BEFORE = 64
"""Tokens before a text's last one, as the compiler is told, who has threads share the work of so many."""
LONGEST = 2**30
"""Tokens before a text's last one, at most."""
TOGETHER = 8
"""Texts that are read by one call; a single one is read by code of its own."""
GRAIN = {1: 2**13, TOGETHER: 2**9}
"""Operations that are worth a thread; of one row so many that no norm is shared by two, who would add up otherwise."""
LENGTHS = [2, 3, 5, 17, 24, 31, 64, 100]
"""Of texts that are read together and alone, to see whether they become the same: full vectors of 16 and some more."""
ROUNDS = 8
"""Tokens of each that are looked at: an exponential by other instructions changes the bits of one in ten."""


class Code(NamedTuple):
    """What reads a token of each of so many texts: calls one after another, with their weights."""

    start: Run
    blocks: list[Run]
    head: Run


class Compiled:
    """A model whose blocks and head are compiled, for the number of threads that there are then."""

    def __init__(self, model: DecoderLLM, precision: Precision, banned: Sequence[int] = ()) -> None:
        self.model, self.precision = model, precision
        layers = [OneToken(layer, precision) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList tells of no kind
        size = next(size for size in BLOCKS if len(layers) % size == 0)
        self.calls = [Blocks(layers[first : first + size]) for first in range(0, len(layers), size)]
        self.start, self.head = Start(model.embedding), Head(model, precision, banned)
        self._code: dict[int, Code] = {}

    @property
    def multiplies_in(self) -> str:
        """What the weights are multiplied in: not always what was asked for, since few sizes fit four bits."""
        if self.precision != "int4":
            return self.precision
        parts = itertools.chain.from_iterable(call.modules() for call in self.calls)
        return "int8 and int4" if any(isinstance(part, KernelInt4) for part in parts) else "int8"

    def code(self, rows: int) -> Code:
        """For so many texts; compiled when it is first asked for."""
        if rows not in self._code:
            self._code[rows] = self._compile(rows)
        return self._code[rows]

    @cached_property
    @torch.inference_mode()
    def together(self) -> int:
        """Texts that one call reads: one, where the compiler has made code that takes sums of several otherwise.

        One, too, with experts, of which each text reads its own, and with a window, which begins at other places in
        company, so that a text's sums might be taken in other parts.
        """
        if self.model.options.experts is not None or self.model.options.window is not None:
            return 1
        lengths = [min(length, self.model.max_seq_length - 1) for length in LENGTHS]
        draw, sizes = torch.Generator().manual_seed(0), (self.model.num_kv_heads, self.model.head_dim)
        texts = [torch.randn(2, len(self.model.layers), length, *sizes, generator=draw) for length in lengths]
        group, alone = Group(texts, TOGETHER, max(lengths) + 1), [Group([text], 1, text.size(2) + 1) for text in texts]
        for tokens in torch.randint(self.model.vocab_size, (ROUNDS, TOGETHER), generator=draw):
            by_one = [self.step(token, of_one) for token, of_one in zip(tokens.split(1), alone, strict=True)]
            by_all = self.step(tokens, group)
            same = by_all.logits.equal(torch.cat([one.logits for one in by_one]))
            if not (same and by_all.normaliser.equal(torch.cat([one.normaliser for one in by_one]))):
                return 1
        return TOGETHER

    @torch.inference_mode(mode=False)  # of which a program knows nothing
    @torch.no_grad()
    def _compile(self, rows: int) -> Code:
        def made(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Run:
            if (shape := _shape_of(module)) not in of_shape:  # what is of one shape shares the code
                of_shape[shape] = compile_module(module, inputs, dynamic, GRAIN[rows])
            return bound(of_shape[shape], module)

        of_shape: dict[str, Run] = {}
        (x, *also), dynamic = self._example(rows)
        places = torch.zeros(2, rows, dtype=torch.long)
        start = made(self.start, tuple(places), (None, None))
        blocks = [made(blocks, (x, *also), dynamic) for blocks in self.calls]
        return Code(start, blocks, made(self.head, (x,), (None,)))

    def _example(self, rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What some blocks read where BEFORE tokens stand before one, and which of these sizes may be others."""
        blocks, zeros = len(self.calls[0].blocks), torch.zeros(rows, dtype=torch.long)
        x, *turn = self.start(zeros, zeros)
        bias, rotation = self.bias(zeros + BEFORE, 0, BEFORE), tuple(turn) or None
        sizes = rows, self.model.num_kv_heads, self.model.head_dim
        held, own = (
            [(torch.zeros(some), torch.zeros(some)) for _ in range(blocks)] for some in ((BEFORE + 1, *sizes), sizes)
        )
        length, room = torch.export.Dim("before", max=LONGEST), torch.export.Dim("room", max=LONGEST)
        of_rotation, of_bias = None if rotation is None else (None, None), None if bias is None else {3: length + 1}
        dynamic = (None, {0: length}, [({0: room}, {0: room})] * blocks, [(None, None)] * blocks, of_rotation, of_bias)
        return (x, torch.arange(BEFORE), held, own, rotation, bias), dynamic

    def bias(self, places: Int[Tensor, " rows"], first: int, last: int) -> Tensor | None:
        """What is added to scores of tokens at these places, for what stands from `first` on, before `last`."""
        at, relative = places[:, None], self.model.relative
        if len(places) == 1 and relative is None:
            return None  # all that stands before is attended to
        before = torch.arange(first, last).expand(len(places), -1)
        hidden = before >= at
        if (window := self.model.options.window) is not None:
            hidden |= before <= at - window
        bias = F.pad(hidden * FORBIDDEN, (0, 1))[:, None, None]
        return bias if relative is None else bias + relative(at, torch.cat([before, at], 1))

    def step(self, tokens: Int[Tensor, " rows"], group: "Group") -> Scored:
        """Logits after a token of each text of a group, which is told its keys and values."""
        window, last, code = self.model.options.window, max(group.ends), self.code(len(tokens))
        first = 0 if window is None else max(0, min(group.ends) + 1 - window)
        places = torch.tensor(group.ends)
        x, *turn = code.start([tokens, places])
        bias, before = self.bias(places, first, last), group.places[first:last]
        held = [part[first:] for part in group.layers] if first else group.layers
        also, size = [*turn, *(() if bias is None else (bias,))], 2 * len(self.calls[0].blocks)
        for number, run in enumerate(code.blocks):
            of_call = slice(number * size, (number + 1) * size)
            (x,) = run([x, before, *held[of_call], *group.own[of_call], *also])
        return Scored(*code.head([x]))


def _shape_of(module: nn.Module) -> str:
    """Equal for modules whose code is the same: a model's blocks differ in what they hold, if they do."""
    return str([(name, part.shape, part.dtype) for name, part in state_of(module).items()])


class Group:
    """Texts that are read by one call, side by side, in the first of `rows` places."""

    def __init__(
        self, texts: Sequence[Float[Tensor, "2 layers _ kv_heads head_dim"]], rows: int, capacity: int
    ) -> None:
        _, layers, _, *sizes = texts[0].shape
        self.held = torch.zeros(2, layers, capacity, rows, *sizes)  # what weighs nothing is a number, too
        for place, text in enumerate(texts):
            self.held[:, :, : text.size(2), place] = text
        lengths = [text.size(2) for text in texts]
        self.ends = lengths + [max(lengths)] * (rows - len(texts))
        """Where the next token of each stands."""
        self._own = torch.zeros(2, layers, rows, *sizes)
        self.layers, self.own = (
            list(itertools.chain(*zip(*both.unbind(), strict=True))) for both in (self.held, self._own)
        )
        """Keys and values of each layer, one behind the other, and where it writes those of the token that it reads."""
        self.places = torch.arange(capacity)

    def keep(self, places: Sequence[int]) -> None:
        """Have the tokens of these texts join what is held; what is in other places goes no further."""
        for row, end in enumerate(self.ends):
            self.held[:, :, end, row] = self._own[:, :, row]
        going = {place: self.ends[place] + 1 for place in places}
        least = min(going.values())  # so that other places do not have more read than the texts need
        self.ends = [going.get(place, least) for place in range(len(self.ends))]

    def text(self, place: int) -> Float[Tensor, "2 layers length kv_heads head_dim"]:
        """Keys and values of one text."""
        return self.held[:, :, : self.ends[place], place]


class CompiledTexts:
    """Texts that go on by compiled code, a group after another (`decoding.search.ScoredSteps`)."""

    ahead = False

    def __init__(
        self, compiled: Compiled, texts: Sequence[Float[Tensor, "2 layers _ kv_heads head_dim"]], capacity: int
    ) -> None:
        self.compiled, self.capacity = compiled, capacity
        self._arrange(texts)

    def _arrange(self, texts: Sequence[Float[Tensor, "2 layers _ kv_heads head_dim"]]) -> None:
        self.groups, self.places = list[Group](), list[tuple[Group, int]]()
        for rows in group_sizes(len(texts), self.compiled):
            some = texts[len(self.places) : len(self.places) + rows]
            self.groups.append(Group(some, rows, self.capacity))
            self.places += [(self.groups[-1], place) for place in range(len(some))]

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " texts"]) -> Scored:
        """Feed each text its next token; logits of the one after."""
        if len(tokens) == 1:  # which waits for each of the operations below
            scored = self.compiled.step(tokens, self.groups[0])
            self.groups[0].keep([0])
            return scored
        found = dict[int, tuple[Scored, int]]()
        for group in self.groups:
            places = {place: text for text, (of, place) in enumerate(self.places) if of is group}
            fed = tokens.new_zeros(len(group.ends))
            fed[list(places)] = tokens[list(places.values())]
            scored = self.compiled.step(fed, group)
            group.keep(list(places))
            found |= {text: (scored, place) for place, text in places.items()}
        of_texts = [found[text] for text in range(len(tokens))]
        return Scored(
            torch.stack([of.logits[place] for of, place in of_texts]),
            torch.stack([of.best[place] for of, place in of_texts]),
            torch.stack([of.normaliser[place] for of, place in of_texts]),
        )

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these texts, in this order; one may be taken more than once."""
        chosen = [self.places[row] for row in rows.tolist()]
        groups = list(dict.fromkeys(group for group, _ in chosen))
        sizes = sorted(len(group.ends) for group in groups)
        if len(set(chosen)) == len(chosen) and sizes == sorted(group_sizes(len(chosen), self.compiled)):
            self.places, self.groups = chosen, groups
        else:
            self._arrange([group.text(place) for group, place in chosen])


def group_sizes(texts: int, compiled: Compiled) -> list[int]:
    """How many are read by each call."""
    together = 1 if texts == 1 else compiled.together
    whole, rest = divmod(texts, together)
    return [together] * whole + ([] if rest == 0 else [1] if rest == 1 else [together])


@torch.inference_mode()
def start_compiled(
    compiled: Compiled,
    prepared: Prepared,
    prompts: Sequence[Sequence[int]],
    most: int,
    texts: int | None = None,
) -> tuple[Float[Tensor, "texts filled_up_vocab"], CompiledTexts]:
    """`start_texts` for texts that go on by compiled code; prompts are read by `prepared`.

    Code is made for so many `texts` as will be selected, if there are others than prompts, before any is read.
    """
    for rows in group_sizes(texts or len(prompts), compiled):
        compiled.code(rows)
    lengths, width = [len(ids) for ids in prompts], compiled.model.head_dim
    logits, steps = start_texts(prepared, prompts, max(lengths))
    held = [steps.held.text(row, length)[..., :width] for row, length in enumerate(lengths)]
    return logits, CompiledTexts(compiled, held, most)
