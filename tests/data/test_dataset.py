"""What holds for every dataset: an epoch is a function of seed and epoch, and nothing is lost or repeated."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.data.batch import IGNORED
from triglot.data.dataset import Crops, FreshPairs, Packed, Pairs, Ragged, Windows, best_fit
from triglot.errors import ConfigError, DataError

BOS, EOS = 1, 2


def numbered(size: int) -> np.ndarray:
    """Tokens that are all different, so that each can be told from the others."""
    return np.arange(3, 3 + size, dtype=np.uint16)


def documents(sizes: list[int]) -> np.ndarray:
    """A stream of documents whose tokens between BOS and EOS are all different."""
    starts = np.cumsum([3, *sizes])
    parts = [
        np.concatenate([[BOS], np.arange(start, start + size), [EOS]])
        for start, size in zip(starts, sizes, strict=False)
    ]
    return np.concatenate(parts).astype(np.uint16)


def pairs(lengths: list[tuple[int, int]], budget: int = 61, seed: int | None = 0) -> Pairs:
    """Examples that can be told by the id which every token of theirs has."""
    sources = [[3 + number] * source for number, (source, _) in enumerate(lengths)]
    targets = [[3 + number] * target for number, (_, target) in enumerate(lengths)]
    return Pairs(Ragged.of(sources), Ragged.of(targets), budget, seed)


def same(one, other) -> bool:
    return type(one) is type(other) and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


MAKERS = {
    "crops": lambda seed: Crops(numbered(499), 7, 23, seed),
    "windows": lambda seed: Windows(numbered(499), 7, 23),
    "packed": lambda seed: Packed(documents([n % 17 for n in range(59)]), 11, 47, seed),
    "packed in order": lambda seed: Packed(documents([n % 17 for n in range(59)]), 11, 47, None),
    "pairs": lambda seed: pairs([(1 + n % 13, n % 11) for n in range(97)], seed=seed),
    "pairs by length": lambda seed: pairs([(1 + n % 13, n % 11) for n in range(97)], seed=None),
    "fresh pairs": lambda seed: FreshPairs(
        lambda epoch: pairs([(1 + (n + epoch) % 13, n % 11) for n in range(97)], seed=seed)
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_epoch_begun_in_the_middle_goes_on_as_the_whole_one_does(name):
    dataset, fresh = MAKERS[name](5), MAKERS[name](5)
    for epoch in (0, 3):
        whole = list(dataset.epoch(epoch))
        assert len(whole) == dataset.num_batches(epoch) > 3
        for start in (0, 1, len(whole) - 1, len(whole)):
            rest = list(fresh.epoch(epoch, start))
            assert len(rest) == len(whole) - start
            assert all(map(same, rest, whole[start:]))


@pytest.mark.parametrize("name", ["crops", "packed", "pairs", "fresh pairs"])
def test_another_seed_and_another_epoch_are_another_order(name):
    first, again, later, other = (
        next(iter(MAKERS[name](seed).epoch(epoch))) for seed, epoch in ((5, 0), (5, 0), (5, 1), (6, 0))
    )
    assert same(first, again)
    assert not same(first, later)
    assert not same(first, other)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(12, 499), context=st.integers(1, 11), rows=st.integers(1, 5), seed=st.integers(0, 2**63))
def test_crops_are_windows_of_the_text_one_from_each_stretch(size, context, rows, seed):
    crops = Crops(numbered(size), context, rows * context, seed)
    batches = list(crops.epoch(2))
    inputs, targets = (torch.cat([batch[side] for batch in batches]) for side in (0, 1))
    assert inputs.shape == (size // context, context)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))
    starts = sorted((inputs[:, 0] - 3).tolist())
    stretch = (size - context) / len(starts)
    assert all(int(number * stretch) <= start <= (number + 1) * stretch for number, start in enumerate(starts))
    assert max(starts) < size - context
    assert all(batch.segments is None for batch in batches)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(2, 499), context=st.integers(1, 11), rows=st.integers(1, 5))
def test_windows_predict_each_token_but_the_first_once_and_in_order(size, context, rows):
    tokens = numbered(size)
    batches = list(Windows(tokens, context, rows * context).epoch(0))
    inputs, targets = (torch.cat([batch[side] for batch in batches]) for side in (0, 1))
    scored = targets != IGNORED
    assert targets[scored].tolist() == tokens[1:].tolist()
    assert inputs[scored].tolist() == tokens[:-1].tolist()
    assert not inputs[~scored].any()
    assert all(len(batch.input_ids) == rows for batch in batches[:-1])


@pytest.mark.parametrize("dataset", [Crops(documents([5] * 31), 7, 23, 0), Windows(documents([5] * 31), 7, 23)])
def test_a_begin_token_is_read_but_never_predicted(dataset):
    inputs, targets = (torch.cat([batch[side] for batch in dataset.epoch(0)]) for side in (0, 1))
    assert (inputs == BOS).any()
    assert not (targets == BOS).any()
    assert torch.equal(targets[:, :-1] == IGNORED, inputs[:, 1:] == BOS)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 29), min_size=1, max_size=31),
    context=st.integers(1, 13),
    rows=st.integers(1, 3),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_packing_predicts_every_token_once_from_the_one_before_it_in_its_document(sizes, context, rows, seed):
    tokens = documents(sizes)
    batches = list(Packed(tokens, context, rows * context, seed).epoch(1))
    inputs, targets, segments = (torch.cat([batch[side] for batch in batches]) for side in range(3))
    assert torch.equal(segments == 0, targets == IGNORED)
    scored = segments > 0
    found = Counter(zip(inputs[scored].tolist(), targets[scored].tolist(), strict=True))
    assert found == Counter((a, b) for a, b in pairwise(tokens.tolist()) if b != BOS)
    for row_inputs, row_targets, row_segments in zip(inputs, targets, segments, strict=True):
        numbers = row_segments[row_segments > 0]
        assert torch.equal(numbers, numbers.sort().values)
        assert sorted(set(numbers.tolist())) == list(range(1, 1 + len(set(numbers.tolist()))))
        inside = (row_segments[1:] == row_segments[:-1]) & (row_segments[1:] > 0)
        assert torch.equal(row_targets[:-1][inside], row_inputs[1:][inside])
        assert not row_segments[len(numbers) :].any()


def test_documents_that_fit_a_row_are_not_cut():
    sizes = [n % 12 for n in range(97)]
    dataset = Packed(documents(sizes), 13, 26, 0)
    segments = sum(int(batch.segments.amax(1).sum()) for batch in dataset.epoch(0))
    assert segments == len(sizes)


def test_packing_in_order_keeps_the_order():
    inputs = torch.cat([batch.input_ids for batch in Packed(documents([5] * 31), 12, 12, None).epoch(0)])
    kept = inputs[inputs > EOS]
    assert torch.equal(kept, kept.sort().values)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 13), min_size=1, max_size=499))
def test_no_row_is_too_full_and_no_two_rows_could_be_one(sizes):
    rows = best_fit(sizes, 13)
    filled = Counter()
    for size, row in zip(sizes, rows, strict=True):
        filled[row] += size
    assert sorted(filled) == list(range(len(filled)))
    assert max(filled.values()) <= 13
    if len(filled) <= 64:
        assert len(filled) < 2 or sum(sorted(filled.values())[:2]) > 13


def test_random_documents_pack_tightly():
    sizes = np.random.default_rng(0).integers(1, 257, 4999).tolist()
    assert sum(sizes) / (256 * (1 + max(best_fit(sizes, 256)))) > 0.97


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 31), st.integers(0, 30)), min_size=1, max_size=97),
    budget=st.integers(31, 199),
    seed=st.one_of(st.none(), st.integers(0, 99)),
    epoch=st.integers(0, 7),
)
def test_an_epoch_has_every_pair_once_within_the_budget(lengths, budget, seed, epoch):
    dataset = pairs(lengths, budget, seed)
    batches = list(dataset.epoch(epoch))
    found = []
    for src, tgt_in, tgt_out, src_real, tgt_real in batches:
        assert (src != 0).equal(src_real)
        assert (tgt_in != 0).equal(tgt_real)
        assert len(src) * max(src.shape[1], tgt_in.shape[1]) <= budget
        assert (tgt_in[:, 0] == BOS).all()
        for source, given_ids, wanted in zip(src.tolist(), tgt_in.tolist(), tgt_out.tolist(), strict=True):
            number = source[0] - 3
            found.append(number)
            wide, high = lengths[number]
            assert source == [number + 3] * wide + [0] * (len(source) - wide)
            assert given_ids == [BOS] + [number + 3] * high + [0] * (len(given_ids) - high - 1)
            assert wanted == [number + 3] * high + [EOS] + [IGNORED] * (len(wanted) - high - 1)
    assert sorted(found) == list(range(len(lengths)))
    assert len(batches) == dataset.num_batches(epoch)
    if seed is None:
        widths = [max(batch.src.shape[1], batch.tgt_in.shape[1]) for batch in batches]
        assert widths == sorted(widths)


def test_batches_are_formed_anew_in_every_epoch():
    dataset = pairs([(5, 5)] * 59)
    first, second = ({frozenset(batch.src[:, 0].tolist()) for batch in dataset.epoch(epoch)} for epoch in (0, 1))
    assert first != second


def test_batches_of_similar_length_have_little_padding():
    random = np.random.default_rng(0)
    sources = random.integers(3, 61, 4999)
    dataset = pairs([(int(size), max(0, int(size) - 1)) for size in sources], 997)
    real, all_of_it = (
        sum(int(count(batch.src)) for batch in dataset.epoch(0)) for count in (torch.count_nonzero, torch.numel)
    )
    assert real / all_of_it > 0.97


def test_skipping_makes_none_of_the_batches_that_are_skipped(monkeypatch):
    made = []
    monkeypatch.setattr("triglot.data.dataset.pair_batch", lambda sources, targets, ids: made.append(len(sources)))
    dataset = pairs([(5, 5)] * 997)
    next(iter(dataset.epoch(0, dataset.num_batches(0) - 1)))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Crops(numbered(7), 7, 7, 0), DataError, "`the training text` must be longer than 7 tokens, but is 7"),
        (lambda: Crops(numbered(17), 7, 6, 0), ConfigError, r"`train\.batch_tokens` must be at least train\.context"),
        (lambda: Windows(numbered(1), 7, 7), DataError, "`the validation text` must be of two tokens or more"),
        (lambda: Packed(numbered(1), 7, 7, 0), DataError, "`the text` must be of two tokens or more"),
        (lambda: pairs([(62, 3)]), ConfigError, r"`train\.batch_tokens` must be at least the 62 tokens"),
        (lambda: pairs([]), DataError, "`the number of examples` must be at least 1"),
    ],
)
def test_what_can_make_no_batch_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
