"""AdamW (Loshchilov & Hutter 2019) or Muon, which weights they decay, and the learning rate from step to step."""

import math
from collections.abc import Iterator
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from triglot.config import TrainConfig
from triglot.layers.attention import MultiHeadAttention
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.moe import MixtureOfExperts
from triglot.training.muon import Muon

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which PyTorch updates all weights in one kernel."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's weights, with decay on matrices alone."""
    decayed, plain = split_by_decay(model)
    fused = all(weight.device.type in FUSED for weight in (*decayed, *plain))
    adamw: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.adam_eps, "fused": fused}
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(decay_groups(decayed, plain, config.weight_decay), **adamw)
        case "muon":
            hidden = {id(weight) for weight in hidden_matrices(model)}
            matrices = [weight for weight in decayed if id(weight) in hidden]
            others = [weight for weight in decayed if id(weight) not in hidden]
            groups = decay_groups(others, plain, config.weight_decay)
            dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
            return Muon(matrices, groups, weight_decay=config.weight_decay, dtype=dtype, **adamw)
        case _:
            assert_never(config.optimizer)


def decay_groups(decayed: list[nn.Parameter], plain: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with and without decay; none that is empty."""
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> Iterator[Tensor]:
    """The matrices between activations, experts' included: neither embeddings nor outputs nor routers."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention | PointwiseFeedForward):
            yield from (part.weight for part in module.children() if isinstance(part, nn.Linear))
        elif isinstance(module, MixtureOfExperts):
            yield from (module.inner, module.outer)


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
