"""A module as compiled code: exported (`torch.export`), compiled to C++ by AOTInductor, and kept for the next time."""

import itertools
import shlex
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triglot.generation.compiler import becoming, cpp_compiler, is_gcc, kept
from triglot.generation.int4 import KernelInt4, called_by_compiled_code

Run = Callable[[list[Tensor]], list[Tensor]]
"""Compiled code, from inputs and state in one list."""
OPTIONS = {
    "realize_reads_threshold": 16,  # rather than writing out what is made of five small parts
    "cpp.enable_floating_point_contract_flag": "fast",
    "aot_inductor.check_lowerbound": False,
    "assert_indirect_indexing": False,  # once for each product, of experts that we have chosen
    "memory_planning": True,  # one piece of memory for all that a call writes, not one for each
}
GCC = "-ftree-loop-vectorize"
"""What PyTorch forbids GCC: to make vectors of loops of which it makes none itself, as of sums of whole numbers."""
GCC_OF = {"AVX512": f"{GCC} -mprefer-vector-width=512"}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors, those too that checkpoints leave out."""
    return {name: part.detach() for name, part in itertools.chain(module.named_parameters(), module.named_buffers())}


class Stateless(nn.Module):
    """A module that is given its own tensors, so that modules of one shape share code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.of = [module]  # in a list, so that its tensors are none of this one's
        self.names = list(state_of(module))

    def forward(self, inputs: tuple[Any, ...], state: list[Tensor]) -> Any:
        return torch.func.functional_call(self.of[0], dict(zip(self.names, state, strict=True)), inputs)


def exported(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The module's code as a program over its inputs, of which some sizes are `dynamic`, and its state."""
    state = list(state_of(module).values())
    dynamic_shapes = {"inputs": dynamic, "state": [None] * len(state)}
    return torch.export.export(Stateless(module), (inputs, state), dynamic_shapes=dynamic_shapes)


def compile_module(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...], grain: int) -> Run:
    """The module's code, compiled unless it was before: it is kept where PyTorch keeps what it has compiled.

    `grain`: operations of a loop that are worth a thread.
    """
    options = OPTIONS | {"cpp.min_chunk_size": grain}
    program = exported(module, inputs, dynamic)
    if any(isinstance(part, KernelInt4) for part in module.modules()):
        options = options | {"aot_inductor.custom_ops_to_c_shims": called_by_compiled_code()}
    path = kept(f"{program}{options}{_gcc_flags()}{torch.get_num_threads()}", ".pt2")
    if not path.exists():
        with becoming(path) as package:
            _compile(program, str(package), options)
    run: Run = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return run


def bound(run: Run, module: nn.Module) -> Run:
    """A module's code with its tensors, to be given inputs alone."""
    state = list(state_of(module).values())
    return lambda inputs: run([*inputs, *state])


def _compile(program: torch.export.ExportedProgram, package: str, options: dict[str, Any]) -> None:
    options = options | {"cpp.cxx": (_script(),)}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyTorch's, of itself
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)


def _script() -> str:
    """One that calls the compiler with its own arguments and, behind PyTorch's, with flags of ours for GCC.

    By its name PyTorch knows whose it is.
    """
    text = f'#!/bin/sh\nexec {shlex.join(cpp_compiler())} "$@" {_gcc_flags() if is_gcc() else ""}\n'
    script = kept(text, "-g++" if is_gcc() else "-clang++")
    if not script.exists():
        with becoming(script) as made:
            made.write_text(text)
            made.chmod(0o755)
    return str(script)


def _gcc_flags() -> str:
    return GCC_OF.get(torch.backends.cpu.get_cpu_capability(), GCC)
