"""Which ids of a vocabulary mean something to those who train and decode."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""One of a conversation: its `role` (system, user, assistant), its `content`, and whatever else a template reads."""


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """What each special id is for; the defaults are those of tokenizers that are trained here.

    None of them is for padding: what fills a row up is told by its place, and any id serves.
    """

    bos: int | None = 1
    """Stands before a document; None: nothing does, and documents are told apart by their ends."""
    ends: tuple[int, ...] = (2,)
    """Each of them ends a text that is generated; the first one is written behind documents and targets."""
    start: int = 1
    """What a decoder reads where there is nothing before: ahead of a target, or of a text without a prompt."""
    forced: tuple[int, ...] = ()
    """How every translation begins."""
    banned: tuple[int, ...] = (0, 1)
    """Never generated."""

    @property
    def eos(self) -> int:
        """What is written at an end."""
        return self.ends[0]
