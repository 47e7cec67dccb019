"""The tokenizers of a model's two sides."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from triglot.config import GenerationConfig
from triglot.errors import CheckpointError
from triglot.files import write_bytes
from triglot.tokenizer.files import NAMES, ONE_OF, Files, read_files
from triglot.tokenizer.foreign import Foreign, FromLibrary
from triglot.tokenizer.gguf import files_of
from triglot.tokenizer.sentencepieces import FromSentencePiece
from triglot.tokenizer.trained import Tokenizer

TOKENIZER_FILES = ("source.json", "target.json", *NAMES)
"""What a run's folder may have of them."""


class Tokenizers(NamedTuple):
    """The tokenizers of both sides; one and the same when they are joint, and in a language model."""

    source: Tokenizer
    target: Tokenizer

    @property
    def joint(self) -> bool:
        """Both sides share one vocabulary."""
        shared = isinstance(self.source, Foreign) and "target_vocab.json" not in self.source.files
        return shared or self.source is self.target

    @property
    def generation(self) -> GenerationConfig:
        """What the files of a model of others say about decoding."""
        return self.target.settings.generation if isinstance(self.target, Foreign) else GenerationConfig()

    def encode_sources(self, texts: Sequence[str], tags: Sequence[str | None]) -> list[list[int]]:
        """What the encoder reads: a whole text, as its tokenizer begins and ends it, behind the target tag if any."""
        wholes = self.source.encode_whole(texts)
        return [
            whole if tag is None else [self.source.tag_id(tag), *whole] for whole, tag in zip(wholes, tags, strict=True)
        ]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """What the decoder is to write, without its end."""
        return [[*self.target.ids.forced, *ids] for ids in self.target.encode_batch(texts)]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, or source.json and target.json, or the files of others, into an existing folder."""
        if isinstance(self.source, Foreign):
            for name, content in self.source.files.items():
                write_bytes(folder / name, content)
        elif self.joint:
            self.source.save(folder / "tokenizer.json")
        else:
            self.source.save(folder / "source.json")
            self.target.save(folder / "target.json")

    @classmethod
    def load(cls, path: Path) -> "Tokenizers":
        """Read what `save` wrote into a folder, or a folder of others, or the one tokenizer in a file."""
        if any((path / name).is_file() for name in ONE_OF):
            with _naming(path):
                return cls._of(read_files(path))
        joint = path / "tokenizer.json" if path.is_dir() else path
        if joint.is_file():
            tokenizer = Tokenizer.load(joint)
            return cls(tokenizer, tokenizer)
        sides = [path / "source.json", path / "target.json"]
        if not all(side.is_file() for side in sides):
            rule = "a tokenizer's file, or a folder that holds tokenizer.json"
            raise CheckpointError(f"`tokenizer` must be {rule}, but is {str(path)!r} instead.")
        return cls(*map(Tokenizer.load, sides))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: Path) -> "Tokenizers":
        """The tokenizer that the metadata of a GGUF file, `source`, describe: its keys to numbers, texts and lists."""
        with _naming(source):
            return cls._of(files_of(metadata))

    @classmethod
    def from_sentencepiece(cls, path: Path) -> "Tokenizers":
        """The one tokenizer in a file of SentencePiece, with BOS in front of each text, as Llama's have it."""
        with _naming(path):
            return cls._of({"tokenizer.model": path.read_bytes()})

    @classmethod
    def _of(cls, files: Files) -> "Tokenizers":
        if "source.spm" in files:
            return cls(FromSentencePiece(files), FromSentencePiece(files, "target"))
        tokenizer = FromLibrary(files) if "tokenizer.json" in files else FromSentencePiece(files)
        return cls(tokenizer, tokenizer)


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
