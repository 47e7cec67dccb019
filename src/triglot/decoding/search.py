"""Greedy and sampled search over anything that turns one token a row into the logits of the next.

A model opens a search by its `start`: `DecoderLLM.start` returns the logits after each prompt beside its `Steps`; an
encoder–decoder is fed the begin token, `logits = steps.step(begin)`. Every search goes on from these first logits.

Probabilities are those of softmax(logits), after `banned` and `rules` and before a sampler's temperature and cuts.
"""

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, assert_never, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.logits import Scaled, Scored, Top, in_full
from triglot.decoding.rules import Rule, Texts, apply
from triglot.decoding.sampling import Generators, Sampler, largest, log_sum_exp
from triglot.errors import CheckpointError, ConfigError, DeadEndError, require

Lengths = Literal["power", "gnmt"]
"""What Σ log p of n tokens is divided by: n^α, or ((5 + n) / 6)^α (Wu et al. 2016, eq. 14)."""


@runtime_checkable
class Steps(Protocol):
    """A model in the middle of a text, one row a hypothesis."""

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Feed each row its next token and return the logits of the one after."""
        ...

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows in this order; a row may be repeated or left out."""
        ...


@runtime_checkable
class ScoredSteps(Protocol):
    """`Steps` that know more of their logits."""

    ahead: bool
    """Whether a step is made while the program goes on: the next can begin before the last one's tokens are known."""

    def step(self, tokens: Int[Tensor, " rows"]) -> Scored: ...
    def select(self, rows: Int[Tensor, " kept"]) -> None: ...


class Token(NamedTuple):
    """One token of one row, with its log-probability."""

    row: int
    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest ids at its place, falling, each with its log-probability."""


class Decoded(NamedTuple):
    """A decoded text: the generated ids, the end token included if it came, and log p of each."""

    ids: list[int]
    log_probs: list[float]
    truncated: bool
    """Stopped by a limit, not by the end token."""

    @property
    def log_prob(self) -> float:
        """Σ log p."""
        return sum(self.log_probs, 0.0)

    def score(self, length_penalty: float, lengths: Lengths = "power") -> float:
        """Σ log p, normalised for its n generated tokens, the end token included."""
        return normalised(self.log_prob, len(self.ids), length_penalty, lengths)


def normalised(log_prob: float, count: int, length_penalty: float, lengths: Lengths = "power") -> float:
    """log p / n^α, or log p / ((5 + n) / 6)^α, for n = `count` of at least 1 and α = `length_penalty`."""
    match lengths:
        case "power":
            return float(log_prob / max(count, 1) ** length_penalty)
        case "gnmt":
            return float(log_prob / ((5 + max(count, 1)) / 6) ** length_penalty)
        case _:
            assert_never(lengths)


def masked(logits: Float[Tensor, "rows vocab"], banned: Sequence[int]) -> Float[Tensor, "rows vocab"]:
    """The logits in fp32, those of `banned` ids −∞, so that the rest is a distribution."""
    logits = logits.float()
    if not banned:
        return logits
    return logits.index_fill(1, torch.tensor(banned, dtype=torch.long, device=logits.device), float("-inf"))


class Chosen:
    """The next tokens of some rows: their ids where logits are, and all of them once they have come from there."""

    def __init__(
        self,
        rows: Sequence[int],
        ids: Int[Tensor, " rows"],
        scores: Float[Tensor, "rows 1"],
        told: Iterable[tuple[tuple[int, float], ...]] | None = None,
        *,
        scored: bool = True,
    ) -> None:
        self.rows, self.ids, self._told, self._scored = rows, ids, told, scored
        self._here = [part.to("cpu", non_blocking=part.is_cuda) for part in (ids, scores[:, 0])]
        self._arrived = torch.cuda.Event() if ids.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(ids.device))

    def tokens(self) -> list[Token]:
        """The tokens; CheckpointError where there was nothing to choose from but NaN."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, scores = (part.tolist() for part in self._here)
        require(not any(map(math.isnan, scores)), "logits", "numbers", "NaN", CheckpointError)
        if not self._scored:
            scores = [math.nan] * len(ids)
        if self._told is None:
            return list(map(Token, self.rows, ids, scores))
        return list(map(Token, self.rows, ids, scores, self._told))


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """How a search of one text a row chooses: by `sampler`, from what `banned` and `rules` leave of the logits."""

    sampler: Sampler
    banned: Sequence[int] = ()
    rules: Sequence[Rule] = ()
    top_logprobs: int = 0
    """How many alternatives a token tells of."""
    scored: bool = True
    """Whether log p is told; else it is NaN, and the arg max needs no softmax."""

    @torch.inference_mode()
    def __call__(
        self,
        logits: Float[Tensor, "rows vocab"] | Scored | Scaled | Top,
        rows: Sequence[int],
        texts: Texts,
        generator: Generators,
    ) -> Chosen:
        """The next token of each of these rows, after its text; DeadEndError where rules leave it none."""
        if isinstance(logits, Top):  # which are made where the likeliest of all is wanted
            own = logits.values[:, :1] - logits.normaliser
            return Chosen(rows, logits.ids[:, 0], own, scored=self.scored)
        known, greedy = None, self.sampler.temperature == 0
        if isinstance(logits, Scaled):  # what is largest stays so, but for what scaling would round to one
            alone = greedy and not self.scored and not self.banned and not self.rules
            logits = logits.values if alone else in_full(logits)
        if isinstance(logits, Scored):
            known = None if self.banned or self.rules else logits
            logits = logits.logits
        allowed = masked(logits, self.banned)
        if self.rules:
            refuse_nan(allowed.amax(1))
            allowed = apply(self.rules, allowed, texts, rows)
            refuse_dead_ends(allowed, rows)
        ids = known.best if greedy and known else self.sampler(allowed, generator)
        own = allowed.gather(1, ids[:, None])
        if not self.scored and greedy:
            return Chosen(rows, ids, own, scored=False)
        normaliser = known.normaliser if known else log_sum_exp(allowed, own if greedy else None)
        told = alternatives(allowed - normaliser, self.top_logprobs) if self.top_logprobs else None
        return Chosen(rows, ids, own - normaliser, told)


def stream(
    logits: Float[Tensor, "rows vocab"] | Scored,
    steps: Steps | ScoredSteps,
    sampler: Sampler,
    max_new_tokens: int | Sequence[int],
    *,
    eos_ids: Collection[int] = (),
    banned: Sequence[int] = (),
    rules: Sequence[Rule] = (),
    generator: Generators = None,
    top_logprobs: int = 0,
    stopped: Container[int] = (),
) -> Iterator[Token]:
    """Tokens of all rows, step by step, as they are chosen.

    A row ends with one of `eos_ids`, which is yielded, or after its `max_new_tokens`, and leaves the batch then; so
    does one that the caller has put among the `stopped`, having seen its last token. `banned` ids never come. With one
    generator for each row, a row's tokens do not depend on its batch mates. `top_logprobs` is the number of
    alternatives told of each token, where so many are possible. Rules know the rows as their requests; DeadEndError
    where they leave one no token.
    """
    limits = limits_of(max_new_tokens, len(logits), least=0)
    require(top_logprobs >= 0, "top_logprobs", "at least 0", top_logprobs, ConfigError)
    choose = Chooser(sampler=sampler, banned=banned, rules=rules, top_logprobs=top_logprobs)
    ahead = isinstance(steps, ScoredSteps) and steps.ahead and not rules  # which have to know the tokens
    return _in_inference_mode(
        [logits],
        lambda tokens: [steps.step(tokens)],
        steps.select,
        choose,
        limits,
        eos_ids,
        generator,
        stopped,
        ahead=ahead,
    )


def generate(
    logits: Float[Tensor, "rows vocab"] | Scored,
    steps: Steps | ScoredSteps,
    sampler: Sampler,
    max_new_tokens: int | Sequence[int],
    *,
    eos_ids: Collection[int] = (),
    banned: Sequence[int] = (),
    rules: Sequence[Rule] = (),
    generator: Generators = None,
) -> list[Decoded]:
    """What `stream` yields, gathered by rows."""
    tokens = stream(
        logits, steps, sampler, max_new_tokens, eos_ids=eos_ids, banned=banned, rules=rules, generator=generator
    )
    return gather(tokens, len(logits), eos_ids)


def gather(tokens: Iterable[Token], rows: int, eos_ids: Collection[int]) -> list[Decoded]:
    """The text of each row out of a stream."""
    texts = [Decoded([], [], truncated=True) for _ in range(rows)]
    for token in tokens:
        texts[token.row].ids.append(token.id)
        texts[token.row].log_probs.append(token.log_prob)
    return [text._replace(truncated=not text.ids or text.ids[-1] not in eos_ids) for text in texts]


def stream_in_parts(
    logits: Iterable[Float[Tensor, "some vocab"] | Scored | Scaled | Top],
    step: Callable[[Int[Tensor, " rows"]], Iterable[Float[Tensor, "some vocab"] | Scored | Scaled | Top]],
    select: Callable[[Int[Tensor, " kept"]], None],
    choose: Chooser,
    limits: Sequence[int],
    eos_ids: Collection[int],
    generator: Generators = None,
    stopped: Container[int] = (),
    *,
    ahead: bool = False,
) -> Iterator[Token]:
    """`stream` over logits that come in parts, of some rows each, behind one another; finished rows are dropped.

    With `ahead` a step begins before the tokens that it reads are known here, so that it has read one more of a row
    that turns out to be finished, and what it knows of that row is dropped.
    Who takes the tokens does so in inference mode: a generator that enters and leaves it for each would wait for that.
    """
    texts: list[list[int]] = [[] for _ in limits]  # kept for rules alone
    live = closed_up([limit > 0 for limit in limits])  # the row that stands at each place of the batch
    parts: Iterable[Tensor | Scored | Scaled | Top] = logits
    if 0 < len(live) < len(limits):
        some = one_part(logits)[live]
        parts = [some]
        select(torch.tensor(live, device=some.device))
    made = 0
    while live:
        chosen, rest = list[Chosen](), live
        for part in parts:
            rows, rest = rest[: len(part)], rest[len(part) :]
            own = [generator[row] for row in rows] if isinstance(generator, Sequence) else generator
            chosen.append(choose(part, rows, [texts[row] for row in rows], own))
            del part  # so that the next one takes its place in the cache
        made += 1
        fed = torch.cat([one.ids for one in chosen])
        begun = step(fed) if ahead and any(made < limits[row] for row in live) else None
        tokens = [token for one in chosen for token in one.tokens()]
        if choose.rules:
            for token in tokens:
                texts[token.row].append(token.id)
        yield from tokens
        kept = closed_up(
            [one.id not in eos_ids and made < limits[one.row] and one.row not in stopped for one in tokens]
        )
        if 0 < len(kept) < len(live):
            places = torch.tensor(kept, device=fed.device)
            select(places)
            fed = fed[places]
            begun = None if begun is None else [one_part(begun)[places]]
        live = [live[place] for place in kept]
        if live:
            parts = step(fed) if begun is None else begun


_in_inference_mode = torch.inference_mode()(stream_in_parts)
"""For whoever takes the tokens outside of it."""


def one_part(
    parts: Iterable[Float[Tensor, "some vocab"] | Scored | Scaled | Top],
) -> Float[Tensor, "rows vocab"] | Scored | Top:
    """All rows as one part, none of them to be scaled any more; what is scored, or the likeliest alone, is one."""
    first, *others = (in_full(part) if isinstance(part, Scaled) else part for part in parts)
    return first if isinstance(first, Scored | Top) else torch.cat([first, *others])  # type: ignore[list-item]  # nor are these


def alternatives(log_probs: Float[Tensor, "rows vocab"], count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` likeliest ids of each row, falling, with their log-probabilities; fewer where fewer are possible."""
    values, ids = (part.tolist() for part in largest(log_probs, count))
    pairs = [zip(*of_row, strict=True) for of_row in zip(ids, values, strict=True)]
    return [tuple(pair for pair in of_row if pair[1] > -math.inf) for of_row in pairs]


def closed_up(goes_on: Sequence[bool]) -> list[int]:
    """The places that go on, each where it is if it can be: the last ones fill the gaps, so that few are moved."""
    places = [place for place, goes in enumerate(goes_on) if goes]
    last = iter(places[sum(goes_on[: len(places)]) :])
    return [place if goes_on[place] else next(last) for place in range(len(places))]


def refuse_nan(of_rows: Tensor) -> None:
    """CheckpointError where what was made of a row's logits is NaN."""
    require(not of_rows.isnan().any(), "logits", "numbers", "NaN", CheckpointError)


def refuse_dead_ends(logits: Float[Tensor, "rows vocab"], requests: Sequence[int]) -> None:
    """DeadEndError for a row without any token."""
    for request, best in zip(requests, logits.amax(1).tolist(), strict=True):
        if best == -math.inf:
            raise DeadEndError(request)


def limits_of(max_new_tokens: int | Sequence[int], rows: int, least: int) -> list[int]:
    """The limit of each row, all of them at least `least`."""
    limits = [max_new_tokens] * rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    require(len(limits) == rows, "max_new_tokens", f"one number, or one for each of {rows} rows", len(limits))
    fewest = min(limits, default=least)
    require(fewest >= least, "max_new_tokens", f"at least {least}", fewest, ConfigError)
    return limits
