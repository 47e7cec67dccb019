"""Tokenizers of other libraries' models: the files that they are, read by the `tokenizers` library.

What such a tokenizer takes for a special token in a text is one, as it was when its model was trained.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from triglot.errors import CheckpointError, require
from triglot.tokenizer.files import Files, Settings, read_json
from triglot.tokenizer.ids import Message, SpecialIds
from triglot.tokenizer.trained import BYTE_OF_FALLBACK, BYTE_OF_LETTER, TextStream, Tokenizer

DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace"}
"""The ways from pieces to text that are known here; of all of them a text that grows keeps its beginning."""

CLEANED = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}


class Foreign(Tokenizer):
    """A tokenizer that is its files; subclasses differ in what reads them."""

    def __init__(self, files: Files) -> None:
        self.files, self.settings, self.tags = files, Settings(files), ()
        self.specials = self.settings.specials
        self.cleans = self.settings.values.get("clean_up_tokenization_spaces") is True

    def _know(self, names: Sequence[str], spelled: Iterable[bytes]) -> None:
        """Take down the vocabulary: what each id is called, and what it stands for."""
        self.names, self._bytes, self.vocab_size = tuple(names), tuple(spelled), len(names)

    def _stand_between(self, before: list[int], behind: list[int]) -> None:
        """Take down what stands around a whole text, and find out what ids are for."""
        self._frame, size, told = (before, behind), self.vocab_size, self.settings.ids
        eos, bos = self.id_of("eos_token"), self.id_of("bos_token")
        ends = dict.fromkeys(told("eos_token_id", size) or eos)
        require(bool(ends), "eos_token", "a token, here or in generation_config.json", None, CheckpointError)
        first = [token for token in eos if token in ends]
        starts = [*told("decoder_start_token_id", size), *bos, *told("bos_token_id", size), *first, *ends]
        self.ids = SpecialIds(
            bos=before[0] if len(before) == 1 and before[0] not in ends else None,
            ends=tuple(dict.fromkeys([*first, *ends])),
            start=starts[0],
            forced=told("forced_bos_token_id", size),
            banned=told("bad_words_ids", size),
        )

    def id_of(self, name: str) -> list[int]:
        """The id of the special token of a name, if there is one; CheckpointError where the vocabulary lacks it."""
        spelled = self.specials.get(name)
        if spelled is None:
            return []
        require(spelled in self.names, name, "a token of the vocabulary", spelled, CheckpointError)
        return [self.names.index(spelled)]

    def holds(self, token_id: int) -> bool:
        """Whether what a token adds to a text can change with the next one."""
        raise NotImplementedError

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts with those that the tokenizer itself sets around them."""
        before, behind = self._frame
        return [[*before, *ids, *behind] for ids in self.encode_batch(texts)]

    def encode_prompts(self, prompts: Sequence[str], *, documents: bool) -> list[list[int]]:  # noqa: ARG002 it knows itself
        """Whole texts; where that is nothing at all, what a document begins with."""
        return [ids or [self.ids.start] for ids in self.encode_whole(prompts)]

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, to be encoded as it is: the template writes special tokens itself.

        `variables` are what else the template may ask for, such as `tools`. Raises ConfigError where there is no
        template, and where it can not say the conversation.
        """
        from triglot.tokenizer import chat

        if (template := self.settings.chat_template) is None:
            return super().apply_chat_template(messages)
        given = {"tools": None, "documents": None, **self.specials, **variables}
        return chat.render(template, messages, add_generation_prompt=add_generation_prompt, **given)

    @property
    def digest(self) -> str:
        """A fingerprint of the files that tell what ids a text has."""
        held = hashlib.blake2b(digest_size=16)
        for name, content in sorted(self.files.items()):
            if name not in ("generation_config.json", "chat_template.jinja"):
                held.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return held.hexdigest()


class PieceStream(TextStream):
    """Text from pieces, what is told of each being what it adds to the one before; held pieces wait for another."""

    def __init__(self, tokenizer: Foreign, after: Sequence[int] = ()) -> None:
        self._foreign = tokenizer
        pieces = (token for token in reversed(after) if tokenizer.token_bytes(token))
        before = next(pieces, None)  # without which a space at the beginning would be no part of the text
        alone = before is not None and tokenizer.names[before] not in BYTE_OF_FALLBACK
        self._read: list[int] = [before] if before is not None and alone else []
        self._told = tokenizer.decode(self._read)

    def push(self, token_id: int) -> str:
        """The text that can not change any more."""
        if not self._foreign.token_bytes(token_id):
            return ""
        self._read.append(token_id)
        if self._foreign.holds(token_id):
            return ""
        text = self.flush()
        self._read, self._told = [token_id], self._foreign.decode([token_id])
        return text

    def flush(self) -> str:
        """What is left at the end."""
        text = self._foreign.decode(self._read)[len(self._told) :]
        self._told += text
        return text


class FromLibrary(Foreign):
    """A tokenizer.json."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        values = read_json(files["tokenizer.json"], "tokenizer.json")
        self._backend = _parse(files["tokenizer.json"], values)
        self._set_frame()
        decoders = list(_flat(values.get("decoder")))
        known, kinds = f"made of {', '.join(sorted(DECODERS))}", {one.get("type") for one in decoders}
        require(bool(kinds) and kinds <= DECODERS, "the decoder of tokenizer.json", known, kinds, CheckpointError)
        self._by_letters, self._falls_back = kinds == {"ByteLevel"}, "ByteFallback" in kinds
        self.kind = str(values["model"].get("type")).lower()
        self.cleans = self.cleans and self.kind != "bpe"  # whose spaces are those of the text
        added = self._backend.get_added_tokens_decoder()
        special = {one.content for one in added.values() if one.special}
        names = by_id(self._backend.get_vocab(with_added_tokens=True).items(), "tokenizer.json")
        self._know(names, (b"" if name in special else self._spelled(name) for name in names))
        probe = self._backend.encode("a 1 . ▁ 中 ")
        body = [place for place, added in enumerate(probe.special_tokens_mask) if not added]
        begin, end = (body[0], body[-1] + 1) if body else (len(probe.ids),) * 2
        self._stand_between(probe.ids[:begin], probe.ids[end:])

    def _set_frame(self) -> None:
        """Have the special tokens around a text that tokenizer_config.json asks for, if it says so."""
        self._backend.no_padding()
        self._backend.no_truncation()
        asked = {f"{name}_token": self.settings.values.get(f"add_{name}_token") for name in ("bos", "eos")}
        if set(asked.values()) == {None}:
            return
        bos, eos = ([self.specials[name]] if wanted and name in self.specials else [] for name, wanted in asked.items())
        tokens = {token: self._backend.token_to_id(token) for token in (*bos, *eos)}
        for token, token_id in tokens.items():
            require(token_id is not None, "special tokens", "of the vocabulary", token, CheckpointError)
        frame = [*bos, "$A", *eos]
        self._backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=list(tokens.items()))

    def _spelled(self, piece: str) -> bytes:
        if self._by_letters:
            known = all(letter in BYTE_OF_LETTER for letter in piece)
            return bytes(map(BYTE_OF_LETTER.__getitem__, piece)) if known else piece.encode()
        if self._falls_back and piece in BYTE_OF_FALLBACK:
            return bytes([BYTE_OF_FALLBACK[piece]])
        return piece.replace("▁", " ").encode()

    def as_json(self, *, bos: bool = False, eos: bool = False) -> str:  # noqa: ARG002 it knows itself
        """The file itself."""
        return self.files["tokenizer.json"].decode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens, as the tokenizer itself has it."""
        held = [int(token_id) for token_id in ids]
        for extreme in (min(held), max(held)) if held else ():
            self.token_bytes(extreme)
        text = self._backend.decode(held, skip_special_tokens=True)
        return cleaned(text) if self.cleans else text

    def holds(self, token_id: int) -> bool:
        """A byte alone may be no character, and whoever cleans up may take a space back."""
        return self.cleans or (self._falls_back and self.names[token_id] in BYTE_OF_FALLBACK)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that come one by one, after others that were told before."""
        return TextStream(self) if self._by_letters else PieceStream(self, after)


def by_id(vocabulary: Iterable[tuple[str, int]], name: str) -> list[str]:
    """The tokens in the order of their ids, "" where an id has none; CheckpointError for an id that has two."""
    tokens: dict[int, str] = {}
    for token, token_id in vocabulary:
        rule = f"one token of {name}, like every id"
        require(token_id not in tokens, f"id {token_id}", rule, [tokens.get(token_id), token], CheckpointError)
        tokens[token_id] = token
    require(bool(tokens), f"the vocabulary of {name}", "of one token or more", 0, CheckpointError)
    return [tokens.get(token_id, "") for token_id in range(max(tokens) + 1)]


def cleaned(text: str) -> str:
    """The text without the spaces that stand before English punctuation and contractions in some vocabularies."""
    for found, instead in CLEANED.items():
        text = text.replace(found, instead)
    return text


def _flat(decoder: Any) -> Iterator[Mapping[str, Any]]:
    parts = decoder.get("decoders", []) if isinstance(decoder, Mapping) else []
    if isinstance(decoder, Mapping) and not parts:
        yield decoder
    for part in parts:
        yield from _flat(part)


def _parse(content: bytes, values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    model = values.get("model")
    require(isinstance(model, Mapping), "model of tokenizer.json", "an object", model, CheckpointError)
    assert isinstance(model, Mapping)
    if isinstance(model.get("vocab"), list):  # in which a piece of which there are two would lose its first id
        twice = [piece for piece, count in Counter(piece for piece, _ in model["vocab"]).items() if count > 1]
        require(not twice, "the vocabulary of tokenizer.json", "without doubles", twice, CheckpointError)
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise CheckpointError(f"tokenizer.json is damaged: {error}") from error
