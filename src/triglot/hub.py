"""What is brought from huggingface.co, when somebody asks for it."""

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download

from triglot.errors import ConfigError, DataError, require
from triglot.files import write_bytes

CHECKPOINT = ("*.json", "*.safetensors", "*.model", "*.spm", "*.jinja")
"""Of a repository, all that a model and its tokenizer are read from; nothing pickled, no code."""


class Part(NamedTuple):
    """A file of pairs, and the SHA-256 of the lines of each side."""

    file: str
    sha256: dict[str, str]


MULTI30K = "bentrevett/multi30k"
PARTS = {
    "train": Part(
        "train.jsonl",
        {
            "en": "1b9c6fae1605bc3a5f148410b0db7b092829296a4174aeff2a4080c9e1fda56d",
            "de": "fbc65c96f0aa74fe1341e0d28225b20e7fb809ec5ebce4870bfa963a83d049e7",
        },
    ),
    "val": Part(
        "val.jsonl",
        {
            "en": "eecab95d3e8e3b4e82c0e049625a6aa8ffb65314acf78c357a049d349d1cfb8d",
            "de": "1aad18941ede1c8afadc75f9f3356e72944041c7ad45bcfac7d589b13733f543",
        },
    ),
    "test_2016_flickr": Part(
        "test.jsonl",
        {
            "en": "a1efdee92d83876dbd9bc65f019b58eda88f1fc910e954aea943914d23fe89ca",
            "de": "bb3e48712d8d4f8d6e16352ea830d2b3c64ff50439cb6e02486e02f8475d138e",
        },
    ),
}
"""Multi30k's first task (Elliott et al. 2016; 2017), as it stands in the repository multi30k/dataset."""


def checkpoint(name: str) -> Path:
    """The folder of a model's files, downloaded; ConfigError where that can not be done."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT)))
    except (OSError, ValueError) as error:  # which all of the library's errors are
        raise ConfigError(f"{name} can not be brought from the hub: {error}") from error


def multi30k(out: Path) -> list[Path]:
    """Bring Multi30k's English and German into a folder, under the names that the recipes have for them.

    White space around lines is left out. Raises DataError where a line is not what it was when the recipes were
    measured, ConfigError where a file is there already or can not be brought; then nothing is written.
    """
    paths = {(split, side): out / f"{split}.{side}.gz" for split, part in PARTS.items() for side in part.sha256}
    there = sorted(path.name for path in paths.values() if path.exists())
    require(not there, "--out", "a folder without these files, since nothing is overwritten", there, ConfigError)
    contents = {}
    for split, part in PARTS.items():
        try:
            file = Path(hf_hub_download(MULTI30K, part.file, repo_type="dataset"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{MULTI30K} can not be brought from the hub: {error}") from error
        with file.open(encoding="utf-8") as lines:
            pairs = [json.loads(line) for line in lines]
        for side, expected in part.sha256.items():
            text = as_text(pair[side] for pair in pairs)
            found = hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()
            require(found == expected, f"the SHA-256 of {part.file}'s {side}", expected, found, DataError)
            contents[split, side] = text
    out.mkdir(parents=True, exist_ok=True)
    for key, text in contents.items():
        write_bytes(paths[key], gzip.compress(text.encode(), mtime=0))
    return list(paths.values())


def as_text(lines: Iterable[str]) -> str:
    """Lines one below another."""
    return "".join(f"{line.strip()}\n" for line in lines)
