"""What can go wrong through no fault of the code, and the one form in which it is told."""

from enum import StrEnum
from pathlib import Path
from typing import Any


class TriglotError(Exception):
    """Anything a user can cause and can mend."""


class ConfigError(TriglotError, ValueError):
    """A recipe, an option or an argument is not usable."""


class DeadEndError(ConfigError):
    """Rules leave a text nothing to go on with: number `request` of a search, or what `text` says."""

    def __init__(self, request: int, text: str | None = None) -> None:
        super().__init__(request, text)  # as they are, so that it can be sent between processes
        self.request, self.text = request, text or f"text {request}"

    def __str__(self) -> str:
        return f"`the number of tokens that the rules leave {self.text}` must be at least 1, but is 0 instead."


class DataError(TriglotError, ValueError):
    """A text, a file of pairs or a data set is not usable."""


class CheckpointError(TriglotError, ValueError):
    """A run or a checkpoint is missing, damaged or does not fit."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


def require(holds: bool, name: str, rule: str, value: Any, error: type[ValueError] = ValueError) -> None:
    """Raise `error` with "`name` must be rule, but is value instead." unless `holds`."""
    if not holds:
        told = str(value) if isinstance(value, (Path, StrEnum)) else value
        raise error(f"`{name}` must be {rule}, but is {told!r} instead.")


def reason(error: Exception) -> str:
    """What an error says beside the path that it is told of, which the system's own would say again."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
