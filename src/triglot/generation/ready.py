"""A run's model, its config and tokenizers, ready to decode."""

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from triglot.config import RunConfig
from triglot.decoding.beam import BeamSearch
from triglot.decoding.speculation import Draft, NGrams
from triglot.errors import ConfigError, DataError, require
from triglot.generation.captured import Captured, can_be_captured
from triglot.generation.compiled import Compiled
from triglot.generation.compiler import cpp_compiler
from triglot.generation.drafts import ModelDraft
from triglot.generation.int8 import multiplies_bytes
from triglot.generation.kernels import kernels_pay
from triglot.generation.prepared import Prepared
from triglot.generation.steps import search, start_texts
from triglot.layers.packed import Precision
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.objective import Model
from triglot.tokenizer import Tokenizers

Tags = str | Sequence[str | None] | None
"""The target tag of all lines, or of each."""
BATCH_TOKENS = 16_384
"""Positions, of all texts and beams, whose keys and values are held at a time."""


class Ready:
    """A model in evaluation mode; on a processor it is prepared when it is first asked for.

    Its weights must not change then. On a GPU texts go on by captured steps, which put some weights into one piece,
    unless the model is `in_training`; all else decodes with the model as it is. Where `compiled` is left out, kernels
    are compiled if they pay, unless it is in training, and nothing else is.
    """

    def __init__(
        self,
        model: Model,
        config: RunConfig,
        tokenizers: Tokenizers,
        precision: Precision = "fp32",
        draft: "Ready | None" = None,
        *,
        compiled: bool | None = None,
        in_training: bool = False,
    ) -> None:
        known = ", ".join(get_args(Precision))
        require(precision in get_args(Precision), "precision", f"one of {known}", precision, ConfigError)
        self.model, self.config, self.tokenizers, self.precision = model, config, tokenizers, precision
        weight = model.projection.weight
        self._can_be_prepared = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._can_be_captured = not in_training and can_be_captured(model)
        rule = "fp32 unless the model is on a processor, in fp32"
        require(self._can_be_prepared or precision == "fp32", "precision", rule, precision, ConfigError)
        if draft is not None:
            _ = self.writer, draft.writer
            own, other = (one.target for one in (tokenizers, draft.tokenizers))
            same = [own.token_bytes(id) for id in range(own.vocab_size)] == [
                other.token_bytes(id) for id in range(other.vocab_size)
            ]
            require(same, "the draft's vocabulary", "the model's own tokens", f"{other.vocab_size} others", ConfigError)
            rule, value = "left out unless the model is on a processor, in fp32", draft.config.model.kind
            require(self._can_be_prepared, "draft", rule, value, ConfigError)
        self.draft, self._compiles, self._in_training = draft, compiled, in_training
        if compiled:
            self._check_compiles()

    def _check_compiles(self) -> None:
        rule = "left out unless the model is on a processor, in fp32, or a decoder-only one on a GPU, without experts"
        require(self._can_be_captured or self._can_be_prepared, "compiled", rule, True, ConfigError)
        if self._can_be_prepared:
            cpp_compiler()
        if isinstance(self.model, DecoderLLM):
            rule = "fp32, bf16 or int8 where texts are `compiled` for a processor without AVX2"
            fits = self.precision != "int4" or multiplies_bytes()
            require(fits, "precision", rule, self.precision, ConfigError)

    @cached_property
    def compiled(self) -> Compiled | None:
        """What goes on from a prompt where that was asked for; compiling it takes up to two minutes, once."""
        if not self._compiles or not self._can_be_prepared:
            return None
        return Compiled(self.writer, self.precision, self._never)

    @cached_property
    def captured(self) -> Captured | None:
        """What goes on from a prompt on a GPU; None elsewhere, and with experts, of which each step needs others."""
        return Captured(self.writer, self._never, compiled=bool(self._compiles)) if self._can_be_captured else None

    @cached_property
    def prepared(self) -> Prepared | None:
        """The model made ready for a processor, its banned ids among what it knows; None elsewhere."""
        if not self._can_be_prepared:
            return None
        if self._compiles is None and not self._in_training and kernels_pay():
            try:
                return self._tried(self._prepare(by_kernels=True))
            except (ConfigError, OSError) as error:
                told = "texts will take longer, since no kernels could be compiled for them"
                warnings.warn(f"{told} (nor are any where `compiled` is False): {error}", stacklevel=2)
        pays = isinstance(self.model, Transformer) or kernels_pay()  # compiled texts have code of their own
        return self._prepare(by_kernels=bool(self._compiles) and pays)

    def _prepare(self, *, by_kernels: bool) -> Prepared:
        return Prepared(self.model, self.precision, self._never, by_kernels=by_kernels)

    @staticmethod
    def _tried(prepared: Prepared) -> Prepared:
        """The same, after a search for one token of one sentence, or one of a text, which needs each kernel."""
        if prepared.encoder is None:
            _, steps = start_texts(prepared, [[0]], 1)
            steps.step(torch.zeros(1, dtype=torch.long))
        else:
            search(prepared, [[0]], [1], BeamSearch(beam=1, eos_ids=[0]), 0)
        return prepared

    @property
    def multiplies_in(self) -> str:
        """What decoding multiplies in, whatever was asked for: without kernels small projections do not in int8."""
        if (compiled := self.compiled if isinstance(self.model, DecoderLLM) else None) is not None:
            return compiled.multiplies_in
        if (prepared := self.prepared) is not None:
            return " and ".join(one for one in get_args(Precision) if one in prepared.used)
        dtype = self.model.projection.weight.dtype
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))

    def guesser(self, count: int) -> Draft:
        """What guesses `count` tokens of one text: the draft model, or what followed in the text before."""
        rule = "0 unless the model is on a processor, in fp32"
        require(self._can_be_prepared, "speculate", rule, count, ConfigError)
        require(not self._compiles, "speculate", "0 where `compiled` is set", count, ConfigError)
        if self.draft is None or self.draft.prepared is None:
            return NGrams()
        return ModelDraft(self.draft.prepared)

    @property
    def banned(self) -> Sequence[int]:
        """What a search has to ban itself."""
        return () if self._can_be_prepared or self._can_be_captured else self._never

    @property
    def _never(self) -> list[int]:
        """What no text has: what the tokenizer bans, and where an import's model has more ids than it, these."""
        tokenizer = self.tokenizers.target
        return [*tokenizer.ids.banned, *range(tokenizer.vocab_size, self.model.projection.out_features)]

    @property
    def translator(self) -> Transformer:
        """The model, if it is an encoder–decoder."""
        rule, kind = "one that translates; this one has `generate` and `score`", self.config.model.kind
        require(isinstance(self.model, Transformer), "the model of the run", rule, kind, ConfigError)
        assert isinstance(self.model, Transformer)
        return self.model

    @property
    def writer(self) -> DecoderLLM:
        """The model, if it is decoder-only."""
        rule, kind = "one that continues texts; this one has `translate` and `score`", self.config.model.kind
        require(isinstance(self.model, DecoderLLM), "the model of the run", rule, kind, ConfigError)
        assert isinstance(self.model, DecoderLLM)
        return self.model


def tags_of(tags: Tags, lines: int, tokenizers: Tokenizers) -> Sequence[str | None]:
    """The target tag of each line; DataError for another number, or for none where the run was trained with tags."""
    tags = [tags] * lines if isinstance(tags, str) or tags is None else tags
    require(len(tags) == lines, "tags", f"one for each of {lines} lines", len(tags), DataError)
    known = ", ".join(tokenizers.source.tags)
    rule = f"one of {known}, since the run was trained with target tags"
    require(not known or None not in tags, "the target tag", rule, None, DataError)
    return tags


def pad(texts: Sequence[Sequence[int]], model: Model) -> Tensor:
    """Rows of one length on the model's device, filled up with zeros."""
    rows = [torch.tensor(list(ids)) for ids in texts]
    return pad_sequence(rows, batch_first=True).to(model.projection.weight.device)


def batches(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Rows from the largest down, in batches of at most BATCH_TOKENS: number of rows × the first one's size."""
    batch: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
