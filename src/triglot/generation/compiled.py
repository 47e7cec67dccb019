"""Texts that go on one after another, by compiled code: what a processor does for a token becomes loops over memory.

A token of one text costs its weights, read once, and in Python many operations between them that are too small for
their price. So a block that reads one token (`one_token.py`) is exported and compiled to C++ (`torch.export`,
AOTInductor): it becomes one call, and all blocks, being of one shape, share the code.

Weights are rounded and rows are not, unlike in `prepared.py`, so that log-probabilities are others than there. No text
is computed beside another one: what it becomes does not depend on its company here either.
"""

import hashlib
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.errors import ConfigError
from triglot.generation.one_token import Head, OneToken, Row, Turn
from triglot.generation.prepared import Prepared
from triglot.generation.steps import start_texts
from triglot.layers.packed import Precision
from triglot.models.decoder_only import DecoderLLM

Run = Callable[[list[Tensor]], list[Tensor]]
"""Compiled code, from inputs and state in one list."""
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast", "aot_inductor.check_lowerbound": False}
LONGEST = 2**30
"""Tokens before a text's last one, at most."""


class Compiled:
    """A model whose blocks and head are compiled, for the number of threads that there are then."""

    @torch.inference_mode(mode=False)  # of which a program knows nothing
    @torch.no_grad()
    def __init__(self, model: DecoderLLM, precision: Precision, banned: Sequence[int] = ()) -> None:
        self.model = model
        layers = [OneToken(layer, precision) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList tells of no kind
        head = Head(model, precision, banned)
        self.states = [list(layer.state_dict().values()) for layer in layers]
        self.head_state = list(head.state_dict().values())
        inputs, dynamic = self._example()
        of_shape: dict[str, Run] = {}
        for layer in layers:  # blocks of one shape share the code
            if (shape := _shape_of(layer)) not in of_shape:
                of_shape[shape] = compile_module(layer, inputs, dynamic)
        self.run_blocks = [of_shape[_shape_of(layer)] for layer in layers]
        self.run_head = compile_module(head, (inputs[0],), (None,))

    def _example(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What a block reads where three tokens stand before one, and which of these sizes may be others."""
        x, rotation, bias = self.embed(0, 3)
        sizes = self.model.num_kv_heads, self.model.head_dim
        before, own = ((torch.zeros(*some, *sizes), torch.zeros(*some, *sizes)) for some in ((3,), ()))
        length = torch.export.Dim("before", max=LONGEST)
        of_rotation, of_bias = None if rotation is None else (None, None), None if bias is None else {3: length + 1}
        dynamic = (None, ({0: length}, {0: length}), (None, None), of_rotation, of_bias)
        return (x, before, own, rotation, bias), dynamic

    def embed(self, token: int, position: int) -> tuple[Row, Turn | None, Tensor | None]:
        """A token's vector, the rotation at its place, and what relative positions add to its scores."""
        at, relative = torch.tensor([[position]]), self.model.relative
        x, rotation = self.model.embedding(torch.tensor([[token]]), at)
        bias = None if relative is None else relative(at, torch.arange(self.first(position), position + 1)[None])
        return x, None if rotation is None else tuple(rotation), bias

    def first(self, position: int) -> int:
        """The first token that the one at `position` attends to."""
        window = self.model.options.window
        return 0 if window is None else max(0, position + 1 - window)

    def step(
        self, token: int, position: int, held: Float[Tensor, "2 layers capacity kv_heads head_dim"]
    ) -> Float[Tensor, "1 filled_up_vocab"]:
        """Logits after a token at `position`, whose keys and values join those `held` of the ones before."""
        x, rotation, bias = self.embed(token, position)
        first = self.first(position)
        keys, values = (part[:, first:position].unbind() for part in held)
        own_keys, own_values = (part[:, position].unbind() for part in held)
        also = [*(rotation or ()), *(() if bias is None else (bias,))]
        for layer, (run, state) in enumerate(zip(self.run_blocks, self.states, strict=True)):
            own = own_keys[layer], own_values[layer]
            (x,) = run([x, keys[layer], values[layer], *own, *also, *state])
        (logits,) = self.run_head([x, *self.head_state])
        return logits[0]


def _shape_of(module: nn.Module) -> str:
    """Equal for modules whose code is the same: a model's blocks differ in what they hold, if they do."""
    return str([(name, part.shape, part.dtype) for name, part in module.state_dict().items()])


class CompiledTexts:
    """Texts [2, layers, capacity, kv_heads, head_dim] that go on one after another (`decoding.search.Steps`)."""

    def __init__(self, compiled: Compiled, held: Sequence[Tensor], ends: Sequence[int]) -> None:
        self.compiled, self.held, self.ends = compiled, held, ends

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " texts"]) -> Float[Tensor, "texts filled_up_vocab"]:
        """Feed each text its next token; logits of the one after."""
        logits = [self.compiled.step(*each) for each in zip(tokens.tolist(), self.ends, self.held, strict=True)]
        self.ends = [end + 1 for end in self.ends]
        return torch.cat(logits)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these texts, in this order; one may be taken more than once."""
        chosen, taken = rows.tolist(), set[int]()
        held = list[Tensor]()
        for row in chosen:
            held.append(self.held[row].clone() if row in taken else self.held[row])
            taken.add(row)
        self.held, self.ends = held, [self.ends[row] for row in chosen]


@torch.inference_mode()
def start_compiled(
    compiled: Compiled, prepared: Prepared, prompts: Sequence[Sequence[int]], most: int
) -> tuple[Float[Tensor, "texts filled_up_vocab"], CompiledTexts]:
    """`start_texts` for texts that go on by compiled code; prompts are read by `prepared`."""
    lengths, width = [len(ids) for ids in prompts], compiled.model.head_dim
    logits, steps = start_texts(prepared, prompts, max(lengths))
    held = list[Tensor]()
    for row, length in enumerate(lengths):
        read = steps.held.both[:, :, row, :, :length, :width].transpose(2, 3)
        held.append(read.new_empty(*read.shape[:2], most, *read.shape[3:]))
        held[row][:, :, :length] = read
    return logits, CompiledTexts(compiled, held, lengths)


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
