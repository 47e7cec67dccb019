"""Runs side by side: what each is, how far it came, what it reached, and where their recipes differ."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triglot.checkpoint import Progress, find_checkpoint, read_progress, step_checkpoints
from triglot.config import RunConfig, TrainConfig
from triglot.errors import CheckpointError, ConfigError, require
from triglot.files import is_at_work
from triglot.insight.inspect import PIPED
from triglot.manifest import read_manifest
from triglot.models.factory import build_model, count_active_parameters, count_parameters
from triglot.recipe import flat, load_config, to_dict
from triglot.training import samples
from triglot.training.metrics import read_metrics

OF_A_RUN = ("config.json", "checkpoints", "metrics.jsonl")
"""What a run's folder has and others have not; a damaged one may have lost some."""
KINDS = {"encoder_decoder": "enc–dec", "decoder_only": "decoder"}
NO_SCORES = {"kind", "step", "seconds", "checkpoints"}
"""What an evaluation's line says besides scores."""
WORDS = ("run", "kind", "state", "started")
"""The columns that hold no numbers."""


@dataclass
class Run:
    """What a run's folder tells; of one that can not be read, why."""

    path: Path
    name: str
    fault: str | None = None
    cells: dict[str, str] = field(default_factory=dict)
    """What a table shows of it, by the names of the columns."""
    best: dict[str, float] = field(default_factory=dict)
    """The best score by each metric that was found: a loss by being lower, all else by being higher."""
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    samples: str = ""
    """What it wrote at its last evaluation."""


class Comparison(NamedTuple):
    """Runs in the order that was asked for, those that can not be read last."""

    runs: list[Run]
    columns: list[str]
    differing: dict[str, list[str]]
    """The recipe's keys that are not the same in all runs that can be read, with the value of each of these."""
    foreign: list[Path]
    """Folders without a run."""


def compare(folders: Sequence[Path], *, sort: str = "name", console: Console | None = None) -> Comparison:
    """Print the runs in `folders` and below them side by side.

    `sort` is name, started or a metric, by which the best comes first. Raises ConfigError where there is no run, or
    none that was measured by that metric.
    """
    for folder in folders:
        require(folder.is_dir(), "FOLDER", "a folder", str(folder), ConfigError)
    found = [(folder, *find_runs(folder)) for folder in folders]
    paths = {path.resolve(): (folder, path) for folder, runs, _ in found for path in runs}
    require(bool(paths), "FOLDER", "a folder with runs", ", ".join(map(str, folders)), ConfigError)
    runs = [read_run(path, folder) for folder, path in paths.values()]
    metrics = sorted({metric for run in runs for metric in run.best}, key=lambda metric: (metric != "loss", metric))
    known = ("name", "started", *metrics)
    require(sort in known, "--sort", f"one of {', '.join(known)}", sort, ConfigError)
    runs.sort(key=lambda run: (run.fault is not None, _place(run, sort), run.name))
    columns = list(dict.fromkeys(column for run in runs for column in run.cells))
    foreign = [path for *_, others in found for path in others]
    comparison = Comparison(runs, columns, differing([run.config for run in runs if run.fault is None]), foreign)
    show(comparison, console or Console(width=None if sys.stdout.isatty() else PIPED))
    return comparison


def _place(run: Run, sort: str) -> Any:
    if sort in ("name", "started"):
        return run.cells.get(sort, "")
    value = run.best.get(sort, math.nan)
    return math.isnan(value), value if sort == "loss" else -value


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all configs, by its dotted key; what one has not is – there."""
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    texts = {key: ["–" if one is None else json.dumps(one, ensure_ascii=False) for one in values[key]] for key in keys}
    return {key: some for key, some in texts.items() if len(set(some)) > 1}


def show(found: Comparison, console: Console) -> None:
    """Print a table of the runs, one of what differs in their recipes, and what could not be read."""
    table, below = (Table(box=None, pad_edge=False) for _ in range(2))
    table.add_column("#", justify="right")
    for column in found.columns:
        table.add_column(column.replace(" ", "\n"), justify="left" if column in WORDS else "right", overflow="fold")
    below.add_column("differing", no_wrap=True)
    for number, run in enumerate(found.runs, 1):
        table.add_row(str(number), *(Text(run.cells.get(column, "")) for column in found.columns))
        if run.fault is None:
            below.add_column(str(number), overflow="fold")
    for key, values in found.differing.items():
        below.add_row(key, *map(Text, values))
    console.print(table, *([""] * bool(found.differing)), *([below] * bool(found.differing)))
    told = [f"{run.path} can not be read: {run.fault}" for run in found.runs if run.fault is not None]
    for line in (*told, *(f"{path} holds no run" for path in found.foreign)):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


# Reading


def find_runs(folder: Path) -> tuple[list[Path], list[Path]]:
    """The runs in a folder and below it, and the folders that hold none."""
    if any((folder / name).exists() for name in OF_A_RUN):
        return [folder], []
    runs, foreign = list[Path](), list[Path]()
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            some, others = find_runs(path)
            runs, foreign = runs + some, foreign + others
    return runs, foreign if runs else [folder]


def read_run(path: Path, above: Path) -> Run:
    """What a run's folder tells. The weights are not read: whether they are damaged is found where they are used."""
    name = path.resolve().name if path == above else str(path.relative_to(above))
    run = Run(path, name)
    try:
        _read(run)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # whatever a damaged file can lead to
        return Run(path, name, f"{type(error).__name__}: {error}", {"run": name, "state": "damaged"})
    return run


def _read(run: Run) -> None:
    config, metrics, environment, written = (
        run.path / name for name in ("config.json", "metrics.jsonl", "environment.json", samples.FILE)
    )
    at, recipe = Progress(), load_config(config)
    if step_checkpoints(run.path):
        last = find_checkpoint(run.path, "last")
        at = read_progress(last)
        missing = [name for name in read_manifest(last) if not (last / name).is_file()]
        require(not missing, str(last), "whole", f"without {', '.join(missing)}", CheckpointError)
    run.config, run.lines = flat(to_dict(recipe)), read_metrics(metrics) if metrics.exists() else []
    run.samples = samples.read(written)[-1][1] if written.exists() else ""
    started = json.loads(environment.read_text(encoding="utf-8"))["started"] if environment.exists() else ""
    run.cells = {
        "run": run.name,
        **_size(recipe),
        **_course(run.lines, at),
        "state": "running" if is_at_work(run.path) else "finished" if has_ended(recipe.train, at) else "stopped",
        "started": started[:16].replace("T", " "),  # UTC
    }
    for line in run.lines:
        if line["kind"] == "eval":
            run.cells["last loss"] = f"{line['loss']:.4f}"
        for name in line.keys() - NO_SCORES if line["kind"] == "eval" else ():
            if math.isfinite(line[name]):
                better = min if name == "loss" else max
                run.best[name] = better(line[name], run.best.get(name, line[name]))
    run.cells |= {f"best {name}": f"{run.best[name]:.4f}" for name in sorted(run.best, key=lambda name: name != "loss")}


def _size(config: RunConfig) -> dict[str, str]:
    size = ""
    if config.model.vocab_size:  # it is known when the data is prepared
        with torch.device("meta"):  # shapes without memory
            model = build_model(config.model)
        count, active = count_parameters(model), count_active_parameters(model)
        size = f"{count:,}" + (f" ({active:,} active)" if active < count else "")
    return {"kind": KINDS[config.model.kind], "parameters": size}


def _course(lines: Sequence[dict[str, Any]], at: Progress) -> dict[str, str]:
    """How far a run has come: by its last checkpoint, or by what was logged since."""
    train = [line for line in lines if line["kind"] == "train"]
    logged = [(line["step"], line["tokens"], line["seconds"]) for line in train[-1:]]
    step, tokens, seconds = max([(at.step, at.tokens, at.seconds), *logged])
    speed = f"{median(line['tokens_per_second'] for line in train):,.0f}" if train else ""
    return {"step": f"{step:,}", "tokens": f"{tokens:,}", "minutes": f"{seconds / 60:.1f}", "tokens/s": speed}


def has_ended(config: TrainConfig, at: Progress) -> bool:
    """Whether a run has come to the end that its recipe sets."""
    reached = (at.step, at.epoch, at.seconds / 60, at.stale)
    limits = (config.max_steps, config.max_epochs, config.max_minutes, config.patience)
    return any(limit is not None and far >= limit for far, limit in zip(reached, limits, strict=True))
