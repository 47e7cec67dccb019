"""Texts that go on a few at a time, by compiled code: what a processor does for a token becomes loops over memory.

A token of one text costs its weights, read once, and in Python many operations between them that are too small for
their price. So a block that reads one token (`one_token.py`) is exported and compiled to C++ (`torch.export`,
AOTInductor): it becomes one call, and all blocks, being of one shape, share the code. Several texts are read by code
for TOGETHER of them, whose loops over the weights serve all.

Weights are rounded and rows are not, unlike in `prepared.py`, so that log-probabilities are others than there. Both
codes take each text's sums in the same order, and what is hidden weighs exactly nothing: what a text becomes does not
depend on its company here either.
"""

import hashlib
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.errors import ConfigError
from triglot.generation.one_token import Head, OneToken, Rows, Turn
from triglot.generation.prepared import Prepared
from triglot.generation.steps import start_texts
from triglot.layers.attend import FORBIDDEN
from triglot.layers.packed import Precision
from triglot.models.decoder_only import DecoderLLM

Run = Callable[[list[Tensor]], list[Tensor]]
"""Compiled code, from inputs and state in one list."""
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast", "aot_inductor.check_lowerbound": False}
LONGEST = 2**30
"""Tokens before a text's last one, at most."""


TOGETHER = 8
"""Texts that are read by one call; a single one is read by code of its own."""


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

    @torch.inference_mode(mode=False)  # of which a program knows nothing
    @torch.no_grad()
    def _compile(self, rows: int) -> Code:
        inputs, dynamic = self._example(rows)
        of_shape: dict[str, Run] = {}
        for layer in self.layers:  # blocks of one shape share the code
            if (shape := _shape_of(layer)) not in of_shape:
                of_shape[shape] = compile_module(layer, inputs, dynamic)
        head = compile_module(self.head, (inputs[0],), (None,))
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
        self.ends[list(places)] += 1

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
        sizes = group_sizes(len(texts))
        parts = [texts[first : first + TOGETHER] for first in range(0, len(texts), TOGETHER)]
        self.groups = [Group(part, rows, self.capacity) for part, rows in zip(parts, sizes, strict=True)]
        self.places = [
            (group, place) for group, part in zip(self.groups, parts, strict=True) for place in range(len(part))
        ]

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
        if len(set(chosen)) == len(chosen) and group_sizes(len(chosen)) == [len(group.ends) for group in self.groups]:
            self.places = chosen
        else:
            self._arrange([group.text(place) for group, place in chosen])


def group_sizes(texts: int) -> list[int]:
    """How many are read by each call, so that these are few."""
    whole, rest = divmod(texts, TOGETHER)
    return [TOGETHER] * whole + ([] if rest == 0 else [1] if rest == 1 else [TOGETHER])


@torch.inference_mode()
def start_compiled(
    compiled: Compiled, prepared: Prepared, prompts: Sequence[Sequence[int]], most: int
) -> tuple[Float[Tensor, "texts filled_up_vocab"], CompiledTexts]:
    """`start_texts` for texts that go on by compiled code; prompts are read by `prepared`."""
    for rows in group_sizes(len(prompts)):
        compiled.code(rows)  # before any work
    lengths, width = [len(ids) for ids in prompts], compiled.model.head_dim
    logits, steps = start_texts(prepared, prompts, max(lengths))
    held = [steps.held.both[:, :, row, :, :length, :width].transpose(2, 3) for row, length in enumerate(lengths)]
    return logits, CompiledTexts(compiled, held, most)


class Stateless(nn.Module):
    """A module that is given its own tensors, so that modules of one shape share code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.of = [module]  # in a list, so that its tensors are none of this one's
        self.names = list(module.state_dict())

    def forward(self, inputs: tuple[Any, ...], state: list[Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(self.of[0], dict(zip(self.names, state, strict=True)), inputs)
        return result


def exported(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The module's code as a program over its inputs, of which some sizes are `dynamic`, and its state."""
    state = list(module.state_dict().values())
    dynamic_shapes = {"inputs": dynamic, "state": [None] * len(state)}
    return torch.export.export(Stateless(module), (inputs, state), dynamic_shapes=dynamic_shapes)


def compile_module(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Run:
    """The module's code, compiled unless it was before: it is kept where PyTorch keeps what it has compiled."""
    program = exported(module, inputs, dynamic)
    path = _folder() / f"{_key(str(program))}.pt2"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            package = Path(folder) / path.name
            _compile(program, str(package))
            package.replace(path)
    run: Run = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return run


def _compile(program: torch.export.ExportedProgram, package: str) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        rule = "left out where there is no C++ compiler (g++, or what the variable CXX names)"
        raise ConfigError(f"`compiled` must be {rule}, but is True instead.") from error
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyTorch's, of itself
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=OPTIONS)


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "triglot"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(program: str) -> str:
    """Of code for this very machine and as many threads."""
    also = platform.node(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.__version__, OPTIONS
    return hashlib.sha256(f"{program}{also}".encode()).hexdigest()
