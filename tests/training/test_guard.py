"""What holds for the rule by which steps are skipped."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triglot.training.guard import ENOUGH, SIGMAS, WINDOW, fault, num_recent

values = st.lists(st.floats(0.125, 8.0), min_size=ENOUGH, max_size=WINDOW)


@given(values, st.sampled_from([0.9, 1.1]), st.sampled_from(["loss", "gradient norm"]))
def test_a_spike_is_above_the_mean_by_six_standard_deviations(known, share, name):
    std, mean = torch.std_mean(torch.tensor(known, dtype=torch.float64))
    value = (mean + share * SIGMAS * std).item()
    spike = share > 1 and std > 1e-6
    other = [min(known)] * len(known)
    if name == "loss":
        found = fault(value, min(known), list(zip(known, other, strict=True)))
    else:
        found = fault(min(known), value, list(zip(other, known, strict=True)))
    if std > 1e-6:
        assert found == (f"the {name} is a spike" if spike else None)


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
