"""Token streams on disk, read through memory maps, with a manifest that tells if they are still those of their text."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triglot.data.corpus import BLOCK, Piece
from triglot.errors import DataError
from triglot.files import replacing, sha256, write_json
from triglot.tokenizer import Tokenizer

MANIFEST = "manifest.json"
Tokens = NDArray[np.unsignedinteger[Any]]
Parts = Mapping[str, Iterable[Piece]]


def token_shards(folder: Path, made_from: Mapping[str, str], parts: Parts, tokenizer: Tokenizer) -> dict[str, Tokens]:
    """The token stream of each part, a file each: those in `folder` if they were made from the same, else new ones.

    A document is BOS if there is one, its text, EOS; where only part of one is there, only the tokens of that part.
    Raises DataError if the folder holds what was made from something else, or if any byte of it is not as it was
    written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    manifest = read_manifest(folder, made_from)
    if manifest is None:
        folder.mkdir(parents=True, exist_ok=True)
        counts = {name: _write(folder / f"{name}.bin", pieces, tokenizer, dtype) for name, pieces in parts.items()}
        hashes = {name: sha256(folder / f"{name}.bin") for name in parts}
        write_manifest(folder, made_from, {"dtype": dtype.str, "tokens": counts, "sha256": hashes})
        manifest = read_manifest(folder, made_from) or {}
    try:
        for name in parts:
            _verify(folder / f"{name}.bin", manifest["sha256"][name])
        streams = {name: _open(folder / f"{name}.bin", dtype, manifest["tokens"][name]) for name in parts}
        for name, tokens in streams.items():
            highest = int(tokens.max(initial=0))
            if highest >= tokenizer.vocab_size:
                raise ValueError(f"{name}.bin has the id {highest}, and there are {tokenizer.vocab_size}")
        return streams
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def read_manifest(folder: Path, made_from: Mapping[str, str]) -> dict[str, Any] | None:
    """What `write_manifest` wrote, or None if it has not; DataError if that was made from something else."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before: dict[str, str] = dict(manifest["made_from"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    changed = sorted(key for key in before.keys() | made_from.keys() if before.get(key) != made_from.get(key))
    if changed:
        remedy = "Bring the old data back to go on, or start a new run with the new one."
        raise DataError(f"the data must be what {folder} was made from, but its {', '.join(changed)} changed. {remedy}")
    return manifest


def write_manifest(folder: Path, made_from: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Write down what the data was made from: the last step of a preparation."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MANIFEST, {"made_from": dict(made_from), **values})


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder}: the prepared data is damaged ({error}); remove the folder to prepare it anew.")


def _write(path: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> int:
    count, begin = 0, [] if tokenizer.ids.bos is None else [tokenizer.ids.bos]
    with replacing(path) as partial, partial.open("wb") as file:
        for group in _groups(pieces):
            rows = tokenizer.encode_batch([piece.text for piece in group])
            framed = (
                begin * piece.begins + row + [tokenizer.ids.eos] * piece.ends
                for piece, row in zip(group, rows, strict=True)
            )
            tokens = np.fromiter(chain.from_iterable(framed), dtype)
            file.write(tokens.tobytes())
            count += len(tokens)
    return count


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text) + 16
        if characters >= BLOCK:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _verify(path: Path, expected: str) -> None:
    if sha256(path) != expected:
        raise ValueError(f"{path.name} is not what was written")


def _open(path: Path, dtype: np.dtype[Any], count: int) -> Tokens:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} must have {count} tokens")
    return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
