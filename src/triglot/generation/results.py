"""What the engine's calls return."""

from typing import Literal, NamedTuple

Ended = Literal["end", "stop", "limit"]
"""Why a text ended: its end token came, a stop string did, or it was not to be longer."""


class Alignment(NamedTuple):
    """How much of a target token renders each source token; rows sum to 1, tokens that are no text are left out."""

    target: list[str]
    """The rows' tokens as a person can read them: those of the text, the end token left out."""
    source: list[str]
    """The columns'."""
    weights: list[list[float]]


class Hypothesis(NamedTuple):
    """A translation; `score` is Σ log p / n^α over its n `tokens`, the end token included, or NaN if not asked for."""

    text: str
    score: float
    tokens: list[int]
    truncated: bool
    """Stopped by a limit, not by the end token."""
    log_probs: list[float]
    """log p of each token, if asked for; 0 for those of a forced beginning."""
    alignment: Alignment | None = None


class Alternative(NamedTuple):
    """A token that may stand at a place, and the best translation that goes on with it."""

    token: int
    piece: str
    """The token as a person can read it."""
    log_prob: float
    best: Hypothesis


class Generation(NamedTuple):
    """What follows a prompt, up to a stop string."""

    text: str
    tokens: list[int]
    """All that were chosen: those of the stop string and the end token too."""
    log_probs: list[float]
    """log p of each token after bans and rules, before temperature and cuts."""
    ended: Ended
    stop: str | None = None
    """The stop string that ended the text."""
    alternatives: list[list[tuple[int, float]]] | None = None
    """For each token the likeliest ids at its place, falling, each with its log p; None where nobody asked."""

    @property
    def log_prob(self) -> float:
        """Σ log p."""
        return sum(self.log_probs, 0.0)

    @property
    def truncated(self) -> bool:
        """Stopped by a limit."""
        return self.ended == "limit"
