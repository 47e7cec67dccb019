"""Which steps are not applied: what is not finite, and spikes (the rule of OLMo-core's `SkipStepOptimizer`)."""

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 128
"""Applied steps that say what is usual."""
ENOUGH = WINDOW // 2
"""How many of them must be known before anything is called a spike."""
SIGMAS = 6.0


def fault(loss: float, grad_norm: float, usual: Sequence[Sequence[float]]) -> str | None:
    """Why a step with this loss and gradient norm is not to be applied, or None; `usual` are those of applied ones."""
    for number, (name, value) in enumerate({"loss": loss, "gradient norm": grad_norm}.items()):
        if not math.isfinite(value):
            return f"the {name} is not finite"
        known = np.array([step[number] for step in usual])
        if len(known) >= ENOUGH and value > known.mean() + SIGMAS * known.std():
            return f"the {name} is a spike"
    return None


def num_recent(skipped: Sequence[int], step: int) -> int:
    """How many of the last `WINDOW` steps up to `step` were skipped."""
    return sum(number > step - WINDOW for number in skipped)
