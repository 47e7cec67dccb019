"""What holds for the optimizer and its schedule."""

import pytest
import torch
from torch import nn

from triglot.config import BlockOptions, ExpertOptions, ModelConfig, TrainConfig
from triglot.models.factory import build_model
from triglot.training.optim import learning_rate, make_optimizer, split_by_decay

PEAK, FLOOR, WARMUP, STEPS = 0.7, 0.03, 11, 101
SCHEDULES = ["cosine", "linear", "inverse_sqrt", "constant"]


def rates(schedule: str, warmup: int = WARMUP, floor: float = FLOOR, steps: int = STEPS) -> list[float]:
    config = TrainConfig(
        schedule=schedule, learning_rate=PEAK, min_learning_rate=floor, warmup_steps=warmup, max_steps=steps
    )
    return [learning_rate(step, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_that_ends_at_the_peak(schedule):
    expected = [PEAK * step / WARMUP for step in range(1, WARMUP + 1)]
    assert rates(schedule)[:WARMUP] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, WARMUP, STEPS, 2 * STEPS])
def test_the_rate_is_above_zero_at_most_the_peak_and_after_warm_up_never_rises(schedule, warmup):
    found = rates(schedule, warmup, floor=0.01)
    assert all(0 < rate <= PEAK for rate in found)
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_step_is_at_the_floor(schedule):
    assert rates(schedule)[-1] == pytest.approx(FLOOR)


def test_halfway_cosine_and_line_are_halfway():
    middle = (WARMUP + STEPS) // 2
    assert rates("cosine")[middle - 1] == pytest.approx((PEAK + FLOOR) / 2)
    assert rates("linear")[middle - 1] == pytest.approx((PEAK + FLOOR) / 2)


def test_cosine_equals_torch_after_warm_up():
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=PEAK)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=FLOOR)
    for ours in rates("cosine")[WARMUP - 1 :]:
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_inverse_sqrt_is_the_papers_shape_scaled_to_the_peak():
    noam = [min(step**-0.5, step * WARMUP**-1.5) for step in range(1, STEPS + 1)]
    scale = PEAK / noam[WARMUP - 1]
    assert rates("inverse_sqrt", floor=0.0) == pytest.approx([scale * rate for rate in noam])
    assert min(rates("inverse_sqrt", floor=0.5)[WARMUP:]) == 0.5


def test_fused_adamw_equals_the_unfused_one_with_the_same_groups():
    config = TrainConfig(weight_decay=0.3, learning_rate=0.01, adam_eps=1e-6)
    shape = ModelConfig(kind="decoder_only", d_model=6, num_heads=2, num_layers=1, d_ff=11, vocab_size=13)
    ours, theirs = build_model(shape), build_model(shape)
    theirs.load_state_dict(ours.state_dict())
    fused = make_optimizer(ours, config)
    decayed, plain = split_by_decay(theirs)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    unfused = torch.optim.AdamW(
        groups, lr=0.01, betas=config.betas, eps=1e-6, weight_decay=0.3, fused=False, foreach=False
    )
    assert all(group["fused"] for group in fused.param_groups)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        fused.step()
        unfused.step()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, msg=name)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("tied", [False, True])
def test_decay_falls_on_matrices_and_on_nothing_else(kind, tied):
    options = BlockOptions(
        positions="learned", tie_embeddings=tied, output_bias=True, experts=ExpertOptions(num_experts=3)
    )
    config = ModelConfig(
        kind=kind, d_model=6, num_heads=2, num_layers=1, d_ff=11, vocab_size=13, src_vocab_size=13, options=options
    )
    model = build_model(config)
    decayed, plain = ({id(weight) for weight in part} for part in split_by_decay(model))
    names = {name: id(weight) for name, weight in model.named_parameters()}
    assert decayed | plain == set(names.values())
    assert not decayed & plain
    for name, weight in names.items():
        is_embedding = "tokens" in name or "embedding" in name
        assert (weight in decayed) == (
            model.get_parameter(name).dim() > 1 and "bias" not in name and not is_embedding
        ), name
    output = model.final_layer.weight if kind == "encoder_decoder" else model.lm_head.weight
    assert (id(output) in plain) == tied
