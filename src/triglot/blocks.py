"""What models are stacked from: attention and feed-forward in residual connections (Vaswani et al. 2017, §3.1)."""

from dataclasses import replace
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from triglot.config import BlockOptions
from triglot.layers.attention import Attention, MultiHeadAttention
from triglot.layers.cache import LayerCache, MemoryCache
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.masks import real_tokens
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.norm import Residual
from triglot.layers.positions import Rotation
from triglot.layers.routing import Routing

Hidden = Float[Tensor, "batch length d_model"]
Memory = Float[Tensor, "batch memory d_model"]
PositionBias = Float[Tensor, "#batch heads length keys"]
Mask = Bool[Tensor, "..."]


class EncoderLayerOutput(NamedTuple):
    """What an `EncoderLayer` returns."""

    x: Float[Tensor, "batch length d_model"]
    weights: Float[Tensor, "batch heads length length"] | None


class DecoderLayerOutput(NamedTuple):
    """What a `DecoderLayer` returns."""

    x: Float[Tensor, "batch length d_model"]
    self_weights: Float[Tensor, "batch heads length length"] | None
    cross_weights: Float[Tensor, "batch heads length memory"] | None


class BlockOutput(NamedTuple):
    """All that a block knows after a forward pass; what was not asked for, or is not there, is None."""

    x: Float[Tensor, "batch length d_model"]
    self_weights: Float[Tensor, "batch heads length keys"] | None
    cross_weights: Float[Tensor, "batch heads length memory"] | None
    routing: Routing | None


def options_of_layer(options: BlockOptions, layer: int, side: Literal["encoder", "decoder"]) -> BlockOptions:
    """The options of block number `layer`, from 0: without experts unless it is an `experts.every`-th one of a side."""
    experts = options.experts
    sparse = experts is not None and experts.on(side) and (layer + 1) % experts.every == 0
    return options if sparse else replace(options, experts=None)


def make_feed_forward(
    d_model: int, d_ff: int, dropout: float, options: BlockOptions
) -> PointwiseFeedForward | MixtureOfExperts:
    """Dense, or experts where the options of this layer (`options_of_layer`) have left them."""
    inner_dropout = dropout if options.activation_dropout is None else options.activation_dropout
    experts = options.experts
    if experts is None:
        return PointwiseFeedForward(d_model, d_ff, inner_dropout, activation=options.activation, bias=options.bias)
    return MixtureOfExperts(
        d_model,
        experts.num_experts,
        experts.d_ff or d_ff,
        experts.top_k,
        experts.capacity_factor,
        router=experts.router,
        renormalize=experts.renormalize,
        bias_rate=experts.bias_rate,
        noise=experts.noise,
        capacity_over=experts.capacity_over,
        min_capacity=experts.min_capacity,
        shared=experts.shared,
        activation=options.activation,
        bias=options.bias,
        router_bias=experts.router_bias,
        dropout=inner_dropout,
    )


class Block(nn.Module):
    """Self-attention, then attention over a memory if it has one, then a feed-forward, dense or of experts.

    A block knows no positions: its caller, the model, passes the rotation of rotary ones and what relative ones add to
    scores.
    """

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout: float, options: BlockOptions, *, reads_memory: bool
    ) -> None:
        super().__init__()

        def attention() -> MultiHeadAttention:
            rate = dropout if options.attention_dropout is None else options.attention_dropout
            return MultiHeadAttention(
                d_model,
                num_heads,
                rate,
                num_kv_heads=options.num_kv_heads,
                head_dim=options.head_dim,
                bias=options.bias,
                qkv_bias=options.qkv_bias,
                qk_norm=options.qk_norm,
                norm_eps=options.norm_eps,
                scale=options.scale_attention,
            )

        def residual() -> Residual:
            return Residual(d_model, dropout, norm=options.norm, order=options.norm_order, eps=options.norm_eps)

        if reads_memory and options.experts is not None:
            options.experts.check_for_decoders()
        self.self_attention, self.around_self_attention = attention(), residual()
        if reads_memory:
            self.cross_attention, self.around_cross_attention = attention(), residual()
        self.feed_forward, self.around_feed_forward = make_feed_forward(d_model, d_ff, dropout, options), residual()

    def run(
        self,
        x: Hidden,
        mask: Mask | None = None,
        *,
        memory: Memory | None = None,
        memory_mask: Mask | None = None,
        causal: bool = False,
        real: Bool[Tensor, "batch length"] | None = None,
        rotation: Rotation | None = None,
        position_bias: PositionBias | None = None,
        cache: LayerCache | None = None,
        memory_cache: MemoryCache | None = None,
        need_weights: bool = False,
    ) -> BlockOutput:
        """`real` marks the tokens that are no padding, for experts; `causal` stands for a look-ahead `mask`."""

        def attend(h: Hidden) -> Attention:
            return self.self_attention(
                h,
                h,
                h,
                mask,
                causal=causal,
                rotation=rotation,
                bias=position_bias,
                cache=cache,
                need_weights=need_weights,
            )

        def attend_to_memory(h: Hidden) -> Attention:
            return self.cross_attention(h, memory, memory, memory_mask, cache=memory_cache, need_weights=need_weights)

        def feed(h: Hidden) -> tuple[Hidden, Routing | None]:
            if isinstance(self.feed_forward, MixtureOfExperts):
                return self.feed_forward.run(h, real)
            return self.feed_forward(h), None

        x, self_weights = self.around_self_attention(x, attend)
        cross_weights = None
        if memory is not None:
            x, cross_weights = self.around_cross_attention(x, attend_to_memory)
        x, routing = self.around_feed_forward(x, feed)
        return BlockOutput(x, self_weights, cross_weights, routing)


class EncoderLayer(Block):
    """Self-attention and feed-forward."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout: float = 0.1, *, options: BlockOptions = BlockOptions()
    ) -> None:
        super().__init__(d_model, num_heads, d_ff, dropout, options, reads_memory=False)

    def forward(self, x: Hidden, mask: Mask | None = None, *, need_weights: bool = True) -> EncoderLayerOutput:
        out = self.run(x, mask, real=real_tokens(mask, x.size(0), x.size(1)), need_weights=need_weights)
        return EncoderLayerOutput(out.x, out.self_weights)


class DecoderLayer(Block):
    """Self-attention, attention over the encoder's output, and feed-forward."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout: float = 0.1, *, options: BlockOptions = BlockOptions()
    ) -> None:
        super().__init__(d_model, num_heads, d_ff, dropout, options, reads_memory=True)

    def forward(
        self,
        x: Hidden,
        enc_output: Memory,
        look_ahead_mask: Mask | None = None,
        padding_mask: Mask | None = None,
        *,
        need_weights: bool = True,
    ) -> DecoderLayerOutput:
        out = self.run(
            x,
            look_ahead_mask,
            memory=enc_output,
            memory_mask=padding_mask,
            real=real_tokens(look_ahead_mask, x.size(0), x.size(1)),
            need_weights=need_weights,
        )
        return DecoderLayerOutput(out.x, out.self_weights, out.cross_weights)


class DecoderBlock(EncoderLayer):
    """An `EncoderLayer` for a decoder: its caller gives the look-ahead mask; attention weights keep all by default."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        dropout: float = 0.1,
        options: BlockOptions = BlockOptions(attention_dropout=0.0),
    ) -> None:
        if options.experts is not None:
            options.experts.check_for_decoders()
        super().__init__(d_model, n_heads, d_ff, dropout, options=options)

    def forward(self, x: Hidden, mask: Mask | None = None) -> Hidden:  # type: ignore[override]  # the document's call
        return self.run(x, mask, real=real_tokens(mask, x.size(0), x.size(1))).x
