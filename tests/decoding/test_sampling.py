"""Sampling does what the naive Python versions beside it do, and follows the probabilities it is given."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.decoding.sampling import (
    BLOCK,
    Sampler,
    draw,
    first_largest,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    largest,
    log_sum_exp,
    settle_powers,
    to_powers,
)
from triglot.errors import ConfigError
from triglot.generation.prepared import SHIFT

# Few distinct values, so that ties are common; minus infinity, as of banned ids.
VALUES = st.sampled_from([-math.inf, -3.0, -1.25, 0.0, 0.5, 2.0, 2.5])
ROWS = st.integers(2, 13).flatmap(lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=3))
POSSIBLE = ROWS.filter(lambda rows: all(max(row) > -math.inf for row in rows))


def ranked(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [[token for token, value in enumerate(row) if value > -math.inf] for row in logits.tolist()]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 40), st.floats(0.0, 90.0))
def test_log_sum_exp_is_torchs_and_the_same_bits_in_any_company(seed, blocks, rows, scale):
    values = scale * torch.randn(rows, blocks * BLOCK, generator=torch.Generator().manual_seed(seed))
    values[0, :-1] = -math.inf  # one possibility

    def found(some: torch.Tensor) -> torch.Tensor:
        return log_sum_exp(some, some.view(len(some), -1, BLOCK).amax(2))

    together = found(values)
    torch.testing.assert_close(together.double(), values.double().logsumexp(1, keepdim=True), rtol=1e-6, atol=2e-6)
    assert together[0] == values[0, -1]
    assert torch.equal(together, torch.cat([found(values[row : row + 1]) for row in range(rows)]))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 40), st.floats(0.1, 60.0), st.floats(-400.0, 400.0))
def test_exponents_become_powers_that_give_them_back_in_any_company(seed, blocks, rows, spread, middle):
    exponents = spread * torch.randn(rows, blocks * BLOCK, generator=torch.Generator().manual_seed(seed))
    exponents[::2] += middle
    exponents[0, 1:] = -math.inf  # one possibility

    def found(some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        powers = some.clone()
        return powers, *to_powers(powers, some.view(len(some), -1, BLOCK).amax(2))

    powers, total, of_powers = found(exponents)
    log = math.log(2) * exponents.double()
    torch.testing.assert_close(total.double(), log.logsumexp(1, keepdim=True) / math.log(2), rtol=1e-6, atol=3e-6)
    assert (total >= exponents.amax(1, keepdim=True)).all()
    log2_p, far = exponents - total, exponents - exponents.amax(1, keepdim=True) < -80
    torch.testing.assert_close((powers.log2() - of_powers)[~far], log2_p[~far], rtol=1e-6, atol=1e-4)
    assert ((powers.log2() - of_powers)[far] < -70).all()
    one_by_one = zip(*(found(row[None]) for row in exponents), strict=True)
    assert all(
        torch.equal(whole, torch.cat(part)) for whole, part in zip((powers, total, of_powers), one_by_one, strict=True)
    )


def test_powers_of_nothing_are_nothing_that_makes_nan():
    exponents = torch.full((2, 2 * BLOCK), -math.inf)
    total, of_powers = to_powers(exponents, exponents[:, ::BLOCK].clone())
    assert total.isfinite().all()
    assert (exponents.log2() - of_powers).eq(-math.inf).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 40), st.floats(0.0, 12.0), st.floats(-120.0, 60.0))
def test_settled_powers_give_log_p_and_the_same_bits_in_any_company(seed, blocks, rows, scale, shift):
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, blocks * BLOCK, generator=draw) + shift * torch.rand(rows, 1, generator=draw)
    logits[0, :-1] = -math.inf

    def found(some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        powers = (some - SHIFT).sigmoid().bfloat16()
        return powers, *settle_powers(powers, lambda chosen: some[chosen])

    powers, of_blocks, total = found(logits)
    log_p, near = logits.log_softmax(1), logits > logits.amax(1, keepdim=True) - 20
    torch.testing.assert_close((powers.float().log() - total)[near], log_p[near], rtol=0, atol=0.02)
    assert (powers.float().log() - total)[~near].le(-19).all()
    torch.testing.assert_close(of_blocks, powers.float().view(rows, -1, BLOCK).amax(2).log())
    assert (of_blocks <= total).all()
    one_by_one = zip(*(found(row[None]) for row in logits), strict=True)
    assert all(whole.equal(torch.cat(part)) for whole, part in zip((powers, of_blocks, total), one_by_one, strict=True))


def test_powers_that_are_no_numbers_stay_none():
    powers = torch.full((2, 2 * BLOCK), math.exp(-30), dtype=torch.bfloat16)
    powers[1, 7] = math.nan
    of_blocks, total = settle_powers(powers, lambda chosen: pytest.fail("these are as they should be"))
    assert total.isnan().flatten().tolist() == [False, True]
    assert of_blocks[0].isfinite().all()


def test_log_sum_exp_of_nothing_is_nothing_that_makes_nan():
    values = torch.full((2, 2 * BLOCK), -math.inf)
    assert (values - log_sum_exp(values, values[:, ::BLOCK])).eq(-math.inf).all()
    assert log_sum_exp(values).eq(0).all()


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 17))
def test_largest_is_a_stable_sort_cut_short(rows, count):
    values, index = largest(torch.tensor(rows), count)
    assert index.tolist() == [ranked(row)[:count] for row in rows]
    assert values.tolist() == [[row[token] for token in ranked(row)[:count]] for row in rows]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 5), st.integers(0, BLOCK - 1))
def test_the_first_of_the_largest_is_found_by_blocks_and_without(seed, blocks, rows, missing):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 9, (rows, blocks * BLOCK - missing), generator=draw).float()
    assert first_largest(values).tolist() == [row.index(max(row)) for row in values.tolist()]


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 17))
def test_top_k_keeps_exactly_k_with_ties_by_lower_id(rows, top_k):
    expected = [sorted(t for t in ranked(row)[:top_k] if row[t] > -math.inf) for row in rows]
    assert kept(keep_top_k(torch.tensor(rows), top_k)) == expected


@settings(deadline=None, max_examples=50)
@given(POSSIBLE, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(rows, top_p):
    for row, tokens in zip(rows, kept(keep_top_p(torch.tensor(rows), top_p)), strict=True):
        weights = [math.exp(value) for value in row]
        total = sum(weights)
        assert tokens
        assert sorted(tokens) == sorted(ranked(row)[: len(tokens)])
        reached = sum(weights[token] for token in tokens) / total
        without_last = reached - weights[ranked(row)[len(tokens) - 1]] / total
        assert reached >= top_p - 1e-5
        assert without_last < top_p + 1e-5


@settings(deadline=None, max_examples=50)
@given(POSSIBLE, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest(rows, min_p):
    for row, tokens in zip(rows, kept(keep_min_p(torch.tensor(rows), min_p)), strict=True):
        share = [math.exp(value - max(row)) for value in row]
        assert set(tokens) <= {token for token, one in enumerate(share) if one > 0 and one > min_p - 1e-6}
        assert set(tokens) >= {token for token, one in enumerate(share) if one > 0 and one > min_p + 1e-6}
        assert ranked(row)[0] in tokens


def surprises(row: list[float]) -> tuple[list[float], list[float]]:
    """The probabilities, and how far −log p of each is from the entropy."""
    weights = [math.exp(value) for value in row]
    probabilities = [weight / sum(weights) for weight in weights]
    entropy = -sum(p * math.log(p) for p in probabilities if p)
    return probabilities, [abs(-math.log(p) - entropy) if p else math.inf for p in probabilities]


@settings(deadline=None, max_examples=50)
@given(POSSIBLE, st.floats(0.01, 1.0))
def test_typical_p_keeps_the_smallest_set_nearest_to_the_entropy_that_reaches_p(rows, typical_p):
    for row, tokens in zip(rows, kept(keep_typical_p(torch.tensor(rows), typical_p)), strict=True):
        probabilities, surprise = surprises(row)
        left = [surprise[token] for token in range(len(row)) if token not in tokens]
        farthest = max(tokens, key=lambda token: surprise[token])
        assert all(surprise[farthest] < other + 1e-5 for other in left)
        reached = sum(probabilities[token] for token in tokens)
        assert reached >= typical_p - 1e-5
        ties = [probabilities[token] for token in tokens if surprise[token] > surprise[farthest] - 1e-5]
        assert reached - max(ties) < typical_p + 1e-5


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9999), st.floats(0.02, 0.98), st.sampled_from(["min_p", "typical_p"]))
def test_the_cuts_are_those_of_transformers(seed, share, name):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(7, 53, generator=torch.Generator().manual_seed(seed)) * 2
    logits[:, 41:] = -math.inf
    theirs = {"min_p": warpers.MinPLogitsWarper, "typical_p": warpers.TypicalLogitsWarper}[name](share)
    ours = {"min_p": keep_min_p, "typical_p": keep_typical_p}[name]
    assert torch.equal(ours(logits, share), theirs(None, logits))


def test_all_cuts_together_leave_what_those_of_transformers_leave():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    rows = 20_000
    logits = torch.randn(53, generator=torch.Generator().manual_seed(1)) * 2
    left = logits[None]
    for warper in (
        warpers.TemperatureLogitsWarper(1.7),
        warpers.TopKLogitsWarper(31),
        warpers.TopPLogitsWarper(0.95),
        warpers.MinPLogitsWarper(0.15),
        warpers.TypicalLogitsWarper(0.8),
    ):
        before, left = left, warper(None, left)
        assert left.isfinite().sum() < before.isfinite().sum() or isinstance(warper, warpers.TemperatureLogitsWarper)
    expected = rows * left[0].softmax(0)
    sampler = Sampler(temperature=1.7, top_k=31, top_p=0.95, min_p=0.15, typical_p=0.8)
    counts = sampler(logits.expand(rows, -1), torch.Generator().manual_seed(2)).bincount(minlength=53)
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@settings(deadline=None, max_examples=50)
@given(POSSIBLE, st.floats(0, 1, exclude_max=True, width=32))
def test_a_draw_inverts_the_cumulative_probabilities(rows, uniform):
    probabilities = torch.tensor(rows).softmax(1)
    tokens = draw(probabilities, torch.full((len(rows),), uniform)).tolist()
    for row, token in zip(probabilities.tolist(), tokens, strict=True):
        assert row[token] > 0
        assert sum(row[:token]) <= uniform + 1e-6
        assert sum(row[: token + 1]) > uniform - 1e-6


def test_the_largest_uniform_number_never_draws_what_has_probability_zero():
    probabilities = torch.rand(211, 1009, generator=torch.Generator().manual_seed(0))
    probabilities[:, 601:] = 0
    probabilities /= probabilities.sum(1, keepdim=True)
    assert draw(probabilities, torch.full((211,), 1 - 2**-24)).max() == 600


@pytest.mark.parametrize(
    ("sampler", "share"),
    [
        (Sampler(), [0.1, 0.2, 0.3, 0.4]),
        (Sampler(temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (Sampler(top_k=3), [0, 2 / 9, 3 / 9, 4 / 9]),
        (Sampler(top_p=0.65), [0, 0, 3 / 7, 4 / 7]),
        (Sampler(top_k=3, top_p=0.5), [0, 0, 3 / 7, 4 / 7]),
        (Sampler(min_p=0.6), [0, 0, 3 / 7, 4 / 7]),
        (Sampler(min_p=0.4, temperature=0.5), [0, 0, 9 / 25, 16 / 25]),
        (Sampler(typical_p=0.4), [0, 2 / 5, 3 / 5, 0]),
        (Sampler(top_k=3, min_p=0.45, typical_p=0.3), [0, 0, 1, 0]),
    ],
)
def test_draws_follow_the_probabilities(sampler, share):
    draws, expected = 40_000, torch.tensor(share)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(draws, 4)
    counts = sampler(logits, torch.Generator().manual_seed(7)).bincount(minlength=4)
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    assert chi_square < 16.3  # the 0.1 % point of three degrees of freedom


@settings(deadline=None, max_examples=25)
@given(ROWS, st.sampled_from([None, 1, 2, 50]), st.sampled_from([None, 0.3, 1.0]))
def test_temperature_zero_is_the_first_of_the_largest(rows, top_k, top_p):
    chosen = Sampler(temperature=0.0, top_k=top_k, top_p=top_p)(torch.tensor(rows)).tolist()
    assert chosen == [ranked(row)[0] for row in rows]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_next_to_zero_is_greedy(temperature, dtype):
    logits = torch.randn(23, 31, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[:, 17] = logits.amax(1) + 1
    assert (Sampler(temperature=temperature)(logits) == 17).all()


def test_a_rows_own_generator_makes_it_independent_of_its_mates():
    logits = torch.randn(5, 19, generator=torch.Generator().manual_seed(2))

    def generators(rows):
        return [torch.Generator().manual_seed(row) for row in rows]

    for sampler in (Sampler(), Sampler(top_k=17, top_p=0.95, min_p=0.01, typical_p=0.9)):
        together = sampler(logits, generators(range(5)))
        turned = sampler(logits.flip(0), generators(reversed(range(5)))).flip(0)
        alone = torch.cat([sampler(logits[row : row + 1], generators([row])) for row in range(5)])
        assert together.tolist() == turned.tolist() == alone.tolist()


@pytest.mark.parametrize("cut", [keep_top_p, keep_min_p, keep_typical_p])
def test_a_cut_gives_a_row_the_same_bits_in_any_company(cut):
    logits = torch.randn(3, 65_537, generator=torch.Generator().manual_seed(2))
    try:
        torch.set_num_threads(2)  # a long row that is alone may be shared among threads
        together = cut(logits, 0.3)
        assert torch.equal(together, torch.cat([cut(row[None], 0.3) for row in logits]))
    finally:
        torch.set_num_threads(1)


def test_one_uniform_number_is_taken_a_row():
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    Sampler(top_k=2, top_p=0.9)(torch.randn(7, 11), one)
    torch.rand(7, generator=other)
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "`temperature` must be at least 0 and finite, but is -0.1 instead."),
        ({"temperature": math.nan}, "`temperature` must be at least 0 and finite, but is nan instead."),
        ({"top_k": 0}, "`top_k` must be at least 1, or left out, but is 0 instead."),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, or left out, but is 0.0 instead."),
        ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1, or left out, but is 1.5 instead."),
        ({"min_p": 1.5}, "`min_p` must be between 0 and 1, or left out, but is 1.5 instead."),
        ({"min_p": math.nan}, "`min_p` must be between 0 and 1, or left out, but is nan instead."),
        ({"typical_p": 0.0}, "`typical_p` must be above 0 and at most 1, or left out, but is 0.0 instead."),
    ],
)
def test_refuses_what_makes_no_distribution(options, message):
    with pytest.raises(ConfigError) as refusal:
        Sampler(**options)
    assert str(refusal.value) == message
