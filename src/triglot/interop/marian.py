"""Marian (Junczys-Dowmunt et al. 2018) as transformers has it: the original Transformer, post-norm, with sinusoids.

All sines stand before all cosines, where here they alternate: the columns of d_model change places, everywhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triglot.checkpoint import set_weights, weights_of
from triglot.config import BlockOptions, ModelConfig
from triglot.errors import CheckpointError, require
from triglot.interop import bart
from triglot.interop.family import Family
from triglot.interop.links import Link, unchanged
from triglot.models.encoder_decoder import Transformer
from triglot.models.factory import build_model

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


def with_start_behind(model: Transformer, config: ModelConfig, start: int) -> tuple[Transformer, ModelConfig]:
    """The model with one more id, its last, that the decoder begins with instead of `start`: it is all zeros.

    So it is in Marian's models, and engines that read them rely on it. Raises CheckpointError where `start` is not.
    """
    held = weights_of(model)
    zero = not held[bart.EMBEDDING][start].any()
    rule = "zero (train with `train.zero_start` for this export; --to ctranslate2 needs it not)"
    require(zero, "the vector that the decoder begins with", rule, "another", CheckpointError)
    larger = replace(
        config,
        vocab_size=config.vocab_size + 1,
        src_vocab_size=config.src_vocab_size + 1,
        options=replace(config.options, output_bias=True),
    )
    bias = held.get("final_layer.bias", torch.zeros(config.vocab_size))
    held |= {"final_layer.bias": bias}
    rows = (bart.EMBEDDING, "decoder.embedding.tokens.weight", "final_layer.weight", "final_layer.bias")
    held |= {name: torch.cat([held[name], torch.zeros_like(held[name][:1])]) for name in rows if name in held}
    built = build_model(larger)
    set_weights(built, held, "the model")
    assert isinstance(built, Transformer)
    return built, larger


FAMILY = Family(read, write, links, bart.follows, prefix="model.")
