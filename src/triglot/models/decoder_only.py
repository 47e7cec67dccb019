"""The decoder-only language model (Radford et al. 2018; with the right options, Touvron et al. 2023)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triglot.blocks import DecoderBlock
from triglot.config import BlockOptions, ModelConfig
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate
from triglot.errors import require
from triglot.layers.cache import Cache
from triglot.layers.initialise import normal
from triglot.layers.masks import check_real, create_document_mask, create_look_ahead_mask
from triglot.losses import expert_losses, token_cross_entropy
from triglot.models.stack import Stack, StackRun, Tokens


class DecoderLLMOutput(NamedTuple):
    """What a `DecoderLLM` returns; `loss` is None without targets."""

    logits: Float[Tensor, "batch length vocab"]
    loss: Float[Tensor, ""] | None


class DecoderLLM(Stack):
    """Blocks under a look-ahead mask, and a projection to the vocabulary; all weights begin as N(0, 0.02²).

    There is no padding id: 0 is a token. Padding is told by `mask`, and targets of −100 are not scored.
    """

    layer_type = DecoderBlock
    length_name = "max_len"

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        n_heads: int = 8,
        n_layers: int = 6,
        d_ff: int = 2048,
        max_len: int = 5000,
        *,
        dropout: float = 0.1,
        options: BlockOptions = BlockOptions(),
    ) -> None:
        options = options.with_dropout(attention=0.0, embedding=0.0)
        if options.final_norm is None:
            options = replace(options, final_norm=True)
        super().__init__(vocab_size, d_model, n_layers, n_heads, d_ff, max_len, dropout, options=options)
        self.vocab_size, self.max_len = vocab_size, max_len
        self.lm_head = nn.Linear(d_model, vocab_size, bias=bool(options.output_bias))
        normal(self, std=0.02)
        if options.tie_embeddings:
            self.lm_head.weight = self.embedding.tokens.weight

    @classmethod
    def from_config(cls, config: ModelConfig) -> "DecoderLLM":
        """The model that a recipe describes."""
        return cls(
            config.vocab_size,
            config.d_model,
            config.num_heads,
            config.num_layers,
            config.d_ff,
            config.max_seq_length,
            dropout=config.dropout,
            options=config.options,
        )

    @staticmethod
    def create_causal_mask(
        seq_len: int, *, device: torch.device | str | None = None
    ) -> Bool[Tensor, "1 1 length length"]:
        """The look-ahead mask with axes for batch and heads."""
        return create_look_ahead_mask(seq_len, device=device)[None, None]

    def forward(
        self, input_ids: Tokens, targets: Tokens | None = None, *, mask: Bool[Tensor, "batch length"] | None = None
    ) -> DecoderLLMOutput:
        """Logits of the token after each of `input_ids`; with `targets`, the mean loss over those that are not −100.

        In training mode the loss includes the weighted expert losses.
        """
        out = self.run(input_ids, mask=mask)
        logits = self.head(out.hidden)
        if targets is None:
            return DecoderLLMOutput(logits, None)
        scored = token_cross_entropy(logits, targets)
        loss = scored.total / scored.tokens.clamp(min=1)
        if self.training and self.options.experts is not None:
            loss = loss + expert_losses(out.routing).weighted(self.options.experts)
        return DecoderLLMOutput(logits, loss)

    def run(
        self,
        input_ids: Tokens,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        segments: Int[Tensor, "batch length"] | None = None,
        cache: Cache | None = None,
        need_weights: bool = False,
    ) -> StackRun:
        """All but the projection to the vocabulary, and all that the layers know.

        `mask` is True for real tokens, `segments` tells the documents of packed rows apart; with a `cache` the tokens
        come after those it holds, and the caller advances it.
        """
        given = [part for part in (mask, segments, cache) if part is not None]
        require(len(given) <= 1, "mask, segments or cache", "given alone", f"{len(given)} of them")
        attend, real = self._may_attend(input_ids, mask, segments, cache), mask
        if segments is not None:
            real = segments != 0
        return self.run_layers(
            input_ids, attend, causal=attend is None, real=real, cache=cache, need_weights=need_weights
        )

    def _may_attend(
        self,
        input_ids: Tokens,
        mask: Bool[Tensor, "batch length"] | None,
        segments: Int[Tensor, "batch length"] | None,
        cache: Cache | None,
    ) -> Bool[Tensor, "#batch 1 length keys"] | None:
        """The attention mask, or None where plain look-ahead is all there is."""
        length, window = input_ids.size(1), self.options.window
        if window is not None and window >= length + (0 if cache is None else cache.longest):
            window = None
        if cache is not None:
            return cache.mask(length, window) if cache.longest or window else None
        if segments is not None:
            return create_document_mask(segments, window=window)
        if mask is None and window is None:
            return None
        look_ahead = create_look_ahead_mask(length, window=window, device=input_ids.device)[None, None]
        if mask is None:
            return look_ahead
        check_real(mask)
        return mask[:, None, None] & look_ahead

    def head(self, hidden: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
        """Logits over the vocabulary."""
        return self.lm_head(hidden)

    @property
    def projection(self) -> nn.Linear:
        """The layer behind `head`."""
        return self.lm_head

    def start(
        self, input_ids: Tokens, lengths: Int[Tensor, " batch"], max_new_tokens: int
    ) -> tuple[Float[Tensor, "batch vocab"], "DecoderOnlySteps"]:
        """Read right-padded prompts; logits after each prompt's last token, and what goes on from there."""
        cache = self.start_cache(input_ids.size(0), input_ids.size(1) + max_new_tokens)
        hidden = self.run(input_ids, cache=cache).hidden
        cache.advance(input_ids.size(1), lengths)
        last = hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1]
        return self.head(last), DecoderOnlySteps(self, cache)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tokens,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
        eos_id: int | None = None,
        pad_id: int = 0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue each row; temperature 0 takes the most probable token. Prompts of `lengths` are right-padded.

        Each row of the result is its prompt, what follows it up to `eos_id`, and `pad_id` to the longest row's end.
        """
        batch, width = input_ids.shape
        if lengths is None:
            lengths = torch.full((batch,), width, device=input_ids.device)
        require(max_new_tokens >= 0, "max_new_tokens", "at least 0", max_new_tokens)
        rule = f"such that prompt and new tokens fit max_len ({self.max_len})"
        require(width + max_new_tokens <= self.max_len, "max_new_tokens", rule, max_new_tokens)
        require(
            bool((lengths >= 1).all() and (lengths <= width).all()),
            "lengths",
            f"between 1 and {width}",
            lengths.tolist(),
        )
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        ends = () if eos_id is None else (eos_id,)
        was_training = self.training
        self.eval()
        try:
            first, steps = self.start(input_ids, lengths, max_new_tokens)
            new = generate(first, steps, sampler, max_new_tokens, eos_ids=ends, generator=generator)
        finally:
            self.train(was_training)
        rows = [torch.cat([input_ids[i, : lengths[i]], input_ids.new_tensor(new[i].ids)]) for i in range(batch)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)


class DecoderOnlySteps:
    """Decoding token by token over a cache."""

    def __init__(self, model: DecoderLLM, cache: Cache) -> None:
        self.model, self.cache = model, cache

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Feed one token per row; logits of the next."""
        hidden = self.model.run(tokens[:, None], cache=self.cache).hidden
        self.cache.advance(1)
        return self.model.head(hidden[:, 0])

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self.cache.select(rows)
