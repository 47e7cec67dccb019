"""Translating files of any length: a chunk in memory at a time, order and empty lines kept."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from triglot.data.corpus import read_lines
from triglot.errors import DataError
from triglot.generation.engine import Engine, Hypothesis

CHUNK = 1024
"""Lines that are sorted by length and translated at a time."""


def lines_of(source: Path | None) -> Iterator[str]:
    """The lines of a file, which may be gzipped, or of standard input."""
    return _standard_input() if source is None else read_lines(source)


def _standard_input() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input, line {number}: the text must be UTF-8.") from error


def translate_lines(
    engine: Engine, lines: Iterable[str], *, chunk: int | None = None, **options: Any
) -> Iterator[list[Hypothesis]]:
    """What `Engine.translate` returns for each line, as the lines come."""
    lines, number = iter(lines), 1
    while some := list(itertools.islice(lines, chunk or CHUNK)):
        yield from engine.translate(some, first_line=number, **options)
        number += len(some)


def written(results: Iterable[list[Hypothesis]], *, nbest: int = 1) -> Iterator[str]:
    r"""One line for each source line; with `nbest` above 1 "line number \t score \t text" for each hypothesis."""
    for number, hypotheses in enumerate(results, 1):
        for one in hypotheses:
            text = " ".join(one.text.splitlines())  # a model may write a line feed, but a line must stay a line
            yield f"{number}\t{one.score:.4f}\t{text}\n" if nbest > 1 else f"{text}\n"
