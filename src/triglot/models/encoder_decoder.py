"""The encoder–decoder Transformer (Vaswani et al. 2017)."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.blocks import DecoderLayer, EncoderLayer
from triglot.config import BlockOptions, ModelConfig
from triglot.errors import require
from triglot.layers.cache import Cache
from triglot.layers.initialise import xavier
from triglot.layers.masks import real_tokens
from triglot.layers.routing import Routing
from triglot.models.stack import Mask, Memory, Stack, StackRun, Tokens


class EncoderOutput(NamedTuple):
    """What an `Encoder` returns."""

    x: Float[Tensor, "batch length d_model"]
    weights: list[Tensor] | None
    """One [batch, heads, length, length] per layer."""


class DecoderOutput(NamedTuple):
    """What a `Decoder` returns."""

    x: Float[Tensor, "batch length d_model"]
    self_weights: list[Tensor] | None
    """One [batch, heads, length, length] per layer."""
    cross_weights: list[Tensor] | None
    """One [batch, heads, length, memory] per layer."""


class TransformerOutput(NamedTuple):
    """What a `Transformer` returns; attention is None where it was not asked for."""

    logits: Float[Tensor, "batch length vocab"]
    enc_attention: list[Tensor] | None
    dec_self_attention: list[Tensor] | None
    dec_enc_attention: list[Tensor] | None


class EncoderDecoderRun(NamedTuple):
    """What the model knows before it projects to the vocabulary; `routing`: encoder's layers, then decoder's."""

    hidden: Float[Tensor, "batch length d_model"]
    enc_attention: list[Tensor] | None
    dec_self_attention: list[Tensor] | None
    dec_enc_attention: list[Tensor] | None
    routing: list[Routing]


class Encoder(Stack):
    """Token ids to vectors that know their context; alone it keeps the initial weights that PyTorch gives its parts."""

    layer_type = EncoderLayer

    def forward(self, tokens: Tokens, mask: Mask | None = None, *, need_weights: bool = True) -> EncoderOutput:
        out = self.run(tokens, mask, need_weights=need_weights)
        return EncoderOutput(out.hidden, out.self_weights)

    def run(self, tokens: Tokens, mask: Mask | None = None, *, need_weights: bool = False) -> StackRun:
        """`forward`, with all that the layers know."""
        real = real_tokens(mask, *tokens.shape)
        return self.run_layers(tokens, mask, real=real, need_weights=need_weights)


class Decoder(Stack):
    """Token ids to vectors that know their context and the encoder's output."""

    layer_type = DecoderLayer

    def forward(
        self,
        tokens: Tokens,
        enc_output: Memory,
        look_ahead_mask: Mask | None = None,
        padding_mask: Mask | None = None,
        *,
        need_weights: bool = True,
    ) -> DecoderOutput:
        out = self.run(tokens, enc_output, look_ahead_mask, padding_mask, need_weights=need_weights)
        return DecoderOutput(out.hidden, out.self_weights, out.cross_weights)

    def run(
        self,
        tokens: Tokens,
        memory: Memory,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        need_weights: bool = False,
    ) -> StackRun:
        """`forward`, with all that the layers know."""
        real = real_tokens(mask, *tokens.shape)
        return self.run_layers(
            tokens, mask, real=real, memory=memory, memory_mask=memory_mask, need_weights=need_weights
        )


class Transformer(nn.Module):
    """Encoder, decoder, and a projection to the target's vocabulary.

    Embeddings begin as N(0, 1/d_model), so that √d_model times them has unit variance beside the sinusoids; projections
    begin as Xavier. With `options.tie_embeddings` both embeddings and the projection are one matrix.
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        d_model: int = 512,
        num_layers: int = 6,
        num_heads: int = 8,
        d_ff: int = 2048,
        max_seq_length: int = 5000,
        dropout: float = 0.1,
        *,
        options: BlockOptions = BlockOptions(),
    ) -> None:
        super().__init__()
        options.check_for_pairs()
        self.options, self.max_seq_length = options, max_seq_length
        shape = (d_model, num_layers, num_heads, d_ff, max_seq_length, dropout)
        self.encoder = Encoder(src_vocab_size, *shape, options=options)
        self.decoder = Decoder(tgt_vocab_size, *shape, options=options)
        self.final_layer = nn.Linear(d_model, tgt_vocab_size, bias=options.output_bias is not False)
        xavier(self, embedding_std=d_model**-0.5)
        if options.tie_embeddings:
            rule = f"src_vocab_size ({src_vocab_size}) with tied embeddings"
            require(src_vocab_size == tgt_vocab_size, "tgt_vocab_size", rule, tgt_vocab_size)
            self.decoder.embedding.tokens.weight = self.encoder.embedding.tokens.weight
            self.final_layer.weight = self.encoder.embedding.tokens.weight

    @classmethod
    def from_config(cls, config: ModelConfig) -> "Transformer":
        """The model that a recipe describes."""
        return cls(
            config.src_vocab_size,
            config.vocab_size,
            config.d_model,
            config.num_layers,
            config.num_heads,
            config.d_ff,
            config.max_seq_length,
            config.dropout,
            options=config.options,
        )

    def encode(self, src: Tokens, src_mask: Mask | None = None, *, need_weights: bool = True) -> EncoderOutput:
        """The source [batch, length, d_model] and each layer's attention."""
        return self.encoder(src, src_mask, need_weights=need_weights)

    def decode(
        self,
        tgt: Tokens,
        enc_output: Memory,
        look_ahead_mask: Mask | None = None,
        padding_mask: Mask | None = None,
        *,
        need_weights: bool = True,
    ) -> DecoderOutput:
        """The target [batch, length, d_model], each layer's self-attention and its attention over `enc_output`."""
        return self.decoder(tgt, enc_output, look_ahead_mask, padding_mask, need_weights=need_weights)

    def forward(
        self,
        src: Int[Tensor, "batch src_length"],
        tgt: Int[Tensor, "batch tgt_length"],
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
        tgt_padding_mask: Mask | None = None,
        *,
        need_weights: bool = True,
    ) -> TransformerOutput:
        """Logits of the token after each of `tgt`; `tgt_padding_mask` is the decoder's mask over the source."""
        out = self.run(src, tgt, src_mask, tgt_mask, tgt_padding_mask, need_weights=need_weights)
        return TransformerOutput(
            self.head(out.hidden), out.enc_attention, out.dec_self_attention, out.dec_enc_attention
        )

    def run(
        self,
        src: Int[Tensor, "batch src_length"],
        tgt: Int[Tensor, "batch tgt_length"],
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
        tgt_padding_mask: Mask | None = None,
        *,
        need_weights: bool = False,
    ) -> EncoderDecoderRun:
        """All but the projection to the vocabulary, and all that the layers know."""
        encoded = self.encoder.run(src, src_mask, need_weights=need_weights)
        decoded = self.decoder.run(tgt, encoded.hidden, tgt_mask, tgt_padding_mask, need_weights=need_weights)
        return EncoderDecoderRun(
            decoded.hidden,
            encoded.self_weights,
            decoded.self_weights,
            decoded.cross_weights,
            encoded.routing + decoded.routing,
        )

    def head(self, hidden: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
        """Logits over the target's vocabulary."""
        return self.final_layer(hidden)

    @property
    def projection(self) -> nn.Linear:
        """The layer behind `head`."""
        return self.final_layer

    def start(
        self, src: Int[Tensor, "batch src_length"], src_mask: Mask | None, max_new_tokens: int
    ) -> "EncoderDecoderSteps":
        """Encode `src` and make ready to decode up to `max_new_tokens` tokens per row, the first of them after BOS."""
        rule = f"at most max_seq_length ({self.max_seq_length})"
        require(max_new_tokens <= self.max_seq_length, "max_new_tokens", rule, max_new_tokens)
        memory = self.encoder.run(src, src_mask).hidden
        if src_mask is not None:  # a row for every row of the batch, which `select` can take
            src_mask = src_mask[(None,) * (4 - src_mask.dim())].expand(src.size(0), -1, -1, -1)
        return EncoderDecoderSteps(self, self.decoder.start_cache(src.size(0), max_new_tokens), memory, src_mask)


class EncoderDecoderSteps:
    """Decoding token by token over a cache; the source is encoded and its keys and values projected once."""

    def __init__(self, model: Transformer, cache: Cache, memory: Memory, memory_mask: Mask | None) -> None:
        self.model, self.cache, self.memory, self.memory_mask = model, cache, memory, memory_mask

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Feed one token per row; logits of the next."""
        cache = self.cache
        out = self.model.decoder.run_layers(
            tokens[:, None], cache.mask(1), memory=self.memory, memory_mask=self.memory_mask, cache=cache
        )
        cache.advance(1)
        return self.model.head(out.hidden[:, 0])

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self.cache.select(rows)
        self.memory = self.memory[rows]
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]
