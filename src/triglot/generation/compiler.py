"""The C++ compiler of this machine, and where what it has made is kept for the next time."""

import getpass
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from triglot.errors import ConfigError, require

PATHLIKE = r'[\\/:*?"<>|]'
"""What a file's name cannot have on some system."""


def cpp_compiler() -> list[str]:
    """The command that compiles C++, its own arguments with it; ConfigError where there is none.

    It is the one that PyTorch would find, whose own search takes a second or two to import.
    """
    return _compiler().command


def has_compiler() -> bool:
    """Whether there is a C++ compiler, and a folder for what it makes."""
    try:
        cpp_compiler()
        _check_writable(_folder())
    except ConfigError:
        return False
    return True


def is_gcc() -> bool:
    """Whether the compiler is GCC, by what it says of itself."""
    return "Free Software Foundation" in _compiler().version


class Compiler(NamedTuple):
    """What is called, and what it says of itself."""

    command: list[str]
    version: str


def _compiler() -> Compiler:
    return _compiler_of(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@cache
def _compiler_of(known: str) -> Compiler:
    try:
        command = [known] if shutil.which(known) else shlex.split(known)
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        rule = "left out where there is no C++ compiler (g++, or what the variable CXX says)"
        raise ConfigError(f"`compiled` must be {rule}, but is True instead.") from error
    return Compiler(command, told)


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """A path of this process alone, which becomes `path` when all is written: others may make the same meanwhile."""
    _check_writable(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        made.replace(path)


def _check_writable(folder: Path) -> None:
    writable = os.access(folder, os.W_OK)
    require(writable, "TORCHINDUCTOR_CACHE_DIR", "a folder that can be written to", folder.parent, ConfigError)


def kept(program: str, suffix: str) -> Path:
    """Where the code of a program for this very machine is, or is to be: among PyTorch's own."""
    cpu = torch.backends.cpu.get_cpu_capability(), sorted(torch.cpu.get_capabilities().items())
    also = platform.node(), cpu, torch.__version__, _compiler()
    return _folder() / f"{hashlib.sha256(f'{program}{also}'.encode()).hexdigest()}{suffix}"


def _folder() -> Path:
    named, default = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), _default_folder()
    folder = Path(named or default).absolute() / "triglot"
    with suppress(OSError):  # of which whoever wants to write is told
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Anyone can make a folder of this name among temporary files, and what lies there is run.
    foreign = folder.parent == default and not (_is_own(folder) and _is_own(default))
    require(not foreign, "TORCHINDUCTOR_CACHE_DIR", "a folder of this user's own", folder.parent, ConfigError)
    return folder


def _is_own(folder: Path) -> bool:
    return not folder.exists() or not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _default_folder() -> Path:
    """The one that PyTorch names in that variable once it has compiled something."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # as of a container's user that has no name
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir(), f"torchinductor_{re.sub(PATHLIKE, '_', user)}")
