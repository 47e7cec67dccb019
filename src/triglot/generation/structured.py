"""Texts that follow a JSON schema, a regular expression or a grammar: tokens that lead out of it are never chosen.

What may come next is found by llguidance, from the bytes of every token. The end token may come where the grammar may
end, and has to where it can not go on; a text that a limit cuts off is the beginning of one that follows the grammar.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from triglot.decoding.rules import Logits, Texts
from triglot.errors import ConfigError, require
from triglot.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Structured:
    """A rule for searches: the text of each request follows the grammar that `grammars` has for it; None is free.

    A grammar is Lark's text, in llguidance's dialect, or what `json_schema_grammar` and `regex_grammar` make. What a
    row may become depends on its text alone, so that rows may come, go and change places. Raises ConfigError for a
    grammar that can not be followed, and where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, grammars: Sequence[str | None]) -> None:
        library, self._vocab_size = _library(), tokenizer.vocab_size
        vocabulary, matchers = _vocabulary(tokenizer), dict[str, "LLMatcher"]()
        for grammar in dict.fromkeys(grammar for grammar in grammars if grammar is not None):
            _require_grammar("grammar", grammar)
            matchers[grammar] = library.LLMatcher(vocabulary, grammar, log_level=0)
            trial = _Reader(matchers[grammar])
            trial.after([])  # some can be seen only then to have no text that follows them
            _refuse("grammar", trial.matcher.get_error())
        self._readers = [None if grammar is None else _Reader(matchers[grammar]) for grammar in grammars]

    def __call__(self, logits: Logits, texts: Texts, requests: Sequence[int], /) -> Logits:
        rule = f"at least that of the tokenizer ({self._vocab_size})"
        require(logits.size(1) >= self._vocab_size, "the number of logits", rule, logits.size(1), ConfigError)
        needed, known = max(requests, default=-1) + 1, len(self._readers)
        require(needed <= known, "grammars", f"one for each of at least {needed} requests", known, ConfigError)
        allowed = np.ones(logits.shape, bool)
        for row, (text, request) in enumerate(zip(texts, requests, strict=True)):
            reader = self._readers[request]
            if reader is not None:
                possible = reader.after(text)
                _refuse(f"the grammar of request {request}", reader.matcher.get_error())
                allowed[row] = False
                allowed[row, : self._vocab_size] = possible[: self._vocab_size]
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))


def from_json_schema(schema: dict[str, Any] | str, tokenizer: Tokenizer, requests: int) -> Structured:
    """The text of every request is JSON that is valid under `schema`; see `json_schema_grammar`."""
    return Structured(tokenizer, [json_schema_grammar(schema)] * requests)


def from_regex(regex: str, tokenizer: Tokenizer, requests: int) -> Structured:
    """The whole text of every request matches `regex`; see `regex_grammar`."""
    return Structured(tokenizer, [regex_grammar(regex)] * requests)


def from_grammar(grammar: str, tokenizer: Tokenizer, requests: int) -> Structured:
    """The text of every request follows `grammar`, in Lark's notation as llguidance reads it."""
    return Structured(tokenizer, [grammar] * requests)


def json_schema_grammar(schema: dict[str, Any] | str) -> str:
    """The grammar of JSON under `schema`, with no white space between its parts.

    A small model that may write white space writes little else. A schema asks for it by llguidance's own keyword,
    "x-guidance": {"whitespace_flexible": true}. Raises ConfigError for what is no JSON, no schema, or a schema with
    keywords that llguidance can not follow.
    """
    try:
        values = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"`json_schema` must be JSON, but is not: {error}.") from error
    require(isinstance(values, dict), "json_schema", "a JSON object", values, ConfigError)
    grammar = _library().LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
    _require_grammar("json_schema", grammar)
    return str(grammar)


def regex_grammar(regex: str) -> str:
    """The grammar of texts that match `regex` whole, in the syntax of Rust's regex: no look-around, no back-references.

    Raises ConfigError for a regular expression that can not be followed.
    """
    grammar = _library().LLMatcher.grammar_from_regex(regex)
    _require_grammar("regex", grammar)
    return str(grammar)


class _Reader:
    """A matcher at the end of the last text it was shown; the next one is read from where they part."""

    def __init__(self, start: "LLMatcher") -> None:
        self._start, self.matcher = start, start.deep_copy()
        self._read: list[int] = []

    def after(self, text: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow `text`."""
        text = list(text)
        if self.matcher.is_error():
            self.matcher, self._read = self._start.deep_copy(), []
        shorter = min(len(self._read), len(text))
        common = next((at for at in range(shorter) if self._read[at] != text[at]), shorter)
        if common < len(self._read):
            self.matcher.rollback(len(self._read) - common)
        if common < len(text):
            self.matcher.consume_tokens(text[common:])
        self._read = text
        return _allowed(self.matcher)


def _allowed(matcher: "LLMatcher") -> NDArray[np.bool_]:
    """Which tokens may come next."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, bitorder="little").astype(bool)


@lru_cache(4)
def _vocabulary(tokenizer: Tokenizer) -> "LLTokenizer":
    """The tokenizer as llguidance knows it; special tokens can be named in a grammar, and are no text."""
    library = _library()
    return library.LLTokenizer(library.TokenizerWrapper(_Spelled(tokenizer)))


class _Spelled:
    """What llguidance asks a tokenizer for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id, self._tokenizer = tokenizer.ids.eos, tokenizer.ids.start, tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token, spelled in enumerate(self.tokens) if not spelled]
        for token, name in zip(self.special_token_ids, tokenizer.pieces(self.special_token_ids), strict=True):
            self.tokens[token] = name.encode()

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        told = "`llguidance` must be there for texts that follow a grammar (pip install 'triglot[structured]')"
        raise ConfigError(f"{told}, but is missing instead.") from error
    return llguidance


def _require_grammar(name: str, grammar: str) -> None:
    _refuse(name, _library().LLMatcher.validate_grammar(grammar))


def _refuse(name: str, reason: str) -> None:
    """ConfigError for what llguidance gives a reason against."""
    if reason:
        told = " ".join(reason.partition("\n<state>")[0].split())
        raise ConfigError(f"`{name}` must be one that llguidance can follow, but this speaks against it: {told}")
