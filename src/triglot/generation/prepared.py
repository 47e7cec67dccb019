"""A model made ready to decode on a processor: projections side by side and packed, keys and values in place.

It computes what the model computes (`models/stack.py`), in fewer and larger operations over rows of tokens, and gives
a row the same bits in any company: products never see fewer rows than it takes for that, and keys past a row's own
end weigh exactly nothing and are so many that no sum is taken in another order.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triglot.blocks import Block
from triglot.decoding.logits import Powers, Scaled, Top
from triglot.errors import require
from triglot.generation.attention import (
    Memory,
    PagedMemory,
    Part,
    PreparedAttention,
    PreparedMemory,
    Turn,
    Whole,
    at_least,
    at_most,
    turn_table,
)
from triglot.generation.feed_forward import PreparedFeedForward
from triglot.generation.held import Held, Place, held_width
from triglot.generation.int8 import pack_for_kernels
from triglot.generation.paged import Pages
from triglot.generation.residual import PreparedResidual, Stream, norm_of
from triglot.generation.top import TopKernel, may_multiply
from triglot.layers.attend import FORBIDDEN
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.packed import LEAST_SIZE, PackedFloat, PackedInt8, Packer, Precision, pack, quantise_rows
from triglot.layers.positions import LearnedPositions, PositionalEncoding
from triglot.layers.vectors import GRAIN, VECTOR, round_up
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.stack import Stack

Hidden = Float[Tensor, "rows d_model"]
QUERIES = 4
"""From so many queries on attention gives each the same bits: a text's tokens may be read one by one or together."""
SHIFT = 35.0
"""What is taken off logits whose powers are wanted: those of a row's likeliest token are seldom outside −10 to 25."""
VOCABULARY = 128
"""The vocabulary is filled up to a multiple of this, by tokens that never come."""


class PreparedExperts:
    """The experts that some row has chosen, one after another."""

    def __init__(self, moe: MixtureOfExperts, packer: Packer) -> None:
        self.moe, router = moe, moe.router
        missing = round_up(moe.num_experts, VECTOR) - moe.num_experts
        bias = None if router.bias is None else F.pad(router.bias.detach(), (0, missing))
        self.router = pack(F.pad(router.weight.detach(), (0, 0, 0, missing)), bias, "fp32")
        self.shared = None if moe.shared is None else PreparedFeedForward.of(moe.shared, packer)
        none = [None] * moe.num_experts
        inner_bias = none if moe.inner_bias is None else moe.inner_bias.detach()
        outer_bias = none if moe.outer_bias is None else moe.outer_bias.detach()
        self.experts = [
            PreparedFeedForward(
                packer(moe.inner[one].detach(), inner_bias[one]),
                packer(moe.outer[one].detach(), outer_bias[one]),
                moe.activation,
            )
            for one in range(moe.num_experts)
        ]
        self.least_rows = packer.least_rows

    @property
    def feeds(self) -> list[PreparedFeedForward]:
        """All experts, the shared one too."""
        return self.experts if self.shared is None else [*self.experts, self.shared]

    def step(self, x: Hidden, rows: int) -> Hidden:
        """Of the first rows, which stand for tokens; what fills up others visits no expert."""
        tokens = at_most(x, rows)
        filled = at_least(tokens, LEAST_SIZE)  # a sum over one row may be taken in another order
        choice = self.choose(filled, torch.ones(len(filled), 1, dtype=torch.bool))
        return at_least(self.mix(tokens, *(part[:rows] for part in choice)), len(x))

    def whole(self, x: Hidden, whole: Whole) -> Hidden:
        """Of whole texts, whose padding visits none."""
        return self.mix(x, *self.choose(x, whole.real))

    def choose(self, x: Hidden, real: Bool[Tensor, "texts length"]) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, weights, which choices are some [rows, choices]; of as many texts at a time as one thread takes."""
        logits = self.router(x)[:, : self.moe.num_experts]
        texts = max(1, GRAIN // (real.size(1) * self.moe.num_experts))
        parts = zip(logits.view(*real.shape, -1).split(texts), real.split(texts), strict=True)
        found = [self.moe.choose(some, real_ones)[:3] for some, real_ones in parts]
        whole = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        experts, weights, chosen = (part.flatten(0, 1) for part in whole)
        return experts, weights, chosen

    def mix(
        self,
        x: Hidden,
        experts: Int[Tensor, "rows choices"],
        weights: Float[Tensor, "rows choices"],
        chosen: Bool[Tensor, "rows choices"],
    ) -> Hidden:
        """What the chosen experts say, weighted and summed, and what the shared one says."""
        output = torch.zeros_like(x)
        if len(x) == 1:  # the same in the same order, without a search for rows
            for number, rank in sorted(zip(experts[0].tolist(), range(experts.size(1)), strict=True)):
                output += weights[:, rank, None] * self.experts[number](at_least(x, self.least_rows))[:1]
        else:
            for number in experts[chosen].unique().tolist():
                row, rank = ((experts == number) & chosen).nonzero(as_tuple=True)
                found = self.experts[number](at_least(x[row], self.least_rows))[: len(row)]
                output[row] += weights[row, rank, None] * found
        if self.shared is not None:
            output += at_most(self.shared(at_least(x, self.least_rows)), len(x))
        return output


class PreparedBlock:
    """A block: self-attention, attention over a memory if there is one, a feed-forward."""

    def __init__(self, block: Block, packer: Packer) -> None:
        self.self_attention = PreparedAttention(block.self_attention, packer)
        self.around_self_attention = PreparedResidual(block.around_self_attention)
        self.memory = None
        if hasattr(block, "cross_attention"):
            self.memory = PreparedMemory(block.cross_attention, packer)
            self.around_memory = PreparedResidual(block.around_cross_attention)
        self.around_feed_forward = PreparedResidual(block.around_feed_forward)
        self.feed_forward: PreparedFeedForward | PreparedExperts
        if isinstance(feed := block.feed_forward, PointwiseFeedForward):
            self.feed_forward = PreparedFeedForward.of(feed, packer)
        else:
            self.feed_forward = PreparedExperts(feed, packer)

    def compile(self, dtype: torch.dtype) -> None:
        """Have kernels add and normalise, for products that read rows in `dtype`, and activate."""
        for part in vars(self).values():
            if isinstance(part, PreparedResidual):
                part.compile(dtype)
        feed = self.feed_forward
        for one in [feed] if isinstance(feed, PreparedFeedForward) else feed.feeds:
            one.by_kernel = True

    def step(self, x: Stream, parts: Sequence[Part], layer: int, turn: Turn | None) -> Stream:
        """Rows are the next tokens of texts."""
        x = self.around_self_attention(x, lambda h: self.self_attention.step(h, parts, layer, turn))
        if (attention := self.memory) is not None:
            x = self.around_memory(x, lambda h: attention.step(h, parts, layer))
        feed, rows = self.feed_forward, sum(part.rows for part in parts)
        return self.around_feed_forward(
            x, feed if isinstance(feed, PreparedFeedForward) else lambda h: feed.step(h, rows)
        )

    def whole(self, x: Stream, whole: Whole, turn: Turn | None, held: Tensor | None) -> Stream:
        """Rows are whole texts."""
        x = self.around_self_attention(x, lambda h: self.self_attention.whole(h, whole, turn, held))
        feed = self.feed_forward
        return self.around_feed_forward(
            x, feed if isinstance(feed, PreparedFeedForward) else lambda h: feed.whole(h, whole)
        )


class PreparedStack:
    """An encoder, a decoder, or a decoder-only model without its projection."""

    def __init__(self, stack: Stack, packer: Packer, *, by_kernels: bool = False) -> None:
        self.stack, self.embedding, self.packer = stack, stack.embedding, packer
        self.blocks = [PreparedBlock(layer, packer) for layer in stack.layers]  # type: ignore[arg-type]  # a ModuleList tells of no kind
        narrow = by_kernels and packer.used == {"bf16"} and stack.options.experts is None
        self.reads = torch.bfloat16 if narrow else torch.float32
        """The type in which a block's products read."""
        for block in self.blocks if by_kernels else ():
            block.compile(self.reads)
        self.embedding_norm, self.final_norm = norm_of(stack.embedding.norm), norm_of(stack.final_norm)
        self.relative = stack.relative
        self.turns = None if stack.embedding.rotary is None else turn_table(stack.embedding.rotary)

    def embed(self, tokens: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]) -> tuple[Hidden, Turn | None]:
        """Vectors of tokens at their positions."""
        x = self.embedding.tokens.weight.index_select(0, tokens) * self.embedding.scale
        match self.embedding.added:
            case PositionalEncoding() as added:
                x += added.table.index_select(0, positions)
            case LearnedPositions() as added:
                x += added.embedding.weight.index_select(0, positions)
        x = self.embedding_norm(x)
        if self.turns is None:
            return x, None
        return x, (self.turns[0].index_select(0, positions), self.turns[1].index_select(0, positions))

    def step(self, tokens: Int[Tensor, " rows"], parts: Sequence[Part]) -> Hidden:
        """What stands before the projection once the texts of all parts have read their next tokens."""
        at = [part.place.positions.flatten() for part in parts]
        positions = at[0] if len(at) == 1 else torch.cat(at)
        x, turn = self.embed(tokens, positions.clamp(max=self.stack.max_seq_length - 1))
        x = at_least(x, self.packer.least_rows)
        if self.relative is not None:
            parts = [part._replace(place=self.relatively(part.place)) for part in parts]
        stream = Stream(x, x.to(self.reads))
        for number, block in enumerate(self.blocks):
            stream = block.step(stream, parts, number, turn)
        return self.finish(at_most(stream.full, len(tokens)))

    def relatively(self, place: Place) -> Place:
        """A place whose bias knows of relative positions."""
        assert self.relative is not None
        return place._replace(bias=place.bias + self.relative(place.positions, place.keys))

    def whole(self, tokens: Int[Tensor, "texts length"], bias: Tensor, held: Tensor | None = None) -> Hidden:
        """Read whole texts; their keys and values go to `held` [2, layers, texts, kv_heads, length, width]."""
        texts, length = tokens.shape
        last = self.stack.max_seq_length - 1  # a text is filled up beyond what the model reads
        places = torch.arange(length)
        x, turn = self.embed(tokens.flatten(), places.clamp(max=last).repeat(texts))
        if self.relative is not None:
            bias = bias + self.relative(places[None], places[None])
        whole = Whole(texts, length, bias)
        stream = Stream(x, x.to(self.reads))
        for number, block in enumerate(self.blocks):
            stream = block.whole(stream, whole, turn, None if held is None else held[:, number])
        return self.finish(stream.full)

    def finish(self, x: Hidden) -> Hidden:
        """What stands before the projection, of what the last block gives."""
        x, scale = self.final_norm(x), self.stack.output_scale
        return x if scale is None else x * scale


def filled_up_projection(
    projection: nn.Linear, banned: Sequence[int]
) -> tuple[Float[Tensor, "filled_up_vocab d_model"], Float[Tensor, " filled_up_vocab"]]:
    """Its weight and bias, a multiple of VOCABULARY long: what fills it up, and what is `banned`, gets −∞.

    Rows of logits then begin where memory is read at its fastest, and every sum over one is taken in the same order.
    """
    vocab, weight = projection.out_features, projection.weight.detach()
    if (more := round_up(vocab, VOCABULARY) - vocab) > 0:
        weight = F.pad(weight, (0, 0, 0, more))
    bias = weight.new_full((len(weight),), -math.inf)
    bias[:vocab] = 0 if projection.bias is None else projection.bias.detach()
    bias[list(banned)] = -math.inf
    return weight, bias


class Prepared:
    """A model ready to decode: its stacks and the projection to the vocabulary, where `banned` tokens get −∞."""

    def __init__(
        self,
        model: Transformer | DecoderLLM,
        precision: Precision = "fp32",
        banned: Sequence[int] = (),
        *,
        by_kernels: bool = False,
    ) -> None:
        packer, self.by_kernels = Packer(precision, pack_for_kernels if by_kernels else pack), by_kernels
        self.encoder = None
        if isinstance(model, Transformer):
            self.encoder = PreparedStack(model.encoder, packer, by_kernels=by_kernels)
        decoder = model.decoder if isinstance(model, Transformer) else model
        self.decoder = PreparedStack(decoder, packer, by_kernels=by_kernels)
        weight, bias = filled_up_projection(model.projection, banned)
        self.has_bias, self.never = model.projection.bias is not None, bias.isneginf().nonzero()[:, 0]
        self.head = packer.make(weight, bias, "int8" if precision == "int4" else precision)  # four bits are too few
        self.powers = None
        if isinstance(self.head, PackedFloat) and self.head.packed and not self.has_bias:  # which it would round
            self.powers = self.head.with_bias(bias - SHIFT)
        self.top = None
        if by_kernels and self.encoder is not None and may_multiply(self.head.precision):
            self.top = TopKernel(weight, bias, self.head.precision)
        self.num_bytes, self.used = packer.num_bytes + self.head.num_bytes, {*packer.used, self.head.precision}

    @property
    def bytes_held(self) -> int:
        """Of a position's keys and values."""
        stack = self.decoder.stack
        return 2 * 4 * len(stack.layers) * stack.num_kv_heads * held_width(stack.head_dim)

    def logits(self, hidden: Hidden) -> Float[Tensor, "rows filled_up_vocab"]:
        """What follows `hidden`."""
        return at_most(self.head(at_least(hidden, self.head.least_rows)), len(hidden))

    def logits_in_parts(self, hidden: Hidden, rows: int) -> Iterator[Float[Tensor, "some filled_up_vocab"] | Scaled]:
        """The same, of so many rows at a time.

        Those of int8 are quantised together, so that each part can take the memory of the last, and left as they come.
        """
        head = self.head
        if self.has_bias or not isinstance(head, PackedInt8):
            yield from map(self.logits, hidden.split(rows))
            return
        whole, largest = quantise_rows(hidden)
        for some, scale in zip(whole.split(rows), largest.split(rows), strict=True):
            yield Scaled(head.product(some).index_fill_(1, self.never, -math.inf), scale)

    def top_of(self, hidden: Hidden, count: int) -> Top:
        """The `count` likeliest tokens after each row, where `top` can tell them."""
        assert self.top is not None
        return self.top(hidden, count, partial(self._logits_of, hidden))

    def powers_in_parts(self, hidden: Hidden, rows: int) -> Iterator[Powers]:
        """The same as powers, where `powers` can: σ(t) = eᵗ / (1 + eᵗ) of a small t is eᵗ, and comes with a product."""
        assert self.powers is not None
        for some, own in zip(hidden.to(self.powers.dtype).split(rows), hidden.split(rows), strict=True):
            yield Powers(  # of which nothing is kept here, so that the next part can take its memory
                at_most(self.powers.narrow(at_least(some, self.powers.least_rows), "sigmoid"), len(own)),
                partial(self._logits_of, own),
            )

    def _logits_of(self, hidden: Hidden, rows: Int[Tensor, " some"]) -> Float[Tensor, "some filled_up_vocab"]:
        return self.logits(hidden[rows])

    def hold(self, rows: int, most: int) -> Held | Pages:
        """Room for `rows` texts of at most `most` tokens."""
        if not self.by_kernels:
            return self._hold(rows, most, 1, QUERIES)
        self._check_length(most)
        return self._pages(rows, of_texts=True, window=self.decoder.stack.options.window)

    def hold_hypotheses(self, sentences: int, most: int, beam: int) -> Held | Pages:
        """Room for `beam` hypotheses of each sentence, of at most `most` tokens."""
        if self.by_kernels:
            self._check_length(most)
            return self._pages(sentences)
        groups = self.decoder.blocks[0].self_attention.heads // self.decoder.stack.num_kv_heads
        return self._hold(sentences, most, beam, beam * groups)

    def _pages(self, rows: int, **how: Any) -> Pages:
        stack, dtype = self.decoder.stack, self.decoder.blocks[0].self_attention.comes_in(self.decoder.turns)
        return Pages(len(stack.layers), rows, stack.num_kv_heads, stack.head_dim, dtype, **how)

    def _hold(self, rows: int, most: int, beam: int, queries: int) -> Held:
        stack = self.decoder.stack
        self._check_length(most)
        sizes = len(stack.layers), rows, stack.num_kv_heads, stack.head_dim, most * beam, queries
        return Held(*sizes, stack.options.window)

    def _check_length(self, most: int) -> None:
        stack = self.decoder.stack
        require(most <= stack.max_seq_length, "length", f"at most {stack.length_name} ({stack.max_seq_length})", most)

    def hold_memory(self, sentences: int, length: int) -> Memory | PagedMemory:
        """Room for what as many sentences are, of which nothing is attended to yet."""
        bias, stack = torch.full((sentences, 1, 1, length), FORBIDDEN), self.decoder.stack
        attention = self.decoder.blocks[0].memory
        assert attention is not None
        layers, kv_heads, head_dim = len(stack.layers), stack.num_kv_heads, stack.head_dim
        if self.by_kernels:
            return PagedMemory(Pages(layers, sentences, kv_heads, head_dim, attention.comes_in), bias)
        return Memory(torch.zeros(2, layers, sentences, kv_heads, length, held_width(head_dim)), bias)

    def encode(
        self, sources: Sequence[Sequence[int]], length: int
    ) -> tuple[list[Float[Tensor, "2 sources kv_heads length head_dim"]], Float[Tensor, "sources 1 1 length"]]:
        """Keys and values that each layer has of sources, and the bias that hides padding."""
        assert self.encoder is not None
        tokens = torch.zeros(len(sources), length, dtype=torch.long)
        for row, ids in enumerate(sources):
            tokens[row, : len(ids)] = torch.tensor(ids)
        ends = torch.tensor([len(ids) for ids in sources])
        bias = ((torch.arange(length) >= ends[:, None]) * FORBIDDEN)[:, None, None]
        memory = self.encoder.whole(tokens, bias)
        layers = [block.memory for block in self.decoder.blocks if block.memory is not None]
        return [layer.read(memory, len(sources)) for layer in layers], bias
