"""Files of tensors in safetensors' form (https://github.com/huggingface/safetensors), read one tensor at a time.

A whole file is never held: a model takes no more memory than its weights and the largest few that become one.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from triglot.errors import CheckpointError, require
from triglot.files import write_json

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9
"""Of one file among several."""


def require_file(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raise CheckpointError in the one form."""
    require(holds, name, rule, value, CheckpointError)


class Entry(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Tensors:
    """Tensors in files, by name."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def read(self, name: str) -> Tensor:
        """A tensor, as it was written."""
        entry = self.entries[name]
        return self.read_into(name, torch.empty(entry.shape, dtype=entry.dtype))

    def read_into(self, name: str, into: Tensor) -> Tensor:
        """Fill a tensor of the same shape and type that lies in one piece."""
        entry = self.entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            file.readinto(into.detach().view(-1).view(torch.uint8).numpy().data)
        return into


def tensors_of(folder: Path, prefix: str = "") -> Tensors:
    """The tensors of a folder, or of one file; CheckpointError for what is damaged before any is read.

    `prefix` is put before names where all lack it.
    """
    entries: dict[str, Entry] = {}
    for path in _files_of(folder):
        entries |= _entries_of(path)
    if not any(name.startswith(prefix) for name in entries):
        entries = {name if name == "lm_head.weight" else prefix + name: entry for name, entry in entries.items()}
    return Tensors(entries)


def _files_of(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not (folder / INDEX).exists():
        others = sorted(path.name for path in folder.glob("*.bin")) or "not there"
        require_file((folder / ONE).is_file(), str(folder / ONE), "a file of safetensors", others)
        return [folder / ONE]
    index = read_object(folder / INDEX)
    names = index.get("weight_map")
    fits = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    require_file(fits, f"weight_map of {folder / INDEX}", "names of tensors with those of files", names)
    assert isinstance(names, dict)
    for name in sorted(set(names.values())):
        inside = re.fullmatch(r"[^/\\:]+\.safetensors", name) is not None
        require_file(inside, f"weight_map of {folder / INDEX}", "names of safetensors in this folder", name)
        require_file((folder / name).is_file(), str(folder / name), "a file, as the index says", "not there")
    return [folder / name for name in sorted(set(names.values()))]


def _entries_of(path: Path) -> dict[str, Entry]:
    """A file's tensors; the library has checked that they are what fills it."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, about in header.items():
        require_file(about["dtype"] in DTYPES, f"the type of {name}", f"one of {', '.join(DTYPES)}", about["dtype"])
    return {
        name: Entry(path, DTYPES[about["dtype"]], tuple(about["shape"]), 8 + size + about["data_offsets"][0])
        for name, about in header.items()
    }


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds names with values; CheckpointError where it does not."""
    require_file(path.is_file(), str(path), "a file", "not there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    require_file(isinstance(values, dict), str(path), "names with values in JSON", type(values).__name__)
    return dict(values)


def write_tensors(folder: Path, tensors: Iterable[Mapping[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors, a few at a time, in one file or in several with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    paths, places = list[Path](), dict[str, int]()
    total = size = 0
    for some in tensors:
        more = sum(tensor.nbytes for tensor in some.values())
        if shards[-1] and size + more > shard_bytes:
            paths.append(_write_shard(folder, len(paths), shards.pop()))
            shards.append({})
            size = 0
        shards[-1] |= {name: tensor.contiguous() for name, tensor in some.items()}
        places |= dict.fromkeys(some, len(paths))
        size, total = size + more, total + more
    paths.append(_write_shard(folder, len(paths), shards.pop()))
    if len(paths) == 1:
        paths[0].rename(folder / ONE)
        return
    names = [f"model-{number:05}-of-{len(paths):05}.safetensors" for number in range(1, len(paths) + 1)]
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
    weights = {name: names[place] for name, place in places.items()}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    path = folder / f"shard-{number}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path
