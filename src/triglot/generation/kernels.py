"""Kernels of ours in C++ (the folder `cpp`), each compiled for the sizes of one model: what decoding calls.

They are for what a processor does between products: what takes PyTorch some operations, each of them through memory,
takes a kernel one, in the cache. Each sum is taken in one order, by one thread, so that a row's bits are its own.
"""

import ctypes
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triglot.errors import ConfigError
from triglot.generation.compiler import becoming, cpp_compiler, has_compiler, kept

FOLDER = Path(__file__).with_name("cpp")
LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Numbers that kernels compute side by side: as many as a vector holds, or two where it is shorter."""
FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -fopenmp -shared -fPIC"
ARCHITECTURES = {"AVX512": "-march=native", "AVX2": "-mavx2 -mfma"}
"""What keeps kernels to the instructions that PyTorch keeps to; nothing where those are what any such processor has."""
HEADERS = f"-I{Path(torch.__file__).parent / 'include'}"
"""PyTorch's."""
TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16"}
GRAIN, WORK = 128, 2**16
"""Rows from which on threads are worth it, and products, or what costs as much."""
Kernel = Callable[..., None]


@cache
def kernel(source: str, name: str, types: str, *, within: bool = False, **given: Any) -> Kernel:
    """The function `name` of a file, compiled with what is `given`, in a second, unless it was before.

    Of `types` there is a letter for each argument: p for a tensor, or None, n for a whole number, f for another one.
    What is called from `within` what PyTorch has compiled is found by all that is loaded, the first of a name.
    """
    architecture = ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability(), "")
    flags = [*FLAGS.split(), *architecture.split(), f"-DLANES={LANES}"]
    flags += [f"-D{key}={TYPES.get(value, value)}" for key, value in given.items()]
    code = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*"))]
    path = kept(f"{source}{flags}{code}", ".so")
    if not path.exists():
        with becoming(path) as made:
            command = [*cpp_compiler(), *flags, str(FOLDER / source), HEADERS, "-o", str(made)]
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode or not made.exists():
                raise _not_here(f"the C++ compiler does not take them:\n{told.stderr}")
            _load(made)
    run = getattr(_load(path, ctypes.RTLD_GLOBAL if within else ctypes.RTLD_LOCAL), name)
    run.restype = None
    run.argtypes = [{"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}[letter] for letter in types]
    return run


def kernels_pay() -> bool:
    """Whether kernels are called without having been asked for: where they were seen to pay, if there is a compiler."""
    return torch.backends.cpu.get_cpu_capability() in ARCHITECTURES and has_compiler()


def _load(path: Path, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode)
    except OSError as error:  # as where a compiler of C was named
        raise _not_here(f"what the C++ compiler makes of them cannot be loaded ({error})") from error


def _not_here(why: str) -> ConfigError:
    return ConfigError(f"`compiled` must be False where there can be no kernels, but is not: {why}")


def address(x: Tensor | None) -> int | None:
    """What a kernel is given of a tensor, which has to outlive the call."""
    return None if x is None else x.data_ptr()


def threads_for(rows: int, work: int = 0) -> int:
    """How many threads share so many rows, or so much `work` in products: all that PyTorch has, or one.

    Any other number has threads end and begin.
    """
    return torch.get_num_threads() if rows >= GRAIN or work >= WORK else 1
