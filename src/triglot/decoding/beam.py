"""Beam search, over any number of sentences side by side, each of which ends at a time of its own."""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.logits import Powers, Scaled, Top, in_full
from triglot.decoding.rules import Rule, apply
from triglot.decoding.sampling import BLOCK, PER_LOG, largest, log_sum_exp, settle_powers, to_powers
from triglot.decoding.search import Decoded, Lengths, Steps, closed_up, limits_of, masked, normalised, refuse_nan
from triglot.errors import ConfigError, DeadEndError, require
from triglot.layers.vectors import in_whole_vectors

Logits = Float[Tensor, "rows vocab"] | Scaled | Powers
"""Of some sentences' hypotheses."""


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How to search: the `nbest` best texts found for a sentence, by Σ log p normalised for `lengths`.

    Each step looks at the 2·beam best continuations of a sentence (3·beam where two ids end it, and so on): an end
    among the first `beam` moves a text to the sentence's pool of finished ones, the first `beam` others live on. As
    log p only falls and n is limited, log p normalised for the limit bounds what a live text can come to; a sentence
    ends when its `nbest` finished ones reach the bound, so stopping early changes no result. With a beam of 1 the
    first end ends it, as in greedy search.
    With `patience` a sentence ends when beam · patience texts, and at least `nbest`, have finished instead (Kasai et
    al. 2022; 1 is the usual first come, first served).
    Where fewer than `nbest` finished in time, live texts follow, marked as truncated. `banned` ids never come. Rules
    know the sentences as their requests; a text that they leave no token is dropped, and DeadEndError says so where a
    sentence has no other.
    """

    beam: int
    eos_ids: Sequence[int]
    length_penalty: float = 1.0
    lengths: Lengths = "power"
    patience: float | None = None
    nbest: int = 1
    banned: Sequence[int] = ()
    rules: Sequence[Rule] = ()
    scored: bool = True
    """Whether the log p of texts are wanted where a beam of 1 can do without; NaN where not."""

    @property
    def candidates(self) -> int:
        """Continuations of a sentence that a step looks at."""
        return self.beam * (1 + len(self.eos_ids))

    def __post_init__(self) -> None:
        require(self.beam >= 1, "beam", "at least 1", self.beam, ConfigError)
        require(1 <= self.nbest <= self.beam, "nbest", f"between 1 and beam ({self.beam})", self.nbest, ConfigError)
        require(len(self.eos_ids) >= 1, "eos_ids", "one id or more", self.eos_ids, ConfigError)
        finite = 0 <= self.length_penalty < math.inf
        require(finite, "length_penalty", "at least 0 and finite", self.length_penalty, ConfigError)
        require(self.lengths in get_args(Lengths), "lengths", "power or gnmt", self.lengths, ConfigError)
        fits = self.patience is None or self.patience > 0
        require(fits, "patience", "above 0, or left out", self.patience, ConfigError)


class Beams:
    """Sentences side by side; `advance` takes the logits of all and says how their hypotheses go on."""

    def __init__(self, limits: Mapping[int, int], how: BeamSearch, device: torch.device | None = None) -> None:
        sentences, longest = len(limits), max(limits.values(), default=1)
        self.how = how
        self.counts = torch.zeros(sentences, dtype=torch.long, device=device)
        """The tokens of each sentence's hypotheses."""
        self.scores = torch.zeros(sentences, 1, device=device)
        """Σ log p of each hypothesis, falling; −∞ where there is none."""
        self.tokens = torch.zeros(sentences, how.beam, dtype=torch.long, device=device)
        """What each hypothesis reads next."""
        self.parents = torch.zeros(sentences, how.beam, dtype=torch.long, device=device)
        """The hypothesis of its sentence that each goes on from."""
        self.history = torch.zeros(sentences, how.beam, longest, dtype=torch.long, device=device)
        self.sums = torch.zeros(sentences, how.beam, longest, device=device)  # the scores along each history
        self.pools = [_Pool(request, limit, how) for request, limit in limits.items()]
        self.groups = [sentences]
        """How many sentences of each of those that have been joined; no sentence takes another group's place."""
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        """Of the hypotheses of the step before, those that the ones there are now go on from."""

    def __len__(self) -> int:
        return len(self.pools)

    def join(self, other: "Beams") -> None:
        """Go on with the sentences of another search as well, behind these; both have begun, if there are any."""
        longest = max(self.history.size(2), other.history.size(2))
        self.scores = torch.cat([self.scores.expand(-1, self.how.beam), other.scores])
        for name in ("tokens", "parents", "counts"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for name in ("history", "sums"):
            both = (getattr(self, name), getattr(other, name))
            setattr(self, name, torch.cat([F.pad(kept, (0, longest - kept.size(2))) for kept in both]))
        self.pools += other.pools
        self.groups += other.groups

    def advance(self, logits: Iterable[Logits | Top]) -> dict[int, list[Decoded]]:
        """Go on by a token each; the texts, best first, of those sentences that ended, by request.

        Rows are the hypotheses of each sentence, at first one; logits may come in parts, of some sentences each.
        """
        how, width = self.how, self.scores.size(1)
        found, parent, token = self._continuations(logits)
        if (missing := how.beam - found.size(1)) > 0:  # a first step finds no more than there are tokens
            found = F.pad(found, (0, missing), value=-math.inf)
            parent, token = F.pad(parent, (0, missing)), F.pad(token, (0, missing))
        refuse_nan(found)
        ended = reduce(torch.logical_or, [token == end for end in how.eos_ids])
        most = int(self.counts.max())
        self._finish(found, parent, token, ended, most)
        self.scores, rank_of = largest(found.masked_fill(ended, -math.inf), how.beam)
        self.parents = parent.gather(1, rank_of)
        # A sentence without a text may hold a column that is no token.
        self.tokens = token.gather(1, rank_of).masked_fill_(self.scores == -math.inf, how.eos_ids[0])
        at = self.counts[:, None, None].expand(-1, how.beam, 1)
        for kept, new in ((self.history, self.tokens), (self.sums, self.scores)):
            used = kept[:, :, :most]
            used.copy_(used.gather(1, self.parents[..., None].expand_as(used)))
            kept.scatter_(2, at, new[..., None])
        self.counts += 1
        return self._end(width)

    def _continuations(self, logits: Iterable[Logits | Top]) -> tuple[Tensor, Tensor, Tensor]:
        """The best of each sentence, `beam` and as many for each end token: scores, hypotheses, tokens.

        What is looked at of a part of the logits is taken out while it is in the cache, before the next one is made.
        """
        first, candidates, tops = 0, list[_Candidates](), list[Top]()
        for part in logits:
            if isinstance(part, Top):
                tops.append(part)
                continue
            rows, width = len(part), self.scores.size(1)
            scores = self.scores[first // width : (first + rows) // width]
            candidates.append(_candidates(scores, self._allowed(part, first), self.how.candidates))
            first += rows
            del part  # so that the next one takes its place in the cache
        if tops:
            return _best_tokens(self.scores, tops, self.how.candidates)
        return _best(candidates, self.how.candidates)

    def _allowed(self, logits: Logits, first: int) -> Logits:
        """What may come of the logits from row `first` on."""
        if not isinstance(logits, Tensor) and not self.how.banned and not self.how.rules:
            return logits
        assert not isinstance(logits, Powers)  # which are made where everything is allowed
        allowed = masked(in_full(logits), self.how.banned)
        return self._ruled(allowed, first) if self.how.rules else allowed

    def _ruled(self, logits: Float[Tensor, "some vocab"], first: int) -> Float[Tensor, "some vocab"]:
        """What rules leave of the logits after the texts from row `first` on; they see those that are possible."""
        rows = self.scores.flatten()[first : first + len(logits)].isfinite().nonzero()[:, 0]
        at = [divmod(first + row, self.scores.size(1)) for row in rows.tolist()]
        counts = self.counts.tolist()
        texts = [self.history[sentence, rank, : counts[sentence]].tolist() for sentence, rank in at]
        refuse_nan(logits[rows].amax(1))  # before a rule is blamed for it
        ruled = apply(self.how.rules, logits[rows], texts, [self.pools[sentence].request for sentence, _ in at])
        return logits.index_copy(0, rows, ruled)

    def _finish(self, found: Tensor, parent: Tensor, token: Tensor, ended: Tensor, most: int) -> None:
        """Move texts whose end token came, of at most so many others before it, to the pools of their sentences."""
        beam = self.how.beam
        at = (ended[:, :beam] & found[:, :beam].isfinite()).nonzero()
        sentences, ranks = at.unbind(1)
        parents = parent[sentences, ranks]
        texts = (kept[sentences, parents, :most].tolist() for kept in (self.history, self.sums))
        ends = (kept[sentences, ranks].tolist() for kept in (token, found))
        places = zip(sentences.tolist(), self.counts[sentences].tolist(), strict=True)
        for (sentence, count), ids, sums, end, last in zip(places, *texts, *ends, strict=True):
            text = Decoded([*ids[:count], end], _differences([*sums[:count], last]), truncated=False)
            self.pools[sentence].add(text)

    def _end(self, width: int) -> dict[int, list[Decoded]]:
        """Take out the sentences that have ended."""
        counts, results, goes_on = self.counts.tolist(), dict[int, list[Decoded]](), list[bool]()
        bests = self.scores[:, 0].tolist()
        for sentence, (pool, best, count) in enumerate(zip(self.pools, bests, counts, strict=True)):
            goes_on.append(not pool.is_complete(best, count))
            if not goes_on[-1]:
                pool.fill(self.history[sentence, :, :count], self.sums[sentence, :, :count])
                if not pool.best:
                    raise DeadEndError(pool.request)
                results[pool.request] = pool.best
        live, first = list[int](), 0
        for number, size in enumerate(self.groups):
            own = closed_up(goes_on[first : first + size])
            live += [first + place for place in own]
            first, self.groups[number] = first + size, len(own)
        kept = torch.tensor(live, dtype=torch.long, device=self.scores.device)
        if results:
            self.scores, self.tokens, self.parents = self.scores[kept], self.tokens[kept], self.parents[kept]
            self.history, self.sums, self.counts = self.history[kept], self.sums[kept], self.counts[kept]
            self.pools = [self.pools[sentence] for sentence in live]
            self.groups = [size for size in self.groups if size]
        self.rows = (kept[:, None] * width + self.parents).flatten()
        return results


@torch.inference_mode()
def beam_search(
    logits: Float[Tensor, "sentences vocab"], steps: Steps, how: BeamSearch, max_new_tokens: int | Sequence[int]
) -> list[list[Decoded]]:
    """The `nbest` best texts found for each sentence, best first."""
    limits = limits_of(max_new_tokens, logits.size(0), least=1)
    beams, results = Beams(dict(enumerate(limits)), how, logits.device), dict[int, list[Decoded]]()
    while len(beams):
        results |= beams.advance([logits])
        if len(beams):
            steps.select(beams.rows)
            logits = steps.step(beams.tokens.flatten())
    return [results[row][: how.nbest] for row in range(len(limits))]


class _Candidates(NamedTuple):
    """Continuations of some sentences, by blocks of tokens."""

    scores: Float[Tensor, "sentences blocks block"]
    chosen: Int[Tensor, "sentences blocks"]
    """The blocks' numbers: those of the first hypothesis, of the second, …"""
    num_blocks: int
    """Of each hypothesis."""


def _candidates(scores: Float[Tensor, "sentences width"], logits: Logits, count: int) -> _Candidates:
    """Those blocks of tokens that have the largest maxima: the `count` best continuations are among them.

    What is still to be scaled becomes powers of 2 in its place, and only what is looked at becomes log p again.
    """
    sentences, width = scores.shape
    if isinstance(logits, Tensor) and logits.size(1) % BLOCK:
        logits = F.pad(logits, (0, -logits.size(1) % BLOCK), value=-math.inf)
    of_blocks, off = _normalise(logits)
    values, num_blocks = logits if isinstance(logits, Tensor) else logits.values, of_blocks.size(1)
    by_block = of_blocks.view(sentences, width, num_blocks) + scores[..., None]
    chosen = largest(by_block.flatten(1), count)[1].sort(1).values  # in order, so that ties stay so
    starts = torch.arange(0, len(values) * num_blocks, width * num_blocks, device=chosen.device)
    picked = values.view(-1, BLOCK).index_select(0, (chosen + starts[:, None]).flatten())
    picked = picked.float().view(sentences, -1, BLOCK)
    hypotheses = chosen // num_blocks
    if not isinstance(logits, Tensor):
        in_whole_vectors(picked, Tensor.log2_ if isinstance(logits, Scaled) else Tensor.log_)
    picked.sub_(off.view(sentences, width).gather(1, hypotheses)[..., None])
    if isinstance(logits, Scaled):
        picked.div_(PER_LOG)
    return _Candidates(picked.add_(scores.gather(1, hypotheses)[..., None]), chosen, num_blocks)


def _normalise(logits: Logits) -> tuple[Float[Tensor, "rows blocks"], Float[Tensor, "rows 1"]]:
    """The largest log p of each block, and what logits, or the logarithms of what they become, are above log p."""
    if isinstance(logits, Powers):
        maxima, normaliser = settle_powers(logits.values, logits.logits)
        return maxima.sub_(normaliser), normaliser
    if isinstance(logits, Scaled):
        exponents = logits.values.mul_(logits.scale * PER_LOG)
        maxima = exponents.view(len(exponents), -1, BLOCK).amax(2)
        normaliser, of_powers = to_powers(exponents, maxima)
        return maxima.sub_(normaliser).div_(PER_LOG), of_powers
    maxima = logits.view(len(logits), -1, BLOCK).amax(2)
    normaliser = log_sum_exp(logits, maxima)
    return maxima.sub_(normaliser), normaliser


def _best(candidates: Sequence[_Candidates], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, hypotheses and tokens of the `count` best of each sentence; ties by hypothesis, then token."""
    num_blocks = candidates[0].num_blocks
    scores = torch.cat([some.scores for some in candidates])
    chosen = torch.cat([some.chosen for some in candidates])
    found, place = largest(scores.flatten(1), count)
    number = chosen.gather(1, place // BLOCK)
    return found, number // num_blocks, number % num_blocks * BLOCK + place % BLOCK


def _best_tokens(
    scores: Float[Tensor, "sentences width"], parts: Sequence[Top], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of the likeliest tokens of each hypothesis, which are `count` if there are so many.

    Ties by hypothesis, then logit, then token.
    """
    log_probs = torch.cat([part.values - part.normaliser for part in parts])
    of_sentences = log_probs.view(*scores.shape, -1) + scores[..., None]
    found, place = largest(of_sentences.flatten(1), count)
    ids = torch.cat([part.ids for part in parts]).view(len(scores), -1)
    return found, place // of_sentences.size(2), ids.gather(1, place)


def _differences(sums: list[float]) -> list[float]:
    """The terms whose running sums these are; in Python's numbers fp32 ones lose nothing, so they sum to the last."""
    return [after - before for before, after in itertools.pairwise([0.0, *sums])]


class _Pool:
    """The best finished texts of one sentence, and when there can be no better ones."""

    def __init__(self, request: int, limit: int, how: BeamSearch) -> None:
        self.request, self.limit, self.how = request, limit, how
        self.best: list[Decoded] = []
        """At most `beam`: behind the `nbest` those that finished besides, for whoever has no use for one of them."""
        self.finished = 0

    def add(self, text: Decoded) -> None:
        self.finished += 1
        bisect.insort_right(self.best, text, key=lambda one: -self.score(one))
        del self.best[self.how.beam if self.how.nbest > 1 else 1 :]

    def score(self, text: Decoded) -> float:
        return text.score(self.how.length_penalty, self.how.lengths)

    def is_complete(self, best_live: float, count: int) -> bool:
        """Whether no text of `count` tokens that still lives, the best at `best_live`, is waited for."""
        if count >= self.limit or best_live == -math.inf:
            return True
        if len(self.best) < self.how.nbest:
            return False
        if self.how.patience is not None:
            return self.finished >= self.how.beam * self.how.patience
        bound = normalised(best_live, self.limit, self.how.length_penalty, self.how.lengths)
        return self.how.beam == 1 or self.score(self.best[self.how.nbest - 1]) >= bound

    def fill(self, texts: Int[Tensor, "beam count"], sums: Float[Tensor, "beam count"]) -> None:
        """Take live texts, best first, into the places that no finished one took."""
        for text, sums_of in zip(texts.tolist(), sums.tolist(), strict=True):
            if len(self.best) < self.how.nbest and sums_of[-1] > -math.inf:
                self.best.append(Decoded(text, _differences(sums_of), truncated=True))
