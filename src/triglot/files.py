"""Files that are at any moment the old ones or the new ones, whole and on disk."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to instead: it becomes `path` when all is on disk, and vanishes if writing fails."""
    partial = path.with_name(f".{path.name}.writing")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)  # a full disk does not say which file it refused
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file of text in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values that people read."""
    write_text(path, as_json(values))


def as_json(values: Mapping[str, Any]) -> str:
    """Values as the one text that is written of them."""
    return json.dumps(values, indent=2) + "\n"


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Be the only process of this machine at work in a folder, until this one ends, however it ends.

    BlockingIOError where another is. Some file systems know no locks: nobody is seen at work there, nor kept out.
    """
    if sys.platform == "win32":  # where folders have no locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, "LOCK_EX")
        yield
    finally:
        os.close(handle)


def is_at_work(folder: Path) -> bool:
    """Whether a process on this machine is at work in a folder, as far as its file system can tell."""
    if sys.platform == "win32":
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, "LOCK_SH", patience=0.0)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _lock(handle: int, kind: Literal["LOCK_EX", "LOCK_SH"], patience: float = 1.0) -> None:
    """Lock a folder or raise BlockingIOError, after some seconds: whoever only looks holds one for a moment."""
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(handle, getattr(fcntl, kind) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.01)
        except OSError:
            return None


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk."""
    if path.is_dir() and os.name != "posix":
        return  # a folder can not be opened there, and renames last without
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
