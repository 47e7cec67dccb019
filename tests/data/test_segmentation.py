"""BPE-dropout: the same text in pieces that differ, none at all and all of them at the extremes."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.data.corpus import Example
from triglot.data.dataset import Pairs, Ragged
from triglot.data.segmentation import DRAWS, SampledPairs, Segmenter, segment
from triglot.tokenizer import Tokenizer, Tokenizers

TEXTS = [
    "the cat sat on the mat",
    "that cat; this mat, 27 hats",
    "",
    "  the   theatre\n",
    "Straße – ñandú",
    "that that",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("bpe", TEXTS * 3, 330)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40))
def test_with_nothing_dropped_it_is_the_tokenizer(tokenizer, text):
    merges, random = tokenizer.merges(), Random(1)
    ids = [token for word in tokenizer.words(text) for token in segment(word, merges, 0.0, random)]
    assert ids == tokenizer.encode(text)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(TEXTS), max_size=9), st.integers(0, 99))
def test_whatever_is_dropped_the_text_stays(tokenizer, texts, seed):
    segmenter = Segmenter(tokenizer, 0.5, seed)
    sampled = segmenter.sample(segmenter.split(texts), np.random.default_rng(seed))
    assert [tokenizer.decode(sampled[row].tolist()) for row in range(len(texts))] == texts


def test_every_merge_is_left_out_as_often_as_said(tokenizer):
    merges, random = tokenizer.merges(), Random(1)
    left, right = next(iter(merges.ranks))
    drawn = [segment(left + right, merges, 0.3, random) for _ in range(4000)]
    assert sum(len(ids) == 2 for ids in drawn) / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert all(len(segment("the", merges, 1.0, random)) == 3 for _ in range(9))


def test_occurrences_of_a_word_differ_and_every_draw_is_used(tokenizer):
    segmenter = Segmenter(tokenizer, 0.5, 1)
    words = segmenter.split(["that"] * 500)
    sampled = segmenter.sample(words, np.random.default_rng(1))
    seen = {tuple(sampled[row].tolist()) for row in range(500)}
    assert seen == {tuple(ids) for ids in segmenter.drawn[:DRAWS]}
    assert len(seen) > 1


def sampled_pairs(tokenizer, dropout, *, batch_tokens=64):
    examples = [Example(text, text[::-1]) for text in TEXTS if text]
    tokenizers = Tokenizers(tokenizer, tokenizer)
    sources = Ragged.of(tokenizers.encode_sources(*zip(*((one.source, one.tag) for one in examples), strict=True)))
    targets = Ragged.of(tokenizer.encode_batch([one.target for one in examples]))
    return examples, SampledPairs(tokenizers, dropout, examples, Pairs(sources, targets, batch_tokens, 1), 1)


def rows(pairs):
    return [(pairs.sources[row].tolist(), pairs.targets[row].tolist()) for row in range(len(pairs.sources))]


def test_an_epoch_has_the_usual_pairs_in_other_pieces_the_same_each_time_it_is_asked_for(tokenizer):
    examples, make = sampled_pairs(tokenizer, 0.5, batch_tokens=512)
    first, again, second = make(0), make(0), make(1)
    assert rows(first) == rows(again) != rows(second)
    for source, target, example in zip(*zip(*rows(first), strict=True), examples, strict=True):
        assert (source[0], source[-1]) == (Tokenizer.bos_id, Tokenizer.eos_id)
        assert (tokenizer.decode(source), tokenizer.decode(target)) == (example.source, example.target)
    _, plain = sampled_pairs(tokenizer, 0.0, batch_tokens=512)
    assert rows(plain(0)) == rows(plain.usual)


def test_no_row_gets_longer_than_the_longest_usual_one(tokenizer):
    _, make = sampled_pairs(tokenizer, 0.9)
    for epoch in range(3):
        assert make(epoch).longest.max() <= make.usual.longest.max()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 99), max_size=4)] * 3), max_size=6))
def test_beside_is_each_rows_parts_one_behind_another(given_rows):
    parts = [Ragged.of(row[part] for row in given_rows) for part in range(3)]
    together = Ragged.beside(parts)
    assert [together[row].tolist() for row in range(len(together))] == [[*a, *b, *c] for a, b, c in given_rows]
