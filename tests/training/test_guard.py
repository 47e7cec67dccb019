"""What holds for the rule by which steps are skipped."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triglot.config import TrainConfig
from triglot.training.guard import ENOUGH, LEAST_SPREAD, SIGMAS, WINDOW, fault, num_recent, seen

values = st.lists(st.floats(0.125, 8.0), min_size=ENOUGH, max_size=WINDOW)


@given(values, st.sampled_from([0.9, 1.1]))
def test_a_spike_of_the_loss_is_above_the_mean_by_six_standard_deviations(known, share):
    std, mean = torch.std_mean(torch.tensor(known, dtype=torch.float64), correction=0)
    value = (mean + share * SIGMAS * max(std.item(), LEAST_SPREAD)).item()
    assert fault(value, 1.0, [[one, 1.0] for one in known]) == (None if share < 1 else "the loss is a spike")


@given(values, st.sampled_from([0.9, 1.1]))
def test_a_spike_of_the_gradient_norm_is_above_the_mean_in_logarithms(known, share):
    std, mean = torch.std_mean(torch.tensor(known, dtype=torch.float64).log(), correction=0)
    value = math.exp(mean + share * SIGMAS * max(std.item(), LEAST_SPREAD))
    assert fault(1.0, value, [[1.0, one] for one in known]) == (None if share < 1 else "the gradient norm is a spike")


def test_values_that_hardly_differ_make_no_spike_of_the_next():
    assert fault(2.05, 1.05, [[2.0, 1.0]] * WINDOW) is None


STEADY = [[1.0 + number % 2 / 10, 1.0 + number % 3 / 10] for number in range(WINDOW)]


@given(st.floats(1.0, 1.5), st.floats(1.0, 3.0))
def test_what_has_changed_a_little_for_good_is_no_spike_for_long(loss, norm):
    usual, skipped = STEADY, 0
    while fault(loss, norm, usual):
        usual = seen(usual, loss, norm)
        skipped += 1
        assert skipped <= TrainConfig().max_skipped


@given(st.floats(10.0, 1e6), st.integers(1, 9))
def test_spikes_in_a_row_are_all_told(size, number):
    usual = STEADY
    for _ in range(number):
        assert fault(size, 1.0, usual) == "the loss is a spike"
        usual = seen(usual, size, 1.0)


def test_a_spike_that_an_earlier_pass_had_too_is_data():
    assert fault(5.0, 9.0, STEADY) == "the loss is a spike"
    assert fault(5.0, 9.0, STEADY, [[4.0, 7.0]]) is None
    assert fault(5.0, 9.0, STEADY, [[3.0, 7.0]]) == "the loss is a spike"
    assert fault(1.0, 99.0, STEADY, [[4.0, 7.0]]) == "the gradient norm is a spike"
    assert fault(math.nan, 9.0, STEADY, [[4.0, 7.0]]) == "the loss is not finite"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_usual(value):
    usual = [[1.0, 2.0]] * WINDOW
    assert seen(usual, value, 1.0) == seen(usual, 1.0, value) == usual
    assert seen(usual, 1.1, 2.1) == [*usual[1:], [1.1, 2.1]]


@given(st.lists(st.floats(0.0, 8.0), max_size=ENOUGH - 1), st.floats(0, 1e30))
def test_too_little_is_known_at_first_to_call_anything_a_spike(known, value):
    assert fault(value, value, [[one, one] for one in known]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_whatever_is_known(value):
    assert fault(value, 1.0, []) == "the loss is not finite"
    assert fault(1.0, value, []) == "the gradient norm is not finite"


def test_a_fall_is_no_spike():
    assert fault(0.0, 0.0, [[5.0 + number % 2, 7.0] for number in range(WINDOW)]) is None


@given(st.sets(st.integers(1, 1000)), st.integers(1, 1000))
def test_what_counts_is_what_was_skipped_in_the_last_window_of_steps(skipped, step):
    skipped = sorted(number for number in skipped if number <= step)
    recent = range(step - WINDOW + 1, step + 1)
    assert num_recent(skipped, step) == len(set(skipped) & set(recent))
