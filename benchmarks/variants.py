"""One change at a time: `python -m benchmarks.variants --data DIR [--recipe RECIPE] [--seeds 1 2] [--set A.B=C] NAME…`.

Trains a recipe once for each variant and seed and scores its last weights over the whole validation part. A variant
that pays becomes an option of the library; the others stay here, so that the table of docs/experiments.md can be made
anew. Each is a change to the model that the recipe builds, or to the recipe's values.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import measure
from triglot import losses, objective
from triglot.blocks import Block
from triglot.config import RunConfig
from triglot.layers import feed_forward
from triglot.layers.attention import MultiHeadAttention
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.models.factory import build_model
from triglot.recipe import load_recipe, shipped_recipes
from triglot.training import session

Change = Callable[[nn.Module], None]
SOFT_CAP = 15.0
EMA = 0.99
BIGRAMS = 1024


def zero_init(model: nn.Module) -> None:
    """What a block adds begins at zero (Zhang et al. 2019, Fixup; modded-nanogpt)."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            nn.init.zeros_(module.output.weight)
        elif isinstance(module, PointwiseFeedForward):
            nn.init.zeros_(module.outer.weight)


def small_init(model: nn.Module) -> None:
    """What a block adds begins smaller by √(2·layers) (Radford et al. 2019, §2.3)."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.output.weight.data /= (2 * len(blocks)) ** 0.5
        elif isinstance(module, PointwiseFeedForward):
            module.outer.weight.data /= (2 * len(blocks)) ** 0.5


def qk_norm(model: nn.Module) -> None:
    """Queries and keys of length √head_dim (Henry et al. 2020; Dehghani et al. 2023), without a gain."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            for projection in (module.query, module.key):
                projection.register_forward_hook(_normalise_heads(module.head_dim))


def _normalise_heads(head_dim: int) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        heads = output.unflatten(-1, (-1, head_dim)).float()
        return F.rms_norm(heads, (head_dim,)).flatten(-2).to(output.dtype)

    return hook


def value_residual(model: nn.Module) -> None:
    """Every layer's values are mixed with the first layer's (Zhou et al. 2024), by a learned share."""
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    first: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        first[:] = [output]

    attentions[0].value.register_forward_hook(keep)
    for attention in attentions[1:]:
        attention.value.mixed = nn.Parameter(torch.tensor(0.5))

        def mix(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            share = module.mixed.to(output.dtype)
            return (1 - share) * output + share * first[0]

        attention.value.register_forward_hook(mix)


def x0_skip(model: nn.Module) -> None:
    """Each block reads its input and the embedding, in learned shares that begin at 1 and 0 (modded-nanogpt)."""
    first: list[Tensor] = []
    for number, block in enumerate(module for module in model.modules() if isinstance(module, Block)):
        if number:
            block.shares = nn.Parameter(torch.tensor([1.0, 0.0]))
        _read_first(block, first, is_first=number == 0)


def _read_first(block: Any, first: list[Tensor], *, is_first: bool) -> None:
    run = block.run

    def with_first(x: Tensor, *arguments: Any, **named: Any) -> Any:
        if is_first:
            first[:] = [x]
        else:
            x = block.shares[0] * x + block.shares[1] * first[0]
        return run(x, *arguments, **named)

    block.run = with_first


def relu_squared(_: nn.Module) -> None:
    """relu(x)² in the feed-forward (So et al. 2021)."""
    feed_forward.activate = lambda x, _: F.relu(x).square()


def soft_cap(_: nn.Module) -> None:
    """Logits c·tanh(l / c) (Gemma 2, §2)."""

    def capped(hidden: Tensor, projection: nn.Linear, targets: Tensor, **how: Any) -> losses.TokenLoss:
        logits = SOFT_CAP * torch.tanh(projection(hidden).float() / SOFT_CAP)
        return losses.token_cross_entropy(logits, targets, label_smoothing=how.get("label_smoothing", 0.0))

    objective.projected_cross_entropy = capped


def bigrams(model: nn.Module) -> None:
    """A second embedding, of a token and the one before it, hashed (modded-nanogpt)."""
    tokens: Any = model.embedding.tokens  # type: ignore[union-attr]
    tokens.bigrams = nn.Embedding(BIGRAMS, tokens.embedding_dim)
    nn.init.zeros_(tokens.bigrams.weight)

    def add(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (ids,) = inputs
        hashed = (F.pad(ids[:, :-1], (1, 0)) * 36313 + ids * 27191) % BIGRAMS
        return output + module.bigrams(hashed).to(output.dtype)

    tokens.register_forward_hook(add)


def ema(model: Any) -> None:
    """What is scored is the exponential moving average of the weights (Polyak and Juditsky 1992)."""
    averages: list[Tensor] = []
    set_mode = model.train

    def follow(*_: Any) -> None:
        weights = [weight.detach() for weight in model.parameters()]
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - EMA)
        else:
            averages.extend(weight.clone() for weight in weights)

    def swap(mode: bool = True) -> Any:
        if averages and mode != model.training:
            for weight, average in zip(model.parameters(), averages, strict=True):
                weight.data, average.data = average.data.clone(), weight.data.clone()
        return set_mode(mode)

    HANDLES.append(register_optimizer_step_post_hook(follow))
    model.train = swap


HANDLES: list[Any] = []
CHANGES: dict[str, Change] = {
    "plain": lambda _: None,
    "zero-init": zero_init,
    "small-init": small_init,
    "qk-norm": qk_norm,
    "value-residual": value_residual,
    "x0-skip": x0_skip,
    "relu2": relu_squared,
    "soft-cap": soft_cap,
    "bigrams": bigrams,
    "ema": ema,
}
VALUES: dict[str, list[str]] = {
    "adamw": ["train.optimizer=adamw"],
    "cosine": ["train.schedule=cosine"],
    "no-decay": ["train.weight_decay=0"],
    "decay-0.5": ["train.weight_decay=0.5"],
    "swiglu": ["model.options.activation=swiglu", "model.d_ff=341"],
    "layer-norm": ["model.options.norm=layer"],
    "one-kv-head": ["model.options.num_kv_heads=1"],
}


def run(config: RunConfig, change: Change) -> dict[str, float]:
    """Train, and score the last weights."""
    before = feed_forward.activate, objective.projected_cross_entropy

    def build(model: Any) -> Any:
        built = build_model(model)
        change(built)
        return built

    session.build_model = build
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "run", time.perf_counter()
        result = session.train(config, out)
        seconds = time.perf_counter() - began
    feed_forward.activate, objective.projected_cross_entropy = before
    while HANDLES:
        HANDLES.pop().remove()
    scores = result.progress.scores
    return {"loss": scores["loss"], "seconds": seconds}


def main() -> None:
    """Train all that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*CHANGES, *VALUES], metavar="NAME")
    parser.add_argument("--data", required=True, help="the folder of the recipe's data")
    parser.add_argument("--recipe", default="tinyshakespeare-cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print(measure.machine())
    for name in options.names:
        for seed in options.seeds:
            values = (f"data.root={options.data}", f"seed={seed}", "train.samples=0", *options.set)
            config = load_recipe(shipped_recipes()[options.recipe], (*values, *VALUES.get(name, [])))
            found = run(config, CHANGES.get(name, CHANGES["plain"]))
            print(f"{name:16} seed {seed}  loss {found['loss']:.4f}  {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
