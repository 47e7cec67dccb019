"""Beam search, over any number of sentences side by side, each of which may begin and end at a time of its own."""

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.rules import Rule, apply
from triglot.decoding.sampling import BLOCK, largest
from triglot.decoding.search import Decoded, Lengths, Steps, limits_of, masked, normalised
from triglot.errors import CheckpointError, ConfigError, require


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How to search: the `nbest` best texts found for a sentence, by Σ log p normalised for `lengths`.

    Each step looks at the 2·beam best continuations of a sentence: an end token among the first `beam` moves a text to
    the sentence's pool of finished ones, the first `beam` others live on. As log p only falls and n is limited, log p
    normalised for the limit bounds what a live text can come to; a sentence ends when its `nbest` finished ones reach
    the bound, so stopping early changes no result. With a beam of 1 the first end token ends it, as in greedy search.
    With `patience` a sentence ends when beam · patience texts, and at least `nbest`, have finished instead (Kasai et
    al. 2022; 1 is the usual first come, first served).
    Where fewer than `nbest` finished in time, live texts follow, marked as truncated. `banned` ids never come. Rules
    know the sentences as their requests; a text that they leave no token is dropped, and ConfigError says so where a
    sentence has no other.
    """

    beam: int
    eos_id: int
    length_penalty: float = 1.0
    lengths: Lengths = "power"
    patience: float | None = None
    nbest: int = 1
    banned: Sequence[int] = ()
    rules: Sequence[Rule] = ()

    def __post_init__(self) -> None:
        require(self.beam >= 1, "beam", "at least 1", self.beam, ConfigError)
        require(1 <= self.nbest <= self.beam, "nbest", f"between 1 and beam ({self.beam})", self.nbest, ConfigError)
        require(self.length_penalty >= 0, "length_penalty", "at least 0", self.length_penalty, ConfigError)
        require(self.lengths in get_args(Lengths), "lengths", "power or gnmt", self.lengths, ConfigError)
        fits = self.patience is None or self.patience > 0
        require(fits, "patience", "above 0, or left out", self.patience, ConfigError)


class Beams:
    """Places for sentences; `advance` takes the logits of all and says how their hypotheses go on.

    A place is empty until a sentence begins there and when it has ended; what stands in an empty one is fed along.
    """

    def __init__(self, places: int, how: BeamSearch, longest: int, device: torch.device | None = None) -> None:
        self.how = how
        self.scores = torch.full((places, how.beam), -math.inf, device=device)
        """Σ log p of each hypothesis, falling; −∞ where there is none."""
        self.tokens = torch.zeros(places, how.beam, dtype=torch.long, device=device)
        """What each hypothesis reads next."""
        self.parents = torch.zeros(places, how.beam, dtype=torch.long, device=device)
        """The hypothesis of its sentence that each goes on from."""
        self.counts = torch.zeros(places, dtype=torch.long, device=device)
        """Tokens of the hypotheses of each place."""
        self.history = torch.zeros(places, how.beam, longest, dtype=torch.long, device=device)
        self.sums = torch.zeros(places, how.beam, longest, device=device)  # the scores along each history
        self.pools: list[_Pool | None] = [None] * places
        self.log_probs: Tensor | None = None

    @property
    def live(self) -> list[int]:
        """Places that are not empty."""
        return [place for place, pool in enumerate(self.pools) if pool is not None]

    def begin(self, place: int, request: int, limit: int, first: int = 0) -> None:
        """Have a sentence of at most `limit` tokens begin at an empty place, after token `first`."""
        self.pools[place] = _Pool(request, limit, self.how)
        self.scores[place] = -math.inf  # all hypotheses but one are impossible yet
        self.scores[place, 0] = 0.0
        self.tokens[place], self.parents[place], self.counts[place] = first, 0, 0

    def advance(self, logits: Iterable[Float[Tensor, "rows vocab"]], width: int) -> list[tuple[int, list[Decoded]]]:
        """Go on by a token each; the sentences that ended, by request, with their texts, best first.

        Rows are the first `width` hypotheses of each place; logits may come in parts, of some places each.
        """
        how = self.how
        log_probs, maxima = self._log_probs(logits, width)
        found, parent, token = _continuations(self.scores[:, :width], log_probs, maxima, 2 * how.beam)
        if (missing := how.beam - found.size(1)) > 0:  # a first step finds no more than there are tokens
            found = F.pad(found, (0, missing), value=-math.inf)
            parent, token = F.pad(parent, (0, missing)), F.pad(token, (0, missing))
        require(not found.isnan().any(), "logits", "numbers", "NaN", CheckpointError)
        ended = token == how.eos_id
        self._finish(found, parent, ended)
        self.scores, rank_of = largest(found.masked_fill(ended, -math.inf), how.beam)
        self.parents = parent.gather(1, rank_of)
        # A place without a text may hold a column that is no token.
        self.tokens = token.gather(1, rank_of).masked_fill_(self.scores == -math.inf, how.eos_id)
        longest = int(self.counts.max())
        for kept, new in ((self.history, self.tokens), (self.sums, self.scores)):
            used = kept[:, :, :longest]
            used.copy_(used.gather(1, self.parents[..., None].expand_as(used)))
            kept.scatter_(2, self.counts[:, None, None].expand(-1, how.beam, 1), new[..., None])
        return self._end()

    def _finish(self, found: Tensor, parent: Tensor, ended: Tensor) -> None:
        """Move texts whose end token came to the pools of their sentences."""
        beam = self.how.beam
        for place, rank in (ended[:, :beam] & found[:, :beam].isfinite()).nonzero().tolist():
            pool, of, count = self.pools[place], parent[place, rank], self.counts[place]
            assert pool is not None
            ids, sums = self.history[place, of, :count].tolist(), self.sums[place, of, :count].tolist()
            log_probs = _differences([*sums, found[place, rank].item()])
            pool.add(Decoded([*ids, self.how.eos_id], log_probs, truncated=False))

    def _end(self) -> list[tuple[int, list[Decoded]]]:
        results, bests = [], self.scores[:, 0].tolist()
        self.counts += 1
        counts = self.counts.tolist()
        for place, pool in enumerate(self.pools):
            if pool is None:
                counts[place] = 0
            elif pool.is_complete(bests[place], counts[place]):
                pool.fill(self.history[place, :, : counts[place]], self.sums[place, :, : counts[place]])
                name = f"the number of texts that the rules leave sentence {pool.request}"
                require(bool(pool.best), name, "at least 1", 0, ConfigError)
                results.append((pool.request, pool.best))
                self.pools[place], counts[place], self.scores[place] = None, 0, -math.inf
        self.counts = torch.tensor(counts, device=self.counts.device)
        return results

    def keep(self, places: Int[Tensor, " kept"]) -> None:
        """Keep these places, in this order."""
        self.scores, self.tokens, self.parents = self.scores[places], self.tokens[places], self.parents[places]
        self.counts, self.history, self.sums = self.counts[places], self.history[places], self.sums[places]
        self.pools = [self.pools[place] for place in places.tolist()]

    def _log_probs(self, logits: Iterable[Float[Tensor, "some vocab"]], width: int) -> tuple[Tensor, Tensor | None]:
        """log p of what may follow each text, and the largest of each block of tokens.

        They are written where those of the step before were: a large new tensor would cost more than what is in it.
        """
        start, maxima = 0, []
        for part in logits:
            end, vocab = start + len(part), part.size(1)
            if (
                self.log_probs is None
                or self.log_probs.size(1) != vocab
                or len(self.log_probs) < width * len(self.scores)
            ):
                self.log_probs = part.new_empty(width * len(self.scores), vocab, dtype=torch.float32)
            into = self.log_probs[start:end]
            self._rule(masked(part, self.how.banned) if self.how.banned else part.float(), into, start, width)
            if vocab % BLOCK == 0:
                maxima.append(into.view(len(part), -1, BLOCK).amax(2))
            start = end
        assert self.log_probs is not None
        return self.log_probs[:start], torch.cat(maxima) if maxima else None

    def _rule(
        self, logits: Float[Tensor, "some vocab"], into: Float[Tensor, "some vocab"], start: int, width: int
    ) -> None:
        """Write log p of what may follow the texts from row `start` on; rules see those alone that are possible.

        A text to which they leave no token gets −∞ throughout, and so can not go on.
        """
        torch.log_softmax(logits, 1, out=into)
        if not self.how.rules:
            return
        rows = self.scores[:, :width].flatten()[start : start + len(logits)].isfinite().nonzero()[:, 0]
        at = [divmod(start + row, width) for row in rows.tolist()]
        counts = self.counts.tolist()
        texts = [self.history[place, rank, : counts[place]].tolist() for place, rank in at]
        requests = [pool.request for place, _ in at if (pool := self.pools[place]) is not None]
        ruled = apply(self.how.rules, logits[rows], texts, requests)
        possible = ruled.amax(1, keepdim=True) > -math.inf
        into.index_copy_(0, rows, ruled.log_softmax(1).masked_fill(~possible, -math.inf))


@torch.no_grad()
def beam_search(
    logits: Float[Tensor, "sentences vocab"], steps: Steps, how: BeamSearch, max_new_tokens: int | Sequence[int]
) -> list[list[Decoded]]:
    """The `nbest` best texts found for each sentence, best first; all sentences begin together."""
    limits = limits_of(max_new_tokens, logits.size(0), least=1)
    beams = Beams(len(limits), how, max(limits, default=1), logits.device)
    for place, limit in enumerate(limits):
        beams.begin(place, place, limit)
    results: dict[int, list[Decoded]] = {}
    width = 1
    while len(results) < len(limits):
        results |= beams.advance([logits], width)
        if live := beams.live:
            places = torch.tensor(live, device=logits.device)
            beams.keep(places)
            steps.select((places[:, None] * width + beams.parents.clamp(max=width - 1)).flatten())
            width = how.beam
            logits = steps.step(beams.tokens.flatten())
    return [results[row] for row in range(len(limits))]


def _continuations(
    scores: Float[Tensor, "sentences width"],
    log_probs: Float[Tensor, "rows vocab"],
    maxima: Float[Tensor, "rows blocks"] | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best continuations of each sentence: scores, hypotheses, tokens; ties by hypothesis, then token.

    They are among those blocks of tokens that have the largest maxima.
    """
    (sentences, width), vocab = scores.shape, log_probs.size(1)
    if maxima is None:
        found, index = largest((scores[..., None] + log_probs.view(sentences, width, vocab)).flatten(1), count)
        return found, index // vocab, index % vocab
    num_blocks = maxima.size(1) * width
    by_block = scores.repeat_interleave(maxima.size(1), 1)  # [sentences, width · blocks]
    chosen = largest(maxima.view(sentences, -1) + by_block, count)[1].sort(1).values  # in order, so that ties stay so
    starts = torch.arange(0, sentences * num_blocks, num_blocks, device=chosen.device)
    picked = log_probs.view(-1, BLOCK).index_select(0, (chosen + starts[:, None]).flatten()).view(sentences, -1, BLOCK)
    found, place = largest(picked.add_(by_block.gather(1, chosen)[..., None]).flatten(1), count)
    index = chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK
    return found, index // vocab, index % vocab


def _differences(sums: list[float]) -> list[float]:
    """The terms whose running sums these are; in Python's numbers fp32 ones lose nothing, so they sum to the last."""
    return [after - before for before, after in itertools.pairwise([0.0, *sums])]


class _Pool:
    """The best finished texts of one sentence, and when there can be no better ones."""

    def __init__(self, request: int, limit: int, how: BeamSearch) -> None:
        self.request, self.limit, self.how = request, limit, how
        self.best: list[Decoded] = []
        self.finished = 0

    def add(self, text: Decoded) -> None:
        self.finished += 1
        bisect.insort_right(self.best, text, key=lambda one: -self.score(one))
        del self.best[self.how.nbest :]

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
        return self.how.beam == 1 or self.score(self.best[-1]) >= bound

    def fill(self, texts: Int[Tensor, "beam count"], sums: Float[Tensor, "beam count"]) -> None:
        """Take live texts, best first, into the places that no finished one took."""
        for text, sums_of in zip(texts.tolist(), sums.tolist(), strict=True):
            if len(self.best) < self.how.nbest and sums_of[-1] > -math.inf:
                self.best.append(Decoded(text, _differences(sums_of), truncated=True))
