"""How probable given texts are: log p of each token, of translations and of running text, in nats.

Probabilities are the model's own, over its whole vocabulary, as training minimises and `evaluate` reports them: unlike
in generation, no token is banned. A text's score does not depend on its company (`log_probs.py`).
"""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from triglot.config import RunConfig
from triglot.data.batch import IGNORED
from triglot.data.corpus import read_blocks
from triglot.data.dataset import Windows
from triglot.errors import ConfigError, DataError, require
from triglot.generation.log_probs import Row, log_probs
from triglot.generation.ready import Tags, tags_of
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.objective import score_batches
from triglot.tokenizer import Tokenizer, Tokenizers
from triglot.typed import typed

TooLong = Literal["error", "cut"]
"""What happens with a side of a pair that is longer than the model reads."""
PastContext = Literal["error", "windows"]
"""What happens with a text that is longer than the context: refuse it, or read it in pieces."""
BATCH_TOKENS = 16_384
"""Positions, of sources and targets, that are read at a time."""


class TextScore(NamedTuple):
    """log p of each of a text's tokens, given those before it."""

    tokens: list[int]
    pieces: list[str]
    """Each token as a person can read it."""
    log_probs: list[float]
    truncated: bool
    """Not read whole: its source or its end was cut, or it was read in windows."""

    @property
    def log_prob(self) -> float:
        """Σ log p."""
        return math.fsum(self.log_probs)

    @property
    def perplexity(self) -> float:
        """e to the mean of −log p; nan where nothing is scored."""
        return _perplexity(-self.log_prob, len(self.tokens))


class FileScore(NamedTuple):
    """−log p of a whole file, in nats, of so many tokens that spell so many bytes of UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """e to the mean of −log p of a token."""
        return _perplexity(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """What the file's tokenizer has no share in."""
        return self.nats / math.log(2) / self.bytes


@typed
def score_pairs(
    model: Transformer,
    tokenizers: Tokenizers,
    sources: Sequence[str],
    targets: Sequence[str],
    tags: Tags = None,
    *,
    too_long: TooLong = "error",
    first: int = 1,
    batch_tokens: int = BATCH_TOKENS,
) -> list[TextScore]:
    """Each target, its end token included, given its source; `tags` is the target tag of all sources, or of each.

    Raises DataError for a side that is longer than the model reads, of which "cut" takes the beginning instead, the
    pairs counted from `first`, for an unknown tag, and for none where the run was trained with tags.
    """
    _require_as_many("targets", targets, len(sources))
    limit, rows, cut, tags = model.max_seq_length, [], [], tags_of(tags, len(sources), tokenizers)
    encoded, ids = (tokenizers.encode_sources(sources, tags), tokenizers.encode_targets(targets)), tokenizers.target.ids
    for number, (source, text) in enumerate(zip(*encoded, strict=True), first):
        wanted = [*text, ids.eos]
        longest = max(len(source), len(wanted))
        rule = f"at most {limit} tokens long on either side (the model's max_seq_length)"
        require(longest <= limit or too_long == "cut", f"pair {number}", rule, longest, DataError)
        if len(source) > limit:
            source[limit - 1 : -1] = []
        cut.append(longest > limit)
        rows.append(Row([ids.start, *text][:limit], wanted[:limit], source))
    found = zip(rows, log_probs(model, rows, batch_tokens), cut, strict=True)
    return [
        TextScore(list(row.targets), tokenizers.target.pieces(row.targets), values, was_cut)
        for row, values, was_cut in found
    ]


@typed
def score_texts(
    model: DecoderLLM,
    config: RunConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    end: bool = False,
    past_context: PastContext = "error",
    first: int = 1,
    batch_tokens: int = BATCH_TOKENS,
) -> list[TextScore]:
    """Each text after its prompt, or after what begins a document without one, and with `end` its end token too.

    Prompt and text are encoded each for itself, as generation has them. Raises DataError for both together if they are
    longer than the context, counting from `first`; "windows" reads them in pieces of its length instead, each without
    what was before.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    _require_as_many("prompts", prompts, len(texts))
    ids = [one + [tokenizer.ids.eos] * end for one in tokenizer.encode_batch(texts)]
    rows, owners, results, longest = [], [], [], model.max_len
    for number, (before, text) in enumerate(zip(prompt_ids(config, tokenizer, prompts), ids, strict=True)):
        read = len(before) + len(text) - 1
        results.append(TextScore(text, tokenizer.pieces(text), [], truncated=read > longest))
        rule = f'at most {longest} tokens long with its prompt (the context; past_context "windows" goes beyond)'
        require(read <= longest or past_context == "windows", f"text {first + number}", rule, read, DataError)
        inputs, wanted = (before + text)[:-1], [IGNORED] * (len(before) - 1) + text
        pieces = [Row(inputs[at : at + longest], wanted[at : at + longest]) for at in range(0, read, longest)]
        pieces = [piece for piece in pieces if set(piece.targets) != {IGNORED}]
        rows += pieces
        owners += [number] * len(pieces)
    for number, values in zip(owners, log_probs(model, rows, batch_tokens), strict=True):
        results[number].log_probs.extend(values)
    return results


def score_file(
    model: DecoderLLM, config: RunConfig, tokenizer: Tokenizer, path: Path, *, context: int | None = None
) -> FileScore:
    """A file's text in windows of `context` side by side, each token predicted once, the first one after
    what begins a document.

    The context is that of the training, and windows are those of `evaluate`, unless told otherwise. Raises DataError
    for a file that is empty or no UTF-8.
    """
    context = config.train.context if context is None else context
    require(1 <= context <= model.max_len, "context", f"between 1 and {model.max_len}", context, ConfigError)
    ids = chain.from_iterable(tokenizer.encode(block) for block in read_blocks(path))
    tokens = np.fromiter(chain([tokenizer.ids.start], ids), np.uint32)
    if len(tokens) == 1:
        raise DataError(f"`path` must be a file with text, but {path} is empty instead.")
    windows = Windows(tokens, context, max(BATCH_TOKENS, context))
    scored = score_batches(model, windows.epoch(0), device=model.lm_head.weight.device)
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    return FileScore(scored.nll, scored.tokens, int(sizes[tokens].sum()))


def prompt_ids(config: RunConfig, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """What the model reads of each prompt, as it read texts in training."""
    return tokenizer.encode_prompts(prompts, documents=config.data.packing == "documents")


def _require_as_many(name: str, texts: Sequence[str], count: int) -> None:
    require(len(texts) == count, name, f"as many as what they belong to ({count})", len(texts), DataError)


def _perplexity(nats: float, tokens: int) -> float:
    return math.exp(min(nats / tokens, 700.0)) if tokens else math.nan  # e^709 is the largest that a float holds
