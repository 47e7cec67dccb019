"""What the models' halves have in common: an embedding, layers, and a norm after the last of them."""

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triglot.blocks import BlockOutput, DecoderBlock, DecoderLayer, EncoderLayer, options_of_layer
from triglot.config import BlockOptions
from triglot.errors import require
from triglot.layers.cache import Cache
from triglot.layers.embedding import Embedding
from triglot.layers.norm import make_norm
from triglot.layers.relative_positions import RelativePositions
from triglot.layers.routing import Routing

Tokens = Int[Tensor, "batch length"]
Memory = Float[Tensor, "batch memory d_model"]
Mask = Bool[Tensor, "..."]
Layer = EncoderLayer | DecoderLayer | DecoderBlock


class StackRun(NamedTuple):
    """What a stack knows after a forward pass; attention is None where it was not asked for, or is not there."""

    hidden: Float[Tensor, "batch length d_model"]
    self_weights: list[Tensor] | None
    """One [batch, heads, length, keys] per layer."""
    cross_weights: list[Tensor] | None
    """One [batch, heads, length, memory] per layer."""
    routing: list[Routing]
    """One per layer that has experts."""


class Stack(nn.Module):
    """Token ids to vectors that know what they may attend to."""

    layer_type: type[Layer]
    length_name = "max_seq_length"

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        max_seq_length: int,
        dropout: float = 0.1,
        *,
        options: BlockOptions = BlockOptions(),
    ) -> None:
        super().__init__()
        require(num_layers >= 1, "the number of layers", "at least 1", num_layers)
        self.options, self.d_model, self.max_seq_length = options, d_model, max_seq_length
        self.num_kv_heads, self.head_dim = options.num_kv_heads or num_heads, options.head_dim or d_model // num_heads
        self.embedding = Embedding(
            vocab_size,
            d_model,
            max_seq_length,
            dropout if options.embedding_dropout is None else options.embedding_dropout,
            positions=options.positions,
            head_dim=self.head_dim,
            rope_theta=options.rope_theta,
            rope_scaling=None if options.rope_scaling is None else dataclasses.asdict(options.rope_scaling),
            scale=options.scale_embeddings,
            norm=options.norm if options.embedding_norm else None,
            norm_eps=options.norm_eps,
        )
        side: Literal["encoder", "decoder"] = "encoder" if self.layer_type is EncoderLayer else "decoder"
        self.relative: RelativePositions | None = None
        if options.positions == "relative":
            buckets, farthest = options.relative_buckets, options.relative_distance
            self.relative = RelativePositions(buckets, farthest, num_heads, both_ways=side == "encoder")
        self.layers = nn.ModuleList(
            self.layer_type(d_model, num_heads, d_ff, dropout=dropout, options=options_of_layer(options, layer, side))
            for layer in range(num_layers)
        )
        final = options.norm_order == "pre" if options.final_norm is None else options.final_norm
        self.final_norm = make_norm(options.norm, d_model, options.norm_eps) if final else nn.Identity()
        self.output_scale = d_model**-0.5 if options.scale_output and side == "decoder" else None

    def run_layers(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        *,
        causal: bool = False,
        real: Bool[Tensor, "batch length"] | None = None,
        memory: Memory | None = None,
        memory_mask: Mask | None = None,
        cache: Cache | None = None,
        need_weights: bool = False,
    ) -> StackRun:
        """With a `cache` the tokens come after those it holds, and the caller advances it."""
        end = tokens.size(1) + (0 if cache is None else cache.longest)
        require(end <= self.max_seq_length, "length", f"at most {self.length_name} ({self.max_seq_length})", end)
        positions = None if cache is None else cache.positions(tokens.size(1))
        x, rotation = self.embedding(tokens, positions)
        position_bias = None
        if self.relative is not None:
            keys = torch.arange(end, device=tokens.device)[None]
            position_bias = self.relative(keys if positions is None else positions, keys)
        outputs: list[BlockOutput] = []
        for number, layer in enumerate(self.layers):
            output = layer.run(  # type: ignore[operator]  # a ModuleList tells of no kind
                x,
                mask,
                memory=memory,
                memory_mask=memory_mask,
                causal=causal,
                real=real,
                rotation=rotation,
                position_bias=position_bias,
                cache=None if cache is None else cache.layers[number],
                memory_cache=None if cache is None else cache.memory[number],
                need_weights=need_weights,
            )
            outputs.append(output)
            x = output.x
        hidden = self.final_norm(x)
        return StackRun(
            hidden if self.output_scale is None else hidden * self.output_scale,
            [output.self_weights for output in outputs if output.self_weights is not None] if need_weights else None,
            [output.cross_weights for output in outputs if output.cross_weights is not None] if need_weights else None,
            [output.routing for output in outputs if output.routing is not None],
        )

    def start_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for so many rows of at most `capacity` tokens."""
        weight = self.embedding.tokens.weight
        return Cache(
            len(self.layers),
            rows,
            self.num_kv_heads,
            capacity,
            self.head_dim,
            dtype=weight.dtype,
            device=weight.device,
            memory=self.layer_type is DecoderLayer,
        )
