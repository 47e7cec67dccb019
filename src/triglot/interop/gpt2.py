"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, GELU by tanh, x W instead of x Wᵀ."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from triglot.config import Activation, BlockOptions, ModelConfig
from triglot.interop.family import Family
from triglot.interop.links import Link, same, transposed
from triglot.interop.settings import expect, setting

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
OPTIONS = BlockOptions(norm_order="pre", positions="learned", scale_embeddings=False, output_bias=False)


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    expect(
        values,
        activation_function=tuple(ACTIVATIONS),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    width = setting(values, "n_embd", int, 768)
    return ModelConfig(
        kind="decoder_only",
        d_model=width,
        num_heads=setting(values, "n_head", int, 12),
        num_layers=setting(values, "n_layer", int, 12),
        d_ff=setting(values, "n_inner", int, 4 * width),
        max_seq_length=setting(values, "n_positions", int, 1024),
        vocab_size=setting(values, "vocab_size", int, 50257),
        dropout=setting(values, "resid_pdrop", float, 0.1),
        options=replace(
            OPTIONS,
            norm_eps=setting(values, "layer_norm_epsilon", float, 1e-5),
            activation=ACTIVATIONS[setting(values, "activation_function", str, "gelu_new")],
            tie_embeddings=setting(values, "tie_word_embeddings", bool, True),
            attention_dropout=setting(values, "attn_pdrop", float, 0.1),
            embedding_dropout=setting(values, "embd_pdrop", float, 0.1),
            activation_dropout=0.0,
        ),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, if it is one of these."""
    options = config.options
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}.get(options.activation),
        "layer_norm_epsilon": options.norm_eps,
        "tie_word_embeddings": options.tie_embeddings,
        "resid_pdrop": config.dropout,
        "attn_pdrop": options.attention_dropout,
        "embd_pdrop": options.embedding_dropout,
    }


def links(config: ModelConfig) -> Iterator[Link]:
    """Which tensors are which."""
    embeddings = {"embedding.tokens.weight": "wte.weight", "embedding.added.embedding.weight": "wpe.weight"}
    yield from same(embeddings, theirs="transformer.")
    for number in range(config.num_layers):
        ours, theirs = f"layers.{number}.", f"transformer.h.{number}."
        attention, feed = f"{ours}self_attention.", f"{ours}feed_forward."
        for kind in ("weight", "bias"):
            change = (transposed, transposed) if kind == "weight" else ()
            three = tuple(f"{attention}{part}.{kind}" for part in ("query", "key", "value"))
            yield Link(three, (f"{theirs}attn.c_attn.{kind}",), *change)
            yield Link((f"{attention}output.{kind}",), (f"{theirs}attn.c_proj.{kind}",), *change)
            yield Link((f"{feed}inner.{kind}",), (f"{theirs}mlp.c_fc.{kind}",), *change)
            yield Link((f"{feed}outer.{kind}",), (f"{theirs}mlp.c_proj.{kind}",), *change)
            norms = {f"around_self_attention.norm.{kind}": f"ln_1.{kind}"}
            yield from same(norms | {f"around_feed_forward.norm.{kind}": f"ln_2.{kind}"}, ours=ours, theirs=theirs)
    yield from same({f"final_norm.{kind}": f"transformer.ln_f.{kind}" for kind in ("weight", "bias")})
    if not config.options.tie_embeddings:
        yield from same({"lm_head.weight": "lm_head.weight"})


def follows(config: ModelConfig, name: str) -> bool:
    """Masks that old files hold, and the projection where it is the embedding."""
    mask = re.fullmatch(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", name) is not None
    return mask or (config.options.tie_embeddings and name == "lm_head.weight")


FAMILY = Family(read, write, links, follows, prefix="transformer.")
