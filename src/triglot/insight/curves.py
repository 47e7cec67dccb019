"""The course of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triglot.errors import CheckpointError, require
from triglot.training.metrics import read_metrics


def draw(metrics: Path, out: Path) -> Path:
    """Draw training and validation loss, the learning rate, and the fullest expert's load where there are experts."""
    from matplotlib.figure import Figure

    require(metrics.is_file(), "metrics", "a run's metrics.jsonl", str(metrics), CheckpointError)
    lines = read_metrics(metrics)
    train = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "eval"]
    require(bool(train or valid), "metrics", "of a run that has logged a step", str(metrics), CheckpointError)
    routed = [line for line in train if "experts" in line]
    figure = Figure(figsize=(8, 8 if routed else 5), layout="constrained")
    loss, *more = figure.subplots(2 if routed else 1, squeeze=False)[:, 0]
    loss.plot(_steps(train), [line["loss"] for line in train], label="training", linewidth=1)
    loss.plot(_steps(valid), [line["loss"] for line in valid], label="validation", marker="o", markersize=4)
    if valid:
        best = min(valid, key=lambda line: line["loss"])
        loss.annotate(f"{best['loss']:.3f}", (best["step"], best["loss"]), textcoords="offset points", xytext=(0, -14))
    loss.set(xlabel="step", ylabel="nats per token", title=metrics.parent.name)
    rate = loss.twinx()
    rate.plot(_steps(train), [line["learning_rate"] for line in train], color="gray", alpha=0.4, linewidth=1)
    rate.set_ylabel("learning rate", color="gray")
    loss.legend(loc="upper right")
    for axes in more:
        axes.plot(_steps(routed), [line["experts"]["load_max"] for line in routed], label="fullest expert's load")
        axes.plot(_steps(routed), [line["experts"]["balance"] for line in routed], label="balance loss")
        axes.set(xlabel="step", ylabel="1 = even")
        axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def _steps(lines: Sequence[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]
