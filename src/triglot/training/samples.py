"""What a model writes while it learns: at each evaluation the same few samples, into samples.md in the run's folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from triglot.checkpoint import Progress
from triglot.config import RunConfig
from triglot.data.batch import LanguageBatch
from triglot.data.dataset import Dataset
from triglot.data.prepare import Prepared
from triglot.errors import CheckpointError, reason
from triglot.files import write_text
from triglot.generation.engine import Engine
from triglot.objective import Model
from triglot.tokenizer import Tokenizer

FILE = "samples.md"
PROMPT = 32
"""Tokens of a prompt, where half the context is not less."""
LONGEST = 64
"""Tokens that are decoded at most."""
TEMPERATURE = 0.8
"""Greedily a small language model goes in circles."""


def write(path: Path, model: Model, prepared: Prepared, config: RunConfig, progress: Progress) -> Mapping[str, float]:
    """Add the samples of the step that is being evaluated: an evaluator that finds no score.

    They are a function of the weights, the config and the data alone. Averaged weights come after the evaluation of
    their step, and have none.
    """
    if progress.evaluated == progress.step:
        return {}
    samples = _sample(Engine(model, config, prepared.tokenizers, in_training=True), prepared)
    before = path.read_text(encoding="utf-8") if path.exists() else "# What the model wrote at each evaluation\n\n"
    _replace(path, before + _section(progress.step, samples))
    return {}


def cut(path: Path, progress: Progress) -> None:
    """Remove what was written after the evaluation that `progress` knows of, so that going on writes it once."""
    if path.exists():
        _replace(path, "".join(part for step, part in read(path) if step <= progress.evaluated))


def read(path: Path) -> list[tuple[int, str]]:
    """The parts of a samples.md, each with its step; 0 is what comes before the first."""
    parts = re.split(r"^(?=## Step \d+$)", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
    return [(int(found[1]) if (found := re.match(r"## Step (\d+)\n", part)) else 0, part) for part in parts]


def prompts(valid: Dataset, tokenizer: Tokenizer, number: int) -> list[str]:
    """The beginnings of rows from all over a validation text, in whole characters."""
    texts, count = [], valid.num_batches(0)
    for batch_index, part in (divmod(each * count, number) for each in range(number)):
        batch = next(iter(valid.epoch(0, batch_index)))
        assert isinstance(batch, LanguageBatch)
        at = part * len(batch.input_ids) // number
        row = batch.input_ids[at]
        if batch.segments is not None:
            row = row[batch.segments[at] == 1]  # one document, not what was packed beside it
        text = tokenizer.stream()
        texts.append("".join(map(text.push, row[: min(PROMPT, -(-len(row) // 2))].tolist())).lstrip("\ufffd"))
    return texts


def _sample(engine: Engine, prepared: Prepared) -> list[Mapping[str, str]]:
    number, how = engine.config.train.samples, engine.config.generation
    limit = min(LONGEST, how.max_new_tokens)
    if prepared.valid_examples is None:
        given = prompts(prepared.valid, prepared.tokenizers.target, number)
        seed = engine.config.seed
        texts = engine.generate(given, max_new_tokens=limit, temperature=TEMPERATURE, seed=seed, past_context="slide")
        return [{"prompt": prompt, "goes on": new.text} for prompt, new in zip(given, texts, strict=True)]
    pairs = prepared.valid_examples[:number]
    found = engine.translate([pair.source for pair in pairs], max_new_tokens=limit, tags=[pair.tag for pair in pairs])
    return [
        {"source": pair.source, "reference": pair.target, "hypothesis": best.text}
        for pair, (best, *_) in zip(pairs, found, strict=True)
    ]


def _section(step: int, samples: Sequence[Mapping[str, str]]) -> str:
    """A heading, and the samples as blocks of code, so that no line of theirs is taken for a heading."""
    blocks = []
    for sample in samples:
        lines = []
        for name, text in sample.items():
            first, *rest = text.splitlines() or [""]
            lines += [f"{name:<11}{first}", *(f"{'':<11}{line}" for line in rest)]
        blocks.append("".join(f"    {_printable(line)}".rstrip() + "\n" for line in lines))
    return "\n".join([f"## Step {step}\n", *blocks, ""])


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line.expandtabs(4))


def _replace(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {reason(error)}") from error
