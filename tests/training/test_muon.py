"""Muon is torch's own on every matrix, all of one shape at once, and one optimizer with AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from triglot.config import BlockOptions, ExpertOptions, ModelConfig, TrainConfig
from triglot.models.factory import build_model
from triglot.training.muon import Muon, orthogonalise
from triglot.training.optim import hidden_matrices, make_optimizer

LR, DECAY = 0.01, 0.3


def with_gradients(weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("shape", [(7, 7), (7, 13), (13, 7), (1, 5)])
def test_orthogonalising_takes_singular_values_near_one_and_keeps_their_vectors(shape):
    matrices = torch.randn(3, *shape)
    found = orthogonalise(matrices, torch.float32)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4
    assert values.max() < 1.4
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ found @ vh.mT
    off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 0.05


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalise(torch.zeros(2, 5, 7), torch.float32).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_updates_are_those_of_torchs_muon_for_every_matrix():
    shapes = [(7, 7), (7, 13), (13, 7), (7, 7), (13, 7)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    rest = [{"params": [nn.Parameter(torch.randn(3))], "weight_decay": 0.0}]
    muon = Muon(ours, rest, lr=LR, weight_decay=DECAY, dtype=torch.bfloat16)
    oracle = torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        muon.step()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=LR * 0.02, rtol=0)


def test_a_stack_of_experts_is_updated_as_its_matrices_would_be():
    stack = nn.Parameter(torch.randn(3, 7, 11))
    alone = [nn.Parameter(expert.clone()) for expert in stack.detach().unbind()]
    rest = [{"params": [nn.Parameter(torch.randn(3))]}]
    together = Muon([stack], copy.deepcopy(rest), lr=LR, weight_decay=DECAY, dtype=torch.float32)
    apart = Muon(alone, copy.deepcopy(rest), lr=LR, weight_decay=DECAY, dtype=torch.float32)
    stack.grad = torch.randn(stack.shape)
    for expert, grad in zip(alone, stack.grad.unbind(), strict=True):
        expert.grad = grad.clone()
    together.step()
    apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([expert.detach() for expert in alone]))


def model(kind: str = "encoder_decoder") -> nn.Module:
    options = BlockOptions(experts=ExpertOptions(num_experts=3, every=2), positions="learned")
    shape = {"d_model": 6, "num_heads": 2, "num_layers": 2, "d_ff": 11, "vocab_size": 13, "src_vocab_size": 13}
    return build_model(ModelConfig(kind=kind, **shape, options=options))


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_every_weight_is_in_one_group_and_embeddings_outputs_and_routers_are_adamws(kind):
    built = model(kind)
    optimizer = make_optimizer(built, TrainConfig(optimizer="muon"))
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in built.parameters())
    matrices = {id(weight) for weight in optimizer.param_groups[0]["params"]}
    assert matrices == {id(weight) for weight in hidden_matrices(built)}
    for name, weight in built.named_parameters():
        hidden = any(part in name for part in ("query.", "key.", "value.", "output.", ".inner", ".outer"))
        assert (id(weight) in matrices) == (hidden and "bias" not in name), name


def test_the_rest_is_updated_as_by_adamw_alone():
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    config = TrainConfig(optimizer="muon", learning_rate=LR, weight_decay=DECAY)
    muon, adamw = (
        make_optimizer(ours, config),
        make_optimizer(theirs, TrainConfig(learning_rate=LR, weight_decay=DECAY)),
    )
    for step in range(3):
        with_gradients(list(ours.parameters()), step)
        with_gradients(list(theirs.parameters()), step)
        muon.step()
        adamw.step()
    hidden = {id(weight) for weight in hidden_matrices(ours)}
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other) == (id(mine) not in hidden), name


def test_state_that_is_put_back_goes_on_as_if_nothing_had_happened():
    first, second = model(), model()
    second.load_state_dict(first.state_dict())
    config = TrainConfig(optimizer="muon", learning_rate=LR)
    one, other = make_optimizer(first, config), make_optimizer(second, config)
    with_gradients(list(first.parameters()), 1)
    one.step()
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in (2, 3):
        for part, optimizer in ((first, one), (second, other)):
            with_gradients(list(part.parameters()), step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_groups_share_the_learning_rate_that_the_trainer_sets():
    built = model()
    optimizer = make_optimizer(built, TrainConfig(optimizer="muon", weight_decay=0.0))
    before = [weight.detach().clone() for weight in built.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with_gradients(list(built.parameters()), 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))
