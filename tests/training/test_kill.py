"""Nothing is lost: of a run that is killed at any instant, on a disk that is full, or with damaged files."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triglot.checkpoint import find_checkpoint, newest_whole, read_progress, step_checkpoints
from triglot.config import RunConfig
from triglot.errors import CheckpointError, ConfigError, DataError, TriglotError
from triglot.recipe import from_dict
from triglot.training.metrics import Silent, read_metrics
from triglot.training.session import train

MODELS = {
    "encoder-decoder": {"kind": "encoder_decoder"},
    "decoder-only": {"kind": "decoder_only"},
    "experts": {"kind": "decoder_only", "options": {"experts": {"num_experts": 3, "capacity_factor": 1.0}}},
}
SHAPE = {"d_model": 6, "num_heads": 2, "num_layers": 1, "d_ff": 11, "max_seq_length": 61}
TRAIN = {
    "max_steps": 23, "accumulate": 2, "context": 23, "batch_tokens": 230, "warmup_steps": 3, "eval_every": 3,
    "log_every": 1, "threads": 1, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Texts and pairs, some thousand bytes of each."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("data")
    lines = [" ".join(draw.choices(["ein", "zwei", "drei", "vier", "fünf"], k=draw.randint(1, 7))) for _ in range(97)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "pairs.tsv").write_text("".join(f"{line}\t{line[::-1]}\n" for line in lines), encoding="utf-8")
    return folder


def config_of(data: Path, model: str = "decoder-only", **train) -> RunConfig:
    pairs = model == "encoder-decoder"
    source = {"kind": "pairs", "files": ["pairs.tsv"]} if pairs else {"kind": "text", "files": ["text.txt"]}
    values = {
        "model": MODELS[model] | SHAPE,
        "data": {"root": str(data), "valid": 0.1, "document": "line", **source},
        "tokenizer": {"kind": "byte"},
        "train": TRAIN | train,
    }
    return from_dict(RunConfig, values)


def content_of(run: Path) -> dict[str, str]:
    """The SHA-256 of each file that training goes on from; of those that tell times, of all the rest in them."""

    def untimed(line: dict) -> dict:
        return {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}

    last = find_checkpoint(run, "last")
    files = [*last.glob("*.safetensors"), last / "config.json", find_checkpoint(run) / "model.safetensors"]
    files += [run / "config.json", run / "tokenizer.json", *(run / "data").iterdir()]
    contents = {str(path.relative_to(run)): path.read_bytes() for path in files}
    lines = [untimed(line) for line in read_metrics(run / "metrics.jsonl")]  # each step's loss: the order of the data
    told = {"metrics": lines, "state": untimed(dataclasses.asdict(read_progress(last)))}
    contents |= {name: json.dumps(value).encode() for name, value in told.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


# Killed


@pytest.fixture(scope="module")
def start() -> Callable[..., multiprocessing.Process]:
    """Starts `train` in a process of its own, which is a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "triglot.training.session"])

    def begin(*arguments, **options) -> multiprocessing.Process:
        process = context.Process(target=train, args=arguments, kwargs=options)
        process.start()
        return process

    first = context.Process(target=time.sleep, args=(0,))  # the imports are no part of what is timed
    first.start()
    first.join()
    return begin


class Killer:
    """Ends processes at instants of two kinds in turn: any at all, and while a checkpoint is being written."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds, self.draw = seconds, random.Random(seed)
        self.kills = self.within_a_save = 0

    def strike(self, process: multiprocessing.Process, run: Path) -> bool:
        """Kill the process, unless it ends before; whether it was killed."""
        saving = self.kills % 2 == 1
        if saving:
            for begun in (False, True):  # what another process had begun is removed, then this one begins
                while process.is_alive() and is_writing(run) != begun:
                    time.sleep(0.0002)
        else:
            process.join(self.draw.uniform(0, self.seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed = process.exitcode != 0
        self.kills += killed
        self.within_a_save += killed and saving and is_writing(run)
        return killed


def is_writing(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process ended."""
    return any((run / "checkpoints").glob(".writing-*"))


def kill_and_resume(start, config: RunConfig, folder: Path, kills: int, seed: int) -> None:
    """Runs of a config, killed so many times in all, each end as the run that was left alone."""
    whole, began = folder / "whole", time.perf_counter()
    process = start(config, whole)
    process.join()
    assert process.exitcode == 0
    assert read_progress(find_checkpoint(whole, "last")).epoch >= 2, "the test should cross the borders of epochs"
    killer, expected = Killer(time.perf_counter() - began, seed), content_of(whole)
    while killer.kills < kills:
        run, before, alive = folder / f"killed from {killer.kills} on", 0, True
        while alive:
            process = start(config, run, resume=(run / "config.json").exists())
            if killer.kills == kills:
                process.join()
            alive = killer.strike(process, run)
            newest = newest_whole(run)
            assert not newest.damaged
            now = 0 if newest.folder is None else read_progress(newest.folder).step
            assert now >= before
            before = now
        assert content_of(run) == expected
        shutil.rmtree(run)
    assert killer.within_a_save > 0


@pytest.mark.parametrize("model", MODELS)
def test_killed_at_any_instant_a_run_ends_as_if_it_had_not_been(tmp_path, data, start, model):
    kill_and_resume(start, config_of(data, model), tmp_path, kills=7, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_200_times_in_all_a_run_ends_as_if_it_had_not_been(tmp_path, data, start, model):
    kill_and_resume(start, config_of(data, model, average=3), tmp_path, kills=67, seed=1)


def test_sigterm_ends_the_command_with_143_and_a_checkpoint_to_go_on_from(tmp_path, data):
    config, run = config_of(data, max_steps=2003, eval_every=1000, max_epochs=None), tmp_path / "run"
    model = " ".join(f"{key} = {json.dumps(value)}\n" for key, value in (MODELS["decoder-only"] | SHAPE).items())
    text = {key: getattr(config.data, key) for key in ("kind", "root", "valid", "document")} | {"files": ["text.txt"]}
    tables = {"data": text, "tokenizer": {"kind": "byte"}, "train": TRAIN | {"max_steps": 2003, "eval_every": 1000}}
    recipe = f"[model]\n{model}" + "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    command = [sys.executable, "-m", "triglot", "train", str(tmp_path / "recipe.toml"), "--out", str(run)]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[0]
    assert process.returncode == 143
    folder, damaged = newest_whole(run)
    step = read_progress(folder).step
    assert not damaged
    assert step == read_metrics(run / "metrics.jsonl")[-1]["step"] < 1000
    assert f"stopped after step {step}; --resume goes on from there" in told


# The same again


@pytest.mark.parametrize(
    ("model", "options"),
    [*((model, {}) for model in MODELS), ("experts", {"precision": "bf16"}), ("experts", {"threads": 2})],
    ids=str,
)
def test_one_recipe_makes_the_same_files_twice(tmp_path, data, start, model, options):
    config = config_of(data, model, max_steps=7, **options)
    processes = [start(config, tmp_path / name) for name in ("one", "other")]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content_of(tmp_path / "one") == content_of(tmp_path / "other")
    another = dataclasses.replace(config, seed=1)
    train(another, tmp_path / "another")
    name = "checkpoints/step-00000007/model.safetensors"
    assert content_of(tmp_path / "another")[name] != content_of(tmp_path / "one")[name]


# A full disk


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


def test_a_file_that_the_system_refuses_ends_the_run_with_its_name_and_all_before_it_whole(tmp_path, data):
    config, run = config_of(data), tmp_path / "run"
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
    tmp_path, data, small_disk, checkpoints
):
    config = config_of(data, model="encoder-decoder")
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


def test_the_command_line_tells_of_a_full_disk_in_one_line(tmp_path, data, monkeypatch):
    from typer.testing import CliRunner

    from triglot.cli import app

    def full(*_):
        raise OSError(28, os.strerror(28), "some file")

    monkeypatch.setattr("triglot.cli.find_recipe", full)
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
def runs(tmp_path_factory, data) -> Path:
    """A whole run, and one that was stopped between two checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    stop = AtStep(10, lambda: signal.raise_signal(signal.SIGTERM))
    train(config_of(data, average=3), folder / "stopped", reporter=stop)
    train(config_of(data, average=3), folder / "whole")
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
    data, runs, stopped, names
):
    folders = step_checkpoints(stopped)[::-1]
    for folder, name in zip(folders, names, strict=False):
        damage(folder / name)
    reporter = AtStep()
    train(config_of(data, average=3), stopped, resume=True, reporter=reporter)
    told = [note for note in reporter.notes if note.startswith("WARNING")]
    assert len(told) == len(names)
    for line, name, folder in zip(told, names, folders, strict=False):
        assert f"{folder.name}/{name}" in line
        assert f"Training goes on from {folders[len(names)].name}" in line
        assert (stopped / "checkpoints" / f"damaged-{folder.name}" / name).exists()
    assert content_of(stopped) == content_of(runs / "whole")
    train(config_of(data, average=3), stopped, resume=True, reporter=reporter)
    assert not [note for note in reporter.notes if "WARNING" in note]


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("tokenizer.json", CheckpointError, r"run/tokenizer\.json is missing or damaged"),
        ("data/train.bin", DataError, r"data: the prepared data is damaged \(train\.bin is not what was written\)"),
        ("data/valid.bin", DataError, r"valid\.bin is not what was written"),
        ("metrics.jsonl", CheckpointError, r"metrics\.jsonl"),
        ("text.txt", DataError, r"made from, but its text changed since"),
    ],
)
def test_what_lies_beside_the_checkpoints_is_refused_by_name_and_nothing_is_touched(data, stopped, name, error, told):
    kept = (data / "text.txt").read_bytes()
    damage(data / "text.txt" if name == "text.txt" else stopped / name)
    if name == "metrics.jsonl":
        (stopped / name).write_bytes(b"\xff" + (stopped / name).read_bytes())
    before = everything(stopped / "checkpoints")
    with pytest.raises(error, match=told):
        train(config_of(data, average=3), stopped, resume=True)
    (data / "text.txt").write_bytes(kept)
    assert everything(stopped / "checkpoints") == before


def test_data_that_was_removed_is_prepared_anew_only_from_the_same_text(data, runs, stopped):
    kept = (data / "text.txt").read_bytes()
    for content, error in ((kept.replace(b"ein", b"nie", 1), CheckpointError), (kept, None)):
        (data / "text.txt").write_bytes(content)
        shutil.rmtree(stopped / "data")
        if error is not None:
            with pytest.raises(error, match=r"data/manifest\.json is missing or damaged: it is not what step-00000010"):
                train(config_of(data, average=3), stopped, resume=True)
    train(config_of(data, average=3), stopped, resume=True)
    assert content_of(stopped) == content_of(runs / "whole")


@pytest.mark.parametrize("damaged", ["config.json", "environment.json"])
def test_what_is_known_from_elsewhere_may_be_damaged(data, runs, stopped, damaged):
    (stopped / damaged).write_bytes(b"\xff\n")
    train(config_of(data, average=3), stopped, resume=True)
    assert content_of(stopped) == content_of(runs / "whole")


@pytest.mark.parametrize("values", [{"learning_rate": 0.5}, {"context": 19}, {"threads": 2}, {"precision": "bf16"}])
def test_another_recipe_is_refused_whatever_the_runs_own_config_says_and_nothing_is_touched(data, stopped, values):
    table = json.loads((stopped / "config.json").read_text(encoding="utf-8"))
    table["train"] |= values
    (stopped / "config.json").write_text(json.dumps(table), encoding="utf-8")
    before = everything(stopped)
    with pytest.raises(ConfigError, match=f"another recipe: train.{next(iter(values))}"):
        train(config_of(data, average=3, **values), stopped, resume=True)
    assert everything(stopped) == before


def test_killed_before_anything_was_written_a_run_can_be_started_again(tmp_path, data):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.writing").write_text('{"mod', encoding="utf-8")
    with pytest.raises(TriglotError, match="to be resumed"):
        train(config_of(data), run, resume=True)
    assert train(config_of(data, max_steps=1), run).progress.step == 1
