"""The main job on data that every machine has: a translator and a language model, without and with experts."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from triglot.checkpoint import load_model
from triglot.data.phrases import examples
from triglot.errors import ConfigError, TriglotError, require
from triglot.evaluation import evaluate
from triglot.generation.engine import Engine
from triglot.insight.curves import draw
from triglot.insight.explain import explain
from triglot.insight.progress import Bar
from triglot.models.factory import count_active_parameters, count_parameters
from triglot.recipe import load_recipe, shipped_recipes
from triglot.training.session import train

ENOUGH = 0.95
"""The share of held-out phrases that the first run must translate to the letter."""
RECIPES = {
    "demo-phrases": "A Transformer translates English numbers and dates to German",
    "demo-stdlib": "A decoder-only language model writes Python",
    "demo-phrases-moe": "The translator with experts",
    "demo-stdlib-moe": "The language model with experts",
}
PROMPTS = ("import ", "def __init__(self, ", "    if not isinstance(")
READ = "def close(self):\n    if self.file is not None:\n        self.file.close()\n"
"""What the language models' pages explain."""


class Outcome(NamedTuple):
    """What a run reached."""

    name: str
    model: str
    reached: dict[str, float]
    seconds: float


def run(
    out: Path, *, settings: Sequence[str] = (), enough: float = ENOUGH, console: Console | None = None
) -> list[Outcome]:
    """Train all the demo's recipes into folders of `out`, each with curves.png and explain.html.

    `settings` override the recipes, as `triglot train --set` does. Raises ConfigError, before anything is done, where a
    folder is there already, and TriglotError where the first run translates fewer than `enough` held-out phrases to
    the letter.
    """
    console = console or Console()
    there = [name for name in RECIPES if (out / name).exists()]
    rule = f"a folder without {', '.join(there)}: nothing is overwritten, another --out begins anew"
    require(not there, "--out", rule, str(out), ConfigError)
    outcomes = []
    for number, (name, title) in enumerate(RECIPES.items(), 1):
        console.rule(f"[bold]{number} of {len(RECIPES)}: {title}")
        outcomes.append(one(name, out / name, settings, console))
    console.rule("[bold]What was reached")
    console.print(summary(outcomes))
    first = out / next(iter(RECIPES))
    console.print(
        f"\nEvery run has curves.png and explain.html. Go on with\n"
        f'  echo "May 1, 2031" | triglot translate {first}\n'
        f'  triglot generate {out / "demo-stdlib"} --prompt "class "\n'
        f'  triglot explain {first} --text "seventy-one thousand and six"',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    judge(outcomes[0], enough)
    return outcomes


def judge(outcome: Outcome, enough: float) -> None:
    """Raise TriglotError where a translator falls short."""
    match = outcome.reached["exact match"]
    if match < enough:
        raise TriglotError(
            f"{outcome.name} must translate {enough:.0%} of the held-out phrases to the letter, but does so with"
            f" {match:.1%} of them: the demo does not do here what it should."
        )


def one(name: str, folder: Path, settings: Sequence[str], console: Console) -> Outcome:
    """Train a recipe, measure it on what was held out, show samples, and draw its pictures."""
    began = time.perf_counter()
    config = load_recipe(shipped_recipes()[name], tuple(settings))
    result = train(config, folder, reporter=Bar(console))
    if result.signal is not None:
        raise SystemExit(result.exit_code)
    draw(folder / "metrics.jsonl", folder / "curves.png")
    engine = Engine(*load_model(folder))
    use = translate if config.model.kind == "encoder_decoder" else write
    reached = use(folder, engine, console)
    for picture in ("curves.png", "explain.html"):
        console.print(f"{folder / picture}", style="cyan", highlight=False)
    size, active = count_parameters(engine.model), count_active_parameters(engine.model)
    told = f"{type(engine.model).__name__}, {size:,} parameters" + (f", {active:,} active" if active < size else "")
    return Outcome(name, f"{told}, {config.train.max_steps} steps", reached, time.perf_counter() - began)


def translate(folder: Path, engine: Engine, console: Console) -> dict[str, float]:
    """Exact match on phrases of the test part, which training never sees, and a few of them."""
    config = engine.config
    samples = list(islice(examples(config.seed, config.data.language, "test"), 4))
    found = engine.translate([sample.source for sample in samples])
    for sample, (best, *_) in zip(samples, found, strict=True):
        mark = "=" if best.text == sample.target else f"≠ {sample.target}"
        console.print(f"  {sample.source} → {best.text}  {mark}", markup=False, highlight=False)
    explain(folder, max((sample.source for sample in samples), key=len), out=folder / "explain.html")
    scores = evaluate(folder, split="test")
    console.print(f"exact match on {scores['sentences']} held-out phrases: {scores['exact_match']:.1%}")
    return {"exact match": scores["exact_match"], "loss": scores["loss"]}


def write(folder: Path, engine: Engine, console: Console) -> dict[str, float]:
    """Loss on the files held out, and what follows a few prompts."""
    for prompt, new in zip(PROMPTS, engine.generate(PROMPTS, temperature=0.7, top_k=50), strict=True):
        console.print(Text.assemble((prompt, "bold"), new.text.rstrip(), "\n"))
    explain(folder, READ, out=folder / "explain.html")
    scores = evaluate(folder)
    console.print(f"held-out files: {scores['loss']:.3f} nats per token, {scores['bits_per_byte']:.3f} bits per byte")
    return {"loss": scores["loss"], "bits per byte": scores["bits_per_byte"]}


def summary(outcomes: Sequence[Outcome]) -> Table:
    """What each run reached, and in what time."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "model", "reached", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for outcome in outcomes:
        reached = ", ".join(
            f"{name} {value:.1%}" if name == "exact match" else f"{name} {value:.3f}"
            for name, value in outcome.reached.items()
        )
        table.add_row(outcome.name, outcome.model, reached, f"{outcome.seconds:.0f}")
    return table
