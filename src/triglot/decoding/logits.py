"""What stands for the logits of some rows where whoever makes them knows more, or has made less, than all of them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

Own = TypeVar("Own", bound="_OfRows")


class _OfRows:
    """Tensors of rows, of which some can be taken."""

    normaliser: Tensor

    def __len__(self) -> int:
        return len(self.normaliser)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.normaliser.device

    def __getitem__(self: Own, rows: Tensor | slice | list[int]) -> Own:
        """The same of some rows, in this order."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))  # type: ignore[arg-type]  # a dataclass


@dataclass(frozen=True)
class Scored(_OfRows):
    """Logits of some rows beside what whoever made them knows of them."""

    logits: Float[Tensor, "rows vocab"]
    best: Int[Tensor, " rows"]
    """The first largest of each row."""
    normaliser: Float[Tensor, "rows 1"]
    """log Σ exp of each row."""


@dataclass(frozen=True)
class Top(_OfRows):
    """The largest logits of some rows, falling, ties by lower id; −∞ where there are no more."""

    values: Float[Tensor, "rows count"]
    ids: Int[Tensor, "rows count"]
    normaliser: Float[Tensor, "rows 1"]
    """log Σ exp of all of each row."""


@dataclass(frozen=True)
class Scaled:
    """Logits of some rows as products of whole numbers give them: still to be multiplied, for whoever wants all."""

    values: Float[Tensor, "rows vocab"]
    scale: Float[Tensor, "rows 1"]
    """Above 0."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Powers:
    """e to the power of some rows' logits, each row's less a number that its probabilities do not depend on."""

    values: BFloat16[Tensor, "rows vocab"]
    """0 where the power is too small for its type, 1 or near it where it may have been too large."""
    logits: Callable[[Int[Tensor, " some"]], Float[Tensor, "some vocab"]]
    """What they are powers of, of some of the rows."""

    def __len__(self) -> int:
        return len(self.values)


def in_full(logits: Float[Tensor, "rows vocab"] | Scaled) -> Float[Tensor, "rows vocab"]:
    """The logits themselves, in fp32; what they are made of is used up."""
    return logits.values.mul_(logits.scale) if isinstance(logits, Scaled) else logits.float()
