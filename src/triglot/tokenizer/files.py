"""The files of a tokenizer that came with a model of another library, and what they say of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triglot.config import GenerationConfig
from triglot.errors import CheckpointError, ConfigError, require
from triglot.files import as_json
from triglot.recipe import from_dict

Files = Mapping[str, bytes]
"""By name, what is kept of a folder, byte for byte."""
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "target_vocab.json",
)
ONE_OF = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "source.spm")
"""What tells the files of others from those of a tokenizer that was trained here."""
GENERATION = {
    "num_beams": "beam",
    "length_penalty": "length_penalty",
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
"""What generation_config.json says, and what it is called here; all other keys stay in the file and mean nothing."""
ALSO_SAID = (
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "bad_words_ids",
    "do_sample",
    "max_length",
    "early_stopping",
)
SAYS_NOTHING = {"top_k": 0, "no_repeat_ngram_size": 0}


def read_files(folder: Path) -> Files:
    """The tokenizer's files in a folder of another library or in a run of ours.

    Where there is no generation_config.json, the config.json of older models says the same.
    """
    files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}
    if "source.spm" not in files:  # GPT-2 has a vocab.json of another kind beside its tokenizer.json
        files = {name: content for name, content in files.items() if not name.endswith("vocab.json")}
    if "tokenizer.json" in files:
        files = {name: content for name, content in files.items() if not name.endswith(".model")}
    config = folder / "config.json"
    if "generation_config.json" not in files and config.is_file():
        values = read_json(config.read_bytes())
        if "model_type" in values:  # it is none of ours
            said = {key: values[key] for key in (*GENERATION, *ALSO_SAID) if key in values}
            files["generation_config.json"] = as_json(said).encode()
    return files


def read_json(content: bytes, name: str = "config.json") -> dict[str, Any]:
    """An object in JSON, no key of it twice; CheckpointError with its name for anything else."""
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
        require(isinstance(values, dict), "the file", "an object in JSON", values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: {error}") from error
    return dict(values)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen = [key for key, _ in pairs]
        raise ValueError(f"it has {next(key for key in seen if seen.count(key) > 1)!r} twice")
    return values


class Settings:
    """What the files beside a vocabulary say: how special tokens are spelled, which ids end a text, how to decode."""

    def __init__(self, files: Files) -> None:
        names = ("special_tokens_map.json", "tokenizer_config.json")
        kept = [read_json(files[name], name) for name in names if name in files]
        self.values: dict[str, Any] = {key: value for values in kept for key, value in values.items()}
        content = files.get("generation_config.json")
        self.generating = {} if content is None else read_json(content, "generation_config.json")
        self._template = files.get("chat_template.jinja")

    @property
    def specials(self) -> dict[str, str]:
        """How the special tokens that have a name are spelled: `bos_token`, `eos_token`, …"""
        named = {key: value for key, value in self.values.items() if key.endswith("_token")}
        spelled = {key: one.get("content") if isinstance(one, dict) else one for key, one in named.items()}
        return {key: one for key, one in spelled.items() if isinstance(one, str)}

    @property
    def chat_template(self) -> str | None:
        """The template of conversations; of several the one called default."""
        if self._template is not None:
            return self._template.decode("utf-8")
        given = self.values.get("chat_template")
        if isinstance(given, list):
            given = {one["name"]: one["template"] for one in given}.get("default")
        require(given is None or isinstance(given, str), "chat_template", "a text", given, CheckpointError)
        return given

    def ids(self, name: str, size: int) -> tuple[int, ...]:
        """The ids that generation_config.json has under a name: one, several or none."""
        given = self.generating.get(name)
        if name == "bad_words_ids":  # of which those of several tokens are no ids
            given = [word[0] for word in given or [] if len(word) == 1]
        several = tuple(given) if isinstance(given, list) else () if given is None else (given,)
        for one in several:
            fits = type(one) is int and 0 <= one < size
            require(fits, f"{name} in generation_config.json", f"ids between 0 and {size - 1}", given, CheckpointError)
        return several

    @property
    def generation(self) -> GenerationConfig:
        """What a call that does not say otherwise decodes with, where the files say it."""
        given = self.generating
        values = {
            ours: given[key]
            for key, ours in GENERATION.items()
            if given.get(key) is not None and given[key] != SAYS_NOTHING.get(key)
        }
        if given.get("do_sample") is False:
            values = {key: value for key, value in values.items() if key not in ("temperature", "top_k", "top_p")}
            values["temperature"] = 0.0
        longest = given.get("max_length")
        if "max_new_tokens" not in values and isinstance(longest, int) and "decoder_start_token_id" in given:
            values["max_new_tokens"] = longest - 1  # it counts what the decoder begins with
        if given.get("early_stopping") is True:
            values["patience"] = 1.0
        try:
            return from_dict(GenerationConfig, values)
        except ConfigError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
