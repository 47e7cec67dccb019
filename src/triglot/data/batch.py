"""What a model is fed: token ids in rectangles, with the padding marked."""

from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

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


def num_targets(batch: Batch) -> int:
    """How many tokens of the batch are scored."""
    targets = batch.tgt_out if isinstance(batch, PairBatch) else batch.targets
    return int((targets != IGNORED).sum())
