"""A run that is killed at any instant ends as one that was left alone, and one recipe makes the same files twice."""

import dataclasses
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from triglot.checkpoint import find_checkpoint, newest_whole, read_progress
from triglot.config import RunConfig
from triglot.recipe import to_dict
from triglot.training.metrics import read_metrics
from triglot.training.session import train


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


def kill_and_resume(start, content_of, config: RunConfig, folder: Path, kills: int, seed: int) -> None:
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


def test_killed_at_any_instant_a_run_ends_as_if_it_had_not_been(tmp_path, start, config_of, content_of, architecture):
    kill_and_resume(start, content_of, config_of(architecture), tmp_path, kills=7, seed=0)


@pytest.mark.slow
def test_killed_200_times_in_all_a_run_ends_as_if_it_had_not_been(tmp_path, start, config_of, content_of, architecture):
    kill_and_resume(start, content_of, config_of(architecture), tmp_path, kills=67, seed=1)


def as_toml(value: object) -> str:
    """A value in TOML, tables in one line; what is None is left out."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return f"{{ {', '.join(f'{key} = {as_toml(one)}' for key, one in value.items() if one is not None)} }}"


def test_sigterm_ends_the_command_with_143_and_a_checkpoint_to_go_on_from(tmp_path, config_of):
    run, recipe = tmp_path / "run", tmp_path / "recipe.toml"
    tables = to_dict(config_of(max_steps=2003, eval_every=1000))
    recipe.write_text("".join(f"{name} = {as_toml(table)}\n" for name, table in tables.items()), encoding="utf-8")
    command = [sys.executable, "-m", "triglot", "train", str(recipe), "--out", str(run)]
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


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"threads": 2}], ids=str)
def test_one_recipe_makes_the_same_files_twice(tmp_path, start, config_of, content_of, architecture, options):
    config = config_of(architecture, max_steps=5, **options)
    for name, seed in (("one", 0), ("again", 0), ("another", 1)):
        process = start(dataclasses.replace(config, seed=seed), tmp_path / name)
        process.join()
        assert process.exitcode == 0
    one, again, another = (content_of(tmp_path / name) for name in ("one", "again", "another"))
    assert one == again
    weights = "checkpoints/step-00000005/model.safetensors"
    assert one[weights] != another[weights]
