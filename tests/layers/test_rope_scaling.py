"""Scaled frequencies are those of transformers, and what turns fast enough stays as it is."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.config import RopeScaling
from triglot.layers.positions import RotaryPositions
from triglot.layers.rope_scaling import scaled

FIELDS = {
    "original_max_position": "original_max_position_embeddings", "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}  # fmt: skip
factors, originals = st.floats(1, 64), st.integers(64, 8192)
scalings = st.one_of(
    st.builds(RopeScaling, kind=st.just("linear"), factor=factors),
    st.builds(RopeScaling, kind=st.just("dynamic"), factor=factors, original_max_position=originals),
    st.builds(
        RopeScaling, kind=st.just("llama3"), factor=factors, original_max_position=originals,
        low_freq_factor=st.floats(0.5, 2), high_freq_factor=st.floats(3, 9),
    ),
    st.builds(
        RopeScaling, kind=st.just("yarn"), factor=factors, original_max_position=originals, beta_fast=st.floats(16, 40),
        beta_slow=st.floats(0.5, 4), attention_factor=st.none() | st.floats(0.5, 2),
    ),
)  # fmt: skip


def plain(head_dim: int, theta: float) -> torch.Tensor:
    return theta ** (-torch.arange(0, head_dim, 2) / head_dim)


@settings(deadline=None, max_examples=100)
@given(scalings, st.sampled_from([4, 10, 64, 128]), st.sampled_from([500.0, 1e4, 5e5]), st.sampled_from([1, 3, 7]))
def test_frequencies_are_those_of_transformers(scaling, head_dim, theta, times):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    given_values = {theirs: getattr(scaling, ours) for ours, theirs in FIELDS.items()}
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
        max_position_embeddings=scaling.original_max_position or 64,
        rope_parameters={"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor} | given_values,
    )  # fmt: skip
    longest = times * (scaling.original_max_position or 64)
    expected, amplitude = rope.ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu", seq_len=longest)
    found = scaled(plain(head_dim, theta), theta, longest, **dataclasses.asdict(scaling))
    torch.testing.assert_close(found.frequencies, expected, rtol=2e-5, atol=0)
    assert found.amplitude == pytest.approx(amplitude)


def test_positions_are_turned_by_scaled_frequencies_and_lengthened():
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position=64)
    rotary = RotaryPositions(10, 101, 500.0, dataclasses.asdict(scaling))
    found = scaled(plain(10, 500.0), 500.0, 101, **dataclasses.asdict(scaling))
    angles = torch.arange(101)[:, None] * found.frequencies.repeat(2)
    amplitude = 1 + 0.1 * math.log(4)
    turn = rotary(torch.arange(101)[None])
    torch.testing.assert_close(turn.cos[0], angles.cos() * amplitude, atol=1e-4, rtol=0)
    torch.testing.assert_close(turn.sin[0], angles.sin() * amplitude, atol=1e-4, rtol=0)


def test_dynamic_scaling_leaves_a_model_of_the_first_trainings_length_as_it_was():
    scaling = dataclasses.asdict(RopeScaling(kind="dynamic", factor=4.0, original_max_position=101))
    assert torch.equal(RotaryPositions(10, 101, scaling=scaling).cos, RotaryPositions(10, 101).cos)
    assert not torch.equal(RotaryPositions(10, 102, scaling=scaling).cos, RotaryPositions(10, 102).cos)
