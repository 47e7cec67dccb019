"""Text that ends where a stop string begins, in pieces none of which has to be taken back.

Of several stop strings the one that is complete first ends the text, of those that are complete at the same character
the longest. Characters decide, not tokens: the text is the same wherever its tokens begin.
"""

from collections.abc import Sequence

from triglot.errors import ConfigError, require
from triglot.tokenizer import Tokenizer


class StoppingStream:
    """`Tokenizer.stream()` up to a stop string; what may be the beginning of one is held back until it is none."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        require(not isinstance(stops, str), "stops", "a list of texts", stops, ConfigError)
        require("" not in stops, "stops", "texts of at least one character", stops, ConfigError)
        self._text, self._stops, self._held = tokenizer.stream(after), tuple(stops), ""
        self._longest = max(map(len, stops), default=0)
        self.stop: str | None = None
        """The stop string that ended the text."""

    @property
    def finished(self) -> bool:
        """A stop string stands in the text: no token changes what was given out."""
        return self.stop is not None

    def push(self, token_id: int) -> str:
        """What this token shows to be text, in whole characters."""
        return self._pass(self._text.push(token_id))

    def flush(self) -> str:
        """What is left at the end: a stop string that was never completed is text."""
        rest = self._pass(self._text.flush())
        rest, self._held = rest + self._held, ""
        return rest

    def _pass(self, piece: str) -> str:
        if self.finished or not piece:
            return ""
        text, self._held = self._held + piece, ""
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, begin, self.stop = min(ends)
            return text[:begin]
        first = max(0, len(text) - self._longest + 1)
        begins = (at for at in range(first, len(text)) if any(stop.startswith(text[at:]) for stop in self._stops))
        begin = next(begins, len(text))
        self._held = text[begin:]
        return text[:begin]
