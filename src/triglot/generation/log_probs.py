"""log p of given tokens, many texts at a time and each as if it were alone.

A text is padded to a length that follows from it alone and projected to the vocabulary by itself, so that on the
processor in fp32 it is given the same bits in any company.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.data.batch import IGNORED, Batch, LanguageBatch, PairBatch, targets_of
from triglot.layers.packed import INPUTS
from triglot.models.decoder_only import DecoderLLM
from triglot.objective import Model, evaluating, run_model, to_device

MULTIPLE = 16
"""Lengths are rounded up to this: with fewer rows than that, a product's bits depend on how many there are."""
LOGITS = 1 << 24
"""Logits that are made at a time."""


class Row(NamedTuple):
    """What the model reads and what it is to predict, one behind the other; −100 is not scored."""

    inputs: Sequence[int]
    targets: Sequence[int]
    source: Sequence[int] = ()
    """What the encoder reads, if there is one."""


def log_probs(model: Model, rows: Sequence[Row], batch_tokens: int) -> list[list[float]]:
    """log p of the scored targets of each row; of sources and targets `batch_tokens` positions are read at a time."""
    found: dict[int, list[float]] = {}
    device = model.projection.weight.device
    with evaluating(model, device):
        for chosen, batch in _batches(model, rows, batch_tokens):
            on_device = to_device(batch, device)
            hidden = run_model(model, on_device).hidden
            for row, vectors, wanted in zip(chosen, hidden, targets_of(on_device), strict=True):
                found[row] = _of_targets(model, vectors[wanted != IGNORED], wanted[wanted != IGNORED])
    return [found[row] for row in range(len(rows))]


def _of_targets(model: Model, hidden: Float[Tensor, "length d_model"], wanted: Int[Tensor, " length"]) -> list[float]:
    """log p of a text's tokens; a text by itself, so that the product is the same in any company."""
    size = max(MULTIPLE, LOGITS // model.projection.out_features)
    log_p = [
        model.head(vectors).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for vectors, ids in zip(hidden.split(size), wanted.split(size), strict=True)
    ]
    return torch.cat(log_p).tolist()


def _batches(model: Model, rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Rows of one padded length on each side, and their numbers, shortest first."""
    limit = model.max_len if isinstance(model, DecoderLLM) else model.max_seq_length
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        lengths = (min(limit, -(-len(side) // MULTIPLE) * MULTIPLE) for side in (row.inputs, row.source))
        shapes.setdefault(tuple(lengths), []).append(number)
    alone = model.projection.weight.device.type == "cpu" and _sums_depend_on_company(model)
    for (length, source_length), numbers in sorted(shapes.items()):
        size = 1 if alone else max(1, batch_tokens // (length + source_length))
        for first in range(0, len(numbers), size):
            chosen = numbers[first : first + size]
            inputs, real = _filled([rows[row].inputs for row in chosen], length)
            targets, _ = _filled([rows[row].targets for row in chosen], length, IGNORED)
            if source_length:
                sources, of_source = _filled([rows[row].source for row in chosen], source_length)
                yield chosen, PairBatch(sources, inputs, targets, of_source, real)
            else:
                yield chosen, LanguageBatch(inputs, targets)


def _sums_depend_on_company(model: Model) -> bool:
    """Whether it depends on the company how many tokens an expert is given, or by which parts a long sum is taken."""
    longest = max(part.in_features for part in model.modules() if isinstance(part, nn.Linear))
    return model.options.experts is not None or longest > INPUTS


def _filled(rows: Sequence[Sequence[int]], length: int, value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of one length, and which of it is theirs."""
    ends = torch.tensor([len(row) for row in rows])
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows]), torch.arange(length) < ends[:, None]
