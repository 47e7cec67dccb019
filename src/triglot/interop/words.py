"""The tokenizers of runs, as transformers, CTranslate2 and llama.cpp read them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from triglot.config import GenerationConfig, RunConfig
from triglot.errors import CheckpointError, require
from triglot.files import as_json
from triglot.tokenizer import Tokenizer, Tokenizers
from triglot.tokenizer.files import GENERATION, Files
from triglot.tokenizer.foreign import Foreign, FromLibrary
from triglot.tokenizer.gguf import NAMED, TYPES, files_of

START, UNKNOWN = "<pad>", "<unk>"
"""What Marian calls the id that its decoder begins with, and one that no text has."""
WRITTEN = ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken")
"""Ways of cutting a text that llama.cpp knows by these names."""
PROBE = "The end of 1984's 30 days, I'm DON'T: (x_1 + y) -- don't “quote” it…\n\n\tÜber žluťoučký, 你好!  \r\n`a`"
"""What tells the ways of cutting a text apart."""


def of_transformers(tokenizers: Tokenizers, config: RunConfig, *, start_behind: bool) -> tuple[Files, dict[str, Any]]:
    """The files that AutoTokenizer reads, and what config.json says of ids.

    With `start_behind` there is one id more, the last, for a decoder to begin with.
    A text as it is encoded there has the special tokens around it that it has here. Raises CheckpointError for two
    vocabularies, and for target tags, which stand in front of them.
    """
    target, pairs = tokenizers.target, config.model.kind == "encoder_decoder"
    ids: dict[str, Any] = {"bos_token_id": target.ids.bos, "eos_token_id": target.ids.eos, "pad_token_id": 0}
    ids |= {"decoder_start_token_id": target.ids.start} if pairs else {}
    if isinstance(target, Foreign):
        return target.files, {name: ids[name] for name in ids if name != "pad_token_id"}
    require(tokenizers.joint, "tokenizer.joint", "true for such an export", False, CheckpointError)
    require(not target.tags, "target tags", "left out of such an export", target.tags, CheckpointError)
    values = json.loads(_framed(target, config))
    if start_behind:
        _with_start_behind(values)
        ids |= {"decoder_start_token_id": target.vocab_size, "pad_token_id": target.vocab_size}
    names = {f"{name}_token": names_of(values)[ids[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    names |= {"unk_token": UNKNOWN} if start_behind else {}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    generating = ids | said(config.generation, pairs) | {"bad_words_ids": [[one] for one in target.ids.banned]}
    files = {"tokenizer.json": values, "tokenizer_config.json": about, "generation_config.json": generating}
    return {name: as_json(content).encode() for name, content in files.items()}, ids


def said(generation: GenerationConfig, pairs: bool) -> dict[str, Any]:
    """How a run decodes, in transformers' words."""
    ours = {theirs: getattr(generation, name) for theirs, name in GENERATION.items()}
    search = {"num_beams", "length_penalty", "no_repeat_ngram_size"}
    kept = {name: value for name, value in ours.items() if value is not None and (pairs or name not in search)}
    if pairs:
        early = "never" if generation.patience is None else generation.patience <= 1.0
        return kept | {"early_stopping": early, "forced_eos_token_id": None}
    greedy = kept.get("temperature") == 0.0
    return {"top_k": 0, **kept, "do_sample": not greedy} | ({"temperature": 1.0} if greedy else {})


def of_ctranslate2(tokenizers: Tokenizers, config: RunConfig) -> Files:
    """Files whose `.encode(text).tokens` are what CTranslate2 is to be given."""
    if isinstance(tokenizers.target, Foreign):
        return tokenizers.target.files
    names = ("tokenizer.json",) if tokenizers.joint else ("source.json", "target.json")
    return {name: _framed(one, config).encode() for name, one in zip(names, tokenizers, strict=False)}


def _framed(tokenizer: Tokenizer, config: RunConfig) -> str:
    """A tokenizer.json that sets the special tokens around a text which here those who encode set."""
    pairs = config.model.kind == "encoder_decoder"
    return tokenizer.as_json(bos=pairs or config.data.packing == "documents", eos=pairs)


def _with_start_behind(values: dict[str, Any]) -> None:
    """Call the first id, which no text has, the unknown one, and put the one that a decoder begins with last."""
    added, vocabulary = values["added_tokens"], values["model"]["vocab"]
    start = {**added[0], "id": len(names_of(values))}
    added[0]["content"] = UNKNOWN
    values["model"]["vocab"] = {UNKNOWN if token == START else token: number for token, number in vocabulary.items()}
    added.append(start)


def names_of(values: Mapping[str, Any]) -> list[str]:
    """The tokens of a tokenizer.json of BPE in the order of their ids; where there is none, a name that no text has."""
    ids = values["model"]["vocab"] | {one["content"]: one["id"] for one in values["added_tokens"]}
    tokens = {number: token for token, number in ids.items()}
    return [tokens.get(number, f"[unused {number}]") for number in range(max(tokens) + 1)]


def of_gguf(tokenizers: Tokenizers, config: RunConfig) -> dict[str, Any]:
    """What the header of a GGUF file says of a tokenizer.

    Raises CheckpointError where llama.cpp has no way of cutting texts that gives the same ids.
    """
    target = tokenizers.target
    values = json.loads(target.as_json() if target.kind != "sentencepiece" else "{}")
    is_bpe = values.get("model", {}).get("type") == "BPE"
    require(is_bpe, "the tokenizer", "BPE, to be written to GGUF", target.kind, CheckpointError)
    begins = target.ids.bos is not None and (isinstance(target, Foreign) or config.data.packing == "documents")
    common = _common(values, config.model.vocab_size)
    common |= {"bos_token_id": target.ids.start, "eos_token_id": target.ids.eos, "add_bos_token": begins}
    common |= {"eot_token_id": target.ids.ends[1]} if len(target.ids.ends) > 1 else {}
    ways = [_pieces(values, target, common["tokens"])] if values["model"].get("byte_fallback") else _byte_level(values)
    found = [_metadata(target, common | way) for way in ways]
    read = [FromLibrary(files_of(one)) for one in found]
    fitting = [place for place, one in enumerate(read) if one.encode(PROBE) == target.encode(PROBE)]
    rule = f"one that cuts texts as llama.cpp can ({', '.join(WRITTEN)}, or SentencePiece)"
    require(bool(fitting), "the tokenizer", rule, target.kind, CheckpointError)
    cuts = values.get("pre_tokenizer")
    same = [place for place in fitting if json.loads(read[place].as_json())["pre_tokenizer"] == cuts]
    return found[(same or fitting)[0]]


def _metadata(tokenizer: Tokenizer, about: Mapping[str, Any]) -> dict[str, Any]:
    template = tokenizer.settings.chat_template if isinstance(tokenizer, Foreign) else None
    chat = {} if template is None else {"tokenizer.chat_template": template}
    return {f"tokenizer.ggml.{key}": value for key, value in about.items()} | chat


def _common(values: Mapping[str, Any], size: int) -> dict[str, Any]:
    tokens = names_of(values)
    types = {one["content"]: TYPES["control" if one["special"] else "whole"] for one in values["added_tokens"]}
    types |= {token: TYPES["unused"] for token in tokens if token.startswith("[unused ")}
    unused = [f"[unused {number}]" for number in range(len(tokens), size)]
    types |= dict.fromkeys(unused, TYPES["unused"])
    types |= {f"<0x{byte:02X}>": TYPES["byte"] for byte in range(256)} if values["model"].get("byte_fallback") else {}
    tokens += unused
    return {"tokens": tokens, "token_type": [types.get(token, TYPES["text"]) for token in tokens]}


def _byte_level(values: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Byte-level BPE with each way of cutting a text into words."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    return [{"model": "gpt2", "merges": merges, "pre": pre} for pre in WRITTEN]


def _pieces(values: Mapping[str, Any], tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    """SentencePiece's, in which earlier merges have higher scores."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(values["model"]["merges"]):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    last = -float(len(scores))
    begins = tokenizer.names[tokenizer.encode("x")[0]].startswith("▁")
    unknown = values["model"].get("unk_token")
    about = {} if unknown is None else {f"{NAMED['unk_token']}_token_id": tokens.index(unknown)}
    return about | {
        "model": "llama",
        "scores": [scores.get(token, last) for token in tokens],
        "add_space_prefix": begins,
    }
