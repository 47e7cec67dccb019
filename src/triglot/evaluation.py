"""How good a run is: nats, bits per byte, BLEU (Papineni et al. 2002), chrF (Popović 2015) and exact match.

Losses are those of `objective.score_batches`, which leaves the state of random numbers as it was.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from triglot.checkpoint import load_model
from triglot.config import RunConfig
from triglot.data.batch import IGNORED, Batch, PairBatch
from triglot.data.corpus import Example
from triglot.data.dataset import Dataset, Pairs, Ragged
from triglot.data.prepare import Prepared, prepare
from triglot.distributed.team import device_here
from triglot.errors import ConfigError, require
from triglot.generation.engine import Engine
from triglot.layers.packed import Precision
from triglot.objective import Model, score_batches
from triglot.tokenizer import Tokenizer, Tokenizers
from triglot.typed import typed

Split = Literal["valid", "test"]
RESAMPLES = 1000
"""Of the sentences, for the 95 % interval of BLEU and chrF (Koehn 2004)."""


@typed
def evaluate(
    run: str | Path,
    *,
    which: str = "best",
    split: Split = "valid",
    root: str | Path | None = None,
    beam: int | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """What a run's checkpoint scores on a split: loss, perplexity, bits per byte; of pairs, its translations too.

    `root` is where the data lies now, if it has moved; `beam` and `precision` are those of translating. Raises
    ConfigError where there is no such split.
    """
    where = device_here(device)
    model, config, tokenizers = load_model(Path(run), which, where)
    pairs, rule = config.model.kind == "encoder_decoder", "left out for a run that goes on from texts"
    require(pairs or beam is None, "beam", rule, beam, ConfigError)
    require(pairs or precision == "fp32", "precision", rule, precision, ConfigError)
    if root is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
    if beam is not None:
        config = dataclasses.replace(config, generation=dataclasses.replace(config.generation, beam=beam))
    prepared = prepare(config, Path(run), tokenizers)
    if not pairs:
        measured = prepared.valid if split == "valid" else prepared.test
        if measured is None:
            rule = "valid, since the recipe keeps no part of the text to test on (data.test)"
            raise ConfigError(f"`split` must be {rule}, but is {split!r} instead.")
        return text_scores(model, measured, tokenizers.target, where)
    examples = prepared.valid_examples if split == "valid" else prepared.test_examples
    if not examples:
        rule = "valid, since the recipe names no files to test on (data.test_source and data.test_target)"
        raise ConfigError(f"`split` must be {rule}, but is {split!r} instead.")
    data = examples_dataset(examples, tokenizers, config)
    scores = text_scores(model, data, tokenizers.target, where)
    return scores | translation_scores(model, tokenizers, config, examples, resamples=RESAMPLES, precision=precision)


def text_scores(model: Model, data: Dataset, tokenizer: Tokenizer, device: torch.device) -> dict[str, float]:
    """Mean nats per scored token, its exponential, and bits per byte of the text that the scored tokens spell."""
    scored = score_batches(model, data.epoch(0), device=device)
    num_bytes = scored_bytes(data.epoch(0), tokenizer)
    return {
        "loss": scored.mean,
        "perplexity": math.exp(min(scored.mean, 700.0)),  # e^709 is the largest that a float holds
        "bits_per_byte": scored.nll / math.log(2) / max(1, num_bytes),
        "tokens": scored.tokens,
        "bytes": num_bytes,
    }


def scored_bytes(batches: Iterable[Batch], tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the scored tokens stand for; special tokens stand for none."""
    sizes = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    total = 0
    for batch in batches:
        targets = batch.tgt_out if isinstance(batch, PairBatch) else batch.targets
        total += int(sizes[targets[targets != IGNORED]].sum())
    return total


def examples_dataset(examples: Sequence[Example], tokenizers: Tokenizers, config: RunConfig) -> Pairs:
    """Examples as batches by length."""
    sources = tokenizers.encode_sources([one.source for one in examples], [one.tag for one in examples])
    targets = tokenizers.encode_targets([one.target for one in examples])
    ids = tokenizers.target.ids
    return Pairs(Ragged.of(sources), Ragged.of(targets), config.train.batch_tokens, None, ids)


def translate_examples(engine: Engine, examples: Sequence[Example]) -> list[str]:
    """The best hypothesis of each example's source, decoded as the recipe says."""
    found = engine.translate([one.source for one in examples], tags=[one.tag for one in examples])
    return [hypotheses[0].text for hypotheses in found]


def translation_scores(
    model: Model,
    tokenizers: Tokenizers,
    config: RunConfig,
    examples: Sequence[Example],
    *,
    resamples: int = 1,
    precision: Precision = "fp32",
    in_training: bool = False,
) -> dict[str, Any]:
    """BLEU and chrF with sacrebleu's signatures, the share of translations that are the reference, and their precision.

    With more than one of `resamples`, half the width of their 95 % intervals too: `bleu_ci95` and `chrf_ci95`.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    engine = Engine(model, config, tokenizers, precision=precision, in_training=in_training)
    hypotheses = translate_examples(engine, examples)
    references = [one.target for one in examples]
    bleu = BLEU(tokenize="none", force=True) if config.data.tokenized else BLEU()
    chrf = CHRF()
    scores = {
        "bleu": bleu.corpus_score(hypotheses, [references], n_bootstrap=resamples),
        "chrf": chrf.corpus_score(hypotheses, [references], n_bootstrap=resamples),
    }
    return {
        **{name: score.score for name, score in scores.items()},
        **{f"{name}_ci95": float(score._ci) for name, score in scores.items() if resamples > 1},
        "exact_match": exact_match(hypotheses, references),
        "sentences": len(examples),
        "precision": engine.precision,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The share of hypotheses that are the reference to the letter."""
    equal = sum(one == other for one, other in zip(hypotheses, references, strict=True))
    return equal / max(1, len(references))


def score_translations(model: Model, prepared: Prepared, config: RunConfig) -> Mapping[str, float]:
    """An evaluator for training: BLEU, chrF and exact match of the validation examples; nothing of running text."""
    if prepared.valid_examples is None:
        return {}
    scores = translation_scores(model, prepared.tokenizers, config, prepared.valid_examples, in_training=True)
    return {name: scores[name] for name in ("bleu", "chrf", "exact_match")}
