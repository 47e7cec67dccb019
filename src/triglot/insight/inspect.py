"""What a model is made of and what it costs: its modules with the shapes that a real forward pass has, and arithmetic.

FLOPs are those of the matrix products, a multiplication and an addition counted as two (Kaplan et al. 2020, table 1);
attention is counted as it is computed, over all keys, hidden ones included.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from triglot.checkpoint import load_model
from triglot.errors import ConfigError, require
from triglot.layers.attention import MultiHeadAttention
from triglot.layers.masks import create_masks
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.norm import Residual
from triglot.layers.positions import RotaryPositions
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.factory import count_active_parameters, count_parameters

Model = Transformer | DecoderLLM
PIPED = 160
"""Columns where no terminal says how many it has."""
WIDTHS = {
    "query": "width",
    "key": "kv_width",
    "value": "kv_width",
    "inner": "d_ff",
    "lm_head": "vocab",
    "final_layer": "vocab",
}
"""What the last axis of a plain linear layer is called where that is not d_model."""


class Shape(NamedTuple):
    """A tensor of a forward pass: what it is, and its axes' names beside their sizes."""

    what: str
    axes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return "[" + ", ".join(f"{name} {size}" for name, size in self.axes) + "]"


@dataclass
class Part:
    """A module: what came out of it, its parameters, and the FLOPs of the batch in it and below it."""

    name: str
    kind: str
    parameters: int
    active: int
    shapes: list[Shape] = field(default_factory=list)
    flops: int = 0
    parts: "list[Part]" = field(default_factory=list)

    def alike(self, other: "Part") -> bool:
        """Whether the other part differs in nothing but its name."""
        same = (self.kind, self.parameters, self.active, self.flops, self.shapes)
        return (
            same == (other.kind, other.parameters, other.active, other.flops, other.shapes)
            and len(self.parts) == len(other.parts)
            and all(a.alike(b) and a.name == b.name for a, b in zip(self.parts, other.parts, strict=True))
        )


class Costs(NamedTuple):
    """What one token costs, by name of the token's side; bytes are of the model's own dtype."""

    flops: dict[str, float]
    """Forward, at the length that was looked at; training costs three times as much."""
    cached: dict[str, int]
    """Bytes of keys and values held for each token while decoding."""
    kept: float
    """Bytes that a training step keeps for its backward pass, measured, per token of the batch."""


class Inspection(NamedTuple):
    """All that `inspect` prints."""

    tree: Part
    parameters: int
    active: int
    costs: Costs


def inspect(
    run: Path, *, batch: int = 2, length: int = 7, which: str = "best", console: Console | None = None
) -> Inspection:
    """Print a run's modules, shapes, parameters and costs; raises CheckpointError, and ConfigError for a bad size."""
    model = load_model(run, which).model
    found = look(model, batch, length)
    console = console or Console(width=None if sys.stdout.isatty() else PIPED)
    show(found, f"{run.name or run}, batch {batch}, length {length}", console)
    return found


def look(model: Model, batch: int, length: int) -> Inspection:
    """Run `model` on a random batch and note what comes out of every module.

    An encoder–decoder's target is one token longer than its source, so that their axes are told apart.
    """
    require(batch >= 1, "batch", "at least 1", batch, ConfigError)
    longest = model.max_len if isinstance(model, DecoderLLM) else model.max_seq_length - 1
    require(1 <= length <= longest, "length", f"between 1 and {longest}", length, ConfigError)
    forward = random_pass(model, batch, length)
    with torch.no_grad(), recording(model) as tree:
        forward(need_weights=True)
    return Inspection(tree, count_parameters(model), count_active_parameters(model), costs(model, tree, batch, length))


def random_pass(model: Model, batch: int, length: int) -> Callable[..., Tensor]:
    """A forward pass over random tokens, up to the logits."""
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))

    def forward(*, need_weights: bool) -> Tensor:
        if isinstance(model, DecoderLLM):
            ids = draw(model.vocab_size, (batch, length))
            return model.head(model.run(ids, need_weights=need_weights).hidden)
        sizes = model.encoder.embedding.tokens.num_embeddings, model.decoder.embedding.tokens.num_embeddings
        src, tgt = draw(1, sizes[0], (batch, length)), draw(1, sizes[1], (batch, length + 1))
        return model.head(model.run(src, tgt, *create_masks(src, tgt), need_weights=need_weights).hidden)

    return forward


# Recording


@contextmanager
def recording(model: nn.Module) -> Iterator[Part]:
    """The tree of parts, with what the forward passes inside the context do; afterwards the model is as it was."""
    parts: dict[str, Part] = {}
    with ExitStack() as undo:
        for path, module in model.named_modules():
            above, _, name = path.rpartition(".")
            inner = name in ("norm", "query_norm", "key_norm", "table")  # told with what it is a part of
            if inner or isinstance(module, nn.Dropout | nn.Identity):
                continue
            part = Part(name or "model", _kind_of(module), count_parameters(module), count_active_parameters(module))
            parts[path] = part
            if path:
                parts[above].parts.append(part)
            side = "decoder" if isinstance(module, Transformer) else path
            record = partial(note, part, side, module)
            undo.callback(module.register_forward_hook(partial(_after_forward, record)).remove)
            for method in ("run", "attend"):
                if hasattr(module, method):
                    undo.enter_context(wrapped(module, method, record))
        yield parts[""]
    total(parts[""])


def _kind_of(module: nn.Module) -> str:
    if isinstance(module, nn.ModuleList):
        return ""
    return type(module.norm if isinstance(module, Residual) else module).__name__


def _after_forward(record: Callable[[str, Any, Any], None], _: nn.Module, inputs: Any, output: Any) -> None:
    record("forward", inputs, output)


@contextmanager
def wrapped(module: nn.Module, method: str, record: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Inner calls are no forwards, so no hook of torch sees them."""
    original = getattr(module, method)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        record(method, args, output)
        return output

    setattr(module, method, recorded)
    try:
        yield
    finally:
        delattr(module, method)


def note(part: Part, path: str, module: nn.Module, method: str, inputs: tuple[Any, ...], output: Any) -> None:
    """Add to `part` the shapes that a call gave, and the FLOPs of its own products."""
    if method == "attend":
        query, key, value = inputs[:3]
        for what, tensor, names in (
            ("Q", query, "batch heads query head_dim"),
            ("K", key, "batch kv_heads key head_dim"),
            ("V", value, "batch kv_heads key head_dim"),
            ("scores, weights", output[1], "batch heads query key"),
        ):
            if tensor is not None:
                part.shapes.append(shape(what, tensor, names, path))
        part.flops += 4 * query.numel() * key.size(2)  # QKᵀ, and the weights times V
    elif isinstance(module, MixtureOfExperts):
        tokens, routing = inputs[0].shape[:2].numel(), output.routing
        expert = module.inner[0].numel() + module.outer[0].numel()
        part.flops += 2 * tokens * (module.router.weight.numel() + module.k * expert)
        part.shapes.append(shape("", output.output, "batch length d_model", path))
        part.shapes.append(shape("experts, weights", routing.experts, "batch length top_k", path))
        part.shapes.append(shape("load", routing.load, "experts", path))
    elif isinstance(module, nn.Linear):
        part.flops += 2 * inputs[0].numel() * module.out_features
        part.shapes.append(shape("", output, f"batch length {WIDTHS.get(part.name, 'd_model')}", path))
    else:
        main = output if isinstance(output, Tensor) else output[0]
        if not isinstance(module, RotaryPositions):
            part.shapes.append(shape("", main, axes_of(module, method), path))


def axes_of(module: nn.Module, method: str) -> str:
    """The axes of a call's result, or of the first of its results, as its own annotation names them."""
    if not type(module).__module__.startswith("triglot."):
        return "batch length d_model"
    hint = get_type_hints(getattr(type(module), method))["return"]
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    elif hasattr(hint, "_fields"):
        hint = get_type_hints(hint)[hint._fields[0]]
    return str(hint.dim_str).replace("#", "")


def shape(what: str, tensor: Tensor, names: str, path: str) -> Shape:
    """Names beside sizes; lengths of an encoder–decoder are told apart as source and target."""
    axes = [_side_of(name, path) for name in names.split()]
    return Shape(what, tuple(zip(axes, tensor.shape, strict=True)))


def _side_of(axis: str, path: str) -> str:
    if axis == "memory" or (axis in ("length", "query", "key") and path.startswith("encoder")):
        return "source"
    if not path.startswith(("decoder", "final_layer")):
        return axis
    crossing = ".cross_attention" in path
    if axis == "key" or (axis == "length" and crossing and path.endswith((".key", ".value"))):
        return "source" if crossing else "target"
    return "target" if axis in ("length", "query") else axis


def total(part: Part) -> int:
    """FLOPs of the parts below are the part's own too."""
    part.flops += sum(map(total, part.parts))
    return part.flops


# Costs


def costs(model: Model, tree: Part, batch: int, length: int) -> Costs:
    """What a token costs: from the FLOPs of the recorded batch, the cache's layout, and a measured training pass."""
    blocks = model.layers if isinstance(model, DecoderLLM) else model.decoder.layers
    attention = next(module for module in blocks.modules() if isinstance(module, MultiHeadAttention))
    held = 2 * len(blocks) * attention.key.out_features * attention.key.weight.element_size()
    kept = kept_bytes(model, random_pass(model, batch, length))
    if isinstance(model, DecoderLLM):
        return Costs({"token": tree.flops / (batch * length)}, {"token": held}, kept / (batch * length))
    encoder = next(part for part in tree.parts if part.name == "encoder")
    source, target = batch * length, batch * (length + 1)
    flops = {"source token": encoder.flops / source, "target token": (tree.flops - encoder.flops) / target}
    return Costs(flops, {"source token": held, "target token": held}, kept / (source + target))


def kept_bytes(model: nn.Module, forward: Callable[..., Tensor]) -> int:
    """Bytes of the tensors, parameters left out, that a training forward pass saves for its backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no two saved tensors can have had the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forward(need_weights=False)
    finally:
        model.train(was_training)
    return sum(saved.values())


# Showing


def show(found: Inspection, title: str, console: Console) -> None:
    """The tree of parts as a table, layers that are alike once, and the costs below it."""
    table = Table(title=f"Modules of {escape(title)}", title_justify="left", box=None, pad_edge=False)
    for name in ("module", "kind", "shape"):
        if name != "kind" or console.width >= 112:  # on a narrow screen shapes are worth more
            table.add_column(name, overflow="fold")
    for name in ("parameters", "MFLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    rows(table, found.tree, "")
    console.print(table)
    console.print()
    for name, value in summary(found).items():
        console.print(f"{name}: [bold]{value}[/]", highlight=False)


def rows(table: Table, part: Part, indent: str) -> None:
    """One row for what comes out of the part, one for each tensor inside it, then those of its parts."""
    outer = [one for one in part.shapes if not one.what]
    active = f"\n({part.active:,} active)" if part.active != part.parameters else ""
    size = f"{part.parameters:,}{active}" if part.parameters else ""
    mega = f"{part.flops / 1e6:,.3f}" if part.flops else ""
    _row(table, f"{indent}{part.name}", part.kind, str(outer[-1]) if outer else "", size, mega)
    indent += "  "
    for one in part.shapes:
        if one.what:
            _row(table, f"{indent}[italic]{one.what}[/]", "", str(one))
    told: list[Part] = []
    for below in part.parts:
        same = next((one for one in told if below.name.isdigit() and one.alike(below)), None)
        if same is None:
            told.append(below)
            rows(table, below, indent)
        else:
            _row(table, f"{indent}{below.name}", "", f"as {same.name}", f"{below.parameters:,}")


def _row(table: Table, name: str, kind: str, shape: str, *numbers: str) -> None:
    kinds = [kind] if len(table.columns) == 5 else []
    table.add_row(name, *kinds, escape(shape), *numbers)


def summary(found: Inspection) -> Mapping[str, str]:
    """Totals and costs in words."""
    lines = {"Parameters": f"{found.parameters:,}"}
    if found.active != found.parameters:
        lines["Active per token"] = f"{found.active:,} ({found.active / found.parameters:.0%})"
    for name, flops in found.costs.flops.items():
        lines[f"FLOPs per {name}"] = f"{flops:,.0f} forward, {3 * flops:,.0f} forward and backward"
    for name, held in found.costs.cached.items():
        lines[f"Key-value cache per {name}"] = f"{held:,} bytes"
    lines["Kept for the backward pass per token"] = f"{found.costs.kept:,.0f} bytes (measured, fp32)"
    return lines
