"""A checkpoint survives: the end of the process at any call to the file system, and damage to any byte afterwards."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from triglot import checkpoint, files
from triglot.checkpoint import (
    Progress,
    find_checkpoint,
    load_model,
    newest_whole,
    read_weights,
    remove_checkpoints,
    remove_leftovers,
    save_checkpoint,
    step_checkpoints,
    step_name,
)
from triglot.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from triglot.errors import CheckpointError, DamagedError
from triglot.manifest import find_damage
from triglot.models.factory import build_model
from triglot.tokenizer import Tokenizer, Tokenizers
from triglot.training.optim import make_optimizer

SHAPE = {"d_model": 2, "num_heads": 1, "num_layers": 1, "d_ff": 3, "max_seq_length": 7, "vocab_size": 259}
CONFIG = RunConfig(
    model=ModelConfig(kind="decoder_only", **SHAPE),
    data=DataConfig(kind="stdlib"),
    tokenizer=TokenizerConfig(kind="byte"),
    train=TrainConfig(context=5),
)
BEST = {1: 1, 2: 1, 3: 3, 4: 3}
"""The best step so far, after each step."""


class State(NamedTuple):
    """A model and its optimizer, which remembers a step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def state_of(step: int) -> State:
    torch.manual_seed(step)
    model = build_model(CONFIG.model)
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.randint(259, (2, 5))).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    return State(model, optimizer)


@pytest.fixture(scope="module")
def states() -> dict[int, State]:
    return {step: state_of(step) for step in BEST}


def save(run: Path, states: dict[int, State], step: int) -> None:
    """What training does at an evaluation."""
    progress = Progress(step=step, best=step_name(BEST[step]))
    save_checkpoint(run, step_name(step), CONFIG, states[step].model, progress, states[step].optimizer)
    remove_checkpoints(run, keep=2)


@pytest.fixture
def run(tmp_path, states) -> Path:
    """A run after its third step; of its checkpoints the first was the best while the second was the last."""
    tokenizer = Tokenizer.train("byte", [])
    (tmp_path / "run").mkdir()
    Tokenizers(tokenizer, tokenizer).save(tmp_path / "run")
    for step in (1, 2, 3):
        save(tmp_path / "run", states, step)
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_each_checkpoint_that_is_kept_keeps_its_own_best_one(run, states):
    assert names(run) == [step_name(1), step_name(2), step_name(3)]
    save(run, states, 4)
    assert names(run) == [step_name(3), step_name(4)]


# The end of the process


class Killed(BaseException):
    """The process is no more."""


class Death:
    """Lets a process make `number` calls that change the file system, and none after that, not even to clean up."""

    def __init__(self, number: int, torn: bool) -> None:
        self.left, self.torn = number, torn
        self.calls = 0

    def of(self, call: Callable[..., Any], target: int | None = None) -> Callable[..., Any]:
        """The call as that process makes it; `target` is the argument that says where it writes."""

        def dying(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls > self.left:
                if self.torn and self.calls == self.left + 1 and target is not None:
                    call(*arguments, **options)
                    content = Path(arguments[target]).read_bytes()
                    Path(arguments[target]).write_bytes(content[: len(content) // 2])
                raise Killed
            return call(*arguments, **options)

        return dying


@contextmanager
def dying(number: int, torn: bool = False) -> Iterator[Death]:
    death = Death(number, torn)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(f"os.{name}", death.of(getattr(files.os, name)))
        patch.setattr("os.fsync", death.of(lambda handle: None))
        patch.setattr(Path, "write_text", death.of(Path.write_text, target=0))
        patch.setattr(checkpoint, "save_file", death.of(checkpoint.save_file, target=1))
        yield death


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("torn", [False, True])  # after a call is before the next one; a write can end in its middle
@pytest.mark.parametrize("step", [4, 3], ids=["new", "replaced"])
def test_killed_at_any_call_of_a_save_the_newest_whole_checkpoint_is_there(tmp_path, run, states, step, torn):
    whole = shutil.copytree(run, tmp_path / "whole")
    with dying(10_000) as unharmed:
        save(whole, states, step)
    assert unharmed.calls > 30
    other = state_of(7)
    for number in range(unharmed.calls):
        parts = shutil.copytree(run, tmp_path / str(number))
        with pytest.raises(Killed), dying(number, torn):
            save(parts, states, step)
        newest = newest_whole(parts)
        assert not any(find_damage(folder) for folder in step_checkpoints(parts))
        at = checkpoint.restore_checkpoint(newest.folder, *other).step
        assert at in (3, step)
        assert same(checkpoint.weights_of(other.model), checkpoint.weights_of(states[at].model))
        assert same(checkpoint.optimizer_tensors(*other), checkpoint.optimizer_tensors(*states[at]))
        assert same(read_weights(find_checkpoint(parts, "best")), checkpoint.weights_of(states[3].model))
        remove_leftovers(parts)
        save(parts, states, step)
        assert names(parts) == names(whole)
        shutil.rmtree(parts)


def test_killed_twice_at_any_two_calls_the_newest_whole_checkpoint_is_there(tmp_path, run, states):
    draw = random.Random(0)
    for number in range(53):
        parts = shutil.copytree(run, tmp_path / str(number))
        for torn in (False, True):
            remove_leftovers(parts)
            with pytest.raises(Killed), dying(draw.randrange(30), torn):
                save(parts, states, 3)
            assert newest_whole(parts) == (find_checkpoint(parts, "last"), {})
            assert checkpoint.read_progress(find_checkpoint(parts, "last")).step == 3


def test_all_of_a_checkpoint_is_on_disk_before_it_gets_its_name(run, states, monkeypatch):
    told: list[tuple[str, Path]] = []

    def telling(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def tell(*arguments: Any, **options: Any) -> Any:
            told.append((name, Path(arguments[0])))
            return call(*arguments, **options)

        return tell

    monkeypatch.setattr(checkpoint, "sync", telling("sync", checkpoint.sync))
    monkeypatch.setattr(files, "sync", telling("sync", files.sync))
    monkeypatch.setattr("os.rename", telling("rename", files.os.rename))
    save(run, states, 4)
    checkpoints = run / "checkpoints"
    partial = checkpoints / ".writing-step-00000004"
    named = told.index(("rename", partial))
    synced = {path for name, path in told[:named] if name == "sync"}
    for path in (checkpoints / step_name(4)).iterdir():
        assert synced & {partial / path.name, partial / f".{path.name}.writing"}, path.name
    assert told[named - 1] == ("sync", partial)  # the names in it, after the last of them
    assert told[named + 1] == ("sync", checkpoints)


# Damage


def damages(content: bytes, name: str) -> Iterator[bytes]:
    """Flips of every byte of a manifest and of 97 of any other file, and cuts."""
    draw, size = random.Random(name), len(content)
    every = range(size) if name == "manifest.json" else draw.sample(range(size), min(97, size))
    for place in every:
        yield content[:place] + bytes([content[place] ^ draw.randrange(1, 256)]) + content[place + 1 :]
    for length in {0, 1, size - 1, *(draw.randrange(size) for _ in range(17))}:
        yield content[:length]
    yield content + b"\n"


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json", "config.json", "state.json",
        "model.safetensors", "optimizer.safetensors", "rng.safetensors",
    ],
)  # fmt: skip
def test_any_byte_changed_or_cut_is_found_and_named_and_the_checkpoint_before_is_used(run, name):
    path = find_checkpoint(run, "last") / name
    content = path.read_bytes()
    for damaged in damages(content, name):
        path.write_bytes(damaged)
        newest = newest_whole(run)
        assert newest.folder == run / "checkpoints" / step_name(2)
        assert list(newest.damaged) == [path.parent]
        assert name in newest.damaged[path.parent]
        assert step_name(3) in newest.damaged[path.parent]
    path.unlink()
    assert newest_whole(run).folder == run / "checkpoints" / step_name(2)
    path.write_bytes(content)
    assert newest_whole(run) == (path.parent, {})


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def test_a_run_with_damaged_checkpoints_only_is_refused_with_the_fault_of_each(run):
    for folder, name in zip(step_checkpoints(run), ("model.safetensors", "rng.safetensors", "state.json"), strict=True):
        damage(folder / name)
    expected = r"no whole checkpoint .*3/state\.json .*2/rng\.safetensors .*1/model\.safetensors"
    with pytest.raises(CheckpointError, match=expected):
        newest_whole(run)


@pytest.mark.parametrize("which", ["best", "last", "3"])
def test_a_damaged_model_is_not_used_and_whole_ones_are_named(run, which):
    damage(find_checkpoint(run, "last") / "model.safetensors")
    told = r"model\.safetensors is missing or damaged.* Whole checkpoints .*: step-00000001, step-00000002\."
    with pytest.raises(DamagedError, match=told):
        load_model(run, which)
    assert load_model(run, "2").config == CONFIG


def test_what_is_set_aside_is_no_checkpoint_any_more_and_still_there(run):
    content = (find_checkpoint(run, "last") / "state.json").read_bytes()
    for _ in range(2):
        aside = checkpoint.set_aside(find_checkpoint(run, "last"))
        assert (aside / "state.json").read_bytes() == content
        assert [folder.name for folder in step_checkpoints(run)] == [step_name(1), step_name(2)]
        shutil.copytree(aside, run / "checkpoints" / step_name(3))


def test_a_checkpoint_that_is_damaged_stops_no_later_one_from_being_saved(run, states):
    damage(find_checkpoint(run, "last") / "state.json")
    save(run, states, 4)
    assert newest_whole(run) == (run / "checkpoints" / step_name(4), {})
