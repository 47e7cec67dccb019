"""Models and tokenizers of llama2.c (https://github.com/karpathy/llama2.c), in the first version of its .bin."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from triglot.config import ModelConfig
from triglot.interop import llama
from triglot.interop.tensors import Entry, Tensors, require_file

HEADER = struct.Struct("<7i")
EPS = 1e-5


class Read(NamedTuple):
    """A file's model."""

    config: ModelConfig
    tensors: Tensors
    """Under the names that transformers has for them."""


def read(path: Path) -> Read:
    """Settings and tensors; CheckpointError where the header does not say what the file holds."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    require_file(len(header) == HEADER.size, str(path), f"at least {HEADER.size} bytes long", len(header))
    width, d_ff, layers, heads, kv_heads, vocab, longest = HEADER.unpack(header)
    sizes = {"dim": width, "hidden_dim": d_ff, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads}
    for name, value in (sizes | {"vocab_size": abs(vocab), "seq_len": longest}).items():
        require_file(0 < value < 2**24, f"{name} of {path}", "between 1 and 2^24", value)
    config = ModelConfig(
        kind="decoder_only",
        d_model=width,
        num_heads=heads,
        num_layers=layers,
        d_ff=d_ff,
        max_seq_length=longest,
        vocab_size=abs(vocab),
        dropout=0.0,
        options=replace(llama.OPTIONS, norm_eps=EPS, num_kv_heads=kv_heads, tie_embeddings=vocab > 0),
    )
    entries, start = dict[str, Entry](), HEADER.size
    for names, shape in _tensors(config):
        for name in names:
            entries[name] = Entry(path, torch.float32, shape, start)
            start += 4 * int(torch.Size(shape).numel())
    size = path.stat().st_size
    require_file(size == start, str(path), f"{start} bytes long, by its header", size)
    return Read(config, Tensors({name: entry for name, entry in entries.items() if name}))


def _tensors(config: ModelConfig) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Names and shapes in a file's order; tables of rotations, which follow from other things, have no name."""
    width, d_ff, layers = config.d_model, config.d_ff, range(config.num_layers)
    head_dim = width // config.num_heads
    kv_width = head_dim * (config.options.num_kv_heads or config.num_heads)

    def each(name: str) -> list[str]:
        return [f"model.layers.{number}.{name}.weight" for number in layers]

    yield ["model.embed_tokens.weight"], (config.vocab_size, width)
    yield each("input_layernorm"), (width,)
    for part, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
        yield each(f"self_attn.{part}_proj"), (rows, width)
    yield each("post_attention_layernorm"), (width,)
    yield each("mlp.gate_proj"), (d_ff, width)
    yield each("mlp.down_proj"), (width, d_ff)
    yield each("mlp.up_proj"), (d_ff, width)
    yield ["model.norm.weight"], (width,)
    yield [""], (config.max_seq_length, head_dim)
    if not config.options.tie_embeddings:
        yield ["lm_head.weight"], (config.vocab_size, width)
