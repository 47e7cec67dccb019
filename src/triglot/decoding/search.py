"""Greedy, sampled and beam search over anything that turns one token a row into the logits of the next.

A model opens a search by its `start`: `DecoderLLM.start` returns the logits after each prompt beside its `Steps`; an
encoder–decoder is fed the begin token, `logits = steps.step(begin)`. Every search goes on from these first logits.
"""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.sampling import Generators, Sampler, largest
from triglot.errors import CheckpointError, ConfigError, require


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
    """One token of one row, with its log-probability under the model (before temperature and cuts)."""

    row: int
    id: int
    log_prob: float


class Decoded(NamedTuple):
    """A decoded text: the generated ids, the end token included if it came, and Σ log p of them."""

    ids: list[int]
    log_prob: float
    truncated: bool
    """Stopped by a limit, not by the end token."""

    def score(self, length_penalty: float) -> float:
        """Σ log p / n^α with n generated tokens, the end token included."""
        return normalised(self.log_prob, len(self.ids), length_penalty)


def normalised(log_prob: float, count: int, length_penalty: float) -> float:
    """log p / n^α, the power form of the length penalty."""
    return float(log_prob / max(count, 1) ** length_penalty)


def masked(logits: Float[Tensor, "rows vocab"], banned: Sequence[int]) -> Float[Tensor, "rows vocab"]:
    """The logits in fp32, those of `banned` ids −∞, so that the rest is a distribution; CheckpointError for NaN."""
    logits = logits.float()
    require(not logits.isnan().any(), "logits", "numbers", "NaN", CheckpointError)
    return logits.index_fill(1, torch.tensor(banned, dtype=torch.long, device=logits.device), float("-inf"))


def stream(
    logits: Float[Tensor, "rows vocab"],
    steps: Steps,
    sampler: Sampler,
    max_new_tokens: int | Sequence[int],
    *,
    eos_id: int | None = None,
    banned: Sequence[int] = (),
    generator: Generators = None,
) -> Iterator[Token]:
    """Tokens of all rows, step by step, as they are chosen.

    A row ends with `eos_id`, which is yielded, or after its `max_new_tokens`, and leaves the batch then. `banned` ids
    never come. With one generator for each row, a row's tokens do not depend on its batch mates.
    """
    limits = _limits(max_new_tokens, logits.size(0), least=0)
    return _stream(logits, steps, sampler, limits, eos_id, banned, generator)


def generate(
    logits: Float[Tensor, "rows vocab"],
    steps: Steps,
    sampler: Sampler,
    max_new_tokens: int | Sequence[int],
    *,
    eos_id: int | None = None,
    banned: Sequence[int] = (),
    generator: Generators = None,
) -> list[Decoded]:
    """What `stream` yields, gathered by rows."""
    tokens = stream(logits, steps, sampler, max_new_tokens, eos_id=eos_id, banned=banned, generator=generator)
    return gather(tokens, logits.size(0), eos_id)


def gather(tokens: Iterable[Token], rows: int, eos_id: int | None) -> list[Decoded]:
    """The text of each row out of a stream."""
    ids: list[list[int]] = [[] for _ in range(rows)]
    log_probs = [0.0] * rows
    for token in tokens:
        ids[token.row].append(token.id)
        log_probs[token.row] += token.log_prob
    return [Decoded(row, log_prob, row[-1:] != [eos_id]) for row, log_prob in zip(ids, log_probs, strict=True)]


@torch.no_grad()
def _stream(
    logits: Tensor,
    steps: Steps,
    sampler: Sampler,
    limits: list[int],
    eos_id: int | None,
    banned: Sequence[int],
    generator: Generators,
) -> Iterator[Token]:
    live = list(range(len(limits)))  # the row that stands at each place of the batch
    chosen, made = [-1] * len(live), 0
    tokens = torch.zeros(len(live), dtype=torch.long, device=logits.device)
    while kept := [place for place, row in enumerate(live) if chosen[place] != eos_id and made < limits[row]]:
        if len(kept) < len(live):
            places = torch.tensor(kept, device=logits.device)
            live = [live[place] for place in kept]
            logits, tokens = logits[places], tokens[places]
            steps.select(places)
        if made:
            logits = steps.step(tokens)
        allowed = masked(logits, banned)
        tokens = sampler(allowed, [generator[row] for row in live] if isinstance(generator, Sequence) else generator)
        log_probs = allowed.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        chosen, made = tokens.tolist(), made + 1
        yield from map(Token, live, chosen, log_probs.tolist())


@torch.no_grad()
def beam_search(
    logits: Float[Tensor, "sentences vocab"],
    steps: Steps,
    *,
    beam: int,
    max_new_tokens: int | Sequence[int],
    eos_id: int,
    length_penalty: float = 1.0,
    nbest: int = 1,
    banned: Sequence[int] = (),
) -> list[list[Decoded]]:
    """The `nbest` best texts found for each sentence, best first, by Σ log p / n^α (α: `length_penalty`).

    Each step looks at the 2·beam best continuations of a sentence: an end token among the first `beam` moves a text to
    the sentence's pool of finished ones, the first `beam` others live on. As log p only falls and n is limited,
    log p / limit^α bounds what a live text can come to; a sentence leaves when its `nbest` finished ones reach the
    bound, so stopping early changes no result. With a beam of 1 the first end token ends it, as in greedy search.
    Where fewer than `nbest` finished in time, live texts follow, marked as truncated.
    """
    require(beam >= 1, "beam", "at least 1", beam, ConfigError)
    require(1 <= nbest <= beam, "nbest", f"between 1 and beam ({beam})", nbest, ConfigError)
    require(length_penalty >= 0, "length_penalty", "at least 0", length_penalty, ConfigError)
    vocab, device = logits.size(1), logits.device
    limits = _limits(max_new_tokens, logits.size(0), least=1)
    pools = [_Pool(limit, beam, nbest, length_penalty) for limit in limits]
    live = list(range(len(pools)))
    # Every sentence has `beam` places from the start; at first all but one of them are impossible and none has a row.
    scores = torch.tensor([0.0] + [float("-inf")] * (beam - 1), device=device).repeat(len(live), 1)
    history = torch.empty(len(live), beam, 0, dtype=torch.long, device=device)
    width = 1
    while live:
        log_probs = masked(logits, banned).log_softmax(1).view(len(live), width, vocab)
        found, index = largest((scores[..., None] + log_probs).flatten(1), 2 * beam)  # [sentences, 2·beam]
        parent, token = index // vocab, index % vocab
        ended = token == eos_id
        for place, rank in (ended[:, :beam] & found[:, :beam].isfinite()).nonzero().tolist():
            text = [*history[place, parent[place, rank]].tolist(), eos_id]
            pools[live[place]].add(Decoded(text, found[place, rank].item(), truncated=False))
        scores, rank_of = largest(found.masked_fill(ended, float("-inf")), beam)
        parent, token = parent.gather(1, rank_of), token.gather(1, rank_of)
        history = torch.cat([history.take_along_dim(parent[..., None], 1), token[..., None]], 2)

        bests = scores[:, 0].tolist()
        kept = [place for place, row in enumerate(live) if not pools[row].is_complete(bests[place], history.size(2))]
        for place in set(range(len(live))).difference(kept):
            pools[live[place]].fill(history[place].tolist(), scores[place].tolist())
        live = [live[place] for place in kept]
        if live:
            places = torch.tensor(kept, device=device)
            scores, history, parent = scores[places], history[places], parent[places]
            steps.select((places[:, None] * width + parent.clamp(max=width - 1)).flatten())
            width = beam
            logits = steps.step(history[..., -1].flatten())
    return [pool.best for pool in pools]


class _Pool:
    """The best finished texts of one sentence, and when there can be no better ones."""

    def __init__(self, limit: int, beam: int, nbest: int, length_penalty: float) -> None:
        self.limit, self.beam, self.nbest, self.length_penalty = limit, beam, nbest, length_penalty
        self.best: list[Decoded] = []

    def add(self, text: Decoded) -> None:
        bisect.insort_right(self.best, text, key=lambda one: -one.score(self.length_penalty))
        del self.best[self.nbest :]

    def is_complete(self, best_live: float, count: int) -> bool:
        """Whether no text of `count` tokens that still lives, the best at `best_live`, can change the result."""
        if count >= self.limit or best_live == -math.inf:
            return True
        if len(self.best) < self.nbest:
            return False
        bound = normalised(best_live, self.limit, self.length_penalty)
        return self.beam == 1 or self.best[-1].score(self.length_penalty) >= bound

    def fill(self, texts: list[list[int]], scores: list[float]) -> None:
        """Take live texts, best first, into the places that no finished one took."""
        for text, score in zip(texts, scores, strict=True):
            if len(self.best) < self.nbest and score > -math.inf:
                self.best.append(Decoded(text, score, truncated=True))


def _limits(max_new_tokens: int | Sequence[int], rows: int, least: int) -> list[int]:
    limits = [max_new_tokens] * rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    require(len(limits) == rows, "max_new_tokens", f"one number, or one for each of {rows} rows", len(limits))
    fewest = min(limits, default=least)
    require(fewest >= least, "max_new_tokens", f"at least {least}", fewest, ConfigError)
    return limits
