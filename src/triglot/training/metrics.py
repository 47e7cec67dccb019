"""What training tells: lines of JSON in the run's folder, and a reporter that shows them while it runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triglot.checkpoint import Progress
from triglot.config import RunConfig
from triglot.errors import CheckpointError, reason
from triglot.files import sync, write_text
from triglot.objective import ExpertStats

Line = Mapping[str, Any]
"""`kind` is train, skipped, eval or note, `step` the last step before it; losses are nats per token.

In a skipped line a loss or gradient norm that is not finite is null, and `batches` are the step's micro-batches, each
as its epoch and its index there.
"""


@runtime_checkable
class Reporter(Protocol):
    """Whoever shows a run while it goes on."""

    def start(self, config: RunConfig, model: nn.Module, progress: Progress, notes: Sequence[str]) -> None:
        """Training begins, or goes on, from `progress`; `notes` say what the data is and what was chosen."""

    def step(self, line: Line) -> None:
        """A step is done; `line` has the same keys as a train line of the metrics, `experts` in logged ones only."""

    def skipped(self, line: Line) -> None:
        """A step is done whose update was not applied."""

    def evaluated(self, line: Line, is_best: bool) -> None:
        """An evaluation is done."""

    def noted(self, line: Line) -> None:
        """An evaluation has shown what whoever trains should know."""

    def finish(self, progress: Progress, stopped: bool) -> None:
        """Training has ended: by itself, by an error, or `stopped` by a signal after the last step's checkpoint."""


class Silent:
    """A reporter that shows nothing."""

    def start(self, config: RunConfig, model: nn.Module, progress: Progress, notes: Sequence[str]) -> None:
        """Show nothing."""

    def step(self, line: Line) -> None:
        """Show nothing."""

    def skipped(self, line: Line) -> None:
        """Show nothing."""

    def evaluated(self, line: Line, is_best: bool) -> None:
        """Show nothing."""

    def noted(self, line: Line) -> None:
        """Show nothing."""

    def finish(self, progress: Progress, stopped: bool) -> None:
        """Show nothing."""


class MetricsLog:
    """The run's metrics.jsonl: one JSON object per line, in the order of steps, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Line) -> None:
        """Append a line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path} could not be written: {reason(error)}") from error

    def sync(self) -> None:
        """Have what is written on disk before a checkpoint says that it is."""
        if self.path.exists():
            sync(self.path)

    def close(self) -> None:
        """Nothing more is written."""

    def cut(self, progress: Progress) -> None:
        """Remove what was written after the checkpoint that `progress` is of, so that going on writes it once."""
        if self.path.exists():
            lines = [line for line in read_metrics(self.path) if _is_before(line, progress)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def _is_before(line: Line, progress: Progress) -> bool:
    last = {"train": progress.step, "skipped": progress.step, "eval": progress.evaluated, "note": progress.evaluated}
    return bool(line["step"] <= last.get(line["kind"], -1))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; a last line that was cut off by the end of its process is left out."""
    texts = path.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(texts[:-1], start=1):  # what follows the last line feed is empty or cut off
        try:
            line = dict(json.loads(text))
            line["kind"], line["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}, line {number} is no line of metrics: {text[:60]!r}") from error
        lines.append(line)
    return lines


def mean_load(passes: Sequence[ExpertStats]) -> Float[Tensor, "layers experts"]:
    """Each expert's load over all choices of a step's passes, which may differ in size."""
    choices = torch.stack([stats.choices for stats in passes])[..., None]
    return (torch.stack([stats.load for stats in passes]) * choices).sum(0) / choices.sum(0)


def describe_experts(passes: Sequence[ExpertStats]) -> dict[str, Any]:
    """How evenly a step's forward passes used the experts; means over passes and layers where nothing else is said.

    `load_max` is the fullest expert's load in units of an even share, in the layer where that is highest; `dead` counts
    the experts, over all layers, that no token of the step chose; `entropy` is in nats per token; `load` has each
    expert's share of its layer's choices, layer by layer.
    """
    load = mean_load(passes)
    mean = {
        name: torch.stack([getattr(stats, name) for stats in passes]).mean().item()
        for name in ("entropy", "dropped", "balance", "z")
    }
    shares = [[round(share, 4) for share in layer] for layer in load.tolist()]
    return {"load_max": load.max().item() * load.size(1), "dead": int((load == 0).sum()), **mean, "load": shares}
