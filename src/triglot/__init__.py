"""Triglot: encoder–decoder, decoder-only and mixture-of-experts Transformers in one PyTorch codebase.

Public names are imported when they are first used (PEP 562), so that `triglot --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triglot.blocks import DecoderBlock, DecoderLayer, EncoderLayer
    from triglot.config import BlockOptions, ExpertOptions, ModelConfig
    from triglot.errors import CheckpointError, ConfigError, DataError, TriglotError
    from triglot.generation.engine import load
    from triglot.layers.attention import MultiHeadAttention
    from triglot.layers.feed_forward import PointwiseFeedForward
    from triglot.layers.masks import create_look_ahead_mask, create_masks, create_padding_mask
    from triglot.layers.moe import MixtureOfExperts
    from triglot.layers.positions import PositionalEncoding
    from triglot.models.decoder_only import DecoderLLM
    from triglot.models.document import load_document_weights
    from triglot.models.encoder_decoder import Decoder, Encoder, Transformer
    from triglot.tokenizer import Tokenizer
    from triglot.training.plain import train_step

__all__ = [
    "BlockOptions",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Decoder",
    "DecoderBlock",
    "DecoderLLM",
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "ExpertOptions",
    "MixtureOfExperts",
    "ModelConfig",
    "MultiHeadAttention",
    "PointwiseFeedForward",
    "PositionalEncoding",
    "Tokenizer",
    "Transformer",
    "TriglotError",
    "create_look_ahead_mask",
    "create_masks",
    "create_padding_mask",
    "load",
    "load_document_weights",
    "train_step",
]

_HOME = {
    "blocks": ("DecoderBlock", "DecoderLayer", "EncoderLayer"),
    "config": ("BlockOptions", "ExpertOptions", "ModelConfig"),
    "errors": ("CheckpointError", "ConfigError", "DataError", "TriglotError"),
    "generation.engine": ("load",),
    "layers.attention": ("MultiHeadAttention",),
    "layers.feed_forward": ("PointwiseFeedForward",),
    "layers.masks": ("create_look_ahead_mask", "create_masks", "create_padding_mask"),
    "layers.moe": ("MixtureOfExperts",),
    "layers.positions": ("PositionalEncoding",),
    "models.decoder_only": ("DecoderLLM",),
    "models.document": ("load_document_weights",),
    "models.encoder_decoder": ("Decoder", "Encoder", "Transformer"),
    "tokenizer": ("Tokenizer",),
    "training.plain": ("train_step",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("triglot")
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"triglot.{module}"), name)
    raise AttributeError(f"module 'triglot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
