"""From a checkpoint of another library to a model or a run, and from a run to what other libraries load."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from triglot.config import ModelConfig
from triglot.errors import CheckpointError
from triglot.interop import bart, gguf, gpt2, llama, llama2c, marian, mixtral, t5
from triglot.interop.family import Family
from triglot.interop.links import made_of
from triglot.interop.tensors import read_object, require_file, tensors_of
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.recipe import flat, to_dict

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.FAMILY,
    **dict.fromkeys(llama.CLASSES, llama.FAMILY),
    **dict.fromkeys(mixtral.CLASSES, mixtral.FAMILY),
    "marian": marian.FAMILY,
    "bart": bart.FAMILY,
    "t5": t5.FAMILY,
}
LEARNING = (
    "dropout",
    *(f"options.{name}_dropout" for name in ("attention", "activation", "embedding")),
    *(f"options.experts.{name}_weight" for name in ("balance", "z", "importance")),
    *(f"options.experts.{name}" for name in ("noise", "bias_rate")),
)
"""Settings that change learning and not what a model computes."""
HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", "Model")
"""How classes are called that tell the next token, and those without a head, whose head is the embedding."""
RUNS_CODE = ("auto_map", "custom_pipelines")
Model = Transformer | DecoderLLM


class Found(NamedTuple):
    """A checkpoint's model and what it is."""

    model: Model
    config: ModelConfig


def read_model(path: Path, dtype: torch.dtype = torch.float32, packed: gguf.Read | None = None) -> Found:
    """The model in a folder of transformers, in a GGUF file, of which `packed` is what was read before, or in one of
    llama2.c.

    Raises CheckpointError for what does not fit before a weight is read.
    """
    if path.suffix == ".gguf":
        packed = packed or gguf.read(path)
        named = llama.links(packed.config, side_by_side=packed.side_by_side)
        return Found(made_of(packed.config, named, packed.tensors, lambda _: False, dtype), packed.config)
    if path.suffix == ".bin":
        old = llama2c.read(path)
        named = llama.links(old.config, side_by_side=True)
        return Found(made_of(old.config, named, old.tensors, lambda _: False, dtype), old.config)
    values = read_object(path / "config.json")
    family, config = config_of(values)
    tensors = tensors_of(path, family.prefix)
    return Found(
        made_of(config, family.links(config), tensors, lambda name: family.follows(config, name), dtype), config
    )


def config_of(values: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and settings of a config.json, of which nothing is run."""
    for name in RUNS_CODE:
        require_file(name not in values, name, "left out: no code of a checkpoint is run", values.get(name))
    require_file(
        "quantization_config" not in values, "quantization_config", "left out", values.get("quantization_config")
    )
    kind = values.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    require_file(known, "model_type", f"one of {', '.join(FAMILIES)}", kind)
    heads = values.get("architectures") or [HEADS[0]]
    fits = isinstance(heads, list) and any(str(one).endswith(HEADS) for one in heads)
    require_file(fits, "architectures", f"one that ends in {', '.join(HEADS)}", heads)
    family = FAMILIES[str(kind)]
    return family, family.read(values)


def family_for(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that has such a model, and its config.json; CheckpointError says what the nearest one lacks."""
    nearest: list[str] = []
    wanted, config = settled(config), with_rates(config)
    for family in dict.fromkeys(FAMILIES.values()):
        try:
            values = family.write(config)
            found = settled(family.read(values))
        except (CheckpointError, KeyError):
            continue
        apart = [name for name in wanted if found.get(name) != wanted[name]]
        if not apart:
            return family, values
        if not nearest or len(apart) < len(nearest):
            nearest = [f"{name} ({wanted[name]!r}, {values['model_type']} has {found.get(name)!r})" for name in apart]
    raise CheckpointError(
        f"No family of transformers has such a model; the nearest one differs in {', '.join(nearest)}."
    )


def with_rates(config: ModelConfig) -> ModelConfig:
    """The config with the rates of dropout that it leaves to the one rate, or to none."""
    rate = 0.0 if config.kind == "decoder_only" else config.dropout
    options = config.options.with_dropout(attention=rate, embedding=rate)
    inner = config.dropout if options.activation_dropout is None else options.activation_dropout
    return replace(config, options=replace(options, activation_dropout=inner))


def settled(config: ModelConfig) -> dict[str, Any]:
    """What a model computes, by dotted names, with what is left out filled in."""
    values, only = flat(to_dict(config)), config.kind == "decoder_only"
    left_out = {
        "num_kv_heads": config.num_heads,
        "head_dim": config.d_model // config.num_heads,
        "qkv_bias": config.options.bias,
        "output_bias": not only,
        "final_norm": only or config.options.norm_order == "pre",
    }
    if config.options.experts is not None:
        left_out |= {"experts.d_ff": config.d_ff, "experts.renormalize": config.options.experts.top_k > 1}
    for name, value in left_out.items():
        if values[f"options.{name}"] is None:
            values[f"options.{name}"] = value
    return {name: value for name, value in values.items() if name not in LEARNING}
