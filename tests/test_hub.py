"""What comes from the hub is what it was, or nothing is written; no test asks the network."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from triglot import hub
from triglot.cli import app
from triglot.data.corpus import read_lines
from triglot.errors import ConfigError, DataError

PAIRS = [{"en": "A dog.", "de": "Ein Hund. "}, {"en": "A cat.", "de": "Eine Katze."}]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A hub of one data set in which every part is the same two pairs."""
    file = tmp_path / "any.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    sums = {side: sha256("\n".join(pair[side].strip() for pair in PAIRS)) for side in ("en", "de")}
    monkeypatch.setattr(hub, "PARTS", {name: hub.Part(f"{name}.jsonl", dict(sums)) for name in hub.PARTS})
    asked = []

    def download(name, part, *, repo_type):
        asked.append((name, part, repo_type))
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_multi30k_is_written_as_the_recipes_read_it(fake, tmp_path):
    told = CliRunner().invoke(app, ["data", "multi30k", "--from-hub", "--out", str(tmp_path / "data")])
    assert told.exit_code == 0, told.stderr
    assert {name for _, name, kind in fake} == {"train.jsonl", "val.jsonl", "test_2016_flickr.jsonl"}
    assert list(read_lines(tmp_path / "data" / "train.de.gz")) == ["Ein Hund.", "Eine Katze."]
    assert len(list((tmp_path / "data").iterdir())) == 6
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        hub.multi30k(tmp_path / "data")


def test_nothing_is_written_of_other_data(fake, tmp_path):
    hub.PARTS["val"].sha256["de"] = sha256("other")
    with pytest.raises(DataError, match="SHA-256 of val.jsonl's de"):
        hub.multi30k(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_nothing_is_brought_that_nobody_asked_for(tmp_path):
    told = CliRunner().invoke(app, ["data", "multi30k", "--out", str(tmp_path)])
    assert (told.exit_code, "--from-hub" in told.stderr) == (2, True)


def test_a_checkpoint_is_brought_without_code_or_pickles(monkeypatch, tmp_path):
    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match="org/model can not be brought from the hub: no network"):
        hub.checkpoint("org/model")
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["org/model"])
    told = CliRunner().invoke(app, ["convert", "org/model", str(tmp_path / "run"), "--from-hub"])
    assert (told.exit_code, "no network" in told.stderr) == (2, True)


def test_the_sums_are_those_of_the_data_that_was_measured():
    data = Path(os.environ.get("TRIGLOT_DATA", "")) / "multi30k"
    if not (data / "train.en.gz").is_file():
        pytest.skip("TRIGLOT_DATA has no multi30k")
    for split, part in hub.PARTS.items():
        for side, expected in part.sha256.items():
            text = gzip.decompress((data / f"{split}.{side}.gz").read_bytes()).decode()
            assert sha256(hub.as_text(text.removesuffix("\n").split("\n")).removesuffix("\n")) == expected
