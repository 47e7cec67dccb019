"""The C++ compiler of this machine, and where what it has made is kept for the next time."""

import getpass
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from triglot.errors import ConfigError, require


def cpp_compiler() -> list[str]:
    """The command that compiles C++, its own arguments with it; ConfigError where there is none.

    It is the one that PyTorch would find, whose own search takes a second or two to import.
    """
    command = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    rule = "left out where there is no C++ compiler (g++, or what the variable CXX says)"
    require(bool(_version(command)), "compiled", rule, True, ConfigError)
    return shlex.split(command)


def is_gcc() -> bool:
    """Whether the compiler is GCC, by what it says of itself."""
    return "Free Software Foundation" in _version(shlex.join(cpp_compiler()))


@cache
def _version(command: str) -> str:
    try:
        told = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True)
    except (subprocess.SubprocessError, OSError, ValueError):
        return ""
    return told.stdout


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """A path of this process alone, which becomes `path` when all is written: others may make the same meanwhile."""
    writable = os.access(path.parent, os.W_OK)
    require(writable, "TORCHINDUCTOR_CACHE_DIR", "a folder that can be written to", path.parent.parent, ConfigError)
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
    own = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", own)).absolute() / "triglot"
    with suppress(OSError):  # of which whoever wants to write is told
        folder.mkdir(parents=True, exist_ok=True)
    return folder
