"""What changes logits before a token is chosen: bans, penalties, biases and forced beginnings.

Rules work on logits, before the softmax, so that what they leave is a distribution again; searches apply them in the
order in which they are given, which for generated texts is that of `generation.options`. What is −∞ already (banned
ids, columns that fill the vocabulary up) stays −∞. Rules may leave a row without any token: the search decides what
that means.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.errors import ConfigError, require

Logits = Float[Tensor, "rows vocab"]
Texts = Sequence[Sequence[int]]
T = TypeVar("T")


@runtime_checkable
class Rule(Protocol):
    """Other logits for logits, row by row; a rule keeps no state, so that rows may come, go and change places."""

    def __call__(self, logits: Logits, texts: Texts, requests: Sequence[int], /) -> Logits:
        """New logits, where `texts[row]` was generated so far for the sentence or prompt number `requests[row]`."""
        ...


def apply(rules: Sequence[Rule], logits: Logits, texts: Texts, requests: Sequence[int]) -> Logits:
    """The logits after all rules in turn; ConfigError where one makes NaN of numbers."""
    for rule in rules:
        logits = rule(logits, texts, requests)
        require(not logits.amax(1).isnan().any(), f"what {type(rule).__name__} returns", "numbers", "NaN", ConfigError)
    return logits


@dataclass(frozen=True)
class Within:
    """A rule in a search that knows only some of the rule's requests, and of each text only what follows `before`.

    Number i of the search is number `requests[i]` of the rule: a part of many requests, or a text that goes on.
    """

    rule: Rule
    requests: Sequence[int]
    before: Texts | None = None

    def __call__(self, logits: Logits, texts: Texts, requests: Sequence[int], /) -> Logits:
        if self.before is not None:
            texts = [
                [*begun, *text]
                for begun, text in zip(_of_requests("before", self.before, requests), texts, strict=True)
            ]
        return self.rule(logits, texts, _of_requests("requests", self.requests, requests))


@dataclass(frozen=True)
class MinLength:
    """No end token before `min_new_tokens` others were generated."""

    eos_ids: Sequence[int]
    min_new_tokens: int

    def __post_init__(self) -> None:
        _require_ids("eos_ids", self.eos_ids)
        require(self.min_new_tokens >= 0, "min_new_tokens", "at least 0", self.min_new_tokens, ConfigError)

    def __call__(self, logits: Logits, texts: Texts, _requests: Sequence[int], /) -> Logits:
        return _ban(logits, [self.eos_ids if len(text) < self.min_new_tokens else [] for text in texts])


@dataclass(frozen=True)
class NoRepeatNGram:
    """No n-gram of the generated tokens comes twice (Paulus et al. 2018), n being `size`.

    Where nothing but repetitions is possible they stay possible: other rules say what a text has to be, this one how it
    should sound. A forced beginning may so repeat itself, if its rule comes first.
    """

    size: int

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", "at least 1", self.size, ConfigError)

    def __call__(self, logits: Logits, texts: Texts, _requests: Sequence[int], /) -> Logits:
        banned = _ban(logits, [self._repeating(list(text)) for text in texts])
        return torch.where(banned.amax(1, keepdim=True) > -math.inf, banned, logits)

    def _repeating(self, text: list[int]) -> set[int]:
        """The ids that would complete an n-gram for the second time."""
        before = self.size - 1
        starts = range(len(text) - before)
        return {text[at + before] for at in starts if text[at : at + before] == text[len(text) - before :]}


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of ids that came before are divided by `penalty` if positive, else multiplied (Keskar et al. 2019, §4.1).

    Ids of the request's prompt count as well, where `prompts` are given: one for each request.
    """

    penalty: float
    prompts: Texts | None = None

    def __post_init__(self) -> None:
        require(0 < self.penalty < math.inf, "penalty", "above 0 and finite", self.penalty, ConfigError)
        for prompt in self.prompts or ():
            _require_ids("prompts", prompt)

    def __call__(self, logits: Logits, texts: Texts, requests: Sequence[int], /) -> Logits:
        prompts = [()] * len(texts) if self.prompts is None else _of_requests("prompts", self.prompts, requests)
        places = _places(logits, [{*prompt, *text} for prompt, text in zip(prompts, texts, strict=True)])
        before = logits[places]
        return logits.index_put(places, torch.where(before < 0, before * self.penalty, before / self.penalty))


@dataclass(frozen=True)
class CountPenalty:
    """Logits fall by presence + frequency · c for an id that was generated c > 0 times, as OpenAI's API defines it."""

    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.presence), "presence", "finite", self.presence, ConfigError)
        require(math.isfinite(self.frequency), "frequency", "finite", self.frequency, ConfigError)

    def __call__(self, logits: Logits, texts: Texts, _requests: Sequence[int], /) -> Logits:
        counts = [Counter(text) for text in texts]
        places = _places(logits, counts)
        times = logits.new_tensor([count for of_row in counts for count in of_row.values()])
        return logits.index_put(places, logits[places] - (self.presence + self.frequency * times))


@dataclass(frozen=True)
class LogitBias:
    """A number is added to the logit of each id of `bias`; −∞ bans it."""

    bias: Mapping[int, float]

    def __post_init__(self) -> None:
        _require_ids("bias", self.bias)
        for value in self.bias.values():
            require(value < math.inf, "bias", "of numbers below infinity", value, ConfigError)

    def __call__(self, logits: Logits, texts: Texts, _requests: Sequence[int], /) -> Logits:
        places = _places(logits, [self.bias] * len(texts))
        return logits.index_put(places, logits.new_tensor(list(self.bias.values())).repeat(len(texts)), accumulate=True)


@dataclass(frozen=True)
class BannedWords:
    """None of `words`, sequences of ids, is generated: its last id is banned where those before it stand."""

    words: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        for word in self.words:
            require(len(word) >= 1, "words", "sequences of at least one id", word, ConfigError)
            _require_ids("words", word)

    def __call__(self, logits: Logits, texts: Texts, _requests: Sequence[int], /) -> Logits:
        return _ban(logits, [self._endings(list(text)) for text in texts])

    @cached_property
    def _last(self) -> dict[tuple[int, ...], set[int]]:
        """The last ids of words by what stands before them."""
        last: dict[tuple[int, ...], set[int]] = {}
        for word in self.words:
            last.setdefault(tuple(word[:-1]), set()).add(word[-1])
        return last

    def _endings(self, text: list[int]) -> set[int]:
        """The ids that would complete a word."""
        lengths = {len(before) for before in self._last if len(before) <= len(text)}
        return set().union(*(self._last.get(tuple(text[len(text) - length :]), ()) for length in lengths))


@dataclass(frozen=True)
class ForcedPrefix:
    """A text begins with what `prefixes` has for its request, and goes on freely from there.

    As nothing else is possible, forced tokens have log p = 0: scores compare what was chosen. Forcing revives no
    banned id.
    """

    prefixes: Texts

    def __post_init__(self) -> None:
        for prefix in self.prefixes:
            _require_ids("prefixes", prefix)

    def __call__(self, logits: Logits, texts: Texts, requests: Sequence[int], /) -> Logits:
        prefixes = _of_requests("prefixes", self.prefixes, requests)
        forced = [prefix[len(text) : len(text) + 1] for prefix, text in zip(prefixes, texts, strict=True)]
        rows, ids = _places(logits, forced)
        only = torch.full_like(logits[rows], -math.inf).scatter(1, ids[:, None], logits[rows, ids][:, None])
        return logits.index_copy(0, rows, only)


def _places(logits: Logits, ids: Sequence[Iterable[int]]) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
    """Row and column of the ids that are named for each row; ConfigError for one that the vocabulary lacks."""
    places = [(row, token) for row, named in enumerate(ids) for token in named]
    highest, vocab = max((token for _, token in places), default=-1), logits.size(1)
    require(highest < vocab, "ids that a rule names", f"below the number of logits ({vocab})", highest, ConfigError)
    rows, columns = torch.tensor(places, dtype=torch.long, device=logits.device).view(-1, 2).unbind(1)
    return rows, columns


def _ban(logits: Logits, ids: Sequence[Iterable[int]]) -> Logits:
    """The logits, −∞ for the ids that are named for each row."""
    return logits.index_put(_places(logits, ids), logits.new_tensor(-math.inf))


def _of_requests(name: str, parts: Sequence[T], requests: Sequence[int]) -> list[T]:
    """The part of each row's request."""
    highest = max(requests, default=-1)
    require(highest < len(parts), name, f"one for each of at least {highest + 1} requests", len(parts), ConfigError)
    return [parts[request] for request in requests]


def _require_ids(name: str, ids: Iterable[int]) -> None:
    lowest = min(ids, default=0)
    require(lowest >= 0, name, "of ids, which are at least 0", lowest, ConfigError)
