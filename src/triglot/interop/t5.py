"""T5 (Raffel et al. 2020): an encoder–decoder with pre-norm RMSNorm, relative positions, no biases and no √head_dim.

Version 1.1 opens its feed-forwards by gates, and has a projection of its own to the vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from triglot.config import Activation, BlockOptions, ModelConfig
from triglot.interop.family import Family
from triglot.interop.links import Link, same
from triglot.interop.settings import expect, setting

ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gated-gelu": "geglu_tanh"}
OPTIONS = BlockOptions(
    norm="rms",
    norm_order="pre",
    positions="relative",
    bias=False,
    output_bias=False,
    scale_attention=False,
    scale_embeddings=False,
)


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    layers = setting(values, "num_layers", int, 6)
    expect(
        values,
        feed_forward_proj=tuple(ACTIVATIONS),
        num_decoder_layers=(layers,),
        dense_act_fn=("relu", "gelu_new"),
    )
    vocab_size, dropout = setting(values, "vocab_size", int, 32128), setting(values, "dropout_rate", float, 0.1)
    # transformers 5 writes of version 1.1 that its embeddings are tied, where they are not.
    tied = setting(values, "scale_decoder_outputs", bool, setting(values, "tie_word_embeddings", bool, True))
    return ModelConfig(
        kind="encoder_decoder",
        d_model=setting(values, "d_model", int, 512),
        num_heads=setting(values, "num_heads", int, 8),
        num_layers=layers,
        d_ff=setting(values, "d_ff", int, 2048),
        max_seq_length=setting(values, "n_positions", int, 512),
        vocab_size=vocab_size,
        src_vocab_size=vocab_size,
        dropout=dropout,
        options=replace(
            OPTIONS,
            norm_eps=setting(values, "layer_norm_epsilon", float, 1e-6),
            head_dim=setting(values, "d_kv", int, 64),
            relative_buckets=setting(values, "relative_attention_num_buckets", int, 32),
            relative_distance=setting(values, "relative_attention_max_distance", int, 128),
            activation=ACTIVATIONS[setting(values, "feed_forward_proj", str, "relu")],
            tie_embeddings=tied,
            scale_output=tied,
        ),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, if it is one of these."""
    options = config.options
    feed = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(options.activation)
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": options.head_dim or config.d_model // config.num_heads,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "n_positions": config.max_seq_length,
        "relative_attention_num_buckets": options.relative_buckets,
        "relative_attention_max_distance": options.relative_distance,
        "feed_forward_proj": feed,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": options.norm_eps,
        "tie_word_embeddings": options.tie_embeddings,
        "is_encoder_decoder": True,
    }


def links(config: ModelConfig) -> Iterator[Link]:
    """Which tensors are which."""
    yield Link(("encoder.embedding.tokens.weight",), ("shared.weight",))
    if not config.options.tie_embeddings:
        yield Link(("decoder.embedding.tokens.weight",), ("shared.weight",))
        yield Link(("final_layer.weight",), ("lm_head.weight",))
    for side in ("encoder", "decoder"):
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Link((f"{side}.relative.table.weight",), (first,))
        yield Link((f"{side}.final_norm.weight",), (f"{side}.final_layer_norm.weight",))
        for number in range(config.num_layers):
            yield from block(side, f"{side}.layers.{number}.", f"{side}.block.{number}.layer.", config.options)


def block(side: str, ours: str, theirs: str, options: BlockOptions) -> Iterator[Link]:
    """A block's sublayers, which are numbered there."""
    attentions = {"self_attention": "SelfAttention"} | (
        {"cross_attention": "EncDecAttention"} if side == "decoder" else {}
    )
    for number, (attention, other) in enumerate(attentions.items()):
        names = {
            f"{attention}.{part}.weight": f"{number}.{other}.{part[0]}.weight"
            for part in ("query", "key", "value", "output")
        }
        names[f"around_{attention}.norm.weight"] = f"{number}.layer_norm.weight"
        yield from same(names, ours=ours, theirs=theirs)
    feed = f"{theirs}{len(attentions)}."
    yield Link((f"{ours}around_feed_forward.norm.weight",), (f"{feed}layer_norm.weight",))
    parts = ("wi_0", "wi_1") if options.activation == "geglu_tanh" else ("wi",)
    yield Link((f"{ours}feed_forward.inner.weight",), tuple(f"{feed}DenseReluDense.{part}.weight" for part in parts))
    yield Link((f"{ours}feed_forward.outer.weight",), (f"{feed}DenseReluDense.wo.weight",))


def follows(config: ModelConfig, name: str) -> bool:
    """Other names of the embeddings, and a table that old files hold for attention to the source."""
    tied = config.options.tie_embeddings and name == "lm_head.weight"
    return tied or name.endswith("embed_tokens.weight") or "EncDecAttention.relative_attention_bias" in name


FAMILY = Family(read, write, links, follows, prefix="")
