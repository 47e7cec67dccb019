"""AdamW (Loshchilov & Hutter 2019), which weights it decays, and the learning rate from step to step."""

import math
from typing import assert_never

import torch
from torch import nn

from triglot.config import TrainConfig

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which PyTorch updates all weights in one kernel."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the model's weights, with decay on matrices alone."""
    decayed, plain = split_by_decay(model)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = all(weight.device.type in FUSED for weight in (*decayed, *plain))
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        fused=fused,
    )


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights that decay, and those that do not.

    Decayed is what multiplies activations: weights of rank 2 or more (a stack of experts' matrices is of rank 3) that
    are neither a bias nor an embedding. An output projection tied to an embedding counts as the embedding.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        matrix = weight.dim() >= 2 and not name.endswith("bias") and id(weight) not in embeddings
        (decayed if matrix else plain).append(weight)
    return decayed, plain


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of the `step`-th step, from 1: the peak at the end of the warm-up, the floor at the end.

    inverse_sqrt is the shape of Vaswani et al. 2017, §5.3, with its peak at `learning_rate` rather than at
    d_model^-½ · warmup^-½, and does not know where the end is.
    """
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))
    match config.schedule:
        case "cosine":
            return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return peak + (floor - peak) * done
        case "inverse_sqrt":
            return max(floor, peak * math.sqrt(max(1, warmup) / max(1, warmup, step)))
        case "constant":
            return peak
        case _:
            assert_never(config.schedule)
