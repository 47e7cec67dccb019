"""What guesses gain: `python -m benchmarks.speculation --run RUN --text FILE [--draft RUN] [--json FILE]`.

RUN goes on from pieces of FILE, one at a time; with guesses the texts are the same, and that is checked. Sides take
turns in one process; a step's tokens say how often guesses were right.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import triglot
from benchmarks import measure
from benchmarks.measure import Row
from triglot.allocator import keep_freed_memory
from triglot.generation.engine import Engine
from triglot.generation.steps import TextSteps


def prompts_of(text: str, number: int, length: int) -> list[str]:
    """Pieces of a text, evenly spread."""
    apart = max(1, (len(text) - length) // number)
    return [text[start : start + length] for start in range(0, len(text) - length, apart)][:number]


def speed(engine: Engine, prompts: Sequence[str], options: dict[str, Any]) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the tokens."""
    began = time.perf_counter()
    found = [engine.generate([prompt], **options)[0].tokens for prompt in prompts]
    return sum(map(len, found)) / (time.perf_counter() - began), found


def steps_taken(engine: Engine, prompts: Sequence[str], options: dict[str, Any]) -> int:
    """Steps of the model itself, not of its draft."""
    taken, extend, own = 0, TextSteps.extend, engine._ready.prepared

    def counted(steps: TextSteps, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        taken += steps.prepared is own
        return extend(steps, tokens)

    TextSteps.extend = counted  # type: ignore[method-assign]
    try:
        speed(engine, prompts, options)
    finally:
        TextSteps.extend = extend  # type: ignore[method-assign]
    return taken


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--draft", type=Path, metavar="RUN")
    parser.add_argument("--precision", default="int8")
    options = parser.parse_args()
    keep_freed_memory()
    engines = {"n-grams": triglot.load(options.run, device="cpu", precision=options.precision)}
    if options.draft:
        engines["draft"] = triglot.load(options.run, device="cpu", precision=options.precision, draft=options.draft)
    rounds = 1 if options.quick else 5
    prompts = prompts_of(options.text.read_text("utf-8"), 2 if options.quick else 8, 64)
    measure.report(
        [row for name, engine in engines.items() for row in rows_of(name, engine, prompts, rounds)], options.json
    )


def rows_of(name: str, engine: Engine, prompts: Sequence[str], rounds: int) -> list[Row]:
    """Greedy and drawn texts with 2 and 4 guesses beside those without."""
    rows: list[Row] = []
    for temperature in (0.0, 0.8):
        plain: dict[str, Any] = {"max_new_tokens": 128, "temperature": temperature, "speculate": 0}
        sides = {count: {**plain, "speculate": count} for count in (0, 2, 4)}
        found: dict[int, list[float]] = {count: [] for count in sides}
        texts = {count: speed(engine, prompts, side)[1] for count, side in sides.items()}
        assert all(one == texts[0] for one in texts.values()), "guesses changed a text"
        for _ in range(rounds):
            for count, side in sides.items():
                found[count].append(speed(engine, prompts, side)[0])
        made = sum(map(len, texts[0]))
        for count in (2, 4):
            ours, peer = (statistics.median(found[one]) for one in (count, 0))
            taken = made / max(1, steps_taken(engine, prompts, sides[count]))
            title = f"{name}, {count} guesses, temperature {temperature}: {taken:.2f} tokens a step; against none"
            rows.append(
                {"name": title, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "tokens/s", "runs": rounds}
            )
    return rows


if __name__ == "__main__":
    main()
