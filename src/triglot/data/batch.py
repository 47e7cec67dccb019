"""What a model is fed: token ids in rectangles, with the padding marked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike
from torch import Tensor

from triglot.tokenizer import SpecialIds

IGNORED = -100
"""The target of a position that is not scored."""


class LanguageBatch(NamedTuple):
    """Windows of running text; `targets` are `input_ids` one step later, −100 where nothing is scored."""

    input_ids: Int[Tensor, "batch length"]
    targets: Int[Tensor, "batch length"]
    segments: Int[Tensor, "batch length"] | None = None
    """With packed documents: the document's number within its row, from 1; 0 is padding."""


class PairBatch(NamedTuple):
    """Sources and targets: `tgt_in` is [BOS, y1 … yn], `tgt_out` [y1 … yn, EOS], which is padded with −100."""

    src: Int[Tensor, "batch src_length"]
    tgt_in: Int[Tensor, "batch tgt_length"]
    tgt_out: Int[Tensor, "batch tgt_length"]
    src_real: Bool[Tensor, "batch src_length"] | None = None
    """What is no padding; None: all ids but 0. Models of others begin a target with the id that they pad with."""
    tgt_real: Bool[Tensor, "batch tgt_length"] | None = None


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


def padded(rows: Sequence[ArrayLike], value: int = 0) -> Int[Tensor, "rows longest"]:
    """Rows of ids as one rectangle, filled up with `value` on the right."""
    arrays = [np.asarray(row, np.int64) for row in rows]
    rectangle = np.full((len(arrays), max(map(len, arrays), default=0)), value, np.int64)
    for place, row in zip(rectangle, arrays, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(rectangle)


def real(rows: Sequence[ArrayLike]) -> Bool[Tensor, "rows longest"]:
    """What of the rectangle that `padded` makes is the rows' own."""
    lengths = np.array([len(np.asarray(row)) for row in rows], np.int64)
    return torch.from_numpy(np.arange(lengths.max(initial=0)) < lengths[:, None])


def pair_batch(sources: Sequence[ArrayLike], targets: Sequence[ArrayLike], ids: SpecialIds = SpecialIds()) -> PairBatch:
    """Sources as the encoder reads them and targets without begin and end, shifted first and padded then."""
    given = [np.concatenate([[ids.start], row]) for row in targets]
    wanted = [np.concatenate([row, [ids.eos]]) for row in targets]
    return PairBatch(padded(sources), padded(given), padded(wanted, IGNORED), real(sources), real(given))
