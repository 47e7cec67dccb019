"""What a caller may say about a text to be generated or translated, checked before any work."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from triglot.config import GenerationConfig
from triglot.decoding.beam import BeamSearch
from triglot.decoding.rules import (
    BannedWords,
    CountPenalty,
    ForcedPrefix,
    LogitBias,
    MinLength,
    NoRepeatNGram,
    RepetitionPenalty,
    Rule,
)
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Lengths
from triglot.errors import ConfigError, require
from triglot.generation.structured import Structured, json_schema_grammar, regex_grammar
from triglot.generation.typed import require_types
from triglot.tokenizer import Tokenizer

PastContext = Literal["error", "slide"]
"""What happens where a text outgrows the model's context: refuse, or go on from the last half of it."""
TooLong = Literal["error", "cut"]
"""What happens with a line that the model can not read whole."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to go on from a prompt: what `generate` and `stream` take."""

    max_new_tokens: int | None = None
    """As the run says, and no more than the context leaves."""
    temperature: float = 1.0
    """0 is greedy. Of this, `top_k`, `top_p`, `repetition_penalty` and `no_repeat_ngram` a run may say otherwise."""
    top_k: int | None = None
    """Draw from so many of the likeliest; above the vocabulary: from all."""
    top_p: float | None = None
    """Draw from the fewest that have so much of the probability."""
    min_p: float | None = None
    """Draw from those that have at least so much of the likeliest one's probability."""
    typical_p: float | None = None
    """Draw from the fewest that have so much, those first whose information is closest to the expected."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens of prompt and text are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """What the logit of a generated token falls by."""
    frequency_penalty: float = 0.0
    """What it falls by for each time the token was generated."""
    logit_bias: Mapping[int, float] | None = None
    """What is added to the logits of ids; −inf bans one, the end token (2 of tokenizers trained here) too."""
    banned_words: Sequence[str] = ()
    """See `banned_words_rule`."""
    min_new_tokens: int = 0
    """No end token before so many others; a stop string may come."""
    no_repeat_ngram: int | None = None
    """So many generated tokens in a row never come again, unless nothing else may."""
    stop: Sequence[str] = ()
    """The text ends before the first of these that stands in it."""
    json_schema: Mapping[str, Any] | str | None = None
    """The text is JSON that is valid under it."""
    regex: str | None = None
    """The whole text matches it (Rust's syntax)."""
    grammar: str | None = None
    """The text follows it (Lark's notation as llguidance reads it)."""
    seed: int | Sequence[int] = 0
    """The i-th text of the result draws from `seed + i`, or from the i-th of so many seeds."""
    n: int = 1
    """Texts for each prompt."""
    top_logprobs: int = 0
    """So many alternatives are told of each token."""
    past_context: PastContext = "error"
    speculate: int = 0
    """So many tokens are guessed at each step and read together; the text stays the same."""

    def __post_init__(self) -> None:
        _ = self.sampler  # which checks its own
        longest = self.max_new_tokens
        _require(longest is None or longest >= 1, "max_new_tokens", "at least 1", longest)
        _check_rules(self.min_new_tokens, longest, self.no_repeat_ngram, self.banned_words)
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, "repetition_penalty", "above 0 and finite", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, "finite", getattr(self, name))
        for bias in (self.logit_bias or {}).values():
            _require(bias < math.inf, "logit_bias", "of numbers below infinity", bias)
        _check_texts("stop", self.stop)
        forms = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        _require(len(forms) <= 1, "json_schema, regex and grammar", "one at most", forms)
        _require(self.n >= 1, "n", "at least 1", self.n)
        _require(self.top_logprobs >= 0, "top_logprobs", "at least 0", self.top_logprobs)
        _require(self.speculate >= 0, "speculate", "at least 0", self.speculate)
        for seed in self.seed if isinstance(self.seed, Sequence) else [self.seed]:
            _require(0 <= seed < 2**64, "seed", "a whole number from 0 to 2^64 − 1", seed)

    @property
    def sampler(self) -> Sampler:
        """What chooses among the tokens that the rules leave."""
        return Sampler(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
        )

    def seeds(self, texts: int) -> list[int]:
        """The seed of each text."""
        if not isinstance(self.seed, Sequence):
            return [(int(self.seed) + number) % 2**64 for number in range(texts)]
        _require(len(self.seed) == texts, "seed", f"one number, or one for each of {texts} texts", len(self.seed))
        return list(map(int, self.seed))

    def rules(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[Rule]:
        """The rules of texts after these prompts, in the order in which they are applied.

        What a text has to be comes before how it should sound: no repeated n-gram stops a grammar from going on.
        """
        rules: list[Rule] = []
        if self.repetition_penalty != 1:
            rules.append(RepetitionPenalty(self.repetition_penalty, prompts))
        if self.presence_penalty or self.frequency_penalty:
            rules.append(CountPenalty(self.presence_penalty, self.frequency_penalty))
        if self.logit_bias:
            for token in (min(self.logit_bias), max(self.logit_bias)):
                rule = f"of ids between 0 and {tokenizer.vocab_size - 1}"
                _require(0 <= token < tokenizer.vocab_size, "logit_bias", rule, token)
            rules.append(LogitBias(self.logit_bias))
        rules += _bans(self.banned_words, self.min_new_tokens, tokenizer)
        if (grammar := self._grammar) is not None:
            rules.append(Structured(tokenizer, [grammar] * len(prompts)))
        if self.no_repeat_ngram is not None:
            rules.append(NoRepeatNGram(self.no_repeat_ngram))
        return rules

    @property
    def _grammar(self) -> str | None:
        if self.json_schema is not None:
            schema = self.json_schema if isinstance(self.json_schema, str) else dict(self.json_schema)
            return json_schema_grammar(schema)
        return self.grammar if self.regex is None else regex_grammar(self.regex)


@dataclass(frozen=True, kw_only=True)
class Searching:
    """How to translate; what is None is as the run says."""

    beam: int | None = None
    """Hypotheses that are looked at side by side; 1 is greedy. None: the run's, and no fewer than `nbest`."""
    nbest: int = 1
    """Translations of each line."""
    length_penalty: float | None = None
    """α of what Σ log p is divided by."""
    lengths: Lengths = "power"
    """Σ log p of n tokens is divided by n^α, or by ((5 + n) / 6)^α with "gnmt"."""
    patience: float | None = None
    """A line ends when beam · patience texts have finished; inf: when there can be no better one."""
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    """No end token before so many others."""
    no_repeat_ngram: int | None = None
    """So many tokens in a row never come again, unless nothing else may."""
    banned_words: Sequence[str] = ()
    """See `banned_words_rule`."""
    alignments: bool = False
    """Tell of each target token which source tokens it renders."""
    log_probs: bool = True
    """Tell scores and log p; greedy search is faster without."""
    too_long: TooLong = "error"

    def __post_init__(self) -> None:
        longest = self.max_new_tokens
        _require(longest is None or longest >= 1, "max_new_tokens", "at least 1", longest)
        _require(self.patience is None or self.patience > 0, "patience", "above 0, or inf", self.patience)
        _check_rules(self.min_new_tokens, longest, self.no_repeat_ngram, self.banned_words)

    def search(
        self, config: GenerationConfig, tokenizer: Tokenizer, prefixes: Sequence[Sequence[int]] | None
    ) -> BeamSearch:
        """The search for sentences whose texts begin with `prefixes`; what is not said is as `config` says."""
        rules: list[Rule] = [] if prefixes is None else [ForcedPrefix(prefixes)]
        rules += _bans(self.banned_words, self.min_new_tokens, tokenizer)
        if self.no_repeat_ngram is not None:
            rules.append(NoRepeatNGram(self.no_repeat_ngram))
        patience = config.patience if self.patience is None else self.patience
        return BeamSearch(
            beam=max(config.beam, self.nbest) if self.beam is None else self.beam,
            eos_ids=tokenizer.ids.ends,
            length_penalty=config.length_penalty if self.length_penalty is None else self.length_penalty,
            lengths=self.lengths,
            patience=None if patience == math.inf else patience,
            nbest=self.nbest,
            rules=rules,
            scored=self.log_probs,
        )


SAID = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram")
"""What a run's config may say of options that have defaults of their own."""


def made(kind: type[T], options: Mapping[str, Any], config: GenerationConfig) -> T:
    """The options that a caller named, and of the others those that `config` names.

    Raises ConfigError for a name that there is not, or a value of another type.
    """
    hints = get_type_hints(kind)
    given = {name: value for name, value in options.items() if value is not None or name not in SAID}
    said = {name: getattr(config, name) for name in SAID if name in hints and name not in given}
    options = given | {name: value for name, value in said.items() if value is not None}
    for name in options:
        _require(name in hints, "the option", f"one of {', '.join(hints)}", name)
    require_types(hints, options)
    return kind(**options)


def banned_words_rule(words: Sequence[str], tokenizer: Tokenizer) -> BannedWords:
    """None of the words is generated, neither as it is encoded alone nor as it is after a space.

    Other tokens that spell the same text stay possible, as in other libraries.
    """
    spelled = tokenizer.encode_batch([before + word for word in words for before in ("", " ")])
    return BannedWords(spelled)


def _bans(banned_words: Sequence[str], min_new_tokens: int, tokenizer: Tokenizer) -> list[Rule]:
    rules: list[Rule] = [banned_words_rule(banned_words, tokenizer)] if banned_words else []
    return [*rules, MinLength(tokenizer.ids.ends, min_new_tokens)] if min_new_tokens else rules


def _check_rules(least: int, longest: int | None, no_repeat_ngram: int | None, banned_words: Sequence[str]) -> None:
    _require(least >= 0, "min_new_tokens", "at least 0", least)
    fits = longest is None or least <= longest
    _require(fits, "min_new_tokens", f"at most max_new_tokens ({longest})", least)
    fits = no_repeat_ngram is None or no_repeat_ngram >= 1
    _require(fits, "no_repeat_ngram", "at least 1, or left out", no_repeat_ngram)
    _check_texts("banned_words", banned_words)


def _check_texts(name: str, texts: Sequence[str]) -> None:
    _require("" not in texts, name, "texts of at least one character", texts)


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    require(holds, name, rule, value, ConfigError)
