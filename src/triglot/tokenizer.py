"""Text to token ids and back, exactly: bytes, characters or byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

Every byte has an id in every vocabulary, so no text is unknown; special tokens have no spelling that text could hit.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from triglot.errors import CheckpointError, DataError, require
from triglot.files import write_text

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# The library's threads do not survive a fork: a child that used them would wait for ever.
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

Kind = Literal["byte", "char", "bpe"]
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


_LETTERS = _byte_letters()
_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(_LETTERS)}
_BYTE_OF_FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


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

    pad_id: ClassVar[int] = 0
    bos_id: ClassVar[int] = 1
    eos_id: ClassVar[int] = 2

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # "<pad>" in a text is text; the library does not save this switch
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        self._names = tuple(piece for piece, _ in vocabulary)
        specials = [added[index].content for index in sorted(added)]
        require(specials == list(self._names[: len(added)]), "special tokens", "the first of the vocabulary", specials)
        require(specials[:3] == list(SPECIALS), "special tokens", f"{', '.join(SPECIALS)} in front", specials)
        self.tags: tuple[str, ...] = tuple(name[2:-1] for name in specials[3:])
        """The target tags that a source may begin with."""
        require(specials[3:] == [_spelled(tag) for tag in self.tags], "tags", 'spelled "<2tag>"', specials[3:])
        by_letters = not getattr(backend.model, "byte_fallback", False)
        pieces = self._names[len(added) :]
        to_bytes = _letters_to_bytes if by_letters else _char_to_bytes
        self._bytes = (b"",) * len(added) + tuple(map(to_bytes, pieces))
        self.vocab_size: int = len(vocabulary)
        self.kind: Kind = "char" if not by_letters else "byte" if len(pieces) == 256 else "bpe"

    @classmethod
    def train(cls, kind: Kind, texts: Iterable[str], vocab_size: int = 8000, tags: Sequence[str] = ()) -> "Tokenizer":
        """Learn the vocabulary of `texts`, which are read once and not kept; only BPE has a choice of size."""
        for tag in tags:
            require(bool(_TAG.fullmatch(tag)), "tag", "letters, digits, and . _ - after the first", tag, DataError)
        specials = [*SPECIALS, *(_spelled(tag) for tag in dict.fromkeys(tags))]
        if kind == "char":
            characters: set[str] = set()
            for text in _encodable(texts):
                characters.update(text)
            return cls(_without_merges(specials, [*_BYTE_OF_FALLBACK, *sorted(characters)], fallback=True))
        if kind == "byte":
            return cls(_without_merges(specials, _LETTERS, fallback=False))
        least = 256 + len(specials)
        rule = f"at least {least}, the bytes and special tokens"
        require(vocab_size >= least, "vocab_size", rule, vocab_size, DataError)
        backend = _with_words(tokenizers.Tokenizer(models.BPE()), fallback=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in specials],
            initial_alphabet=_LETTERS,
            show_progress=False,
        )
        backend.train_from_iterator(_encodable(texts), trainer)
        return cls(backend)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`; what looks like a special token in it is text too."""
        return [self.bos_id] * bos + self.encode_batch([text])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without special tokens; on all cores unless TOKENIZERS_PARALLELISM is "false"."""
        try:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # the library's word for lone surrogates
            for _ in _encodable(texts):
                pass
            raise
        return [one.ids for one in encoded]

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
            return self._names[token_id]
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

    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self)

    @property
    def digest(self) -> str:
        """A fingerprint of the vocabulary and its rules."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        """Write one tokenizer.json of the `tokenizers` library, in which special tokens are marked as such."""
        write_text(path, self._backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote; CheckpointError for any other file."""
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path}: no tokenizer can be read from it: {error}") from error
        try:
            tokenizer = cls(_parse(values, text))
            require(tokenizer.decode(tokenizer.encode(_PROBE)) == _PROBE, "the file", "without loss", _PROBE)
        except ValueError as error:
            raise CheckpointError(f"{path}: this is no tokenizer of triglot: {error}") from error
        return tokenizer


class Tokenizers(NamedTuple):
    """The tokenizers of both sides; one and the same when they are joint, and in a language model."""

    source: Tokenizer
    target: Tokenizer

    @property
    def joint(self) -> bool:
        """Both sides share one vocabulary."""
        return self.source is self.target

    def encode_sources(self, texts: Sequence[str], tags: Sequence[str | None]) -> list[list[int]]:
        """What the encoder reads: [BOS] + text + [EOS], behind the target tag where there is one."""
        bodies = self.source.encode_batch(texts)
        return [
            [*([] if tag is None else [self.source.tag_id(tag)]), self.source.bos_id, *body, self.source.eos_id]
            for body, tag in zip(bodies, tags, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, or source.json and target.json, into an existing folder."""
        if self.joint:
            self.source.save(folder / "tokenizer.json")
        else:
            self.source.save(folder / "source.json")
            self.target.save(folder / "target.json")

    @classmethod
    def load(cls, path: Path) -> "Tokenizers":
        """Read what `save` wrote into a folder, or the one tokenizer in a file."""
        joint = path / "tokenizer.json" if path.is_dir() else path
        if joint.is_file():
            tokenizer = Tokenizer.load(joint)
            return cls(tokenizer, tokenizer)
        sides = [path / "source.json", path / "target.json"]
        if not all(side.is_file() for side in sides):
            rule = "a tokenizer's file, or a folder that holds tokenizer.json"
            raise CheckpointError(f"`tokenizer` must be {rule}, but is {str(path)!r} instead.")
        return cls(*map(Tokenizer.load, sides))


def _spelled(tag: str) -> str:
    return f"<2{tag}>"  # Johnson et al. 2017, §3


def _encodable(texts: Iterable[str]) -> Iterator[str]:
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
    require(all(letter in _BYTE_OF_LETTER for letter in piece), "a piece", "of byte letters", piece)
    return bytes(_BYTE_OF_LETTER[letter] for letter in piece)


def _char_to_bytes(piece: str) -> bytes:
    require(len(piece) == 1 or piece in _BYTE_OF_FALLBACK, "a piece", "one character or byte", piece)
    return bytes([_BYTE_OF_FALLBACK[piece]]) if piece in _BYTE_OF_FALLBACK else piece.encode("utf-8")


def _parse(values: Any, text: str) -> tokenizers.Tokenizer:
    is_bpe = isinstance(values, dict) and isinstance(values.get("model"), dict) and values["model"].get("type") == "BPE"
    require(is_bpe, "model.type", "BPE", values.get("model", {}).get("type") if isinstance(values, dict) else values)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(str(error)) from error
