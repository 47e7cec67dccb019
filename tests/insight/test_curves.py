"""A picture comes of whatever a run has logged, and a clear word where it has logged nothing."""

import json
import math

import pytest

from triglot.errors import CheckpointError, ConfigError
from triglot.insight.curves import draw, smooth

EXPERTS = {"load_max": 1.3, "dead": 0, "entropy": 1.2, "dropped": 0.0, "balance": 1.02, "z": 0.3}
LOADS = EXPERTS | {"load": [[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]]}
PNG = b"\x89PNG\r\n\x1a\n"


def write(folder, lines):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def train(step, loss, **more):
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3} | more


def valid(step, loss):
    return {"kind": "eval", "step": step, "loss": loss}


@pytest.mark.parametrize(
    "lines",
    [
        [train(10, 3.0)],
        [valid(0, 5.0)],
        [train(10, 3.0), valid(10, 2.9)],
        [train(step, 5 / step, experts=EXPERTS) for step in range(1, 60)] + [valid(59, 0.2)],
        [train(10, 3.0, experts=EXPERTS), train(20, 2.0)],
        [train(step, 5 / step, experts=LOADS) for step in range(1, 60)] + [valid(59, 0.2)],
        [train(10, 3.0, experts=LOADS)],
        [train(10, 3.0), valid(10, math.nan)],
    ],
    ids=[
        "one step",
        "one evaluation",
        "both",
        "experts",
        "one step with experts",
        "loads",
        "loads of one step",
        "not a number",
    ],
)
def test_draws_what_there_is(tmp_path, lines):
    out = draw(write(tmp_path, lines), tmp_path / "deep" / "curves.png")
    assert out.read_bytes().startswith(PNG)
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


def test_an_evaluation_beyond_the_last_logged_step_is_still_seen(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self) or path.write_bytes(b""))
    lines = [train(step, 3.0, experts=LOADS) for step in (10, 20)] + [valid(30, 2.5)]
    draw(write(tmp_path, lines), tmp_path / "curves.png")
    for axes in drawn[0].axes[:3]:
        assert axes.get_xlim()[0] <= 10
        assert axes.get_xlim()[1] >= 30


def test_the_picture_names_run_axes_and_the_best_evaluation(tmp_path):
    metrics = write(tmp_path, [train(10, 3.0, experts=LOADS), valid(10, 2.9), valid(20, 2.125), valid(30, 2.5)])
    text = draw(metrics, tmp_path / "curves.svg").read_text(encoding="utf-8")
    for said in (
        tmp_path.name,
        "best: 2.125 at step 20",
        "loss, nats per token",
        "learning rate",
        "fullest expert",
        "experts, by layer",
    ):
        assert f"<!-- {said}" in text


@pytest.mark.parametrize("lines", [None, []])
def test_says_so_where_nothing_is_logged(tmp_path, lines):
    metrics = tmp_path / "metrics.jsonl" if lines is None else write(tmp_path, lines)
    with pytest.raises(CheckpointError, match="`metrics` must be"):
        draw(metrics, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_refuses_a_format_that_it_does_not_know(tmp_path):
    with pytest.raises(ConfigError, match=r"`out` must be a file that ends with \.png"):
        draw(write(tmp_path, [train(1, 1.0)]), tmp_path / "curves.txt")


def test_smoothing_keeps_a_constant_and_stays_between_its_values():
    assert smooth([2.0] * 7) == pytest.approx([2.0] * 7)
    assert smooth([]) == []
    smoothed = smooth([0.0, 1.0] * 11)
    assert smoothed[0] == 0.0
    assert all(0 <= value <= 1 for value in smoothed)
    assert smooth([3.0, 1.0], keep=0.0) == [3.0, 1.0]
