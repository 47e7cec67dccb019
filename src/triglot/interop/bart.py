"""BART (Lewis et al. 2020): an encoder–decoder with post-norm, learned positions and a norm of its embeddings.

Its tables of positions begin with two rows that no token stands at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from triglot.config import Activation, BlockOptions, ModelConfig
from triglot.interop.family import Family
from triglot.interop.links import Link, same
from triglot.interop.settings import expect, setting

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu_new": "gelu_tanh",
}
OPTIONS = BlockOptions(positions="learned", embedding_norm=True, tie_embeddings=True, output_bias=True)
UNUSED = 2
"""Rows before the first position's."""
EMBEDDING = "encoder.embedding.tokens.weight"


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    return read_common(values, OPTIONS)


def read_common(values: Mapping[str, Any], options: BlockOptions) -> ModelConfig:
    """What Marian calls by the same names."""
    layers, heads, d_ff = (setting(values, f"encoder_{name}", int) for name in ("layers", "attention_heads", "ffn_dim"))
    vocab_size = setting(values, "vocab_size", int)
    expect(
        values,
        activation_function=tuple(ACTIVATIONS),
        decoder_layers=(layers,),
        decoder_attention_heads=(heads,),
        decoder_ffn_dim=(d_ff,),
        decoder_vocab_size=(vocab_size,),
        share_encoder_decoder_embeddings=(True,),
        tie_word_embeddings=(True,),
        normalize_before=(False,),
        add_final_layer_norm=(False,),
        normalize_embedding=(options.embedding_norm,),
        static_position_embeddings=(options.positions == "sinusoidal",),
    )
    return ModelConfig(
        kind="encoder_decoder",
        d_model=setting(values, "d_model", int),
        num_heads=heads,
        num_layers=layers,
        d_ff=d_ff,
        max_seq_length=setting(values, "max_position_embeddings", int),
        vocab_size=vocab_size,
        src_vocab_size=vocab_size,
        dropout=setting(values, "dropout", float, 0.1),
        options=replace(
            options,
            activation=ACTIVATIONS[setting(values, "activation_function", str, "gelu")],
            scale_embeddings=setting(values, "scale_embedding", bool, False),
            attention_dropout=setting(values, "attention_dropout", float, 0.0),
            activation_dropout=setting(values, "activation_dropout", float, 0.0),
        ),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, if it is one of these."""
    return write_common(config) | {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}


def write_common(config: ModelConfig) -> dict[str, Any]:
    """What Marian calls by the same names."""
    options = config.options
    sides = {"layers": config.num_layers, "attention_heads": config.num_heads, "ffn_dim": config.d_ff}
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        "max_position_embeddings": config.max_seq_length,
        "activation_function": {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(options.activation),
        "scale_embedding": options.scale_embeddings,
        "dropout": config.dropout,
        "attention_dropout": options.attention_dropout,
        "activation_dropout": options.activation_dropout,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def links(config: ModelConfig) -> Iterator[Link]:
    """Which tensors are which."""
    yield Link((EMBEDDING,), ("model.shared.weight",))
    yield Link(("final_layer.bias",), ("final_logits_bias",), flat, row)
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.embedding.", f"model.{side}."
        yield Link((f"{ours}added.embedding.weight",), (f"{theirs}embed_positions.weight",), cut, fill)
        norms = {f"norm.{kind}": f"layernorm_embedding.{kind}" for kind in ("weight", "bias")}
        yield from same(norms, ours=ours, theirs=theirs)
        for number in range(config.num_layers):
            yield from same(dict(block(side)), ours=f"{side}.layers.{number}.", theirs=f"model.{side}.layers.{number}.")


def block(side: str) -> Iterator[tuple[str, str]]:
    """Names inside of a block, here and there."""
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    attentions = {"self_attention": "self_attn"} | ({"cross_attention": "encoder_attn"} if side == "decoder" else {})
    for kind in ("weight", "bias"):
        for ours, theirs in attentions.items():
            yield from ((f"{ours}.{part}.{kind}", f"{theirs}.{other}.{kind}") for part, other in parts.items())
            yield f"around_{ours}.norm.{kind}", f"{theirs}_layer_norm.{kind}"
        yield f"feed_forward.inner.{kind}", f"fc1.{kind}"
        yield f"feed_forward.outer.{kind}", f"fc2.{kind}"
        yield f"around_feed_forward.norm.{kind}", f"final_layer_norm.{kind}"


def flat(x: Tensor) -> Tensor:
    """A row as a vector."""
    return x[0]


def row(x: Tensor) -> Tensor:
    """A vector as a row."""
    return x[None]


def cut(x: Tensor) -> Tensor:
    """Without the rows that no token stands at."""
    return x[UNUSED:]


def fill(x: Tensor) -> Tensor:
    """With them."""
    return F.pad(x, (0, 0, UNUSED, 0))


def follows(_: ModelConfig, name: str) -> bool:
    """Other names of the one matrix of embeddings."""
    return name in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")


FAMILY = Family(read, write, links, follows, prefix="model.")
