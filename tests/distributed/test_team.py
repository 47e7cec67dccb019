"""What holds for a process among others; what several do together is in tests/training/test_processes.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triglot.distributed.team import Team, this_rank


def gathered(states, size):
    """What `together` gives to `size` processes with these states."""
    return {f"{rank}/{name}" if rank else name: state for rank in range(size) for name, state in states[rank].items()}


@given(st.integers(1, 12), st.data())
def test_each_process_finds_its_own_among_what_as_many_have_gathered(size, data):
    states = [{"cpu": torch.tensor(rank), "cuda:1": torch.tensor(-rank)} for rank in range(size)]
    rank = data.draw(st.integers(0, size - 1))
    assert Team(rank, size).own(gathered(states, size)) == states[rank]


@given(st.integers(1, 12), st.integers(1, 12))
def test_what_another_number_has_gathered_is_nobodys(size, other):
    states = [{"cpu": torch.tensor(rank)} for rank in range(size)]
    assert (Team(0, other).own(gathered(states, size)) is None) == (size != other)


@given(st.lists(st.integers()), st.integers(1, 7))
def test_what_is_dealt_is_everything_once(parts, size):
    shares = [Team(rank, size).dealt(parts) for rank in range(size)]
    assert sorted(part for share in shares for part in share) == sorted(parts)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_hears_what_it_says():
    alone, tensor = Team(), torch.arange(3)
    assert alone.is_first
    assert alone.told({"a": [1, None]}) == {"a": [1, None]}
    assert alone.highest(7) == 7
    assert alone.gathered([tensor]) == [[tensor]]
    assert alone.together({"cpu": tensor}) == {"cpu": tensor}


@pytest.mark.parametrize(("size", "rank"), [(None, 0), ("1", 0), ("3", 2)])
def test_a_rank_counts_only_among_several(monkeypatch, size, rank):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert this_rank() == rank
