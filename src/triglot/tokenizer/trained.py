"""Tokenizers that are trained here: bytes, characters or byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

Text comes back exactly. Every byte has an id in every vocabulary, so no text is unknown; special tokens have no
spelling that text could hit.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from triglot.errors import CheckpointError, ConfigError, DataError, reason, require
from triglot.files import write_text
from triglot.tokenizer.ids import Message, SpecialIds

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# The library's threads do not survive a fork: a child that used them would wait for ever.
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

Kind = Literal["byte", "char", "bpe"]
"""Of those that are trained here."""
SPECIALS = ("<pad>", "<bos>", "<eos>")

# Words with the space in front of them, single digits, runs of marks, white space that leaves a space to the next word.
# The bounds keep a megabyte without a space from becoming one word. Nothing matches letters together with "<" or "2",
# so that BPE can not learn a piece spelled like a special token.
_WORDS = Regex(r" ?[\p{L}\p{M}]{1,40}|\p{N}| ?[^\s\p{L}\p{M}\p{N}]{1,16}|\s{1,64}(?!\S)|\s{1,64}")
_BETWEEN_WORDS = re.compile(r"(?<=[\w!-~])[ \n]")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PROBE = " A\r\n\x00é<pad>  2€"


def _byte_letters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = _byte_letters()
BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(LETTERS)}
BYTE_OF_FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


def word_boundary(text: str) -> int:
    """The last place to cut `text` so that its parts give the ids of the whole; 0 if none is near its end."""
    tail = max(0, len(text) - 4096)
    return max((tail + match.start() for match in _BETWEEN_WORDS.finditer(text[tail:])), default=0)


class TextStream:
    """Text from tokens that come one by one; a character is given out when its last byte is there."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The whole characters that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: nothing, or a replacement character for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A vocabulary with PAD 0, BOS 1, EOS 2, then the target tags, then the pieces of text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # "<pad>" in a text is text; the library does not save this switch
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        self.names = tuple(piece for piece, _ in vocabulary)
        specials = [added[index].content for index in sorted(added)]
        require(specials == list(self.names[: len(added)]), "special tokens", "the first of the vocabulary", specials)
        require(specials[:3] == list(SPECIALS), "special tokens", f"{', '.join(SPECIALS)} in front", specials)
        self.tags: tuple[str, ...] = tuple(name[2:-1] for name in specials[3:])
        """The target tags that a source may begin with."""
        require(specials[3:] == [_spelled(tag) for tag in self.tags], "tags", 'spelled "<2tag>"', specials[3:])
        by_letters = not getattr(backend.model, "byte_fallback", False)
        pieces = self.names[len(added) :]
        to_bytes = _letters_to_bytes if by_letters else _char_to_bytes
        self._bytes = (b"",) * len(added) + tuple(map(to_bytes, pieces))
        self.vocab_size: int = len(vocabulary)
        self.ids = SpecialIds(banned=(0, 1, *range(3, len(added))))
        self.kind: str = "char" if not by_letters else "byte" if len(pieces) == 256 else "bpe"

    @classmethod
    def train(cls, kind: Kind, texts: Iterable[str], vocab_size: int = 8000, tags: Sequence[str] = ()) -> "Tokenizer":
        """Learn the vocabulary of `texts`, which are read once and not kept; only BPE has a choice of size."""
        for tag in tags:
            require(bool(_TAG.fullmatch(tag)), "tag", "letters, digits, and . _ - after the first", tag, DataError)
        specials = [*SPECIALS, *(_spelled(tag) for tag in dict.fromkeys(tags))]
        if kind == "char":
            characters: set[str] = set()
            for text in encodable(texts):
                characters.update(text)
            return cls(_without_merges(specials, [*BYTE_OF_FALLBACK, *sorted(characters)], fallback=True))
        if kind == "byte":
            return cls(_without_merges(specials, LETTERS, fallback=False))
        least = 256 + len(specials)
        rule = f"at least {least}, the bytes and special tokens"
        require(vocab_size >= least, "vocab_size", rule, vocab_size, DataError)
        backend = _with_words(tokenizers.Tokenizer(models.BPE()), fallback=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in specials],
            initial_alphabet=LETTERS,
            show_progress=False,
        )
        backend.train_from_iterator(encodable(texts), trainer)
        return cls(backend)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`; what looks like a special token in it is text too."""
        return [self.ids.start] * bos + self.encode_batch([text])[0] + [self.ids.eos] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without special tokens; on all cores unless TOKENIZERS_PARALLELISM is "false"."""
        try:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # the library's word for lone surrogates
            for _ in encodable(texts):
                pass
            raise
        return [one.ids for one in encoded]

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts as an encoder reads them."""
        return [[self.ids.start, *ids, self.ids.eos] for ids in self.encode_batch(texts)]

    def encode_prompts(self, prompts: Sequence[str], *, documents: bool) -> list[list[int]]:
        """What is read before a text goes on, by a model that knows whole documents or windows cut anywhere.

        Whole documents begin with BOS, and so does nothing at all; windows mostly do not.
        """
        return [[self.ids.start] * (documents or not ids) + ids for ids in self.encode_batch(prompts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        held = [int(token_id) for token_id in ids]
        for extreme in (min(held), max(held)) if held else ():
            self.token_bytes(extreme)
        return b"".join(map(self._bytes.__getitem__, held)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; a special token stands for none."""
        rule = f"between 0 and {self.vocab_size - 1}"
        require(0 <= token_id < self.vocab_size, "token id", rule, int(token_id), DataError)
        return self._bytes[token_id]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as a person can read it: "▁" for a space, escapes for the unprintable, <0xE2> for lone bytes."""
        return [self._readable(token_id) for token_id in ids]

    def _readable(self, token_id: int) -> str:
        piece = self.token_bytes(token_id)
        if not piece:
            return self.names[token_id]
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace(" ", "▁"))

    def tag_id(self, tag: str) -> int:
        """The id of a target tag."""
        known = ", ".join(self.tags) or "none, since the training data had no tags"
        require(tag in self.tags, "tag", f"a known one ({known})", tag, DataError)
        return len(SPECIALS) + self.tags.index(tag)

    def apply_chat_template(self, messages: Sequence[Message], **variables: Any) -> str:  # noqa: ARG002 for those that have one
        """The text of a conversation; ConfigError, as tokenizers that are trained here have no chat template."""
        raise ConfigError("`the run` must be made from a model with a chat template to be talked to, but is not.")

    def stream(self, after: Sequence[int] = ()) -> TextStream:  # noqa: ARG002 for those whose text depends on it
        """A decoder for tokens that come one by one, after others that were told before."""
        return TextStream(self)

    @property
    def digest(self) -> str:
        """A fingerprint of the vocabulary and its rules."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    def as_json(self, *, bos: bool = False, eos: bool = False) -> str:
        """A tokenizer.json of the `tokenizers` library, in which special tokens are marked as such.

        With `bos` or `eos` whoever loads it has these around each text.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        if bos or eos:
            names = [(self.names[token], token) for token in (self.ids.start, self.ids.eos)]
            frame = [names[0][0]] * bos + ["$A"] + [names[1][0]] * eos
            backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=names)
        return str(backend.to_str(pretty=True))

    def save(self, path: Path) -> None:
        """Write it as one file."""
        write_text(path, self.as_json())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote; CheckpointError for any other file."""
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path}: no tokenizer can be read from it: {reason(error)}") from error
        try:
            tokenizer = cls(_parse(values, text))
            require(tokenizer.decode(tokenizer.encode(_PROBE)) == _PROBE, "the file", "without loss", _PROBE)
        except ValueError as error:
            raise CheckpointError(f"{path}: this is no tokenizer of triglot: {error}") from error
        return tokenizer


def _spelled(tag: str) -> str:
    return f"<2{tag}>"  # Johnson et al. 2017, §3


def encodable(texts: Iterable[str]) -> Iterator[str]:
    """The texts, as long as UTF-8 can encode them; DataError where a lone surrogate can not be."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            raise DataError(f"`text` must be Unicode that UTF-8 can encode, but {found} instead.") from error
        yield text


def _with_words(backend: tokenizers.Tokenizer, *, fallback: bool) -> tokenizers.Tokenizer:
    words = pre_tokenizers.Split(_WORDS, "isolated")
    if fallback:
        backend.pre_tokenizer = words
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        backend.decoder = decoders.ByteLevel()
    return backend


def _without_merges(specials: Sequence[str], pieces: Iterable[str], *, fallback: bool) -> tokenizers.Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate((*specials, *pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=fallback))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return _with_words(backend, fallback=fallback)


def _letters_to_bytes(piece: str) -> bytes:
    require(all(letter in BYTE_OF_LETTER for letter in piece), "a piece", "of byte letters", piece)
    return bytes(BYTE_OF_LETTER[letter] for letter in piece)


def _char_to_bytes(piece: str) -> bytes:
    require(len(piece) == 1 or piece in BYTE_OF_FALLBACK, "a piece", "one character or byte", piece)
    return bytes([BYTE_OF_FALLBACK[piece]]) if piece in BYTE_OF_FALLBACK else piece.encode("utf-8")


def _parse(values: Any, text: str) -> tokenizers.Tokenizer:
    is_bpe = isinstance(values, dict) and isinstance(values.get("model"), dict) and values["model"].get("type") == "BPE"
    require(is_bpe, "model.type", "BPE", values.get("model", {}).get("type") if isinstance(values, dict) else values)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(str(error)) from error
