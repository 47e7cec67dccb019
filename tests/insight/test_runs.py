"""Runs side by side are told as they are: what they reached, what they are, and which of them can not be read."""

import dataclasses
import io
import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from triglot.checkpoint import Progress, find_checkpoint, load_model, read_progress, save_checkpoint, step_name
from triglot.config import BlockOptions, DataConfig, ExpertOptions, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from triglot.errors import ConfigError
from triglot.files import at_work, is_at_work, write_json
from triglot.insight.runs import Comparison, compare, find_runs, has_ended, read_run
from triglot.models.factory import build_model, count_active_parameters, count_parameters
from triglot.recipe import to_dict
from triglot.tokenizer import Tokenizer, Tokenizers

SHAPE = {"d_model": 6, "num_heads": 2, "num_layers": 1, "d_ff": 11, "max_seq_length": 29, "vocab_size": 259}


def make_run(
    folder: Path, losses: list[float], *, bleu: tuple[float, ...] = (), step: int | None = None, **train
) -> Path:
    """A run that was evaluated every 10 steps; `step` is that of its last checkpoint."""
    folder.mkdir(parents=True)
    config = RunConfig(
        model=ModelConfig(kind="decoder_only", **SHAPE),
        data=DataConfig(kind="stdlib"),
        tokenizer=TokenizerConfig(kind="byte"),
        train=TrainConfig(**{"max_steps": 10 * len(losses), "context": 23} | train),
    )
    tokenizer = Tokenizer.train("byte", [])
    Tokenizers(tokenizer, tokenizer).save(folder)
    write_json(folder / "config.json", to_dict(config))
    write_json(folder / "environment.json", {"started": f"2026-11-{len(losses):02}T19:06:41Z"})
    lines = []
    for number, loss in enumerate(losses, 1):
        now = {"step": 10 * number, "seconds": 60.0 * number}
        lines.append(
            {"kind": "train", "loss": loss / 2, "tokens": 700 * number, "tokens_per_second": 11.0 * number} | now
        )
        lines.append({"kind": "eval", "loss": loss} | ({"bleu": bleu[number - 1]} if bleu else {}) | now)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    torch.manual_seed(0)
    step = 10 * len(losses) if step is None else step
    progress = Progress(step=step, tokens=70 * step, seconds=6.0 * step)
    save_checkpoint(folder, step_name(step), config, build_model(config.model), progress)
    return folder


def told(*folders: Path, **how) -> tuple[Comparison, str]:
    output = io.StringIO()
    found = compare(folders, console=Console(file=output, width=200), **how)
    return found, output.getvalue()


def test_a_run_is_told_with_what_it_reached(tmp_path):
    path = make_run(tmp_path / "run", [3.0, 1.5, 2.0], bleu=(1.0, 7.0, 5.0))
    run = read_run(path, tmp_path)
    assert run.fault is None
    assert run.best == {"loss": 1.5, "bleu": 7.0}
    assert run.cells == {
        "run": "run",
        "kind": "decoder",
        "parameters": f"{count_parameters(load_model(path).model):,}",
        "step": "30",
        "tokens": "2,100",
        "minutes": "3.0",
        "tokens/s": "22",
        "state": "finished",
        "started": "2026-11-03 19:06",
        "last loss": "2.0000",
        "best loss": "1.5000",
        "best bleu": "7.0000",
    }


def test_of_experts_those_are_told_that_a_token_visits(tmp_path):
    path = make_run(tmp_path / "run", [3.0])
    config = load_model(path).config
    options = BlockOptions(experts=ExpertOptions(num_experts=5))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, options=options))
    write_json(path / "config.json", to_dict(config))
    count, active = (counted(build_model(config.model)) for counted in (count_parameters, count_active_parameters))
    assert read_run(path, tmp_path).cells["parameters"] == f"{count:,} ({active:,} active)"


def test_what_was_logged_after_the_last_checkpoint_counts_until_it_is_cut(tmp_path):
    run = read_run(make_run(tmp_path / "run", [3.0, 1.5, 2.0], step=20), tmp_path)
    assert (run.cells["step"], run.cells["tokens"], run.cells["state"]) == ("30", "2,100", "stopped")
    run = read_run(make_run(tmp_path / "other", [3.0, 1.5], step=29, max_steps=99), tmp_path)
    assert (run.cells["step"], run.cells["tokens"]) == ("29", "2,030")


@pytest.mark.parametrize(
    ("limit", "ended"),
    [
        ({"max_steps": 30}, True),
        ({"max_steps": 31}, False),
        ({"max_epochs": 2}, True),
        ({"max_epochs": 3}, False),
        ({"max_minutes": 2.5}, True),
        ({"patience": 4}, True),
        ({"patience": 5}, False),
    ],
)
def test_a_run_has_ended_by_the_first_of_its_limits(limit, ended):
    at = Progress(step=30, epoch=2, seconds=151.0, stale=4)
    assert has_ended(TrainConfig(**{"max_steps": 99} | limit), at) == ended


def hold(folder: Path, ready, go) -> None:
    with at_work(folder):
        ready.set()
        go.wait()


@pytest.mark.parametrize("end", ["itself", "a kill"])
def test_a_run_is_running_as_long_as_a_process_is_at_work_there(tmp_path, end):
    path = make_run(tmp_path / "run", [3.0, 2.0], step=10)
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, ready, go))
    process.start()
    assert ready.wait(120)
    with pytest.raises(BlockingIOError), at_work(path):
        pass
    assert read_run(path, tmp_path).cells["state"] == "running"
    assert is_at_work(path)
    go.set() if end == "itself" else process.kill()
    process.join()
    assert process.exitcode == (0 if end == "itself" else -signal.SIGKILL)
    assert read_run(path, tmp_path).cells["state"] == "stopped"


def test_only_what_differs_between_recipes_is_shown(tmp_path):
    make_run(tmp_path / "a", [3.0, 2.0], learning_rate=0.5)
    make_run(tmp_path / "b", [3.0, 2.5])
    found, output = told(tmp_path)
    assert found.differing == {"train.learning_rate": ["0.5", "0.001"]}
    assert "train.learning_rate" in output
    assert "train.max_steps" not in output
    assert told(tmp_path / "a")[0].differing == {}


def test_the_best_comes_first_and_what_was_not_measured_last(tmp_path):
    make_run(tmp_path / "a", [3.0, 2.0], bleu=(1.0, 2.0))
    make_run(tmp_path / "b", [1.0], bleu=(5.0,))
    make_run(tmp_path / "c", [2.5] * 3)
    orders = {"name": "abc", "loss": "bac", "bleu": "bac", "started": "bac"}
    assert {key: "".join(run.name for run in told(tmp_path, sort=key)[0].runs) for key in orders} == orders
    with pytest.raises(ConfigError, match="`--sort` must be one of name, started, loss, bleu, but is 'chrf' instead"):
        told(tmp_path, sort="chrf")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model": {"kind": "bert"}}'),
        ("config.json", None),
        ("config.json", b"\xff\xfe"),
        ("metrics.jsonl", b'{"kind": "eval"}\n'),
        ("metrics.jsonl", b'{"kind": "eval", "step": 3}\n'),
        ("metrics.jsonl", b'{"kind": "train", "step": "x", "seconds": [], "tokens": 1}\n'),
        ("metrics.jsonl", b'{"kind": "eval", "step": 3, "loss": 1.0, "bleu": "high"}\n'),
        ("environment.json", b"{}"),
        ("environment.json", b"7"),
        ("tokenizer.json", None),
        ("checkpoints/step-00000020/state.json", b"{}"),
        ("checkpoints/step-00000020/state.json", None),
        ("checkpoints/step-00000020/model.safetensors", None),
        ("checkpoints/step-00000020/manifest.json", b"half"),
    ],
)
def test_a_damaged_run_is_named_with_its_fault_beside_the_others(tmp_path, file, content):
    make_run(tmp_path / "whole", [3.0, 2.0])
    path = make_run(tmp_path / "damaged", [3.0, 2.0]) / file
    path.unlink() if content is None else path.write_bytes(content)
    found, output = told(tmp_path)
    assert [(run.name, run.cells["state"]) for run in found.runs] == [("whole", "finished"), ("damaged", "damaged")]
    assert found.runs[1].fault
    assert f"{tmp_path / 'damaged'} can not be read: {found.runs[1].fault}" in output.replace("\n", "")


def test_a_run_that_has_only_begun_is_one(tmp_path):
    path = make_run(tmp_path / "run", [2.0])
    for name in ("metrics.jsonl", "environment.json", "tokenizer.json"):
        (path / name).unlink()
    for file in find_checkpoint(path, "last").iterdir():
        file.unlink()
    find_checkpoint(path, "last").rmdir()
    run = read_run(path, tmp_path)
    told_of_it = [run.cells[column] for column in ("step", "tokens/s", "state", "started")]
    assert (run.fault, run.best, told_of_it) == (None, {}, ["0", "", "stopped", ""])
    assert told(path)[0].runs[0].name == "run"


def test_runs_are_found_below_and_folders_without_any_are_named(tmp_path):
    one, two = make_run(tmp_path / "one", [1.0]), make_run(tmp_path / "deep" / "two", [1.0])
    for name in ("notes/a", "notes/b", "deep/empty", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_runs(tmp_path) == ([two, one], [tmp_path / "deep" / "empty", tmp_path / "notes"])
    found, output = told(tmp_path, one)
    assert [run.name for run in found.runs] == ["deep/two", "one"]
    assert f"{tmp_path / 'notes'} holds no run" in output
    with pytest.raises(ConfigError, match="`FOLDER` must be a folder with runs, but is"):
        told(tmp_path / "notes")
    with pytest.raises(ConfigError, match="`FOLDER` must be a folder, but is"):
        told(tmp_path / "nowhere")


def test_nothing_in_a_name_is_markup(tmp_path):
    make_run(tmp_path / "[red]a[", [1.0])
    make_run(tmp_path / "b", [1.0], learning_rate=0.5)
    assert "[red]a[" in told(tmp_path)[1]


def test_the_run_is_read_and_never_changed(tmp_path):
    path = make_run(tmp_path / "run", [2.0, 1.0])
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    told(tmp_path)
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    assert read_progress(find_checkpoint(path, "last")).step == 20
