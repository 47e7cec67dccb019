"""Searches in processes of their own, one for each core and of one thread each: for files, where they beat one of many.

What a sentence becomes does not depend on its company, so it does not matter which of them translates it.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from triglot.allocator import keep_freed_memory
from triglot.decoding.beam import BeamSearch
from triglot.decoding.rules import Within
from triglot.decoding.search import Decoded
from triglot.errors import ConfigError, DeadEndError, require

Search = Callable[[list[list[int]], BeamSearch, int], list[list[Decoded]]]
"""The best texts of each source, of at most so many tokens."""

ENOUGH = 10**11
"""Work from which on processes pay, as tokens of sources · beam · parameters: before, they take longer to start.

A core does some 2 · 10^10 of it in a second, and a process is ready after two (docs/experiments.md).
"""

_searches: list[Search] = []
"""What this process searches with, if it is a worker."""


def _start(make: Callable[[], Search]) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    _searches[:] = [make()]


def _search(sources: list[list[int]], how: BeamSearch, limit: int) -> list[list[Decoded]]:
    return _searches[0](sources, how, limit)


class Workers:
    """`number` processes, each with a search of its own that `make` returns there; a context manager."""

    def __init__(self, make: Callable[[], Search], number: int) -> None:
        require(number >= 1, "workers", "at least 1", number, ConfigError)
        self.number = number
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that torch's threads hold
        self.pool = ProcessPoolExecutor(number, context, initializer=_start, initargs=(make,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

    def search(self, sources: Sequence[list[int]], how: BeamSearch, limit: int) -> list[list[Decoded]]:
        """What a search alone would find, by all of them; the rules have to be such that can be sent."""
        order = sorted(range(len(sources)), key=lambda row: -len(sources[row]))
        shares = [share for one in range(self.number) if (share := order[one :: self.number])]
        own = [replace(how, rules=[Within(rule, share) for rule in how.rules]) for share in shares]
        tasks = [
            self.pool.submit(_search, [sources[row] for row in share], rules, limit)
            for share, rules in zip(shares, own, strict=True)
        ]
        results: dict[int, list[Decoded]] = {}
        for share, task in zip(shares, tasks, strict=True):
            try:
                results |= zip(share, task.result(), strict=True)
            except DeadEndError as error:
                raise DeadEndError(share[error.request]) from error
        return [results[row] for row in range(len(sources))]
