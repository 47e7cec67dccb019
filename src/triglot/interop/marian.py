"""Marian (Junczys-Dowmunt et al. 2018) as transformers has it: the original Transformer, post-norm, with sinusoids.

All sines stand before all cosines, where here they alternate: the columns of d_model change places, everywhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from triglot.config import BlockOptions, ModelConfig
from triglot.interop import bart
from triglot.interop.family import Family
from triglot.interop.links import Link, unchanged

OPTIONS = BlockOptions(tie_embeddings=True, output_bias=True)
INTO_HEADS = ("query", "key", "value", "inner")
"""Projections that read d_model and give something else."""


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    return bart.read_common(values, OPTIONS)


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, if it is one of these."""
    return bart.write_common(config) | {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
    }


def links(config: ModelConfig) -> Iterator[Link]:
    """Which tensors are which."""
    yield Link((bart.EMBEDDING,), ("model.shared.weight",), alternating, halves)
    yield Link(("final_layer.bias",), ("final_logits_bias",), bart.flat, bart.row)
    for side in ("encoder", "decoder"):
        for number in range(config.num_layers):
            for ours, theirs in bart.block(side):
                places = f"{side}.layers.{number}.{ours}", f"model.{side}.layers.{number}.{theirs}"
                yield Link(places[:1], places[1:], *changes(ours))


def changes(ours: str) -> tuple[Any, Any]:
    """How a tensor's columns or rows change places."""
    *_, part, kind = ours.split(".")
    if part in INTO_HEADS:
        return (alternating, halves) if kind == "weight" else (unchanged, unchanged)
    return rows_alternating, rows_halves


def halves(x: Tensor) -> Tensor:
    """Columns as they stand there: even ones, then odd ones."""
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def alternating(x: Tensor) -> Tensor:
    """Columns as they stand here."""
    even = (x.size(-1) + 1) // 2
    order = torch.empty(x.size(-1), dtype=torch.long)
    order[::2], order[1::2] = torch.arange(even), torch.arange(even, x.size(-1))
    return x[..., order]


def rows_halves(x: Tensor) -> Tensor:
    """Of a projection to d_model, or a vector of that width."""
    return halves(x.T).T if x.dim() == 2 else halves(x)


def rows_alternating(x: Tensor) -> Tensor:
    """Of a projection to d_model, or a vector of that width."""
    return alternating(x.T).T if x.dim() == 2 else alternating(x)


FAMILY = Family(read, write, links, bart.follows, prefix="model.")
