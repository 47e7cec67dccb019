"""The page of runs side by side: their table, their curves over one another, what differs, and what they wrote last."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from triglot.insight.curves import smooth
from triglot.insight.page import Page, write
from triglot.insight.runs import WORDS, Comparison, Run

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM = 400, 240, 40, 22
"""Of a chart and of its margins; a chart scales with the page."""
MOST_POINTS = 200
"""Of a line."""
BEGINNING = 0.1
"""The share of a run's steps whose losses do not decide how high a chart reaches."""


def write_page(found: Comparison, out: Path) -> Path:
    """Write the page of a comparison."""
    page = {
        "title": f"{len(found.runs)} run{'s' * (len(found.runs) > 1)} side by side",
        "words": WORDS,
        "charts": charts(found.runs),
        **found._asdict(),
    }
    return write("runs", page, out)


def charts(runs: Sequence[Run]) -> list[Page]:
    """A chart of the training losses, and one of each score of the evaluations; runs by their numbers."""
    train = {number: points(run, "train", "loss") for number, run in enumerate(runs, 1)}
    made = {"Training loss, smoothed": {number: _smoothed(line) for number, line in train.items()}}
    names = {name for run in runs for name in run.best}
    for name in sorted(names, key=lambda name: (name != "loss", name)):
        made[f"Validation {name}"] = {number: points(run, "eval", name) for number, run in enumerate(runs, 1)}
    return [chart(name, lines) for name, lines in made.items() if any(lines.values())]


def points(run: Run, kind: str, name: str) -> Points:
    """Step and value of the lines of a kind, where there is a finite one."""
    found = [(line["step"], line.get(name)) for line in run.lines if line["kind"] == kind]
    return [(float(step), value) for step, value in found if isinstance(value, float) and math.isfinite(value)]


def _smoothed(line: Points) -> Points:
    return list(zip([step for step, _ in line], smooth([value for _, value in line]), strict=True))


def chart(name: str, lines: Mapping[int, Points]) -> Page:
    """Lines by the numbers of their runs, in the units of an SVG of WIDTH × HEIGHT."""
    settled = [y for line in lines.values() for x, y in line if x >= BEGINNING * line[-1][0]]
    right, low, high = max(1.0, *(x for line in lines.values() for x, _ in line[-1:])), min(settled), max(settled)
    if low == high:
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / right, (y - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT - 8), 1), round((1 - up) * (HEIGHT - BOTTOM - 8) + 8, 1)

    return {
        "name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "x": [(place(tick, low)[0], f"{tick:,.0f}") for tick in ticks(0.0, right) if tick.is_integer()],
        "y": [(place(0.0, tick)[1], f"{tick:.4g}") for tick in ticks(low, high)],
        "lines": {
            number: [(*place(x, y), f"step {x:,.0f}: {y:.4f}") for x, y in thinned(line) if low <= y <= high]
            for number, line in lines.items()
        },
    }


def thinned(line: Points) -> Points:
    """At most MOST_POINTS of a line, its last one among them."""
    every = -(-len(line) // MOST_POINTS)
    return [*line[:-1][:: every or 1], *line[-1:]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 × 10^n apart, `most` steps at most."""
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= most)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
