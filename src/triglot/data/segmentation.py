"""BPE-dropout: a text's words in other pieces in every epoch (Provilkov et al. 2020)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

import numpy as np

from triglot.data.corpus import Example
from triglot.data.dataset import Pairs, Ragged
from triglot.tokenizer import Merges, Tokenizer, Tokenizers

DRAWS = 16
"""Segmentations that are drawn of each distinct word; every occurrence then picks one of them."""


class Segmenter:
    """Texts as rows of words, and their words in pieces that chance chooses.

    Words are taken apart once and their segmentations drawn in advance, so that an epoch costs a look-up a word.
    """

    def __init__(self, tokenizer: Tokenizer, dropout: float, seed: int) -> None:
        self.tokenizer, self.dropout, self.random = tokenizer, dropout, Random(seed)
        self.merges = tokenizer.merges()
        self.words: dict[str, int] = {}
        self.drawn: list[list[int]] = []
        self._table: Ragged | None = None

    def split(self, texts: Sequence[str]) -> Ragged:
        """Each text as numbers of words, which are drawn of as they are met."""
        self._table = None
        return Ragged.of([self._number(word) for word in self.tokenizer.words(text)] for text in texts)

    def _number(self, word: str) -> int:
        if word not in self.words:
            self.words[word] = len(self.words)
            self.drawn += [segment(word, self.merges, self.dropout, self.random) for _ in range(DRAWS)]
        return self.words[word]

    def sample(self, words: Ragged, random: np.random.Generator) -> Ragged:
        """Token ids of every row, one segmentation picked for each of its words."""
        if self._table is None:
            self._table = Ragged.of(self.drawn)
        picked = words.flat * DRAWS + random.integers(DRAWS, size=len(words.flat))
        sizes = self._table.lengths[picked]
        ends = np.cumsum(sizes)
        places = np.arange(sizes.sum()) + np.repeat(self._table.ends[picked] - ends, sizes)
        borders = np.concatenate([[0], ends])[np.concatenate([[0], words.ends])]
        return Ragged(self._table.flat[places], np.diff(borders))


class SampledPairs:
    """Examples as batches of an epoch, the sources in pieces that chance chooses; rows that get too long as usual.

    Targets keep their usual pieces: a model that has to guess how a word will be cut has less to spend on which word.
    """

    def __init__(self, tokenizers: Tokenizers, dropout: float, examples: Sequence[Example], usual: Pairs, seed: int):
        self.usual, self.seed = usual, seed
        self.segmenter = Segmenter(tokenizers.source, dropout, seed)
        self.words = self.segmenter.split([example.source for example in examples])
        marks = [tokenizers.mark_source([], example.tag) for example in examples]
        self.heads, self.tails = Ragged.of(mark[:-1] for mark in marks), Ragged.of(mark[-1:] for mark in marks)

    def __call__(self, epoch: int) -> Pairs:
        random = np.random.default_rng((self.seed, epoch, 1))
        sampled = Ragged.beside([self.heads, self.segmenter.sample(self.words, random), self.tails])
        fits, usual = sampled.lengths <= self.usual.longest.max(), self.usual.sources
        sources = Ragged.of((sampled if fit else usual)[row].tolist() for row, fit in enumerate(fits))
        return Pairs(sources, self.usual.targets, self.usual.batch_tokens, self.seed)


def segment(word: str, merges: Merges, dropout: float, random: Random) -> list[int]:
    """A word's ids by BPE that leaves out each possible merge, each time anew, with probability `dropout` (alg. 1)."""
    pieces = list(word)
    while True:
        possible = [(rank, place) for rank, place in _possible(pieces, merges) if random.random() >= dropout]
        if not possible:
            return [merges.ids[piece] for piece in pieces]
        _, place = min(possible)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def _possible(pieces: Sequence[str], merges: Merges) -> Iterator[tuple[int, int]]:
    for place, pair in enumerate(pairwise(pieces)):
        rank = merges.ranks.get(pair)
        if rank is not None:
            yield rank, place
