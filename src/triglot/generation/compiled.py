"""Texts that go on a few at a time, by compiled code: what a processor does for a token becomes loops over memory.

A token of one text costs its weights, read once, and in Python many operations between them that are too small for
their price. So a block that reads one token (`one_token.py`) is exported and compiled to C++ (`torch.export`,
AOTInductor): it becomes one call, and all blocks, being of one shape, share the code. Several texts are read by code
for TOGETHER of them, whose loops over the weights serve all.

Weights are rounded and rows are not, unlike in `prepared.py`, so that log-probabilities are others than there. What a
text becomes does not depend on its company here either: both codes take its sums in the same order, what is hidden
weighs exactly nothing, and where a compiler has done otherwise, which is seen before the first texts are read
together, each is read alone.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.generation.aot import Run, compile_module
from triglot.generation.one_token import Head, OneToken, Rows, Turn
from triglot.generation.prepared import Prepared
from triglot.generation.steps import start_texts
from triglot.layers.attend import FORBIDDEN
from triglot.layers.packed import Precision
from triglot.models.decoder_only import DecoderLLM

LONGEST = 2**30
"""Tokens before a text's last one, at most."""
TOGETHER = 8
"""Texts that are read by one call; a single one is read by code of its own."""
GRAIN = {1: 2**13, TOGETHER: 2**9}
"""Operations that are worth a thread; of one row so many that no norm is shared by two, who would add up otherwise."""
LENGTHS = [2, 3, 5, 17, 24, 31, 64, 100]
"""Of texts that are read together and alone, to see whether they become the same: full vectors of 16 and some more."""


class Code(NamedTuple):
    """What reads a token of each of so many texts."""

    blocks: list[Run]
    head: Run


class Compiled:
    """A model whose blocks and head are compiled, for the number of threads that there are then."""

    def __init__(self, model: DecoderLLM, precision: Precision, banned: Sequence[int] = ()) -> None:
        self.model = model
        self.layers = [OneToken(layer, precision) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList tells of no kind
        self.head = Head(model, precision, banned)
        self.states = [list(layer.state_dict().values()) for layer in self.layers]
        self.head_state = list(self.head.state_dict().values())
        self._code: dict[int, Code] = {}

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
        texts = [torch.randn(2, len(self.layers), length, *sizes, generator=draw) for length in lengths]
        tokens = torch.randint(self.model.vocab_size, (TOGETHER,), generator=draw)
        at_once = self.step(tokens, Group(texts, TOGETHER, max(lengths) + 1))
        alone = [self.step(tokens[[row]], Group([text], 1, text.size(2) + 1)) for row, text in enumerate(texts)]
        return TOGETHER if at_once.equal(torch.cat(alone)) else 1

    @torch.inference_mode(mode=False)  # of which a program knows nothing
    @torch.no_grad()
    def _compile(self, rows: int) -> Code:
        inputs, dynamic = self._example(rows)
        of_shape: dict[str, Run] = {}
        for layer in self.layers:  # blocks of one shape share the code
            if (shape := _shape_of(layer)) not in of_shape:
                of_shape[shape] = compile_module(layer, inputs, dynamic, GRAIN[rows])
        head = compile_module(self.head, (inputs[0],), (None,), GRAIN[rows])
        return Code([of_shape[_shape_of(layer)] for layer in self.layers], head)

    def _example(self, rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What a block reads where three tokens stand before one, and which of these sizes may be others."""
        x, rotation, bias = self.embed(torch.zeros(rows, dtype=torch.long), torch.full((rows,), 3), 0)
        sizes = rows, self.model.num_kv_heads, self.model.head_dim
        before, own = ((torch.zeros(*some, *sizes), torch.zeros(*some, *sizes)) for some in ((3,), ()))
        length = torch.export.Dim("before", max=LONGEST)
        of_rotation, of_bias = None if rotation is None else (None, None), None if bias is None else {3: length + 1}
        dynamic = (None, ({0: length}, {0: length}), (None, None), of_rotation, of_bias)
        return (x, before, own, rotation, bias), dynamic

    def embed(
        self, tokens: Int[Tensor, " rows"], positions: Int[Tensor, " rows"], first: int
    ) -> tuple[Rows, Turn | None, Tensor | None]:
        """Vectors of tokens, rotations at their places, and what is added to their scores, from place `first` on."""
        at, relative = positions[:, None], self.model.relative
        x, rotation = self.model.embedding(tokens[:, None], at)
        turn = None if rotation is None else tuple(rotation)
        if len(tokens) == 1 and relative is None:
            return x, turn, None  # all that stands before is attended to
        before = torch.arange(first, int(positions.max())).expand(len(tokens), -1)
        hidden = (before >= at) | (before < self.first(at))
        bias = F.pad(hidden * FORBIDDEN, (0, 1))[:, None, None]
        return x, turn, bias if relative is None else bias + relative(at, torch.cat([before, at], 1))

    def first(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The first token that each attends to."""
        window = self.model.options.window
        return torch.zeros_like(positions) if window is None else (positions + 1 - window).clamp(min=0)

    def step(self, tokens: Int[Tensor, " rows"], group: "Group") -> Float[Tensor, "rows filled_up_vocab"]:
        """Logits after a token of each text of a group, which is told its keys and values."""
        first, code = int(self.first(group.ends).min()), self.code(len(tokens))
        x, rotation, bias = self.embed(tokens, group.ends, first)
        keys, values = (part[:, first : int(group.ends.max())].unbind() for part in group.held)
        also = [*(rotation or ()), *(() if bias is None else (bias,))]
        for layer, (run, state) in enumerate(zip(code.blocks, self.states, strict=True)):
            (x,) = run([x, keys[layer], values[layer], *group.own[layer], *also, *state])
        (logits,) = code.head([x, *self.head_state])
        return logits[:, 0]


def _shape_of(module: nn.Module) -> str:
    """Equal for modules whose code is the same: a model's blocks differ in what they hold, if they do."""
    return str([(name, part.shape, part.dtype) for name, part in module.state_dict().items()])


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
        self.ends = torch.tensor(lengths + [max(lengths)] * (rows - len(texts)))
        """Where the next token of each stands."""
        self._own = torch.zeros(2, layers, rows, *sizes)
        self.own = list(zip(*(part.unbind() for part in self._own), strict=True))
        """Where each layer writes keys and values of the token that it reads."""

    def keep(self, places: Sequence[int]) -> None:
        """Have the tokens of these texts join what is held; what is in other places goes no further."""
        for row, end in enumerate(self.ends.tolist()):
            self.held[:, :, end, row] = self._own[:, :, row]
        going = self.ends[list(places)] + 1
        self.ends[:] = going.min()  # so that other places do not have more read than the texts need
        self.ends[list(places)] = going

    def text(self, place: int) -> Float[Tensor, "2 layers length kv_heads head_dim"]:
        """Keys and values of one text."""
        return self.held[:, :, : int(self.ends[place]), place]


class CompiledTexts:
    """Texts that go on by compiled code, a group after another (`decoding.search.Steps`)."""

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
    def step(self, tokens: Int[Tensor, " texts"]) -> Float[Tensor, "texts filled_up_vocab"]:
        """Feed each text its next token; logits of the one after."""
        found = dict[int, Tensor]()
        for group in self.groups:
            places = {place: text for text, (of, place) in enumerate(self.places) if of is group}
            fed = tokens.new_zeros(len(group.ends))
            fed[list(places)] = tokens[list(places.values())]
            logits = self.compiled.step(fed, group)
            group.keep(list(places))
            found |= {text: logits[place] for place, text in places.items()}
        return torch.stack([found[text] for text in range(len(tokens))])

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
    compiled: Compiled, prepared: Prepared, prompts: Sequence[Sequence[int]], most: int
) -> tuple[Float[Tensor, "texts filled_up_vocab"], CompiledTexts]:
    """`start_texts` for texts that go on by compiled code; prompts are read by `prepared`."""
    for rows in group_sizes(len(prompts), compiled):
        compiled.code(rows)  # before the prompts are read
    lengths, width = [len(ids) for ids in prompts], compiled.model.head_dim
    logits, steps = start_texts(prepared, prompts, max(lengths))
    held = [steps.held.both[:, :, row, :, :length, :width].transpose(2, 3) for row, length in enumerate(lengths)]
    return logits, CompiledTexts(compiled, held, most)
