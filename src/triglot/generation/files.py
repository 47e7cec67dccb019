"""Translating and scoring files of any length: a chunk in memory at a time, order and empty lines kept."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from triglot.data.corpus import read_lines
from triglot.errors import DataError
from triglot.generation.engine import Engine
from triglot.generation.results import Hypothesis
from triglot.generation.workers import ENOUGH
from triglot.models.factory import count_active_parameters

T = TypeVar("T")
CHUNK = 1024
"""Lines that are sorted by length and translated at a time."""


def lines_of(source: Path | None) -> Iterator[str]:
    """The lines of a file, which may be gzipped, or of standard input."""
    return _standard_input() if source is None else read_lines(source)


def _standard_input() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            yield line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeDecodeError as error:
            raise DataError(f"standard input, line {number}: the text must be UTF-8.") from error


def pays(engine: Engine, lines: Iterable[str], beam: int) -> tuple[bool, Iterator[str]]:
    """Whether to translate lines takes so long that other processes are ready before, and all of the lines."""
    first, chunks, work = list[str](), _chunks(lines, CHUNK), 0
    while work < ENOUGH and (some := next(chunks, None)):
        tokens = sum(map(len, engine.tokenizers.source.encode_batch(some)))
        first, work = first + some, work + tokens * beam * count_active_parameters(engine.model)
    return work >= ENOUGH, itertools.chain(first, itertools.chain.from_iterable(chunks))


def translate_lines(
    engine: Engine,
    lines: Iterable[str],
    *,
    prefixes: Iterable[str] | None = None,
    chunk: int | None = None,
    **options: Any,
) -> Iterator[list[Hypothesis]]:
    """What `Engine.translate` returns for each line, as the lines come."""
    number = 1
    for some in _chunks(_beside(lines, prefixes, "prefixes"), chunk or CHUNK):
        sources, begun = zip(*some, strict=True)
        own = {} if prefixes is None else {"prefixes": begun}
        yield from engine.translate(sources, first_line=number, **own, **options)
        number += len(some)


def score_lines(
    engine: Engine, lines: Iterable[str], others: Iterable[str] | None = None, **options: Any
) -> Iterator[str]:
    """Σ log p, number of tokens and text, separated by tabs.

    Of each line, after its prompt where `others` are these, or of each of `others` as what an encoder–decoder makes of
    its line.
    """
    number, pairs = 1, engine.config.model.kind == "encoder_decoder"
    for some in _chunks(_beside(lines, others, "targets" if pairs else "prompts"), CHUNK):
        texts, beside = zip(*some, strict=True)
        scored = beside if pairs else texts
        found = engine.score(texts, *([] if others is None else [beside]), first=number, **options)
        for text, one in zip(scored, found, strict=True):
            yield f"{one.log_prob:.4f}\t{len(one.tokens)}\t{text}\n"
        number += len(some)


def written(results: Iterable[list[Hypothesis]], *, nbest: int = 1) -> Iterator[str]:
    r"""One line for each source line; with `nbest` above 1 "line number \t score \t text" for each hypothesis."""
    for number, hypotheses in enumerate(results, 1):
        for one in hypotheses:
            text = " ".join(one.text.splitlines())  # a model may write a line feed, but a line must stay a line
            yield f"{number}\t{one.score:.4f}\t{text}\n" if nbest > 1 else f"{text}\n"


def as_json_lines(results: Iterable[list[Hypothesis]]) -> Iterator[str]:
    """A JSON list of its hypotheses for each source line."""
    for hypotheses in results:
        told = [
            one._asdict() | {"alignment": None if one.alignment is None else one.alignment._asdict()}
            for one in hypotheses
        ]
        yield json.dumps(told, ensure_ascii=False) + "\n"


def _chunks(items: Iterable[T], number: int) -> Iterator[list[T]]:
    items = iter(items)
    while some := list(itertools.islice(items, number)):
        yield some


def _beside(lines: Iterable[str], others: Iterable[str] | None, name: str) -> Iterator[tuple[str, str]]:
    """Each line with its other one, or with nothing."""
    pairs = itertools.zip_longest(lines, others) if others is not None else ((line, "") for line in lines)
    for number, (line, other) in enumerate(pairs, 1):
        if line is None or other is None:
            raise DataError(f"`{name}` must be as many as lines, but line {number} is in one of the files alone.")
        yield line, other
