"""Llama (Touvron et al. 2023), Mistral (Jiang et al. 2023), Qwen2 and Qwen3 (Yang et al. 2024, 2025).

Pre-norm RMSNorm, rotary positions, SwiGLU, grouped queries; Mistral looks back as far as a window, Qwen2 has biases of
queries, keys and values, Qwen3 norms of queries and keys.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import Tensor

from triglot.config import BlockOptions, ModelConfig, RopeScaling
from triglot.interop.family import Family
from triglot.interop.links import Link, same
from triglot.interop.settings import expect, setting
from triglot.interop.tensors import require_file
from triglot.layers.rope_scaling import Kind as RopeKind
from triglot.recipe import from_dict

OPTIONS = BlockOptions(
    norm="rms",
    norm_order="pre",
    positions="rotary",
    activation="swiglu",
    bias=False,
    output_bias=False,
    scale_embeddings=False,
    embedding_dropout=0.0,
    activation_dropout=0.0,
)
FAMILY_OPTIONS = {
    "llama": OPTIONS,
    "mistral": OPTIONS,
    "qwen2": replace(OPTIONS, qkv_bias=True),
    "qwen3": replace(OPTIONS, qk_norm="head"),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PARTS = ("gate_proj", "up_proj", "down_proj")
THETA = 10_000.0
ROPE_NUMBERS = {
    name: name
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
}


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    kind = setting(values, "model_type", str)
    bias = setting(values, "attention_bias", bool, False)
    if kind == "llama":
        expect(values, mlp_bias=(bias,))
    else:
        expect(values, attention_bias=(False,))
    return read_common(values, replace(FAMILY_OPTIONS[kind], bias=bias))


def read_common(values: Mapping[str, Any], options: BlockOptions) -> ModelConfig:
    """What all of these, dense or of experts, call by the same names."""
    expect(values, hidden_act=("silu",), pretraining_tp=(1,), clip_qkv=(), use_bidirectional_attention=(False,))
    heads, longest = setting(values, "num_attention_heads", int), setting(values, "max_position_embeddings", int)
    width, head_dim = setting(values, "hidden_size", int), setting(values, "head_dim", int, 0)
    theta, scaling = rope(values, longest)
    return ModelConfig(
        kind="decoder_only",
        d_model=width,
        num_heads=heads,
        num_layers=setting(values, "num_hidden_layers", int),
        d_ff=setting(values, "intermediate_size", int),
        max_seq_length=longest,
        vocab_size=setting(values, "vocab_size", int),
        dropout=0.0,
        options=replace(
            options,
            norm_eps=setting(values, "rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            num_kv_heads=setting(values, "num_key_value_heads", int, heads),
            head_dim=head_dim or None,
            window=window(values),
            tie_embeddings=setting(values, "tie_word_embeddings", bool, False),
            attention_dropout=setting(values, "attention_dropout", float, 0.0),
        ),
    )


def rope(values: Mapping[str, Any], longest: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, as transformers writes them or wrote them before its version 5."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    require_file(isinstance(given, Mapping), "rope_parameters", "names with values", given)
    theta = setting({"rope_theta": values.get("rope_theta"), **given}, "rope_theta", float, THETA)
    expect(given, partial_rotary_factor=(1.0, 1), truncate=(True,), mscale=(), mscale_all_dim=())
    name = "rope_type" if "rope_type" in given else "type"
    kind = setting(given, name, str, "default")
    known = ("default", "dynamic", *get_args(RopeKind))
    require_file(kind in known, f"rope_scaling.{name}", f"one of {', '.join(known)}", kind)
    original = "original_max_position_embeddings"
    if kind == "dynamic":  # which turns as the plain one does up to the length that a model was trained for
        within = setting(given, original, int, longest)
        require_file(longest <= within, "max_position_embeddings", f"at most {original} ({within})", longest)
    if kind in ("default", "dynamic"):
        return theta, None
    numbers = {ours: float(given[theirs]) for ours, theirs in ROPE_NUMBERS.items() if given.get(theirs) is not None}
    before = setting(given, original, int, setting(values, original, int, longest))
    settings = numbers | {"kind": kind} | ({} if kind == "linear" else {"original_max_position": before})
    return theta, from_dict(RopeScaling, settings, "rope_scaling.")


def window(values: Mapping[str, Any]) -> int | None:
    """How many keys a query sees at most."""
    if not setting(values, "use_sliding_window", bool, True):
        return None
    layers = values.get("layer_types") or ()
    if size := setting(values, "sliding_window", int, 0):
        every = all(one == "sliding_attention" for one in layers)
        require_file(every, "layer_types", "sliding_attention in every layer where there is a window", layers)
    return size or None


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, if it is one of these."""
    options = config.options
    kind = kind_of(options)
    return (
        common(config)
        | {
            "model_type": kind,
            "architectures": [f"{CLASSES[kind]}ForCausalLM"],
            "intermediate_size": config.d_ff,
        }
        | ({"attention_bias": options.bias, "mlp_bias": options.bias} if kind == "llama" else {})
    )


def kind_of(options: BlockOptions) -> str:
    """Which of these has such blocks."""
    if options.qk_norm:
        return "qwen3"
    if options.qkv_bias and not options.bias:
        return "qwen2"
    return "mistral" if options.window else "llama"


def common(config: ModelConfig) -> dict[str, Any]:
    """What all of these, dense or of experts, call by the same names."""
    options = config.options
    rope: dict[str, Any] = {"rope_theta": options.rope_theta, "rope_type": "default"}
    if (scaling := options.rope_scaling) is not None:
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in ROPE_NUMBERS.items()}
        rope |= {"rope_type": scaling.kind, "original_max_position_embeddings": scaling.original_max_position}
    qwen = kind_of(options).startswith("qwen")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": options.num_kv_heads or config.num_heads,
        "head_dim": options.head_dim or config.d_model // config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_length,
        "rms_norm_eps": options.norm_eps,
        "rope_parameters": {name: value for name, value in rope.items() if value is not None},
        "rope_theta": options.rope_theta,
        "sliding_window": options.window,
        **({"use_sliding_window": options.window is not None, "max_window_layers": 0} if qwen else {}),
        "attention_dropout": options.attention_dropout,
        "tie_word_embeddings": options.tie_embeddings,
    }


def links(config: ModelConfig, *, side_by_side: bool = False) -> Iterator[Link]:
    """Which tensors are which; `side_by_side` are the two numbers that a rotation turns in llama2.c and in GGUF."""
    yield from around(config, side_by_side=side_by_side)
    for number in range(config.num_layers):
        yield from feed_forward(number, config.options.bias)


def feed_forward(number: int, bias: bool) -> Iterator[Link]:
    """A dense one, whose gate lies above what it opens."""
    ours, theirs = f"layers.{number}.feed_forward.", f"model.layers.{number}.mlp."
    for kind in ("weight", "bias") if bias else ("weight",):
        gate, up, down = (f"{theirs}{part}.{kind}" for part in PARTS)
        yield Link((f"{ours}inner.{kind}",), (gate, up))
        yield Link((f"{ours}outer.{kind}",), (down,))


def around(config: ModelConfig, *, side_by_side: bool = False) -> Iterator[Link]:
    """All but the feed-forwards."""
    options = config.options
    head_dim = options.head_dim or config.d_model // config.num_heads
    yield from same({"embedding.tokens.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"})
    if not options.tie_embeddings:
        yield from same({"lm_head.weight": "lm_head.weight"})
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    names = {f"self_attention.{ours}.weight": f"self_attn.{theirs}.weight" for ours, theirs in parts.items()}
    for ours, theirs in parts.items():
        biased = options.bias if ours == "output" or options.qkv_bias is None else options.qkv_bias
        names |= {f"self_attention.{ours}.bias": f"self_attn.{theirs}.bias"} if biased else {}
    if options.qk_norm:
        names |= {f"self_attention.{part}_norm.weight": f"self_attn.{part[0]}_norm.weight" for part in ("query", "key")}
    names["around_self_attention.norm.weight"] = "input_layernorm.weight"
    names["around_feed_forward.norm.weight"] = "post_attention_layernorm.weight"
    changes = (partial(halves, head_dim=head_dim), partial(pairs, head_dim=head_dim)) if side_by_side else ()
    for number in range(config.num_layers):
        for ours, theirs in names.items():
            turned = "query." in ours or "key." in ours
            yield Link((f"layers.{number}.{ours}",), (f"model.layers.{number}.{theirs}",), *(changes if turned else ()))


def halves(x: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose halves are turned against each other, as here and in transformers."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(x.shape)


def pairs(x: Tensor, head_dim: int) -> Tensor:
    """Rows of heads in which two that stand side by side are turned."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(x.shape)


def follows(config: ModelConfig, name: str) -> bool:
    """Frequencies that old files hold, and the projection where it is the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.options.tie_embeddings and name == "lm_head.weight")


FAMILY = Family(read, write, links, follows, prefix="model.")
