"""Slower rotation for texts longer than those a model was first trained on, as released checkpoints have it."""

import math
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["linear", "dynamic", "llama3", "yarn"]


class Scaled(NamedTuple):
    """Rotary frequencies, and what cosines and sines are multiplied by."""

    frequencies: Float[Tensor, " half"]
    amplitude: float


def scaled(
    frequencies: Float[Tensor, " half"],
    theta: float,
    max_seq_length: int,
    *,
    kind: Kind,
    factor: float,
    original_max_position: int | None,
    low_freq_factor: float,
    high_freq_factor: float,
    beta_fast: float,
    beta_slow: float,
    attention_factor: float | None,
) -> Scaled:
    """θ^(-2i/head_dim) divided by `factor` where a pair turns slowly, left as it is where it turns fast.

    linear divides all (Chen et al. 2023); llama3 goes by turns in the texts of that first training (Grattafiori et al.
    2024, §3.4.3), yarn by the pair's number, and makes scores larger besides (Peng et al. 2023, §3). dynamic raises θ
    with the length of the text, which here is always `max_seq_length`: keys that are held need not be turned anew as a
    text grows, and what a text becomes does not depend on how it was cut into steps.
    """
    number, half, original = torch.arange(len(frequencies)), len(frequencies), original_max_position or max_seq_length
    amplitude = 1.0
    match kind:
        case "linear":
            kept = torch.zeros(half)
        case "dynamic":
            stretch = factor * max(max_seq_length, original) / original - (factor - 1)
            return Scaled(frequencies * stretch ** (-number / max(1, half - 1)), amplitude)
        case "llama3":
            turns = original * frequencies / (2 * math.pi)
            kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        case "yarn":
            fast, slow = (half * math.log(original / (2 * math.pi * beta), theta) for beta in (beta_fast, beta_slow))
            first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * half - 1)
            kept = 1 - (number - first) / max(last - first, 0.001)
            amplitude = 1 + 0.1 * math.log(factor) if attention_factor is None else attention_factor
        case _:
            assert_never(kind)
    kept = kept.clamp(0, 1)
    return Scaled(frequencies * kept + frequencies / factor * (1 - kept), amplitude)
