"""Who may attend to whom. One convention everywhere: bool, True = may attend."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from triglot.errors import require

Mask = Bool[Tensor, "..."]
NO_PADDING = -1
"""As the id of padding: there is none."""


class Masks(NamedTuple):
    """What `create_masks` returns."""

    src_mask: Bool[Tensor, "batch 1 1 src_length"]
    tgt_mask: Bool[Tensor, "batch 1 tgt_length tgt_length"]
    cross_mask: Bool[Tensor, "batch 1 1 src_length"]


def create_padding_mask(
    seq: Int[Tensor, "batch length"], pad_id: int = 0, *, device: torch.device | str | None = None
) -> Bool[Tensor, "batch 1 1 length"]:
    """True where `seq` is a token that may be attended to, False where it is padding."""
    return (seq != pad_id)[:, None, None].to(device)


def create_look_ahead_mask(
    seq_length: int, *, window: int | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "length length"]:
    """True on and below the diagonal: position i may attend to positions 0 … i, or to the last `window` of them."""
    mask = torch.ones(seq_length, seq_length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def create_masks(
    src: Int[Tensor, "batch src_length"],
    tgt: Int[Tensor, "batch tgt_length"],
    *,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> Masks:
    """A training step's masks: source padding, target padding with look-ahead, source padding for the decoder."""
    src_mask = create_padding_mask(src, pad_id, device=device)
    look_ahead = create_look_ahead_mask(tgt.size(1), device=device or tgt.device)
    return Masks(src_mask, create_padding_mask(tgt, pad_id, device=device) & look_ahead, src_mask)


def create_document_mask(
    segments: Int[Tensor, "batch length"], *, window: int | None = None
) -> Bool[Tensor, "batch 1 length length"]:
    """Look-ahead within each document of a packed row; segment 0 is padding and attended to by none."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    look_ahead = create_look_ahead_mask(segments.size(1), window=window, device=segments.device)
    return same & (segments != 0)[:, None, None] & look_ahead


def real_tokens(mask: Mask | None, batch: int, length: int) -> Bool[Tensor, "batch length"] | None:
    """Which tokens are no padding, read off a self-attention mask: those that may attend to themselves."""
    if mask is None or mask.dim() < 4:
        return None
    return mask[:, 0].expand(batch, length, length).diagonal(dim1=-2, dim2=-1)


def check_mask(mask: Mask) -> None:
    """Refuse what would be read in another sense than it was meant in."""
    require(mask.dtype == torch.bool, "mask", "bool, True = may attend", mask.dtype)
    shape = list(mask.shape)
    clear = mask.dim() in (2, 4) or (mask.dim() == 3 and mask.size(0) == 1)
    require(clear, "mask", "[query, key], [1, query, key] or of rank 4", shape)


def check_real(mask: Bool[Tensor, "batch length"]) -> None:
    """Refuse a mask of tokens, True = no padding, that is not bool."""
    require(mask.dtype == torch.bool, "mask", "bool, True = real token", mask.dtype)
