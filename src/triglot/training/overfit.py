"""When a run begins to learn its training data by heart."""

import math
from statistics import fmean

from triglot.checkpoint import Progress

MARGIN = 0.01
EVALUATIONS = 3


def overfitting(at: Progress, loss: float) -> str | None:
    """What is to be said, once a run, when it begins to overfit; `loss` is the validation loss that was just found.

    It does where `EVALUATIONS` in a row found a loss more than `MARGIN` above the lowest one, as a share of that, and a
    training loss (the mean of the last applied steps that `at.usual` holds) below the one at that time.
    """
    if math.isnan(loss) or at.above == EVALUATIONS:  # nothing to compare, or said before
        return None
    trained = fmean(step[0] for step in at.usual) if at.usual else math.nan
    if at.lowest is None or loss < at.lowest[0]:
        at.lowest, at.above = [loss, trained, at.step], 0
        return None
    lowest, then, step = at.lowest
    at.above = at.above + 1 if loss > lowest * (1 + MARGIN) and trained < then else 0
    if at.above < EVALUATIONS:
        return None
    return (
        f"the run begins to overfit: for {EVALUATIONS} evaluations the validation loss has been more than {MARGIN:.0%}"
        f" above the {lowest:.3f} of step {step}, while the training loss fell from {then:.3f} to {trained:.3f};"
        " more data or a higher model.dropout may help, and train.patience ends such a run"
    )
