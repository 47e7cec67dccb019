"""Mixtral (Jiang et al. 2024), OLMoE (Muennighoff et al. 2024), Qwen3-MoE (Yang et al. 2025): experts in `llama.py`.

On disk every expert has tensors of its own; here those of a layer lie in one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from triglot.config import ExpertOptions, ModelConfig
from triglot.interop import llama
from triglot.interop.family import Family
from triglot.interop.links import Link, same
from triglot.interop.settings import expect, setting

OPTIONS = {
    "mixtral": llama.OPTIONS,
    "olmoe": replace(llama.OPTIONS, qk_norm="width"),
    "qwen3_moe": replace(llama.OPTIONS, qk_norm="head"),
}
INSIDE = {"mixtral": "block_sparse_moe", "olmoe": "mlp", "qwen3_moe": "mlp"}
PARTS = {"mixtral": ("w1", "w3", "w2"), "olmoe": llama.PARTS, "qwen3_moe": llama.PARTS}
CLASSES = {"mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    expect(values, attention_bias=(False,), router_jitter_noise=(0.0,), mlp_only_layers=([],))
    kind = setting(values, "model_type", str)
    qwen = kind == "qwen3_moe"
    shared = setting(values, "num_experts", int, setting(values, "num_local_experts", int, 0))
    experts = ExpertOptions(
        num_experts=shared,
        top_k=setting(values, "num_experts_per_tok", int),
        d_ff=setting(values, "moe_intermediate_size" if qwen else "intermediate_size", int),
        every=setting(values, "decoder_sparse_step", int, 1) if qwen else 1,
        renormalize=None if setting(values, "norm_topk_prob", bool, kind == "mixtral") else False,
        balance_weight=setting(values, "router_aux_loss_coef", float, 0.0),
        z_weight=0.0,
    )
    return llama.read_common(values, replace(OPTIONS[kind], experts=experts))


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, if it is one of these."""
    experts, kind = config.options.experts, kind_of(config)
    if experts is None:
        return {}
    qwen = {"moe_intermediate_size": experts.d_ff or config.d_ff, "decoder_sparse_step": experts.every}
    return llama.common(config) | {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "num_experts": experts.num_experts,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.renormalize is not False,
        "router_aux_loss_coef": experts.balance_weight,
        "intermediate_size": config.d_ff if kind == "qwen3_moe" else experts.d_ff or config.d_ff,
        **(qwen if kind == "qwen3_moe" else {}),
    }


def kind_of(config: ModelConfig) -> str:
    """Which of these has such blocks."""
    return {None: "mixtral", "width": "olmoe", "head": "qwen3_moe"}[config.options.qk_norm]


def links(config: ModelConfig) -> Iterator[Link]:
    """Which tensors are which."""
    experts, kind = config.options.experts, kind_of(config)
    assert experts is not None
    yield from llama.around(config)
    gate, up, down = PARTS[kind]
    for number in range(config.num_layers):
        if (number + 1) % experts.every:
            yield from llama.feed_forward(number, bias=False)
            continue
        ours, theirs = f"layers.{number}.feed_forward.", f"model.layers.{number}.{INSIDE[kind]}."
        each = [f"{theirs}experts.{one}." for one in range(experts.num_experts)]
        yield from same({"router.weight": "gate.weight"}, ours=ours, theirs=theirs)
        yield Link((f"{ours}inner",), tuple(f"{one}{part}.weight" for one in each for part in (gate, up)))
        yield Link((f"{ours}outer",), tuple(f"{one}{down}.weight" for one in each))


FAMILY = Family(read, write, links, llama.follows, prefix="model.")
