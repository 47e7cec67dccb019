"""A trained run behind three calls: `translate`, `generate` and `stream`.

Texts are batched by length; what a text becomes does not depend on the batch, nor a sampled one on its batch mates.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from triglot.checkpoint import load_model
from triglot.config import RunConfig
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Decoded, Token, beam_search, gather, stream
from triglot.errors import ConfigError, DataError, require
from triglot.layers.masks import create_padding_mask
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.tokenizer import Tokenizer, Tokenizers

BATCH_TOKENS = 16_384
"""Positions, of all texts and beams, whose keys and values are held at a time."""

TooLong = Literal["error", "cut"]
"""What happens with a line that the model can not read whole."""


class TextWasCut(UserWarning):
    """Only the beginning of a text was read."""


PastContext = Literal["error", "slide"]
"""What happens where a text outgrows the model's context: refuse, or go on from the last half of it."""


class Hypothesis(NamedTuple):
    """A translation; `score` is Σ log p / n^α over its n `tokens`, the end token included."""

    text: str
    score: float
    tokens: list[int]
    truncated: bool
    """Stopped by a limit, not by the end token."""


class Generation(NamedTuple):
    """What follows a prompt, and Σ log p of its `tokens` under the model (before temperature and cuts)."""

    text: str
    log_prob: float
    tokens: list[int]
    truncated: bool
    """Stopped by a limit, not by the end token."""


def load(
    run: str | Path, *, which: str = "best", device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> "Engine":
    """The engine of a run's checkpoint `which`: best, last, or a number of steps.

    Without `device` it is on the GPU if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine(*load_model(Path(run), which, device, dtype))


class Engine:
    """A model in evaluation mode with its config and tokenizers; what it does not say, `config.generation` says."""

    def __init__(self, model: Transformer | DecoderLLM, config: RunConfig, tokenizers: Tokenizers) -> None:
        self.model, self.config, self.tokenizers = model, config, tokenizers

    @torch.no_grad()
    def translate(
        self,
        lines: Sequence[str],
        *,
        beam: int | None = None,
        nbest: int = 1,
        length_penalty: float | None = None,
        max_new_tokens: int | None = None,
        tags: str | Sequence[str | None] | None = None,
        too_long: TooLong = "error",
        first_line: int = 1,
    ) -> list[list[Hypothesis]]:
        """The `nbest` best translations of each line, best first; an empty line becomes one empty text.

        `tags` is the target tag of all lines, or of each. Of a line that is longer than the model reads, the beginning
        is translated where `too_long` is "cut". Raises DataError for such a line otherwise, counting from `first_line`,
        for an unknown tag, and for none where the run was trained with tags.
        """
        model = _expect(self.model, Transformer, "one that translates; use `generate`", self.config)
        _refuse_text("lines", lines)
        how = self.config.generation
        beam = max(how.beam, nbest) if beam is None else beam
        length_penalty = how.length_penalty if length_penalty is None else length_penalty
        if isinstance(tags, str) or tags is None:
            known = self.tokenizers.source.tags
            rule = f"one of {', '.join(known)}, since the run was trained with target tags"
            require(tags is not None or not known, "the target tag", rule, tags, DataError)
            tags = [tags] * len(lines)
        sources = self.tokenizers.encode_sources(lines, tags)
        require(too_long in ("error", "cut"), "too_long", "error or cut", too_long, ConfigError)
        for number, ids in enumerate(sources, first_line):
            rule = f"at most {model.max_seq_length} tokens long (the model's max_seq_length)"
            fits = len(ids) <= model.max_seq_length
            require(fits or too_long == "cut", f"line {number}", rule, len(ids), DataError)
            if not fits:
                told = f"line {number} has {len(ids)} tokens: all beyond {model.max_seq_length} were cut"
                warnings.warn(told, TextWasCut, stacklevel=2)
                ids[model.max_seq_length - 1 : -1] = []
        limit = self.config.generation.max_new_tokens if max_new_tokens is None else max_new_tokens
        limit = min(limit, model.max_seq_length)
        results = [[Hypothesis("", 0.0, [], truncated=False)] for _ in lines]
        rows = [row for row, line in enumerate(lines) if line.strip()]
        for batch in _batches(rows, [beam * (len(ids) + limit) for ids in sources]):
            src = _pad([sources[row] for row in batch], model)
            steps = model.start(src, create_padding_mask(src), limit)
            first = steps.step(torch.full((len(batch),), Tokenizer.bos_id, device=src.device))
            found = beam_search(
                first,
                steps,
                beam=beam,
                max_new_tokens=limit,
                eos_id=Tokenizer.eos_id,
                length_penalty=length_penalty,
                nbest=nbest,
                banned=_banned(self.tokenizers.target),
            )
            for row, texts in zip(batch, found, strict=True):
                results[row] = [self._hypothesis(text, length_penalty) for text in texts]
        return results

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        past_context: PastContext = "error",
    ) -> list[Generation]:
        """What follows each prompt, up to the end of its document or `max_new_tokens`; temperature 0 is greedy.

        An empty prompt begins a document. The n-th prompt draws from the seed `seed + n`, counted from 0. Without
        `max_new_tokens` it is the run's, and no more than fits the context; raises ConfigError where it does not fit
        and `past_context` is "error".
        """
        _refuse_text("prompts", prompts)
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        contexts, limits = self._contexts(prompts, max_new_tokens, past_context)
        results: dict[int, Generation] = {}
        sizes = [min(len(ids) + limit, self._window) for ids, limit in zip(contexts, limits, strict=True)]
        for batch in _batches(range(len(prompts)), sizes):
            generators = [torch.Generator().manual_seed(seed + row) for row in batch]
            tokens = self._tokens([contexts[row] for row in batch], [limits[row] for row in batch], sampler, generators)
            for row, new in zip(batch, gather(tokens, len(batch), Tokenizer.eos_id), strict=True):
                text = self.tokenizers.target.decode(new.ids)
                results[row] = Generation(text, new.log_prob, new.ids, new.truncated)
        return [results[row] for row in range(len(prompts))]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        past_context: PastContext = "error",
    ) -> Iterator[str]:
        """The text that `generate` returns for one prompt, in pieces of whole characters as they come."""
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        contexts, limits = self._contexts([prompt], max_new_tokens, past_context)
        tokens = self._tokens(contexts, limits, sampler, [torch.Generator().manual_seed(seed)])
        return self._pieces(tokens)

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """What the model reads of each prompt, as it read texts in training.

        Whole documents begin with BOS, and so does nothing at all; windows cut anywhere mostly do not.
        """
        whole = self.config.data.packing == "documents"
        return [[Tokenizer.bos_id] * (whole or not ids) + ids for ids in self.tokenizers.target.encode_batch(prompts)]

    def _pieces(self, tokens: Iterator[Token]) -> Iterator[str]:
        text = self.tokenizers.target.stream()
        for token in tokens:
            if piece := text.push(token.id):
                yield piece
        if rest := text.flush():
            yield rest

    @property
    def _window(self) -> int:
        return _expect(self.model, DecoderLLM, "one that continues texts; use `translate`", self.config).max_len

    def _contexts(
        self, prompts: Sequence[str], max_new_tokens: int | None, past_context: PastContext
    ) -> tuple[list[list[int]], list[int]]:
        """The ids of each prompt and how many tokens may follow it."""
        window, limits = self._window, []
        require(past_context in ("error", "slide"), "past_context", "error or slide", past_context, ConfigError)
        require(
            max_new_tokens is None or max_new_tokens >= 1, "max_new_tokens", "at least 1", max_new_tokens, ConfigError
        )
        contexts = self.prompt_ids(prompts)
        for number, ids in enumerate(contexts, 1):
            room = window - len(ids)
            limit = max_new_tokens or self.config.generation.max_new_tokens
            if past_context == "error":
                beyond = f'(the context is {window}; past_context "slide" goes on beyond)'
                require(
                    room >= 1, f"prompt {number}", f"at most {window - 1} tokens long {beyond}", len(ids), ConfigError
                )
                rule = f"at most {room} after the {len(ids)} tokens of prompt {number} {beyond}"
                require(max_new_tokens is None or limit <= room, "max_new_tokens", rule, limit, ConfigError)
                limit = min(limit, room)
            limits.append(limit)
        return contexts, limits

    @torch.no_grad()
    def _tokens(
        self, contexts: list[list[int]], limits: list[int], sampler: Sampler, generators: list[torch.Generator]
    ) -> Iterator[Token]:
        """New tokens of every row; a row whose context is full goes on from the last half of it."""
        model = _expect(self.model, DecoderLLM, "one that continues texts; use `translate`", self.config)
        window, left, live = model.max_len, list(limits), list(range(len(contexts)))
        require(window >= 2, "max_seq_length", "at least 2 to generate", window, ConfigError)
        while live:
            texts = [ids if len(ids) < window else ids[-(window // 2) :] for ids in contexts]
            prompts = _pad(texts, model)
            lengths = torch.tensor([len(text) for text in texts], device=prompts.device)
            room = min(max(left[row] for row in live), window - prompts.size(1))  # the longest is the first to be full
            first, steps = model.start(prompts, lengths, room)
            tokens = stream(
                first,
                steps,
                sampler,
                [min(left[row], room) for row in live],
                eos_id=Tokenizer.eos_id,
                banned=_banned(self.tokenizers.target),
                generator=[generators[row] for row in live],
            )
            for token in tokens:
                row = live[token.row]
                texts[token.row].append(token.id)
                left[row] = 0 if token.id == Tokenizer.eos_id else left[row] - 1
                yield token._replace(row=row)
            contexts = [text for row, text in zip(live, texts, strict=True) if left[row]]
            live = [row for row in live if left[row]]

    def _hypothesis(self, text: Decoded, length_penalty: float) -> Hypothesis:
        words = self.tokenizers.target.decode(text.ids)
        return Hypothesis(words, text.score(length_penalty), text.ids, text.truncated)


def _refuse_text(name: str, texts: Sequence[str]) -> None:
    """A text is a sequence of characters, each of which would pass for a text."""
    require(not isinstance(texts, str), name, "a list of texts", texts, ConfigError)


def _banned(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that stand for no text and no end."""
    tags = [tokenizer.tag_id(tag) for tag in tokenizer.tags]
    return [Tokenizer.pad_id, Tokenizer.bos_id, *tags]


def _pad(texts: Sequence[list[int]], model: Transformer | DecoderLLM) -> Tensor:
    rows = pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True, padding_value=Tokenizer.pad_id)
    return rows.to(next(model.parameters()).device)


def _batches(rows: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The rows from the longest down, in batches of at most BATCH_TOKENS: number of rows × the first one's size."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: -sizes[row]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _expect(model: Any, kind: type[Any], rule: str, config: RunConfig) -> Any:
    require(isinstance(model, kind), "the model of the run", rule, config.model.kind, ConfigError)
    return model
