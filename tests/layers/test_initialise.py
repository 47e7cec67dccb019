"""Weights begin with the spread that their names promise."""

import math

import pytest
import torch
from torch import nn

from triglot.layers.initialise import normal, xavier
from triglot.layers.moe import MixtureOfExperts


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({
        "embedding": nn.Embedding(211, 53), "projection": nn.Linear(53, 101), "norm": nn.LayerNorm(53),
        "experts": MixtureOfExperts(53, 3, 101),
    })  # fmt: skip


def biases(model: nn.Module) -> list[torch.Tensor]:
    experts = model["experts"]
    return [model["projection"].bias, experts.router.bias, experts.inner_bias, experts.outer_bias]


def test_xavier_looks_at_each_expert_on_its_own(model):
    xavier(model, embedding_std=53**-0.5)
    limit = math.sqrt(6 / (53 + 101))
    experts = model["experts"]
    for matrix in (model["projection"].weight, *experts.inner, *experts.outer):
        assert matrix.abs().max().item() == pytest.approx(limit, rel=0.01)
        assert matrix.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert model["embedding"].weight.std().item() == pytest.approx(53**-0.5, rel=0.05)
    assert not any(bias.any() for bias in biases(model))


def test_normal_gives_all_matrices_one_spread(model):
    normal(model, 0.02)
    experts = model["experts"]
    for matrix in (model["embedding"].weight, model["projection"].weight, experts.inner, experts.outer):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
        assert matrix.mean().item() == pytest.approx(0, abs=1e-3)
    assert not any(bias.any() for bias in biases(model))
    assert torch.equal(model["norm"].weight, torch.ones(53))
