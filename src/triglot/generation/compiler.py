"""The C++ compiler of this machine, and where what it has made is kept for the next time."""

import hashlib
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from triglot.errors import ConfigError


def cpp_compiler() -> str:
    """The compiler's name; ConfigError where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        rule = "left out where there is no C++ compiler (g++, or what the variable CXX names, without arguments)"
        raise ConfigError(f"`compiled` must be {rule}, but is True instead.") from error


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """A path of this process alone, which becomes `path` when all is written: others may make the same meanwhile."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        made.replace(path)


def kept(program: str, suffix: str) -> Path:
    """Where the code of a program for this very machine is, or is to be: among PyTorch's own."""
    cpu = torch.backends.cpu.get_cpu_capability(), sorted(torch.cpu.get_capabilities().items())
    also = platform.node(), cpu, torch.__version__
    return _folder() / f"{hashlib.sha256(f'{program}{also}'.encode()).hexdigest()}{suffix}"


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "triglot"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
