"""The tokenizer that the metadata of a GGUF file describe, as the files that another library's model has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from triglot.errors import CheckpointError, require
from triglot.files import as_json
from triglot.tokenizer.files import Files
from triglot.tokenizer.trained import BYTE_OF_LETTER, LETTERS

TYPES = {"text": 1, "unknown": 2, "control": 3, "whole": 4, "unused": 5, "byte": 6}
"""What a token is: a piece of text, one that is never cut, or none that a text has."""
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _GPT_4.replace("DIGITS", r"\p{N}{1,3}")
_QWEN_2 = _GPT_4.replace("DIGITS", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS: dict[str | None, str | None] = {
    None: None,
    "default": None,
    "gpt-2": None,
    "olmo": None,
    "smollm": None,
    "llama-bpe": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "tekken": _TEKKEN,
}
"""How a text is cut into words before bytes are merged (`tokenizer.ggml.pre`); None: as GPT-2 does."""


def files_of(metadata: Mapping[str, Any]) -> Files:
    """The files of the tokenizer in a GGUF file's metadata: keys to numbers, texts and lists, as they stand there.

    Raises CheckpointError where they are of another kind than byte-level BPE ("gpt2") and SentencePiece's ("llama"),
    or do not fit together.
    """
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = given.get("model"), list(given.get("tokens", ()))
    require(kind in ("gpt2", "llama"), "tokenizer.ggml.model", "gpt2 or llama", kind, CheckpointError)
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    require(bool(tokens) and not twice, "tokenizer.ggml.tokens", "tokens without doubles", twice, CheckpointError)
    types = list(given.get("token_type", [TYPES["text"]] * len(tokens)))
    require(len(types) == len(tokens), "tokenizer.ggml.token_type", f"{len(tokens)} types", len(types), CheckpointError)
    while types and types[-1] == TYPES["unused"]:  # rows of the model that stand for nothing
        del types[-1], tokens[-1]
    backend = _byte_level(given, tokens) if kind == "gpt2" else _pieces(given, tokens)
    named = {name: [tokens[one] for one in _ids(given, f"{key}_token_id", len(tokens))] for name, key in NAMED.items()}
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == TYPES["control"]]
    special = [token for token in chain(control, *named.values()) if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    whole = [token for token, type_ in zip(tokens, types, strict=True) if type_ == TYPES["whole"]]
    whole = [token for token in whole if backend.token_to_id(token) is not None]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    adds_bos = kind == "llama" or WORDS[given.get("pre")] == _LLAMA_3
    config = {
        **{name: one[0] for name, one in named.items() if one},
        "add_bos_token": bool(given.get("add_bos_token", adds_bos)),
        "add_eos_token": bool(given.get("add_eos_token", False)),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    ends = [token for key in ("eos", "eot") for token in _ids(given, f"{key}_token_id", len(tokens))]
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": as_json(config).encode(),
        "generation_config.json": as_json({"eos_token_id": ends} if ends else {}).encode(),
    }


def _ids(given: Mapping[str, Any], key: str, size: int) -> list[int]:
    token_id = given.get(key)
    if token_id is None:
        return []
    require(0 <= token_id < size, f"tokenizer.ggml.{key}", f"between 0 and {size - 1}", token_id, CheckpointError)
    return [int(token_id)]


def _byte_level(given: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """BPE over bytes (Radford et al. 2019)."""
    known, pre = sorted(filter(None, WORDS)), given.get("pre")
    require(pre in WORDS, "tokenizer.ggml.pre", f"one of {', '.join(known)}", pre, CheckpointError)
    vocabulary = {_in_letters(token): token_id for token_id, token in enumerate(tokens)}
    merges = [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in given.get("merges", ())]
    backend = tokenizers.Tokenizer(_bpe(vocabulary, merges))
    words = WORDS[pre]
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if words is not None:
        parts.append(pre_tokenizers.Split(Regex(words), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _in_letters(token: str) -> str:
    """The token as byte-level vocabularies write it, where the file has it as text."""
    spelled = all(letter in BYTE_OF_LETTER for letter in token)
    return token if spelled else "".join(LETTERS[byte] for byte in token.encode())


def _pieces(given: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, in which of two neighbours those are merged first whose union has the higher score."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    scores = list(given.get("scores", ()))
    require(len(scores) >= len(tokens), "tokenizer.ggml.scores", f"{len(tokens)} scores", len(scores), CheckpointError)
    merges = [
        (token[:at], token[at:])
        for token in tokens
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    merges.sort(key=lambda pair: (scores[vocabulary[pair[0] + pair[1]]], *map(len, pair)), reverse=True)
    backend = tokenizers.Tokenizer(_bpe(vocabulary, merges, fuse_unk=True, byte_fallback=True))
    begins = bool(given.get("add_space_prefix", True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if begins else "never", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if begins else parts)
    return backend


def _bpe(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], **options: bool) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the library raises nothing more special
        raise CheckpointError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
