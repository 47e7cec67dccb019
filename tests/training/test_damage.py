"""Nothing is lost on a disk that is full, and nothing damaged is used."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triglot.checkpoint import find_checkpoint, newest_whole, step_checkpoints
from triglot.errors import CheckpointError, ConfigError, DataError, TriglotError
from triglot.files import at_work
from triglot.training.metrics import Silent
from triglot.training.session import train


class AtStep(Silent):
    """Does something after a step, and keeps the notes of the start."""

    def __init__(self, step: int = 0, act: Callable[[], object] = lambda: None) -> None:
        self.at, self.act = step, act

    def start(self, config, model, progress, notes) -> None:
        self.notes = list(notes)

    def step(self, line) -> None:
        if line["step"] == self.at:
            self.act()


@contextmanager
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets how large a file the system will write for this process."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_only_whole_checkpoints(run: Path) -> None:
    assert step_checkpoints(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [one.name for one in step_checkpoints(run)]
    assert newest_whole(run) == (find_checkpoint(run, "last"), {})


def test_a_file_that_the_system_refuses_ends_the_run_with_its_name_and_all_before_it_whole(
    tmp_path, config_of, content_of
):
    config, run = config_of(), tmp_path / "run"
    train(config, tmp_path / "whole")
    with largest_file() as limit:
        size = (find_checkpoint(tmp_path / "whole") / "optimizer.safetensors").stat().st_size
        with pytest.raises(CheckpointError, match=r"step-00000006 could not be written: .*File too large"):
            train(config, run, reporter=AtStep(5, lambda: limit(size - 1)))
    assert_only_whole_checkpoints(run)
    train(config, run, resume=True)
    assert content_of(run) == content_of(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of some bytes, or gives it another size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def sized(size: str) -> Path:
        how = ["-o", f"{'remount,' * bool(mounted)}size={size}"]
        done = subprocess.run(["mount", "-t", "tmpfs", *how, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a disk that is really full needs the right to mount one: {done.stderr.strip()}")
        mounted.append(size)
        return place

    if not shutil.which("mount"):
        pytest.skip("a disk that is really full needs `mount`")
    yield sized
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("checkpoints", [0.5, 1.5, 2.2, 2.7])
def test_a_disk_that_is_full_ends_the_run_with_an_error_and_all_before_it_whole(
    tmp_path, small_disk, checkpoints, config_of, content_of
):
    config = config_of("encoder-decoder")
    train(config, tmp_path / "whole")
    one = sum(-(-path.stat().st_size // 4096) * 4096 for path in find_checkpoint(tmp_path / "whole").iterdir())
    run = small_disk(str(int(40_000 + checkpoints * one))) / "run"
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
        train(config, run)
    if checkpoints > 1:
        assert_only_whole_checkpoints(run)
    else:
        assert not step_checkpoints(run)
    small_disk("9m")
    train(config, run, resume=True)
    assert content_of(run) == content_of(tmp_path / "whole")


def test_the_command_line_tells_of_a_full_disk_in_one_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from triglot.cli import app

    def full(*_):
        raise OSError(28, os.strerror(28), "some file")

    monkeypatch.setattr("triglot.cli.runs.find_recipe", full)
    result = CliRunner().invoke(app, ["train", "any"])
    assert (result.exit_code, result.stderr) == (2, "[Errno 28] No space left on device: 'some file'\n")


# Damage


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def everything(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config_of) -> Path:
    """A whole run, and one that was stopped between two checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    stop = AtStep(10, lambda: signal.raise_signal(signal.SIGTERM))
    train(config_of(), folder / "stopped", reporter=stop)
    train(config_of(), folder / "whole")
    return folder


@pytest.fixture
def stopped(tmp_path, runs) -> Path:
    """The run that was stopped, to be changed."""
    return shutil.copytree(runs / "stopped", tmp_path / "run")


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors"], ["optimizer.safetensors"], ["rng.safetensors"], ["state.json"], ["config.json"],
        ["manifest.json"], ["model.safetensors", "rng.safetensors"],
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_checkpoint_is_told_and_set_aside_and_training_goes_on_from_the_one_before(
    runs, stopped, names, config_of, content_of
):
    folders = step_checkpoints(stopped)[::-1]
    for folder, name in zip(folders, names, strict=False):
        damage(folder / name)
    reporter = AtStep()
    train(config_of(), stopped, resume=True, reporter=reporter)
    told = [note for note in reporter.notes if note.startswith("WARNING")]
    assert len(told) == len(names)
    for line, name, folder in zip(told, names, folders, strict=False):
        assert f"{folder.name}/{name}" in line
        assert f"Training goes on from {folders[len(names)].name}" in line
        assert (stopped / "checkpoints" / f"damaged-{folder.name}" / name).exists()
    assert content_of(stopped) == content_of(runs / "whole")
    train(config_of(), stopped, resume=True, reporter=reporter)
    assert not [note for note in reporter.notes if "WARNING" in note]


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("tokenizer.json", CheckpointError, r"run/tokenizer\.json is missing or damaged"),
        ("data/train.bin", DataError, r"data: the prepared data is damaged \(train\.bin is not what was written\)"),
        ("data/valid.bin", DataError, r"valid\.bin is not what was written"),
        ("metrics.jsonl", CheckpointError, r"metrics\.jsonl"),
        ("text.txt", DataError, r"made from, but its text changed"),
    ],
)
def test_what_lies_beside_the_checkpoints_is_refused_by_name_and_nothing_is_touched(
    small_data, stopped, name, error, told, config_of
):
    kept = (small_data / "text.txt").read_bytes()
    damage(small_data / "text.txt" if name == "text.txt" else stopped / name)
    if name == "metrics.jsonl":
        (stopped / name).write_bytes(b"\xff" + (stopped / name).read_bytes())
    before = everything(stopped / "checkpoints")
    with pytest.raises(error, match=told):
        train(config_of(), stopped, resume=True)
    (small_data / "text.txt").write_bytes(kept)
    assert everything(stopped / "checkpoints") == before


def test_data_that_was_removed_is_prepared_anew_only_from_the_same_text(
    small_data, runs, stopped, config_of, content_of
):
    kept = (small_data / "text.txt").read_bytes()
    shutil.rmtree(stopped / "data")
    (small_data / "text.txt").write_bytes(kept.replace(b"ein", b"nie", 1))
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or damaged: it is not what step-00000010"):
        train(config_of(), stopped, resume=True)
    (small_data / "text.txt").write_bytes(kept)
    train(config_of(), stopped, resume=True)
    assert content_of(stopped) == content_of(runs / "whole")


def test_the_command_line_goes_on_without_a_recipe_where_the_runs_own_is_damaged(runs, stopped, content_of):
    from typer.testing import CliRunner

    from triglot.cli import app

    (stopped / "config.json").write_bytes(b"\xff\n")
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(stopped), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert content_of(stopped) == content_of(runs / "whole")


def test_data_may_have_moved(tmp_path, small_data, runs, stopped, config_of, content_of):
    config = config_of()
    moved = shutil.copytree(small_data, tmp_path / "elsewhere")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(moved)))
    train(config, stopped, resume=True)
    weights = [name for name in content_of(stopped) if name.endswith("model.safetensors")]
    assert weights
    for name in weights:
        assert content_of(stopped)[name] == content_of(runs / "whole")[name]


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, stopped, config_of):
    new = tmp_path / "new"
    new.mkdir()
    for run, resume in ((stopped, True), (new, False)):
        before = everything(run)
        with at_work(run), pytest.raises(ConfigError, match="no other process is training in, but in .* one is"):
            train(config_of(), run, resume=resume)
        assert everything(run) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_start_that_fails_leaves_no_more_than_there_was(tmp_path, config_of, there):
    config, run = config_of(), tmp_path / "run"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, files=("missing.txt",)))
    if there:
        run.mkdir()
    with pytest.raises(DataError, match=r"missing\.txt"):
        train(config, run)
    assert run.exists() == there
    assert not there or not any(run.iterdir())


@pytest.mark.parametrize("damaged", ["config.json", "environment.json"])
def test_what_is_known_from_elsewhere_may_be_damaged(runs, stopped, damaged, config_of, content_of):
    (stopped / damaged).write_bytes(b"\xff\n")
    train(config_of(), stopped, resume=True)
    assert content_of(stopped) == content_of(runs / "whole")


@pytest.mark.parametrize("values", [{"learning_rate": 0.5}, {"context": 19}, {"threads": 2}, {"precision": "bf16"}])
def test_another_recipe_is_refused_whatever_the_runs_own_config_says_and_nothing_is_touched(stopped, values, config_of):
    table = json.loads((stopped / "config.json").read_text(encoding="utf-8"))
    table["train"] |= values
    (stopped / "config.json").write_text(json.dumps(table), encoding="utf-8")
    before = everything(stopped)
    with pytest.raises(ConfigError, match=f"another recipe: train.{next(iter(values))}"):
        train(config_of(**values), stopped, resume=True)
    assert everything(stopped) == before


def test_killed_before_anything_was_written_a_run_can_be_started_again(tmp_path, config_of):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.writing").write_text('{"mod', encoding="utf-8")
    with pytest.raises(TriglotError, match="to be resumed"):
        train(config_of(), run, resume=True)
    assert train(config_of(max_steps=1), run).progress.step == 1
