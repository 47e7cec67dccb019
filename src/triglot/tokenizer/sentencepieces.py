"""Vocabularies of SentencePiece (Kudo & Richardson 2018), read by its own library: of Marian, and of Llama and T5.

Marian's models have one for each side, which cut a text into pieces; the ids of pieces are in a file beside them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from triglot.errors import CheckpointError, ConfigError, require
from triglot.tokenizer.files import Files, read_json
from triglot.tokenizer.foreign import Foreign, PieceStream, by_id, cleaned
from triglot.tokenizer.trained import BYTE_OF_FALLBACK, TextStream, encodable

Side = Literal["source", "target"]
OF_MARIAN = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SENTINELS = 100
"""T5's blanks, behind its vocabulary, the first one last."""


class FromSentencePiece(Foreign):
    """One side of a Marian model, or the one vocabulary of another model."""

    def __init__(self, files: Files, side: Side = "source") -> None:
        super().__init__(files)
        self.kind, self._of_marian = "sentencepiece", "source.spm" in files
        name = f"{side}.spm" if self._of_marian else next(name for name in files if name.endswith(".model"))
        require(name in files, "source.spm", f"together with {name}", sorted(files), CheckpointError)
        self._model, sentinels = _read(files[name], name), list[str]()
        if self._of_marian:
            self.specials = OF_MARIAN | self.specials
            names = self._names_of_marian(side)
        else:
            self.specials = _specials(self._model) | self.specials
            if name == "spiece.model":
                count = self.settings.values.get("extra_ids", SENTINELS)
                sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
            names = [*map(self._model.id_to_piece, range(self._model.get_piece_size())), *sentinels]
        self._id_of_piece = {piece: token_id for token_id, piece in enumerate(names)}
        special = {*self.specials.values(), *sentinels}
        self._specials = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._know(names, [b"" if piece in special else _spelled(piece) for piece in names])
        [self._unknown] = self.id_of("unk_token")
        begins = name == "tokenizer.model" and self.settings.values.get("add_bos_token") is not False
        ends = name != "tokenizer.model" or self.settings.values.get("add_eos_token") is True
        self._stand_between(self.id_of("bos_token") * begins, self.id_of("eos_token") * ends)

    def _names_of_marian(self, side: Side) -> list[str]:
        name = "target_vocab.json" if side == "target" and "target_vocab.json" in self.files else "vocab.json"
        require(name in self.files, "source.spm", f"together with {name}", sorted(self.files), CheckpointError)
        ids = read_json(self.files[name], name)
        fits = all(type(token_id) is int and token_id >= 0 for token_id in ids.values())
        require(fits, name, "pieces with their ids", "others", CheckpointError)
        return by_id(ids.items(), name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without the special tokens around them."""
        return [[self._id_of_piece.get(piece, self._unknown) for piece in self._cut(text)] for text in encodable(texts)]

    def _cut(self, text: str) -> list[str]:
        """The pieces of a text; special tokens, and the code of a language in front of Marian's, are pieces as well."""
        pieces, at = list[str](), 0
        for special in [*self._specials.finditer(text), None]:
            part = text[at:] if special is None else text[at : special.start()]
            if self._of_marian and (code := re.match(r">>.*?<<", part, re.DOTALL)):
                pieces.append(code[0])
                part = part[code.end() :]
            pieces += self._model.encode(part, out_type=str)
            if special is not None:
                pieces.append(special[0])
                at = special.end()
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        held = [int(token_id) for token_id in ids]
        pieces = [self.names[token_id] for token_id in held if self.token_bytes(token_id)]
        text = str(self._model.decode_pieces(pieces))
        if self._of_marian:
            text = text.replace("▁", " ").strip()
        return cleaned(text) if self.cleans else text

    def holds(self, token_id: int) -> bool:
        """A byte alone may be no character, and of Marian's text white space at the end is no part."""
        return self.cleans or self._of_marian or self.names[token_id] in BYTE_OF_FALLBACK

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that come one by one, after others that were told before."""
        return PieceStream(self, after)


def _read(content: bytes, name: str) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        told = f"`sentencepiece` must be there to read {name} (pip install 'triglot[interop]')"
        raise ConfigError(f"{told}, but is missing instead.") from error
    require(bool(content), name, "a vocabulary", "an empty file", CheckpointError)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} is damaged: {error}") from error


def _specials(model: Any) -> dict[str, str]:
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    return {key: model.id_to_piece(token_id) for key, token_id in ids.items() if token_id >= 0}


def _spelled(piece: str) -> bytes:
    return bytes([BYTE_OF_FALLBACK[piece]]) if piece in BYTE_OF_FALLBACK else piece.replace("▁", " ").encode()
