"""GGUF, llama.cpp's files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), through the package `gguf`.

Llama, Qwen2 and Qwen3; tensors of fewer bits are read as the numbers that they stand for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triglot.config import ModelConfig
from triglot.errors import CheckpointError
from triglot.interop import llama
from triglot.interop.links import theirs_of
from triglot.interop.tensors import Entry, Tensors, require_file
from triglot.models.decoder_only import DecoderLLM

ARCHITECTURES = ("llama", "qwen2", "qwen3")
READ = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
WRITTEN = ("F32", "F16", "Q8_0")
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SETTINGS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
BLOCK = 32
"""Numbers that share a scale."""
REQUIRED = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "max_position_embeddings")


class Read(NamedTuple):
    """A file's model."""

    config: ModelConfig
    tensors: "Unpacked"
    """Under the names that transformers has for them."""
    values: Mapping[str, Any]
    """All that the header says."""

    @property
    def side_by_side(self) -> bool:
        """Whether the numbers that a rotation turns stand side by side, as llama.cpp wants them of Llama alone."""
        return self.values["general.architecture"] == "llama"


class Unpacked(Tensors):
    """Tensors in a GGUF file, of fewer bits or not."""

    def __init__(self, path: Path, stored: Mapping[str, Any]) -> None:
        self.stored = stored
        types = {"F32": torch.float32, "F16": torch.float16}
        super().__init__(
            {
                name: Entry(
                    path,
                    types.get(one.tensor_type.name, torch.float32),
                    tuple(int(size) for size in reversed(one.shape)),
                    int(one.data_offset),
                )
                for name, one in stored.items()
            }
        )

    def read_into(self, name: str, into: Tensor) -> Tensor:
        from gguf.quants import dequantize

        one = self.stored[name]
        if one.tensor_type.name in ("F32", "F16"):
            return super().read_into(name, into)
        return into.copy_(torch.from_numpy(dequantize(one.data, one.tensor_type)).view(into.shape))


def read(path: Path) -> Read:
    """Settings and tensors; CheckpointError for what is damaged or not known here."""
    try:
        values, stored = _parsed(path)
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    kind = values.get("general.architecture")
    require_file(kind in ARCHITECTURES, f"general.architecture of {path}", f"one of {', '.join(ARCHITECTURES)}", kind)
    names = {theirs: f"{kind}.{ours}" for theirs, ours in SETTINGS.items()}
    for theirs in REQUIRED:
        require_file(names[theirs] in values, names[theirs], "given", None)
    given = {theirs: values[name] for theirs, name in names.items() if values.get(name) is not None}
    scaling = values.get(f"{kind}.rope.scaling.type")
    require_file(scaling in (None, "none"), f"{kind}.rope.scaling.type", "none", scaling)
    require_file("token_embd.weight" in stored, f"token_embd.weight of {path}", "there", None)
    tensors = {_theirs(name): one for name, one in stored.items()}
    for name, one in stored.items():
        fits = one.tensor_type.name in READ
        require_file(fits, f"the type of {name}", f"one of {', '.join(READ)}", one.tensor_type.name)
    settings = given | {
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in stored,
    }
    return Read(llama.read(settings), Unpacked(path, tensors), values)


def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings and tensors by their names in the file."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Reads nothing past the end: a length that lies would be waited for."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError(f"it ends before {count} numbers at {offset} do")
            return found

    require_file(path.is_file() and path.stat().st_size > 0, str(path), "a file of GGUF", "not there, or empty")
    file = Bounded(path)
    return {name: field.contents() for name, field in file.fields.items()}, {one.name: one for one in file.tensors}


def _theirs(name: str) -> str:
    """What transformers calls a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    block, number, part = (*stem.split(".", 2), "", "")[:3]
    if block == "blk" and part in INNER:
        return f"model.layers.{number}.{INNER[part]}.{kind}"
    return name


def write(path: Path, model: DecoderLLM, config: ModelConfig, bits: str, about: Mapping[str, Any]) -> None:
    """Write a model; `bits` is one of WRITTEN. Vectors, and rows that are not whole blocks, stay in F32.

    `about` are further settings by name: the tokenizer's. Raises CheckpointError for a model that llama.cpp has not.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    require_file(bits in WRITTEN, "the type of numbers", f"one of {', '.join(WRITTEN)}", bits)
    kind = llama.kind_of(config.options)
    require_file(kind in ARCHITECTURES, "a model for GGUF", f"one of {', '.join(ARCHITECTURES)}", kind)
    require_file(
        config.options.rope_scaling is None, "options.rope_scaling", "left out for GGUF", config.options.rope_scaling
    )
    settings = llama.common(config) | {"intermediate_size": config.d_ff}
    writer = GGUFWriter(path, kind)
    for theirs, ours in SETTINGS.items():
        if (value := settings.get(theirs)) is not None:
            _add(writer, f"{kind}.{ours}", value)
    for name, value in about.items():
        _add(writer, name, value)
    stored = getattr(GGMLQuantizationType, bits)
    for some in theirs_of(model, llama.links(config, side_by_side=kind == "llama")):
        for name, tensor in some.items():
            whole = tensor.dim() == 2 and tensor.size(1) % BLOCK == 0
            kept = stored if whole else GGMLQuantizationType.F32
            writer.add_tensor(_ours(name), quantize(tensor.float().numpy(), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, value: Any) -> None:
    """A setting, of the kind that its value has."""
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def _ours(name: str) -> str:
    """What llama.cpp calls a tensor."""
    stem, _, kind = name.rpartition(".")
    for ours, theirs in OUTER.items():
        if stem == theirs:
            return f"{ours}.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{next(ours for ours, theirs in INNER.items() if theirs == part)}.{kind}"
