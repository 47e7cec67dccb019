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
    """Draw training loss (smoothed), validation loss with the best marked, the learning rate, and the experts' loads.

    Raises CheckpointError where nothing has been logged, ConfigError for a name of an unknown format.
    """
    require(out.suffix in FORMATS, "out", f"a file that ends with {', '.join(FORMATS)}", str(out), ConfigError)
    require(metrics.is_file(), "metrics", "a run's metrics.jsonl", str(metrics), CheckpointError)
    lines = read_metrics(metrics)
    rule = "of a run that has logged a step or an evaluation"
    require(any(line["kind"] in ("train", "eval") for line in lines), "metrics", rule, str(metrics), CheckpointError)
    from matplotlib.figure import Figure  # takes a second, which training need not wait for

    routed = [line for line in lines if "experts" in line]
    loads = [line for line in routed if "load" in line["experts"]]  # runs of older versions have none
    panels = [2.0, *([1.0] if routed else []), *([1.2] if loads else [])]
    figure = Figure(figsize=(8, 2.25 * sum(panels)), layout="constrained")
    ratios = {"height_ratios": panels}
    loss, *below = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    _draw_losses(loss, lines)
    loss.set_title(metrics.resolve().parent.name)
    if routed:
        _draw_experts(below[0], routed)
    if loads:
        _draw_loads(figure, below[1], loads)
    (below or [loss])[-1].set_xlabel("step")
    steps = [line["step"] for line in lines]
    margin = 0.02 * (max(steps) - min(steps)) or 0.5
    loss.set_xlim(min(steps) - margin, max(steps) + margin)  # a picture of loads would cut off what lies beyond them
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
    names = {
        "load_max": "fullest expert, in even shares",
        "balance": "balance loss",
        "entropy": "entropy, nats",
        "dropped": "dropped, share",
        "dead": "without tokens, number",
    }
    for name, label in names.items():
        values = [line["experts"][name] for line in routed]
        if any(values):
            axes.plot(_steps(routed), values, linewidth=1.2, label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set_ylabel("experts (1 = even)")
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right")


def _draw_loads(figure: Any, axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    """A row for each expert, those of a layer side by side; a column for each logged step."""
    loads = [line["experts"]["load"] for line in lines]  # [steps, layers, experts]
    num_layers, num_experts = len(loads[0]), len(loads[0][0])
    shares = [
        [step[layer][expert] * num_experts for step in loads]
        for layer in range(num_layers)
        for expert in range(num_experts)
    ]
    steps = _steps(lines)
    edges = (steps[0], max(steps[-1], steps[0] + 1), num_layers * num_experts, 0)
    image = axes.imshow(shares, aspect="auto", extent=edges, vmin=0, vmax=2, cmap="viridis", interpolation="nearest")
    axes.set_yticks(
        [num_experts * layer for layer in range(num_layers)], [f"{layer + 1}" for layer in range(num_layers)]
    )
    axes.set_ylabel("experts, by layer")
    figure.colorbar(image, ax=axes, label="load, even shares", extend="max")


def _steps(lines: Sequence[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]
