"""What the files of a folder were when they were written: the SHA-256 of each in manifest.json, by name.

The last hash is that of the manifest without it, and its form is fixed, so that no byte of it can change unnoticed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from triglot.errors import DamagedError, reason
from triglot.files import as_json, sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, beside: Iterable[str]) -> None:
    """Write down all files of a folder, and others by their paths from there."""
    names = [*sorted(path.name for path in folder.iterdir()), *beside]
    files = {name: sha256(folder / name) for name in names}
    write_json(folder / MANIFEST, files | {MANIFEST: _of_all(files)})


def _of_all(files: Mapping[str, str]) -> str:
    return hashlib.sha256(as_json(files).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, str]:
    """The names in a folder's manifest with their hashes; DamagedError if it is not as it was written."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        files: dict[str, str] = dict(json.loads(content))
        own = content == as_json(files).encode()
        whole = own and files.pop(MANIFEST, None) in (_of_all(files), None)  # the first runs' had none
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{path} is missing or damaged: {reason(error)}.") from error
    if not whole:
        raise DamagedError(f"{path} is damaged: it is not as it was written.")
    return files


def verified(folder: Path, name: str) -> Path:
    """The path of a file, once its content is known to be what was written; DamagedError if it is not."""
    expected = read_manifest(folder).get(name)
    if expected is None:
        raise DamagedError(f"{folder / MANIFEST} is damaged: it does not know {name}.")
    path = folder / name
    if not path.is_file() or sha256(path) != expected:
        told = f"it is not what {folder.name}/{MANIFEST} says was written"
        raise DamagedError(f"{path.resolve()} is missing or damaged: {told}.")
    return path


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files in a folder, or None where each is as it was written; others are not looked at."""
    try:
        for name in read_manifest(folder):
            if not name.startswith("../"):
                verified(folder, name)
    except DamagedError as error:
        return str(error)
    return None
