"""Greedy and sampled search over anything that turns one token a row into the logits of the next.

A model opens a search by its `start`: `DecoderLLM.start` returns the logits after each prompt beside its `Steps`; an
encoder–decoder is fed the begin token, `logits = steps.step(begin)`. Every search goes on from these first logits.

Probabilities are those of softmax(logits), after `banned` and `rules` and before a sampler's temperature and cuts.
"""

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, assert_never, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.rules import Rule, apply
from triglot.decoding.sampling import Generators, Sampler, largest
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
    """The logits in fp32, those of `banned` ids −∞, so that the rest is a distribution; CheckpointError for NaN."""
    logits = logits.float()
    require(not logits.amax(1).isnan().any(), "logits", "numbers", "NaN", CheckpointError)
    if not banned:
        return logits
    return logits.index_fill(1, torch.tensor(banned, dtype=torch.long, device=logits.device), float("-inf"))


def stream(
    logits: Float[Tensor, "rows vocab"],
    steps: Steps,
    sampler: Sampler,
    max_new_tokens: int | Sequence[int],
    *,
    eos_id: int | None = None,
    banned: Sequence[int] = (),
    rules: Sequence[Rule] = (),
    generator: Generators = None,
    top_logprobs: int = 0,
    stopped: Container[int] = (),
) -> Iterator[Token]:
    """Tokens of all rows, step by step, as they are chosen.

    A row ends with `eos_id`, which is yielded, or after its `max_new_tokens`, and leaves the batch then; so does one
    that the caller has put among the `stopped`, having seen its last token. `banned` ids never come. With one generator
    for each row, a row's tokens do not depend on its batch mates. `top_logprobs` is the number of alternatives told of
    each token, where so many are possible. Rules know the rows as their requests; DeadEndError where they leave one no
    token.
    """
    limits = limits_of(max_new_tokens, logits.size(0), least=0)
    require(top_logprobs >= 0, "top_logprobs", "at least 0", top_logprobs, ConfigError)
    return _stream(logits, steps, sampler, limits, eos_id, banned, rules, generator, top_logprobs, stopped)


def generate(
    logits: Float[Tensor, "rows vocab"],
    steps: Steps,
    sampler: Sampler,
    max_new_tokens: int | Sequence[int],
    *,
    eos_id: int | None = None,
    banned: Sequence[int] = (),
    rules: Sequence[Rule] = (),
    generator: Generators = None,
) -> list[Decoded]:
    """What `stream` yields, gathered by rows."""
    tokens = stream(
        logits, steps, sampler, max_new_tokens, eos_id=eos_id, banned=banned, rules=rules, generator=generator
    )
    return gather(tokens, logits.size(0), eos_id)


def gather(tokens: Iterable[Token], rows: int, eos_id: int | None) -> list[Decoded]:
    """The text of each row out of a stream."""
    texts = [Decoded([], [], truncated=True) for _ in range(rows)]
    for token in tokens:
        texts[token.row].ids.append(token.id)
        texts[token.row].log_probs.append(token.log_prob)
    return [text._replace(truncated=text.ids[-1:] != [eos_id]) for text in texts]


@torch.no_grad()
def _stream(
    logits: Tensor,
    steps: Steps,
    sampler: Sampler,
    limits: list[int],
    eos_id: int | None,
    banned: Sequence[int],
    rules: Sequence[Rule],
    generator: Generators,
    top_logprobs: int,
    stopped: Container[int],
) -> Iterator[Token]:
    texts: list[list[int]] = [[] for _ in limits]  # kept for rules alone
    live = list(range(len(limits)))  # the row that stands at each place of the batch
    chosen, made = [-1] * len(live), 0
    tokens = torch.zeros(len(live), dtype=torch.long, device=logits.device)

    def goes_on(place: int, row: int) -> bool:
        return chosen[place] != eos_id and made < limits[row] and row not in stopped

    while kept := [place for place, row in enumerate(live) if goes_on(place, row)]:
        if len(kept) < len(live):
            places = torch.tensor(kept, device=logits.device)
            live = [live[place] for place in kept]
            logits, tokens = logits[places], tokens[places]
            steps.select(places)
        if made:
            logits = steps.step(tokens)
        allowed = masked(logits, banned)
        if rules:
            allowed = apply(rules, allowed, [texts[row] for row in live], live)
            refuse_dead_ends(allowed, live)
        tokens = sampler(allowed, [generator[row] for row in live] if isinstance(generator, Sequence) else generator)
        log_probs = allowed.log_softmax(1)
        chosen, made = tokens.tolist(), made + 1
        if rules:
            for row, token in zip(live, chosen, strict=True):
                texts[row].append(token)
        own = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        if top_logprobs:
            yield from map(Token, live, chosen, own, alternatives(log_probs, top_logprobs))
        else:
            yield from map(Token, live, chosen, own)


def alternatives(log_probs: Float[Tensor, "rows vocab"], count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` likeliest ids of each row, falling, with their log-probabilities; fewer where fewer are possible."""
    values, ids = (part.tolist() for part in largest(log_probs, count))
    pairs = [zip(*of_row, strict=True) for of_row in zip(ids, values, strict=True)]
    return [tuple(pair for pair in of_row if pair[1] > -math.inf) for of_row in pairs]


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
