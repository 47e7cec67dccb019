"""Raw text and pairs of lines from files, read as a stream of strict UTF-8.

Lines end with "\\n" or with "\\r\\n", which is read as "\\n", and with nothing else; a byte order mark is no text.

Joined, the documents are the text: with nothing between them by `file`, with "\\n" by `line`, with the blank lines by
`paragraph`. In a token stream, an end and a begin token stand in the place of what was between two documents.
"""

import codecs
import gzip
import hashlib
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from triglot.errors import DataError, reason
from triglot.tokenizer import word_boundary

BLOCK = 1 << 20
"""Bytes read at a time, and about the characters of one piece of a long document."""
_GZIP = b"\x1f\x8b"
_NO_CORPUS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "_bundled", "turtledemo"}


class Piece(NamedTuple):
    """Part of a document: all of it, unless it is long."""

    text: str
    begins: bool
    ends: bool


class Example(NamedTuple):
    """A source, what it should become, and the target tag if the data has them."""

    source: str
    target: str
    tag: str | None = None


class Survey(NamedTuple):
    """What one reading of a whole corpus tells."""

    size: int
    """Documents, or examples."""
    characters: int
    digest: str
    tags: tuple[str, ...]
    left_out: Counter[str]


def find_files(patterns: Sequence[str], root: Path, name: str = "data.files") -> list[Path]:
    """The files of names, folders (all below without a NUL in their first block) and globs, without repeats."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = root / Path(pattern).expanduser()
        if path.is_file():
            if not path.stat().st_size:
                raise DataError(f"`{name}` must be files with text (below data.root), but {path} is empty instead.")
            found[path] = None
            continue
        if path.is_dir():
            below = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
        else:
            anchor = Path(path.anchor) if Path(pattern).expanduser().is_absolute() else root
            below = anchor.glob(str(path.relative_to(anchor)))
        files = [file for file in sorted(below) if file.is_file() and _looks_like_text(file)]
        if not files:
            what = "holds no text" if path.exists() or "*" in pattern else "is not there"
            raise DataError(f"`{name}` must be files with text (below data.root), but {path} {what} instead.")
        found.update(dict.fromkeys(files))
    return list(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _looks_like_text(path: Path) -> bool:
    with open_text(path) as file:
        start = file.read(8192)
    return bool(start) and b"\0" not in start


def stdlib_files(max_bytes: int | None = None) -> list[Path]:
    """The sources of Python's own standard library that are UTF-8, without its tests, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen, size = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if max_bytes is not None and size >= max_bytes:
            break
        if _NO_CORPUS.isdisjoint(path.relative_to(root).parts):
            content = path.read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            size += len(content)
            chosen += [path] * bool(content)
    if not chosen:
        raise DataError(f"`data.kind` must be another than stdlib, since {root} holds no sources of Python.")
    return chosen


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where it is gzip by its first bytes or its name."""
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP or path.suffix == ".gz"
            if not packed:
                yield raw
                return
            with gzip.open(raw) as file:
                yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path}:{line}: the text must be UTF-8, but has the byte 0x{byte:02X} instead.")


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file in pieces cut between words: encoded one by one, they give the ids of the whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, rest, first, held = 1, "", True, ""
    with open_text(path) as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line + error.object[: error.start].count(b"\n"), error) from error
            line += block.count(b"\n")
            text, first = text.removeprefix("\ufeff") if first else text, first and not text
            text, held = held + text, ""
            if block and text.endswith("\r"):  # the "\n" of its line may come with the next block
                text, held = text[:-1], "\r"
            rest += text.replace("\r\n", "\n")
            if not block:
                break
            cut = word_boundary(rest) or len(rest) * (len(rest) > 4 * BLOCK)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a file, without "\n" or "\r\n"; no other character ends a line."""
    with open_text(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from error
            yield line.removeprefix("\ufeff") if number == 1 else line


@dataclass(frozen=True)
class TextCorpus:
    """Running text: what is in `files`, one after another, as documents."""

    files: Sequence[Path]
    document: Literal["file", "line", "paragraph"] = "file"
    max_bytes: int | None = None

    def pieces(self, left_out: Counter[str] | None = None) -> Iterator[Piece]:
        """The documents in order, long ones in pieces; what was left out is counted in `left_out`."""
        counts = Counter[str]() if left_out is None else left_out
        read = {"file": self._whole, "line": self._lines, "paragraph": self._paragraphs}[self.document]
        pieces = (piece for path in self.files for piece in read(path, counts))
        return pieces if self.max_bytes is None else _first_bytes(pieces, self.max_bytes)

    def survey(self) -> Survey:
        """Read all of it once; a corpus without text is refused."""
        digest, left_out = hashlib.blake2b(digest_size=16), Counter[str]()
        size = characters = 0
        for piece in self.pieces(left_out):
            digest.update(piece.text.encode() + b"\xff" * piece.ends)  # a byte that UTF-8 does not have
            size += piece.ends
            characters += len(piece.text)
        if not characters:
            raise DataError(
                f"`data.files` must be files with text, but {', '.join(map(str, self.files))} has none instead."
            )
        return Survey(size, characters, digest.hexdigest(), (), left_out)

    @staticmethod
    def _whole(path: Path, left_out: Counter[str]) -> Iterator[Piece]:
        begins, waiting = True, ""
        for text in read_blocks(path):
            if waiting:
                yield Piece(waiting, begins, False)
                begins = False
            waiting = text
        if waiting:
            yield Piece(waiting, begins, True)
        else:
            left_out["empty files"] += 1

    @staticmethod
    def _lines(path: Path, left_out: Counter[str]) -> Iterator[Piece]:
        for line in read_lines(path):
            if line.strip():
                yield Piece(line, True, True)
            else:
                left_out["blank lines"] += 1

    @staticmethod
    def _paragraphs(path: Path, _: Counter[str]) -> Iterator[Piece]:
        lines: list[str] = []
        for line in read_lines(path):
            if line.strip():
                lines.append(line)
            elif lines:
                yield Piece("\n".join(lines), True, True)
                lines = []
        if lines:
            yield Piece("\n".join(lines), True, True)


def _first_bytes(pieces: Iterable[Piece], max_bytes: int) -> Iterator[Piece]:
    for piece in pieces:
        content = piece.text.encode()
        if len(content) >= max_bytes:
            yield Piece(content[:max_bytes].decode("utf-8", "ignore"), piece.begins, True)
            return
        max_bytes -= len(content)
        yield piece


def choose_documents(pieces: Iterable[Piece], chosen: NDArray[np.bool_]) -> Iterator[Piece]:
    """The documents whose number is marked in `chosen`."""
    number = 0
    for piece in pieces:
        if chosen[number]:
            yield piece
        number += piece.ends


def choose_characters(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The characters from `start` up to `stop`, counted over all documents; one cut in two does not end at the cut."""
    seen = 0
    for piece in pieces:
        first, last = max(0, start - seen), min(len(piece.text), stop - seen)
        if first < last:
            whole = last == len(piece.text)
            yield Piece(piece.text[first:last], piece.begins and first == 0, piece.ends and whole)
        seen += len(piece.text)


@dataclass(frozen=True)
class PairCorpus:
    """Pairs: two files of as many lines, or files of two or three tab-separated columns, the third a target tag."""

    files: Sequence[Path]
    separate: bool
    """`files` are one of sources and one of targets."""

    def examples(self, left_out: Counter[str] | None = None) -> Iterator[Example]:
        """The examples in order, without those that have nothing on one side, which are counted in `left_out`."""
        for example in self._two_files() if self.separate else self._columns():
            if example.source.strip() and example.target.strip():
                yield example
            elif left_out is not None:
                left_out["empty on a side"] += 1

    def survey(self) -> Survey:
        """Read all of it once; unequal files, wrong columns and a corpus without examples are refused."""
        digest, left_out, tags = hashlib.blake2b(digest_size=16), Counter[str](), set[str]()
        size = characters = 0
        for example in self.examples(left_out):
            tags.update([example.tag] if example.tag else [])
            digest.update("\n".join((example.source, example.target, example.tag or "", "")).encode())
            size += 1
            characters += len(example.source) + len(example.target)
        if not size:
            raise DataError(f"`data` must hold pairs, but {' and '.join(map(str, self.files))} have none instead.")
        return Survey(size, characters, digest.hexdigest(), tuple(sorted(tags)), left_out)

    def _two_files(self) -> Iterator[Example]:
        sources, targets = map(read_lines, self.files)
        for number, (source, target) in enumerate(zip_longest(sources, targets)):
            if source is None or target is None:
                longer = number + 1 + sum(1 for _ in (sources if target is None else targets))
                counts = (number, longer) if source is None else (longer, number)
                told = " and ".join(f"{path} has {count}" for path, count in zip(self.files, counts, strict=True))
                raise DataError(f"source and target must have as many lines as each other, but {told} instead.")
            yield Example(source, target)

    def _columns(self) -> Iterator[Example]:
        expected = 0
        for path in self.files:
            for number, line in enumerate(read_lines(path), 1):
                columns = line.split("\t")
                if not line.strip():
                    yield Example("", "")
                    continue
                expected = expected or len(columns)
                if len(columns) != expected or expected not in (2, 3):
                    rule = f"{expected} columns like the first line" if expected in (2, 3) else "2 or 3 columns"
                    raise DataError(f"{path}:{number}: a line must have {rule}, but has {len(columns)} instead.")
                if expected == 3 and not columns[2]:
                    raise DataError(f"{path}:{number}: the third column must be a target tag, but is empty instead.")
                yield Example(*columns)
