"""A dense run turned into one with experts that computes the same (Komatsuzaki et al. 2023; He et al. 2024)."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from triglot.checkpoint import Loaded, Progress, load_model, save_checkpoint, step_name
from triglot.config import ExpertOptions, RunConfig
from triglot.errors import ConfigError, require
from triglot.files import write_json
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.moe import MixtureOfExperts
from triglot.models.factory import build_model
from triglot.recipe import to_dict

ROUTER_STD = 0.02
"""Of the routers' first weights: small, so that which experts a token visits is open, and training settles it."""


def upcycle(run: Path, out: Path, experts: ExpertOptions, which: str = "best", seed: int = 0) -> RunConfig:
    """Write to `out` a run without steps whose feed-forwards are experts, each of them the one there was.

    A token's weights sum to 1, so that whatever a router chooses the output is the dense model's, beyond rounding;
    as the experts learn from different tokens, they part. To train on, a recipe names it as `init.from`. Raises
    ConfigError where `out` exists, where the run has experts already, and for options that would change the output.
    """
    require(not out.exists(), "out", "a new folder, since nothing is overwritten", str(out), ConfigError)
    _check(experts)
    dense = load_model(run, which)
    had = dense.config.model.options.experts
    require(had is None, "run", "one without experts", f"one with {had.num_experts if had else 0}", ConfigError)
    torch.manual_seed(seed)
    made = with_experts(dense, experts)
    out.mkdir(parents=True)
    dense.tokenizers.save(out)
    write_json(out / "config.json", to_dict(made.config))
    save_checkpoint(out, step_name(0), made.config, made.model, Progress())
    return made.config


def _check(experts: ExpertOptions) -> None:
    factor = experts.capacity_factor
    require(factor is None, "capacity_factor", "None, since dropped tokens change the output", factor, ConfigError)
    require(experts.router != "expert_choice", "router", "one whose weights sum to 1", experts.router, ConfigError)
    rule = "left out or true, since weights that do not sum to 1 change the output"
    require(experts.renormalize is not False, "renormalize", rule, experts.renormalize, ConfigError)
    rule = "at least 2, since the weight of a single choice is below 1 and the output would change"
    require(experts.top_k > 1, "top_k", rule, experts.top_k, ConfigError)
    require(
        experts.d_ff is None, "d_ff", "left out: an expert is as wide as what it is made of", experts.d_ff, ConfigError
    )
    require(
        experts.shared == 0, "shared", "0, since further experts would change the output", experts.shared, ConfigError
    )


@torch.no_grad()
def with_experts(dense: Loaded, experts: ExpertOptions) -> Loaded:
    """The dense model with experts in its place, on the processor."""
    options = dataclasses.replace(dense.config.model.options, experts=experts)
    config = dataclasses.replace(dense.config, model=dataclasses.replace(dense.config.model, options=options))
    model = build_model(config.model).eval()
    before = dict(dense.model.named_modules())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
    routers = [layer.router for layer in layers.values()]
    for name, module in model.named_modules():
        if name in layers:
            _fill(layers[name], before[name])
        elif module not in routers:
            for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                tensor.copy_(getattr(before[name], part))
    return Loaded(model, config, dense.tokenizers)


def _fill(moe: MixtureOfExperts, dense: nn.Module) -> None:
    assert isinstance(dense, PointwiseFeedForward)
    for stack, bias, linear in ((moe.inner, moe.inner_bias, dense.inner), (moe.outer, moe.outer_bias, dense.outer)):
        stack.copy_(linear.weight.expand_as(stack))
        if bias is not None:
            bias.copy_(linear.bias.expand_as(bias))
    nn.init.normal_(moe.router.weight, std=ROUTER_STD)
    if moe.router.bias is not None:
        nn.init.zeros_(moe.router.bias)
