"""CTranslate2's own format, in fp32, which it makes smaller as it loads it.

Post- and pre-norm, sinusoids, learned and rotary positions, ReLU, GELU and SwiGLU, grouped queries; no experts.
"""

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triglot.interop.tensors import require_file
from triglot.layers.activations import is_gated
from triglot.layers.attention import MultiHeadAttention
from triglot.layers.embedding import Embedding
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.norm import Residual
from triglot.layers.positions import LearnedPositions, PositionalEncoding
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.stack import Stack

SAME = {
    "qk_norm": None,
    "window": None,
    "rope_scaling": None,
    "embedding_norm": False,
    "scale_attention": True,
    "scale_output": False,
    "experts": None,
}
"""Options that must be as they are by default."""


class Words(NamedTuple):
    """The pieces of both sides' vocabularies, in the order of their ids, and those that stand for something."""

    source: Sequence[str]
    target: Sequence[str]
    start: str
    """What a decoder reads first."""
    end: str
    unknown: str


def write(model: Transformer | DecoderLLM, folder: Path, words: Words) -> None:
    """Write a model with its vocabularies; CheckpointError for what CTranslate2 computes otherwise."""
    from ctranslate2.specs import transformer_spec

    for name, value in SAME.items():
        found = getattr(model.options, name)
        told = type(found).__name__ if is_dataclass(found) else found
        require_file(found == value, f"options.{name}", f"{value!r} for CTranslate2", told)
    stack = model.decoder if isinstance(model, Transformer) else model
    first: Any = stack.layers[0]
    equal = stack.d_model // first.self_attention.num_heads
    require_file(stack.head_dim == equal, "options.head_dim", f"{equal}, as many heads share d_model", stack.head_dim)
    positions = model.options.positions
    require_file(positions != "relative", "options.positions", "sinusoidal, learned or rotary", positions)

    if isinstance(model, Transformer):
        encoder = transformer_spec.TransformerEncoderSpec(*_sizes(model.encoder), **_shape(model.encoder))
        decoder = transformer_spec.TransformerDecoderSpec(*_sizes(model.decoder), **_shape(model.decoder))
        spec: Any = transformer_spec.TransformerSpec(encoder, decoder)
        _fill_stack(encoder, model.encoder)
        _fill_stack(decoder, model.decoder)
        spec.register_source_vocabulary(list(words.source))
        spec.register_target_vocabulary(list(words.target))
        spec.config.decoder_start_token, spec.config.add_source_eos = words.start, False
    else:
        shape = {**_shape(model), "with_encoder_attention": False}
        decoder = transformer_spec.TransformerDecoderSpec(*_sizes(model), **shape)
        spec = transformer_spec.TransformerDecoderModelSpec(decoder)
        _fill_stack(decoder, model)
        spec.register_vocabulary(list(words.target))
    _fill_linear(decoder.projection, [model.projection])
    spec.config.bos_token, spec.config.eos_token = words.start, words.end
    spec.config.unk_token = words.unknown
    spec.config.layer_norm_epsilon = model.options.norm_eps
    spec.validate()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def _sizes(stack: Stack) -> tuple[int, int]:
    return len(stack.layers), stack.d_model // stack.head_dim


def _shape(stack: Stack) -> dict[str, Any]:
    from ctranslate2.specs.common_spec import Activation

    options = stack.options
    activations = {
        "relu": Activation.RELU,
        "gelu": Activation.GELU,
        "gelu_tanh": Activation.GELUTanh,
        "silu": Activation.SWISH,
        "swiglu": Activation.SWISH,
        "geglu_tanh": Activation.GELUTanh,
    }
    shape = {
        "pre_norm": options.norm_order == "pre",
        "no_final_norm": isinstance(stack.final_norm, nn.Identity),
        "activation": activations[options.activation],
        "ffn_glu": is_gated(options.activation),
        "rms_norm": options.norm == "rms",
        "num_heads_kv": options.num_kv_heads,
    }
    if options.positions == "rotary":
        shape |= {"rotary_dim": 0, "rotary_interleave": False, "rotary_base": options.rope_theta}
    return shape


def _fill_stack(spec: Any, stack: Stack) -> None:
    embedding = stack.embedding
    embeddings = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    embeddings.weight = embedding.tokens.weight.detach()
    spec.scale_embeddings = embedding.scale != 1.0
    if (table := position_table(embedding)) is not None:
        spec.position_encodings.encodings = table
    if not isinstance(stack.final_norm, nn.Identity):
        _fill_norm(spec.layer_norm, stack.final_norm)
    for into, block in zip(spec.layer, stack.layers, strict=True):
        _fill_block(into, block)


def _fill_block(spec: Any, block: Any) -> None:
    own: MultiHeadAttention = block.self_attention
    _fill_attention(spec.self_attention, [[own.query, own.key, own.value], [own.output]], block.around_self_attention)
    if hasattr(block, "cross_attention"):
        cross: MultiHeadAttention = block.cross_attention
        parts = [[cross.query], [cross.key, cross.value], [cross.output]]
        _fill_attention(spec.attention, parts, block.around_cross_attention)
    feed: PointwiseFeedForward = block.feed_forward
    if is_gated(feed.activation):
        gate, up = feed.inner.weight.detach().chunk(2)
        spec.ffn.linear_0.weight, spec.ffn.linear_0_noact.weight = gate.contiguous(), up.contiguous()
    else:
        _fill_linear(spec.ffn.linear_0, [feed.inner])
    _fill_linear(spec.ffn.linear_1, [feed.outer])
    _fill_norm(spec.ffn.layer_norm, block.around_feed_forward.norm)


def _fill_attention(spec: Any, parts: Sequence[Sequence[nn.Linear]], around: Residual) -> None:
    for into, linears in zip(spec.linear, parts, strict=True):
        _fill_linear(into, linears)
    _fill_norm(spec.layer_norm, around.norm)


def _fill_linear(spec: Any, linears: Sequence[nn.Linear]) -> None:
    spec.weight = torch.cat([linear.weight.detach() for linear in linears])
    if linears[0].bias is not None:
        spec.bias = torch.cat([linear.bias.detach() for linear in linears])


def _fill_norm(spec: Any, norm: Any) -> None:
    spec.gamma = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        spec.beta = norm.bias.detach()


def position_table(embedding: Embedding) -> Tensor | None:
    """What is added to the embedding at each position."""
    match embedding.added:
        case PositionalEncoding() as added:
            return added.table.clone()
        case LearnedPositions() as added:
            return added.embedding.weight.detach()
        case _:
            return None
