"""The course of a run as a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triglot.errors import CheckpointError, ConfigError, require
from triglot.training.metrics import read_metrics

FORMATS = (".png", ".svg", ".pdf")
SMOOTHING = 0.9
"""Of the line of training losses: how much of the mean so far each next loss leaves in place."""


def draw(metrics: Path, out: Path) -> Path:
    """Draw training loss (smoothed), validation loss with the best marked, the learning rate, and the experts' load.

    Raises CheckpointError where nothing has been logged, ConfigError for a name of an unknown format.
    """
    require(out.suffix in FORMATS, "out", f"a file that ends with {', '.join(FORMATS)}", str(out), ConfigError)
    require(metrics.is_file(), "metrics", "a run's metrics.jsonl", str(metrics), CheckpointError)
    lines = read_metrics(metrics)
    rule = "of a run that has logged a step or an evaluation"
    require(any(line["kind"] in ("train", "eval") for line in lines), "metrics", rule, str(metrics), CheckpointError)
    from matplotlib.figure import Figure  # takes a second, which training need not wait for

    routed = [line for line in lines if "experts" in line]
    figure = Figure(figsize=(8, 7 if routed else 4.5), layout="constrained")
    ratios = {"height_ratios": [2, 1]} if routed else {}
    loss, *below = figure.subplots(2 if routed else 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    _draw_losses(loss, lines)
    loss.set_title(metrics.resolve().parent.name)
    for axes in below:
        _draw_experts(axes, routed)
    (below or [loss])[-1].set_xlabel("step")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(out)
    return out


def smooth(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """The exponential moving average without its bias to the start (Kingma & Ba 2015, §3)."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _draw_losses(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    train, valid = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    losses = [line["loss"] for line in train]
    dots = {"marker": "o", "markersize": 3} if len(train) == 1 else {}  # a line through one point would not be seen
    axes.plot(_steps(train), losses, color="C0", linewidth=0.8, alpha=0.3)
    axes.plot(_steps(train), smooth(losses), color="C0", linewidth=1.5, label="training, smoothed", **dots)
    if valid:
        axes.plot(
            _steps(valid), [line["loss"] for line in valid], color="C1", marker="o", markersize=4, label="validation"
        )
        best = min(valid, key=lambda line: line["loss"])
        label = f"best: {best['loss']:.3f} at step {best['step']}"
        axes.plot(best["step"], best["loss"], "*", color="C3", markersize=12, label=label)
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rate.plot(_steps(train), [line["learning_rate"] for line in train], color="gray", alpha=0.4, linewidth=1)
    rate.set_ylabel("learning rate", color="gray")
    rate.set_ylim(bottom=0)


def _draw_experts(axes: Any, routed: Sequence[dict[str, Any]]) -> None:
    for name, label in (("load_max", "fullest expert, in even shares"), ("balance", "balance loss")):
        axes.plot(_steps(routed), [line["experts"][name] for line in routed], linewidth=1.2, label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set_ylabel("experts (1 = even)")
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right")


def _steps(lines: Sequence[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]
