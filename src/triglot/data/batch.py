"""What a model is fed: token ids in rectangles, with the padding marked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike
from torch import Tensor

from triglot.tokenizer import Tokenizer

IGNORED = -100
"""The target of a position that is not scored."""


class LanguageBatch(NamedTuple):
    """Windows of running text; `targets` are `input_ids` one step later, −100 where nothing is scored."""

    input_ids: Int[Tensor, "batch length"]
    targets: Int[Tensor, "batch length"]
    segments: Int[Tensor, "batch length"] | None = None
    """With packed documents: the document's number within its row, from 1; 0 is padding."""


class PairBatch(NamedTuple):
    """Sources and targets: `tgt_in` is [BOS, y1 … yn], `tgt_out` [y1 … yn, EOS]; padding is 0, in `tgt_out` −100."""

    src: Int[Tensor, "batch src_length"]
    tgt_in: Int[Tensor, "batch tgt_length"]
    tgt_out: Int[Tensor, "batch tgt_length"]


Batch = LanguageBatch | PairBatch


def targets_of(batch: Batch) -> Int[Tensor, "batch length"]:
    """What the model is to predict, −100 where nothing is scored."""
    return batch.tgt_out if isinstance(batch, PairBatch) else batch.targets


def num_targets(batch: Batch) -> int:
    """How many tokens of the batch are scored."""
    return int((targets_of(batch) != IGNORED).sum())


def twice(batch: Batch) -> Batch:
    """The rows of the batch, and the same rows once more behind them."""
    return type(batch)(*(None if part is None else torch.cat([part, part]) for part in batch))  # type: ignore[arg-type]  # its own fields


def unscored(batch: Batch) -> Batch:
    """The batch with nothing to learn from it: what a process goes through that has no batch left of a step."""
    if isinstance(batch, PairBatch):
        return batch._replace(tgt_out=torch.full_like(batch.tgt_out, IGNORED))
    return batch._replace(targets=torch.full_like(batch.targets, IGNORED))


def padded(rows: Sequence[ArrayLike], value: int = Tokenizer.pad_id) -> Int[Tensor, "rows longest"]:
    """Rows of ids as one rectangle, filled up with `value` on the right."""
    arrays = [np.asarray(row, np.int64) for row in rows]
    rectangle = np.full((len(arrays), max(map(len, arrays), default=0)), value, np.int64)
    for place, row in zip(rectangle, arrays, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(rectangle)


def pair_batch(sources: Sequence[ArrayLike], targets: Sequence[ArrayLike]) -> PairBatch:
    """Sources as the encoder reads them and targets without special tokens, shifted first and padded then."""
    given = [np.concatenate([[Tokenizer.bos_id], row]) for row in targets]
    wanted = [np.concatenate([row, [Tokenizer.eos_id]]) for row in targets]
    return PairBatch(padded(sources), padded(given), padded(wanted, IGNORED))
