"""Which steps are not applied: what is not finite, and spikes.

Spikes are told by the rule of OLMo-core's `SkipStepOptimizer`, but of gradient norms in logarithms, since they vary by
factors: a norm in the tail of that distribution is no reason to lose a batch.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

WINDOW = 128
"""Steps that say what is usual."""
ENOUGH = WINDOW // 2
"""How many of them must be known before anything is called a spike."""
SIGMAS = 6.0
LEAST_SPREAD = 0.02
"""Of losses and log norms: values that hardly differ are no reason to call the next one a spike."""


ALIKE = 1.5
"""A spike that is no larger than this times one of an earlier pass through the data is taken for the same data."""


def fault(
    loss: float, grad_norm: float, usual: Sequence[Sequence[float]], known: Sequence[Sequence[float]] = ()
) -> str | None:
    """Why a step with this loss and gradient norm is not to be applied, or None; `usual` is what `seen` made.

    `known` are loss and gradient norm of spikes of earlier passes through the data: what comes again belongs to it, and
    would never be learned if it were skipped each time.
    """
    again = any(loss <= ALIKE * one and grad_norm <= ALIKE * norm for one, norm in known)
    limits = (math.inf, math.inf) if again else _limits(usual)
    for name, value, limit in (("loss", loss, limits[0]), ("gradient norm", grad_norm, limits[1])):
        if not math.isfinite(value):
            return f"the {name} is not finite"
        if value > limit:
            return f"the {name} is a spike"
    return None


def seen(usual: Sequence[Sequence[float]], loss: float, grad_norm: float) -> list[list[float]]:
    """`usual` with one more step, applied or not, if its values are finite; the oldest goes.

    A spike counts as what is just none: several in a row are all told, and a small change for good is soon none.
    """
    known = [list(step) for step in usual]
    if math.isfinite(loss) and math.isfinite(grad_norm):
        limits = _limits(usual)
        known.append([min(loss, limits[0]), min(grad_norm, limits[1])])
    return known[-WINDOW:]


def num_recent(skipped: Sequence[int], step: int) -> int:
    """How many of the last `WINDOW` steps up to `step` were skipped."""
    return sum(number > step - WINDOW for number in skipped)


def _limits(usual: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The largest loss and gradient norm that are no spikes."""
    if len(usual) < ENOUGH:
        return math.inf, math.inf
    losses, norms = np.array(usual).T
    return _limit(losses), math.exp(_limit(np.log(np.maximum(norms, sys.float_info.min))))


def _limit(known: np.ndarray) -> float:
    return float(known.mean() + SIGMAS * max(float(known.std()), LEAST_SPREAD))
