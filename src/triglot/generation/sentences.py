"""Translating lines with an encoder–decoder: from text to the best hypotheses of each, and back to text."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from triglot.decoding.beam import BeamSearch, beam_search
from triglot.decoding.rules import Within
from triglot.decoding.search import Decoded
from triglot.errors import ConfigError, DataError, DeadEndError, require
from triglot.generation.alignment import align
from triglot.generation.options import Searching
from triglot.generation.ready import Ready, Tags, batches, pad, tags_of
from triglot.generation.results import Alignment, Alternative, Hypothesis
from triglot.generation.steps import search
from triglot.generation.workers import Search
from triglot.interop.runs import load_any
from triglot.layers.masks import create_padding_mask
from triglot.layers.packed import Precision
from triglot.tokenizer import Tokenizer


class TextWasCut(UserWarning):
    """Only the beginning of a text was read."""


def translate(
    ready: Ready,
    find: Search,
    lines: Sequence[str],
    how: Searching,
    *,
    tags: Tags = None,
    prefixes: Sequence[str] | None = None,
    first_line: int = 1,
) -> list[list[Hypothesis]]:
    """The best translations of each line, as `find` finds them; an empty line becomes one empty text."""
    sources = sources_of(ready, lines, tags, how.too_long, first_line)
    limit = limit_of(ready, how)
    rows = [row for row, line in enumerate(lines) if line.strip()]
    begun = beginnings(ready, prefixes, len(lines), limit, first_line)
    aligned = Alignment([], [], []) if how.alignments else None
    results = [[Hypothesis("", 0.0, [], truncated=False, log_probs=[], alignment=aligned)] for _ in lines]
    dead = list[int]()
    # No kernel serves a rule, so that a line without a beginning would have other bits beside one that has one.
    for some in ([row for row in rows if begun[row]], [row for row in rows if not begun[row]]):
        forced = [begun[row] for row in some if begun[row]] or None
        search = how.search(ready.config.generation, ready.tokenizers.target, forced)
        try:
            found = find([sources[row] for row in some], search, limit) if some else []
        except DeadEndError as error:
            dead.append(some[error.request])
            continue
        for row, texts in zip(some, found, strict=True):
            kept = distinct(ready.tokenizers.target, texts)[: how.nbest]
            results[row] = [hypothesis(ready, sources[row], text, search, alignment=how.alignments) for text in kept]
    if dead:
        raise DeadEndError(min(dead), f"line {first_line + min(dead)}")
    return results


def beginnings(
    ready: Ready, prefixes: Sequence[str] | None, lines: int, limit: int, first_line: int
) -> list[list[int]]:
    """How the translation of each line begins; with nothing where it may begin as it likes."""
    if prefixes is None and not ready.tokenizers.target.ids.forced:
        return [[] for _ in range(lines)]
    prefixes = [""] * lines if prefixes is None else prefixes
    require(len(prefixes) == lines, "prefixes", f"one for each of {lines} lines", len(prefixes), DataError)
    begun = ready.tokenizers.encode_targets(prefixes)
    for number, prefix in enumerate(begun, first_line):
        rule = f"at most {limit - 1} tokens long, for a text of at most {limit}"
        require(len(prefix) < limit, f"the prefix of line {number}", rule, len(prefix), DataError)
    return begun


def distinct(tokenizer: Tokenizer, texts: Sequence[Decoded]) -> list[Decoded]:
    """Of those that spell the same text by other tokens only the first, which is the best."""
    found: dict[str, Decoded] = {}
    for text in texts:
        found.setdefault(tokenizer.decode(text.ids), text)
    return list(found.values())


def alternatives(
    ready: Ready, find: Search, line: str, prefix: str, count: int, how: Searching, tag: str | None
) -> list[Alternative]:
    """The `count` likeliest tokens after `prefix`, falling, each with the best translation that goes on with it."""
    most = ready.tokenizers.target.vocab_size - len(ready.tokenizers.target.ids.banned)
    require(1 <= count <= most, "count", f"between 1 and {most}, the tokens that can come", count, ConfigError)
    require(bool(line.strip()), "line", "no empty one", line, DataError)
    [source], target = sources_of(ready, [line], tag, how.too_long, 1), ready.tokenizers.target
    [begun], limit = ready.tokenizers.encode_targets([prefix]), limit_of(ready, how)
    rule = f"at most {limit - 1} tokens long, for a text of at most {limit}"
    require(len(begun) < limit, "prefix", rule, len(begun), DataError)
    # One token after what is forced: the beam's texts are the likeliest tokens, as the search itself sees them.
    one_token = replace(
        how.search(ready.config.generation, target, [begun]),
        beam=count,
        nbest=count,
        length_penalty=0.0,
        patience=None,
        scored=True,
    )
    [firsts] = find([source], one_token, len(begun) + 1)
    firsts.sort(key=lambda text: -text.log_probs[-1])
    search = replace(how.search(ready.config.generation, target, [text.ids for text in firsts]), nbest=1)
    found = find([source] * len(firsts), search, limit)
    pieces = target.pieces(text.ids[-1] for text in firsts)
    return [
        Alternative(
            first.ids[-1], piece, first.log_probs[-1], hypothesis(ready, source, best, search, alignment=how.alignments)
        )
        for first, piece, (best, *_) in zip(firsts, pieces, found, strict=True)
    ]


def sources_of(ready: Ready, lines: Sequence[str], tags: Tags, too_long: str, first_line: int) -> list[list[int]]:
    """What the encoder reads of each line."""
    tags = tags_of(tags, len(lines), ready.tokenizers)
    limit, sources = ready.translator.max_seq_length, ready.tokenizers.encode_sources(lines, tags)
    for number, ids in enumerate(sources, first_line):
        rule = f"at most {limit} tokens long (the model's max_seq_length)"
        require(len(ids) <= limit or too_long == "cut", f"line {number}", rule, len(ids), DataError)
        if len(ids) > limit:
            told = f"line {number} has {len(ids)} tokens: all beyond {limit} were cut"
            warnings.warn(told, TextWasCut, stacklevel=5)  # where the engine's call is
            ids[limit - 1 : -1] = []
    return sources


def limit_of(ready: Ready, how: Searching) -> int:
    """Tokens of a translation at most; for an alignment the decoder has to read the last of them, too."""
    limit = how.max_new_tokens or ready.config.generation.max_new_tokens
    return min(limit, ready.translator.max_seq_length - how.alignments)


def hypothesis(ready: Ready, source: list[int], text: Decoded, how: BeamSearch, *, alignment: bool) -> Hypothesis:
    """A text that was found, as it is returned."""
    aligned = None
    if alignment:
        produced = text.ids if text.truncated else text.ids[:-1]
        aligned = align(ready.translator, ready.tokenizers, source, produced)
    words = ready.tokenizers.target.decode(text.ids)
    if not how.scored:
        return Hypothesis(words, math.nan, text.ids, text.truncated, [], aligned)
    score = text.score(how.length_penalty, how.lengths)
    return Hypothesis(words, score, text.ids, text.truncated, text.log_probs, aligned)


@torch.inference_mode()
def search_all(ready: Ready, sources: list[list[int]], how: BeamSearch, limit: int) -> list[list[Decoded]]:
    """The best texts of each source; on a processor by the prepared model, whatever its company is the same."""
    start_id = ready.tokenizers.target.ids.start
    if (prepared := ready.prepared) is not None:
        return search(prepared, sources, [limit] * len(sources), how, start_id)
    model, results = ready.translator, dict[int, list[Decoded]]()
    for batch in batches([how.beam * (len(ids) + limit) for ids in sources]):
        src = pad([sources[row] for row in batch], model)
        real = pad([[1] * len(sources[row]) for row in batch], model)
        steps = model.start(src, create_padding_mask(real), limit)
        first = steps.step(torch.full((len(batch),), start_id, device=src.device))
        own = replace(how, banned=ready.banned, rules=[Within(rule, batch) for rule in how.rules])
        try:
            results |= zip(batch, beam_search(first, steps, own, limit), strict=True)
        except DeadEndError as error:
            raise DeadEndError(batch[error.request]) from error
    return [results[row] for row in range(len(sources))]


def worker_search(run: Path, which: str, precision: Precision, compiled: bool) -> Search:
    """The search of another process, with a model of its own."""
    return partial(search_all, Ready(*load_any(run, which), precision, compiled=compiled))
