"""A run overfits where validation loses for some evaluations in a row while training wins, and not before."""

import math

import pytest

from triglot.checkpoint import Progress
from triglot.training.overfit import EVALUATIONS, MARGIN, overfitting

FALLING = [3.0, 2.5, 2.0, 1.5, 1.25, 1.0, 0.5]


def notes(valid: list[float], trained: list[float]) -> list[int]:
    """After which evaluations, counted from 0, something is said."""
    at, found = Progress(), []
    for number, (loss, usual) in enumerate(zip(valid, trained, strict=True)):
        at.step, at.usual = 10 * number, [[usual + 0.1, 7.0], [usual - 0.1, 7.0]]
        if overfitting(at, loss):
            found.append(number)
    return found


def test_it_is_said_once_after_so_many_evaluations_above_the_lowest():
    assert EVALUATIONS == 3
    assert notes([2.0, 1.0, 1.1, 1.3, 1.2, 1.5, 1.6], FALLING) == [4]


@pytest.mark.parametrize(
    "valid",
    [
        [2.0, 1.0, 1.1, 1.2, 0.9, 1.1, 1.2],
        [2.0, 1.0, 1.1, 1.2, 1.0, 1.1, 1.2],
        [1.0, *[1 + MARGIN / 2] * 6],
        [3.0, 2.5, 2.0, 1.5, 1.25, 1.0, 0.5],
        [2.0, 1.0, 1.1, math.nan, 1.2, 0.9, 1.1],
        [math.nan] * 7,
    ],
    ids=["a new lowest", "back at the lowest", "within the margin", "falling", "not a number within", "never one"],
)
def test_nothing_is_said_where_the_rise_is_broken_or_small(valid):
    assert notes(valid, FALLING) == []


@pytest.mark.parametrize("trained", [FALLING[::-1], [1.0] * 7, [math.nan] * 7], ids=["rising", "level", "unknown"])
def test_nothing_is_said_where_training_does_not_get_better_meanwhile(trained):
    assert notes([2.0, 1.0, 1.1, 1.3, 1.2, 1.5, 1.6], trained) == []


def test_the_note_names_both_losses_and_the_step_of_the_lowest():
    at = Progress(step=40, usual=[[1.5, 7.0]], lowest=[2.0, 1.75, 10], above=EVALUATIONS - 1)
    note = overfitting(at, 2.5)
    assert "above the 2.000 of step 10, while the training loss fell from 1.750 to 1.500" in note
