"""Mixtures of experts beside what they replace and a peer: `python -m benchmarks.experts [--quick] [--json FILE]`.

Sides take turns, each in a process of its own: forward and backward of one layer over 4,096 tokens of width 384, beside
a dense layer of as many active operations and beside transformers' Mixtral block with the same gated experts; then what
a decoding step takes beside one reading of the weights it needs, and the memory that many small experts cost.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import Row, Side, Work
from triglot.allocator import keep_freed_memory
from triglot.generation.aot import Run, bound, compile_module
from triglot.generation.attention import at_least
from triglot.generation.compiled import GRAIN
from triglot.generation.one_token import RowExperts
from triglot.generation.prepared import PreparedExperts
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.packed import Packer

TOKENS, WIDTH = 4096, 384
MEMORY_TOKENS = 16_384
"""So many that what importing PyTorch has taken for a moment is small beside them."""


class Shape(NamedTuple):
    """Of a layer."""

    experts: int
    k: int
    expert_dim: int


EIGHT = Shape(8, 2, 768)
SIXTY_FOUR = Shape(64, 8, 192)
"""As many active parameters, cut finer."""
MANY = Shape(64, 2, 96)
"""As many tokens · k and as much width in all as EIGHT."""
DECODING = Shape(8, 2, 2816)
DECODING_WIDTH, DECODING_LAYERS = 1024, 4
PRECISIONS = ("fp32", "bf16", "bf16 weights")
"""Products of a peer may follow its weights' type and not autocast."""


def layer(shape: Shape, activation: Any = "gelu", backend: Any = None, width: int = WIDTH) -> MixtureOfExperts:
    """Ours, without anything that a peer does not do."""
    torch.manual_seed(1)
    return MixtureOfExperts(
        width, *shape[::2], shape.k, None, activation=activation, bias=activation == "gelu", router_bias=False,
        backend=backend,
    )  # fmt: skip


def passes(module: nn.Module, precision: str, tokens: int = TOKENS) -> Work:
    """Forward and backward over the same tokens again and again; gradients of weights and tokens.

    bf16 weights: those, too, are of that type, and nothing is cast.
    """
    torch.manual_seed(2)
    dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    module.to(dtype)
    x, upstream = (torch.randn(16, tokens // 16, WIDTH).to(dtype) for _ in range(2))
    x.requires_grad_()

    def work() -> int:
        x.grad = None
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = module(x)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        output.backward(upstream.to(output.dtype))
        return tokens

    return work


def ours(shape: Shape, activation: str, precision: str, backend: str | None = None) -> Work:
    """A layer of experts."""
    keep_freed_memory()
    return passes(layer(shape, activation, backend), precision)


def dense(precision: str) -> Work:
    """The feed-forward that does as much for a token as EIGHT does."""
    keep_freed_memory()
    torch.manual_seed(1)
    return passes(PointwiseFeedForward(WIDTH, EIGHT.k * EIGHT.expert_dim, 0.0, activation="gelu"), precision)


def mixtral(shape: Shape, precision: str, backend: str) -> Work:
    """transformers' block, given as much freedom to keep freed memory."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    keep_freed_memory()
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=shape.expert_dim, num_local_experts=shape.experts,
        num_experts_per_tok=shape.k, experts_implementation=backend,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config).train()
    own = layer(shape, "swiglu")
    with torch.no_grad():
        block.gate.weight.copy_(own.router.weight)
        block.experts.gate_up_proj.copy_(own.inner)
        block.experts.down_proj.copy_(own.outer)
    return passes(block, precision)


def settings(section: str) -> dict[str, dict[str, Callable[[], Work]]]:
    """Everyone's settings in a section, ours first."""
    kind, _, rest = section.partition(": ")
    if kind == "dense":
        return {"experts": {rest: partial(ours, EIGHT, "gelu", rest)}, "dense": {rest: partial(dense, rest)}}
    shape = EIGHT if rest.startswith("8") else SIXTY_FOUR
    return {
        "triglot": {precision: partial(ours, shape, "swiglu", precision) for precision in PRECISIONS},
        "transformers": {
            f"{precision}, {backend}": partial(mixtral, shape, precision, backend)
            for precision in PRECISIONS
            for backend in ("eager", "grouped_mm")
        },
    }


SECTIONS = ["dense: fp32", "dense: bf16", "Mixtral: 8 experts", "Mixtral: 64 experts"]


def section_rows(section: str, quick: bool) -> list[Row]:
    """All sides in turns, each with the setting that was the fastest in a first turn."""

    def side(name: str, setting: str) -> Side:
        return Side("benchmarks.experts", ["--side", section, name, setting])

    rounds, seconds = (1, 0.5) if quick else (7, 3.0)
    chosen = {}
    for name, known in settings(section).items():
        speeds = {}
        for setting in known if len(known) > 1 else ():
            one = side(name, setting)
            answers = [one.ask(seconds) for _ in range(2)]
            speeds[setting] = answers[-1]["done"] / answers[-1]["seconds"]
            one.end()
            print(f"{section}: {name}, {setting}: {speeds[setting]:,.0f} tokens/s", flush=True)
        chosen[name] = max(speeds, key=lambda setting: speeds[setting]) if speeds else next(iter(known))
    sides = {f"{name}, {setting}": side(name, setting) for name, setting in chosen.items()}
    found = measure.rates(sides, rounds, seconds)
    for one in sides.values():
        one.end()
    return measure.rows(section, found, next(iter(sides)), "tokens/s")


# Decoding


def decoding_steps(precision: Any) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """One token through each of some layers, whose weights no cache holds together; and the bytes of k experts."""
    for number in range(DECODING_LAYERS):
        moe = layer(DECODING, "swiglu", width=DECODING_WIDTH).eval()
        packer = Packer(precision)
        prepared = PreparedExperts(moe, packer)
        x = torch.randn(1, DECODING_WIDTH, generator=torch.Generator().manual_seed(number))
        step = partial(prepared.step, at_least(x, packer.least_rows), rows=1)  # as a block's step calls it
        yield step, packer.num_bytes * DECODING.k // DECODING.experts


def compiled_steps(precision: Any) -> Iterator[tuple[Callable[[], Any], int]]:
    """The same by compiled code, which all layers share."""
    run: Run | None = None
    for number in range(DECODING_LAYERS):
        rows = RowExperts(layer(DECODING, "swiglu", width=DECODING_WIDTH).eval(), precision)
        x = torch.randn(1, 1, DECODING_WIDTH, generator=torch.Generator().manual_seed(number))
        run = run or compile_module(rows, (x,), (None,), GRAIN[1])
        read = rows.inner.weight.nbytes + rows.outer.weight.nbytes
        yield partial(bound(run, rows), [x]), read * DECODING.k // DECODING.experts


def decoding_rows(quick: bool) -> list[Row]:
    """The time of a layer over that of reading its k experts' weights once."""
    found = []
    for make, precision in itertools.product((decoding_steps, compiled_steps), ("fp32", "int8")):
        with torch.no_grad():
            steps = list(make(precision))
        read, seconds = measure.read_rate(), []
        with torch.inference_mode():
            for _ in range(5 if quick else 40):
                for step, _ in steps:
                    seconds.append(measure.seconds(step))
        ours, bound = statistics.median(seconds), steps[0][1] / read
        how = precision + ", compiled" * (make is compiled_steps)
        name = f"decoding: one token, {how}, time of a layer over reading {DECODING.k} experts' weights"
        found.append(
            {
                "name": name,
                "ours": ours * 1e3,
                "peer": bound * 1e3,
                "ratio": ours / bound,
                "unit": "ms",
                "runs": len(seconds),
            }
        )
    return found


# Memory


def passes_after_few(shape: Shape) -> Work:
    """The work, made once layer, gradients of its weights and what the libraries keep are there."""
    keep_freed_memory()
    module = layer(shape)
    module(torch.randn(1, shape.experts, WIDTH)).square().sum().backward()
    return passes(module, "fp32", MEMORY_TOKENS)


def memory_row(quick: bool) -> Row:
    """What forward and backward hold at most beside weights and their gradients, 64 experts against 8."""
    found = {}
    for name in ("64", "8"):
        one = Side("benchmarks.experts", ["--side", "memory: ", name, "fp32"])
        found[name] = one.ask(0.5 if quick else 3.0)["memory"] / 2**20
        one.end()
    return {
        "name": "memory: forward and backward beside the weights, 64 experts of 96 / 8 of 768, k = 2",
        "ours": found["64"],
        "peer": found["8"],
        "ratio": found["64"] / found["8"],
        "unit": "MiB",
        "runs": 1,
    }


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="sections whose names have one of these words")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        section, name, setting = options.side
        if section.startswith("memory"):
            measure.serve(partial(passes_after_few, MANY if name == "64" else EIGHT), beside=True)
        else:
            measure.serve(settings(section)[name][setting])
        return

    def wanted(section: str) -> bool:
        return not options.only or any(word in section for word in options.only)

    found = [row for section in SECTIONS if wanted(section) for row in section_rows(section, options.quick)]
    found += decoding_rows(options.quick) if wanted("decoding") else []
    found += [memory_row(options.quick)] if wanted("memory") else []
    measure.report(found, options.json)


if __name__ == "__main__":
    main()
