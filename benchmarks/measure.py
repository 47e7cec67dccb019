"""How every figure is made: sides take turns in one process, medians are compared, and the machine is written down."""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LAPTOP = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""What a processor without AVX-512 and AMX has, for all sides."""

ANSWER = "answer: "
REST = 0.5
"""Seconds until the threads of the side before have stopped spinning."""

Row = dict[str, Any]
Work = Callable[[], int]
"""Does some work and says how much it was."""


class Side:
    """One side's work in a process of its own, so that no side's settings or memory are another's."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask()  # once it is ready

    def ask(self, seconds: float | None = None) -> dict[str, float]:
        """What the side says next: how much it did in `seconds`, how long that took, and the most memory it held.

        On a GPU, if the side has used one, the memory is the GPU's.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if seconds is not None:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return dict(json.loads(line.removeprefix(ANSWER)))
        raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")

    def end(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(make: Callable[[], Work], *, beside: bool = False) -> None:
    """Be a side: work for as many seconds as each line of standard input says.

    With `beside`, what making the work has taken is not counted as its memory.
    """
    before = peak_memory()
    work = make()
    before = peak_memory() if beside else before
    print(f"{ANSWER}{{}}", flush=True)
    for line in sys.stdin:
        began, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < float(line):
            done += work()
        held = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_memory() - before
        answer = {"done": done, "seconds": spent, "memory": held}
        print(f"{ANSWER}{json.dumps(answer)}", flush=True)


def rates(sides: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Work per second of each side, in turns of about `seconds` each; the first turn only warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            time.sleep(REST)
            answer = side.ask(seconds)
            if turn:
                found[name].append(answer["done"] / answer["seconds"])
    return found


def rows(of: str, found: Mapping[str, Sequence[float]], ours: str, unit: str) -> list[Row]:
    """Ours beside each of the others: medians, their ratio, and how many runs each is the median of."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    return [
        {
            "name": f"{of}: {ours} / {peer}",
            "ours": medians[ours],
            "peer": medians[peer],
            "ratio": medians[ours] / medians[peer],
            "unit": unit,
            "runs": len(found[peer]),
            "spread": [min(found[ours]) / medians[ours], max(found[ours]) / medians[ours]],
        }
        for peer in medians
        if peer != ours
    ]


def matmul_rate(dtype: torch.dtype, size: int = 1536, rounds: int = 20) -> float:
    """Floating-point operations per second of a square matrix product; the best of some, since noise only slows."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def read_rate(num_bytes: int = 2**29, rounds: int = 20) -> float:
    """Bytes per second that all cores together read of so many; the best of some, since noise only slows.

    By the fastest reader that was found: a product of two halves, up to twice as fast as a sum. What a large cache
    keeps of few bytes is read faster than memory, so that a model's bytes are compared with as many.
    """
    one, other = torch.ones(2, num_bytes // 8)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        one.dot(other)
        best = min(best, time.perf_counter() - began)
    return 2 * one.nbytes / best


def specified(by_gpu: Mapping[str, float]) -> float:
    """What makers say of the GPU at hand; nan for one that is not known here."""
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in by_gpu.items() if part in name), float("nan"))


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_memory() -> int:
    """The most bytes that this process ever held; where Linux tells it, without what its parent held before."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """What the figures are of."""
    packages = ("torch", "transformers", "ctranslate2", "llama-cpp-python", "openvino-genai", "triglot")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def module_of(file: Path, name: str) -> Any:
    """A peer's source file as a module."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def installed(package: str) -> str | None:
    """A package's version, None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="fewer and shorter rounds: shows that it runs")
    options.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine as JSON too")
    return options


def report(found: Sequence[Row], path: Path | None) -> None:
    """Print the rows as a table in Markdown, and write them down."""
    print("| | ours | peer | ratio |\n|---|---|---|---|")
    for row in found:
        peer, ratio = (f"{row[key]:,.2f}" if row[key] is not None else "" for key in ("peer", "ratio"))
        print(f"| {row['name']} ({row['unit']}, {row['runs']} runs) | {row['ours']:,.2f} | {peer} | {ratio} |")
    print(json.dumps(machine()))
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": list(found)}, indent=2) + "\n", encoding="utf-8")
