"""The bar tells how far a run is, whichever limit will end it."""

import io
import math

import pytest
from rich.console import Console
from rich.text import Text
from torch import nn

from triglot.checkpoint import Progress
from triglot.config import RunConfig
from triglot.insight.progress import Bar
from triglot.recipe import from_dict

LINE = {"kind": "train", "step": 10, "epoch": 0.5, "loss": 2.0, "tokens_per_second": 1234.5, "seconds": 30.0}


def bar(**limits) -> tuple[Bar, io.StringIO]:
    values = {"model": {"kind": "decoder_only"}, "data": {"kind": "stdlib"}, "train": {"max_steps": 1000} | limits}
    output = io.StringIO()
    shown = Bar(Console(file=output, width=200, force_terminal=True))
    shown.start(from_dict(RunConfig, values), nn.Identity(), Progress(), ["a note"])
    return shown, output


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 1000),
        ({"max_epochs": 3}, 60),  # half an epoch took 10 steps
        ({"max_minutes": 2.0}, 40),  # half a minute took 10 steps
        ({"max_epochs": 3, "max_minutes": 2.0}, 40),
        ({"max_epochs": 100, "max_minutes": 500.0}, 1000),
    ],
)
def test_the_total_is_what_the_nearest_limit_allows(limits, steps):
    shown, _ = bar(**limits)
    try:
        shown.step(LINE)
        task = shown.bar.tasks[0]
        assert (task.completed, task.total) == (10, steps)
    finally:
        shown.finish(Progress(), stopped=False)


def test_loss_speed_scores_and_the_best_are_shown():
    shown, output = bar()
    shown.step(LINE)
    shown.evaluated({"kind": "eval", "step": 10, "loss": 1.875, "bleu": math.pi}, is_best=True)
    shown.step(LINE | {"step": 11})
    shown.skipped({"kind": "skipped", "step": 12, "reason": "the loss is a spike"})
    shown.noted({"kind": "note", "step": 12, "note": "the run [begins] to overfit"})
    assert shown.bar.tasks[0].completed == 12
    shown.finish(Progress(step=11), stopped=True)
    said = Text.from_ansi(output.getvalue()).plain
    for text in (
        "a note",
        "loss 2.000",
        "1,234 tokens/s",
        "bleu 3.1416  best so far",
        "best loss 1.875",
        "step 12 skipped: the loss is a spike",
        "step 12: the run [begins] to overfit",
    ):
        assert text in said
    assert "stopped after step 11;" in said


@pytest.mark.parametrize("stale", [2, 3])
def test_an_end_for_want_of_anything_better_is_told(stale):
    shown, output = bar(patience=3, keep_best="bleu")
    shown.finish(Progress(step=11, stale=stale), stopped=False)
    told = "ended after step 11: no better bleu in 3 evaluations; --resume goes on from there with a larger train.pat"
    assert (told in output.getvalue()) == (stale == 3)
