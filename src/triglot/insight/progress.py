"""Training as it is seen in a terminal."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from triglot import checkpoint
from triglot.config import RunConfig, TrainConfig
from triglot.training.metrics import Line


class Bar:
    """A reporter that shows a bar with loss, tokens per second and time left, and a line for each evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        self.console, self.best, self.config = console or Console(), "", TrainConfig()
        self.last: Line | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def start(self, config: RunConfig, model: nn.Module, progress: checkpoint.Progress, notes: Sequence[str]) -> None:  # noqa: ARG002 a reporter is told more than a bar shows
        """Print what is trained on and begin the bar."""
        for note in notes:
            self.console.print(note, style="dim", markup=False, highlight=False)
        self.bar.start()
        self.config = config.train
        if progress.best_score is not None:
            self.best = f"  best {config.train.keep_best} {progress.best_score:.3f}"
        self.task = self.bar.add_task("training", total=config.train.max_steps, completed=progress.step)

    def step(self, line: Line) -> None:
        """Move the bar."""
        self.last = line
        self.bar.update(self.task, completed=line["step"], total=self.steps(line), description=self.told())

    def told(self) -> str:
        """What stands before the bar."""
        if self.last is None:
            return "training"
        return f"loss {self.last['loss']:.3f}{self.best}  {self.last['tokens_per_second']:,.0f} tokens/s"

    def steps(self, line: Line) -> int:
        """After how many steps the first of the limits will be reached, by what has been reached so far."""
        limits = [(self.config.max_epochs, line["epoch"]), (self.config.max_minutes, line["seconds"] / 60)]
        expected = [math.ceil(line["step"] * limit / done) for limit, done in limits if limit is not None and done > 0]
        return min(self.config.max_steps, *expected) if expected else self.config.max_steps

    def skipped(self, line: Line) -> None:
        """Say which step was skipped and why."""
        self.bar.update(self.task, completed=line["step"])
        self.console.print(f"step {line['step']} skipped: {line['reason']}", markup=False, highlight=False)

    def evaluated(self, line: Line, is_best: bool) -> None:
        """Print the scores."""
        scores = {name: value for name, value in line.items() if name not in ("kind", "step", "seconds")}
        told = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        if is_best:
            metric = self.config.keep_best
            self.best = f"  best {metric} {line[metric]:.3f}"
            self.bar.update(self.task, description=self.told())
        mark = "  best so far" if is_best else ""
        said = f"step {line['step']}: validation {told}{mark}"
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)

    def noted(self, line: Line) -> None:
        """Print the note."""
        self.console.print(f"step {line['step']}: {line['note']}", style="yellow", markup=False, highlight=False)

    def finish(self, progress: checkpoint.Progress, stopped: bool) -> None:
        """End the bar."""
        self.bar.stop()
        if self.config.patience is not None and progress.stale >= self.config.patience:
            said = f"ended after step {progress.step}: no better {self.config.keep_best} in {progress.stale}"
            said += " evaluations; --resume goes on from there with a larger train.patience"
            self.console.print(said, markup=False, highlight=False, soft_wrap=True)
        elif stopped:
            self.console.print(f"stopped after step {progress.step}; --resume goes on from there", markup=False)
