"""Numbers keep their bits whatever stands beside them, with any number of threads."""

from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from triglot.decoding.sampling import log_sum_exp
from triglot.generation.feed_forward import IN_PLACE, activate_apart
from triglot.layers.activations import Activation, activate
from triglot.layers.vectors import VECTOR, filled_up, in_whole_vectors


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * 3


def test_width_is_filled_up_with_zeros_to_whole_vectors():
    wide = filled_up(torch.ones(2, VECTOR + 1))
    assert torch.equal(wide, F.pad(torch.ones(2, VECTOR + 1), (0, VECTOR - 1)))
    assert filled_up(wide) is wide


@pytest.mark.parametrize("rows", [1, 37, 1031])
def test_work_is_done_once_on_every_number(threads, rows):
    x = draw(rows, 160)
    assert torch.equal(in_whole_vectors(x.clone(), lambda some: some.add_(1)), x + 1)


def told_apart(work) -> Tensor:
    """A number that `work` makes another of where it stands alone, if there is one."""
    x = draw(1, 32 * 1024).abs()[0]
    differ = work(x.clone()) != torch.cat([work(one.clone()) for one in x.split(1)])
    return x[differ][0] if differ.any() else x[0]


gelu_tanh = partial(torch.ops.aten.gelu_, approximate="tanh")
WORK = [Tensor.exp2_, Tensor.sigmoid_, torch.ops.aten.silu_, torch.ops.aten.gelu_, gelu_tanh]


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("rows", [1, 37, 1031])
def test_a_number_has_the_same_bits_wherever_it_stands(threads, work, rows):
    found = in_whole_vectors(told_apart(work).expand(rows, 160).clone(), work)
    assert found.unique().numel() == 1


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize(("rows", "width"), [(53, 22), (1999, 34), (37, 3200)])
def test_an_activated_number_has_the_same_bits_wherever_it_stands(threads, activation, rows, width):
    x = told_apart(IN_PLACE.get(activation, torch.ops.aten.silu_)).expand(rows, width)
    found = activate_apart(x.clone(), activation)
    torch.testing.assert_close(found, activate(x, activation))
    assert found.unique().numel() == 1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 1200), st.sampled_from([100, 128, 256]))
@example(1031, 128)
def test_a_rows_log_sum_exp_has_the_bits_that_it_has_alone(rows, columns):
    x = draw(rows, columns)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = log_sum_exp(x)
        torch.testing.assert_close(found, x.logsumexp(1, keepdim=True))
        assert torch.equal(found, torch.cat([log_sum_exp(row[None]) for row in x]))
    finally:
        torch.set_num_threads(before)
