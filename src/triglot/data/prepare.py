"""From a recipe to what is trained on: files are read, split, counted and encoded before anything is trained."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, compress, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from triglot.config import DataConfig, RunConfig, TokenizerConfig
from triglot.data import phrases
from triglot.data.corpus import (
    Example,
    PairCorpus,
    Piece,
    Survey,
    TextCorpus,
    choose_characters,
    choose_documents,
    find_files,
    stdlib_files,
)
from triglot.data.dataset import Crops, Dataset, FreshPairs, Packed, Pairs, Ragged, Windows
from triglot.data.shards import read_manifest, token_shards, write_manifest
from triglot.errors import ConfigError, DataError, require
from triglot.tokenizer import Tokenizer, Tokenizers

HELD_OUT_PHRASES = 500
TOKENIZER_PHRASES = 10_000
GROUP = 4096
"""Examples that are encoded at a time."""


class Prepared(NamedTuple):
    """What a run is trained on and measured by."""

    tokenizers: Tokenizers
    train: Dataset
    valid: Dataset
    valid_examples: list[Example] | None
    """Pairs as text; None in a language model."""
    test_examples: list[Example] | None
    report: list[str]
    """What there is and what was left out, for people."""
    test: Dataset | None = None
    """The part of a text that is kept for the end."""


def prepare(config: RunConfig, folder: Path, tokenizers: Tokenizers | None) -> Prepared:
    """Read, split and encode the data of a recipe; `folder` is the run's, what is kept lies in its "data".

    Without `tokenizers` the recipe's are used, or new ones are trained on the training part. Raises DataError where the
    data can not be used, or is not what this run was prepared from before.
    """
    if tokenizers is None and config.tokenizer.path is not None:
        tokenizers = Tokenizers.load(Path(config.tokenizer.path).expanduser())
    rule = "text, stdlib, pairs or phrases, for something to train on"
    require(config.data.kind != "none", "data.kind", rule, config.data.kind, ConfigError)
    make = {"text": _text, "stdlib": _text, "pairs": _pairs, "phrases": _phrases}[config.data.kind]
    prepared = make(config, folder / "data", tokenizers)
    if config.model.options.tie_embeddings and config.model.kind == "encoder_decoder":
        joint = prepared.tokenizers.joint
        require(joint, "tokenizers", "joint, since the model ties its embeddings", "separate", ConfigError)
    return prepared


def _text(config: RunConfig, folder: Path, tokenizers: Tokenizers | None) -> Prepared:
    data, context, budget = config.data, config.train.context, config.train.batch_tokens
    if data.kind == "stdlib":
        files = stdlib_files(data.max_bytes)
    else:
        files = find_files(data.files, _root(data))
    corpus = TextCorpus(files, data.document, data.max_bytes)
    survey = corpus.survey()
    split = _split_text(corpus, survey, data, config.seed)
    if tokenizers is None:
        texts = (piece.text for piece in split.parts["train"]())
        tokenizer = Tokenizer.train(config.tokenizer.kind, texts, config.tokenizer.vocab_size)
        tokenizers = Tokenizers(tokenizer, tokenizer)
    tokenizer = tokenizers.target
    made_from = {"text": survey.digest, "validation part": split.digest, "tokenizer": tokenizer.digest}
    shards = token_shards(folder, made_from, {name: part() for name, part in split.parts.items()}, tokenizer)
    packed = data.packing == "documents"
    ids = tokenizer.ids
    train: Dataset = (Packed if packed else Crops)(shards["train"], context, budget, config.seed, ids)
    measured: dict[str, Dataset] = {
        name: Packed(shard, context, budget, None, ids) if packed else Windows(shard, context, budget, ids)
        for name, shard in shards.items()
        if name != "train"
    }
    report = [
        f"text: {_many(len(files), 'file')}, {_many(survey.size, 'document')}, {_many(survey.characters, 'character')}"
        + _told(survey.left_out),
        _vocabulary(tokenizers),
        *(f"{name}: {_many(len(shards[name]), 'token')}" for name in shards),
    ]
    return Prepared(tokenizers, train, measured["valid"], None, None, report, measured.get("test"))


class _TextSplit(NamedTuple):
    parts: dict[str, Callable[[], Iterator[Piece]]]
    digest: str


def _split_text(corpus: TextCorpus, survey: Survey, data: DataConfig, seed: int) -> _TextSplit:
    if isinstance(data.valid, str):
        other = TextCorpus(find_files([data.valid], _root(data), "data.valid"), data.document)
        return _TextSplit({"train": corpus.pieces, "valid": other.pieces}, other.survey().digest)
    if data.hold_out == "tail":
        return _split_tail(corpus, survey.characters, data.valid, data.test)
    rule = 'a file, or data.hold_out "tail", for a text of one document'
    require(survey.size > 1, "data.valid", rule, data.valid, DataError)
    held = _drawn(survey.size, data, seed)
    parts = {
        "train": lambda: choose_documents(corpus.pieces(), ~held),
        "valid": lambda: choose_documents(corpus.pieces(), held),
    }
    return _TextSplit(parts, f"{data.valid} seed {seed}")


def _split_tail(corpus: TextCorpus, characters: int, valid: float, test: float) -> _TextSplit:
    """What validates is the text's end, or its beginning where its end tests.

    Cut out before what tests, it would keep from training the names that the test's first chapters share with it.
    """
    end = int(characters * (1 - (test or valid)))
    first = int(characters * valid) if test else 0
    held = (0, first) if test else (end, characters)
    require(first < end and held[0] < held[1], "data.valid", "a part that holds a character", valid, DataError)
    parts: dict[str, Callable[[], Iterator[Piece]]] = {
        "train": lambda: choose_characters(corpus.pieces(), first, end),
        "valid": lambda: _without_last_end(choose_characters(corpus.pieces(), *held)),
    }
    if test:
        parts["test"] = lambda: _without_last_end(choose_characters(corpus.pieces(), end, characters))
    return _TextSplit(parts, f"{valid} head, {test} tail" if test else f"{valid} tail")


def _without_last_end(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """What is scored of a text's tail is its characters, and no token behind them."""
    before = next(pieces)
    for piece in pieces:
        yield before
        before = piece
    yield before._replace(ends=False)


def _drawn(size: int, data: DataConfig, seed: int) -> NDArray[np.bool_]:
    """Which documents or examples validate: the fraction's share, but never none and never all."""
    number = min(max(1, round(size * float(data.valid))), size - 1)
    held = np.zeros(size, bool)
    if data.hold_out == "tail":
        held[size - number :] = True
    else:
        held[np.random.default_rng(seed).choice(size, number, replace=False, shuffle=False)] = True
    return held


def _pairs(config: RunConfig, folder: Path, tokenizers: Tokenizers | None) -> Prepared:
    data, root = config.data, _root(config.data)
    corpus = _pair_corpus(data.source, data.target, data.files, root, "data")
    survey = corpus.survey()
    surveys = {"train": survey}
    train: Callable[[], Iterator[Example]] = corpus.examples
    valid: Callable[[], Iterator[Example]]
    if data.valid_source is not None or isinstance(data.valid, str):
        names = () if data.valid_source is not None else (str(data.valid),)
        other = _pair_corpus(data.valid_source, data.valid_target, names, root, "data.valid")
        surveys["valid"], valid = other.survey(), other.examples
        told = surveys["valid"].digest
    else:
        require(survey.size > 1, "data.valid", "a file, for a single example", data.valid, DataError)
        held = _drawn(survey.size, data, config.seed)
        train, valid = _only(corpus, ~held), _only(corpus, held)
        told = f"{data.valid} {data.hold_out} seed {config.seed}"
    test = None
    if data.test_source is not None:
        test = _pair_corpus(data.test_source, data.test_target, (), root, "data.test")
        surveys["test"] = test.survey()
    if tokenizers is None:
        tokenizers = _train_tokenizers(config.tokenizer, train, survey.tags)
    made_from = {"pairs": survey.digest, "validation part": told} | _digests(tokenizers)
    if "test" in surveys:
        made_from["test part"] = surveys["test"].digest
    for tag in sorted({tag for one in surveys.values() for tag in one.tags}):
        tokenizers.source.tag_id(tag)
    _keep(folder, made_from)
    encoder = _Encoder(tokenizers, config)
    batches = encoder.training("train", train(), survey.left_out, config.seed)
    left_out = surveys["valid"].left_out if "valid" in surveys else Counter[str]()
    valid_batches, valid_examples = encoder.measuring("valid", valid(), left_out)
    test_examples = None
    if test is not None:
        test_examples = encoder.measuring("test", test.examples(), surveys["test"].left_out)[1]
    return Prepared(tokenizers, batches, valid_batches, valid_examples, test_examples, [*encoder.report])


def _pair_corpus(source: str | None, target: str | None, files: tuple[str, ...], root: Path, name: str) -> PairCorpus:
    if source is None or target is None:
        return PairCorpus(find_files(files, root, f"{name}.files" if name == "data" else name), separate=False)
    joint = "." if name == "data" else "_"
    sides = [find_files([side], root, f"{name}{joint}{key}") for key, side in (("source", source), ("target", target))]
    for found, side in zip(sides, (source, target), strict=True):
        require(len(found) == 1, name, "one file a side", side, DataError)
    return PairCorpus([found[0] for found in sides], separate=True)


def _only(corpus: PairCorpus, chosen: NDArray[np.bool_]) -> Callable[[], Iterator[Example]]:
    return lambda: (example for example, wanted in zip(corpus.examples(), chosen, strict=True) if wanted)


def _train_tokenizers(
    config: TokenizerConfig, examples: Callable[[], Iterable[Example]], tags: tuple[str, ...]
) -> Tokenizers:
    if config.joint:
        texts = chain.from_iterable((example.source, example.target) for example in examples())
        tokenizer = Tokenizer.train(config.kind, texts, config.vocab_size, tags)
        return Tokenizers(tokenizer, tokenizer)
    source = Tokenizer.train(config.kind, (example.source for example in examples()), config.vocab_size, tags)
    target = Tokenizer.train(config.kind, (example.target for example in examples()), config.vocab_size)
    return Tokenizers(source, target)


class _Encoder:
    """Examples to ids; those longer than the model or a batch can hold are left out, and `report` is told."""

    def __init__(self, tokenizers: Tokenizers, config: RunConfig) -> None:
        self.tokenizers, self.budget = tokenizers, config.train.batch_tokens
        self.limit = min(config.model.max_seq_length, self.budget)
        self.report = [_vocabulary(tokenizers)]

    def training(self, name: str, examples: Iterable[Example], left_out: Counter[str], seed: int) -> Pairs:
        """Batches to train on; the texts are not kept."""
        return self._batches(name, self._encode(examples, left_out), left_out, seed)

    def measuring(self, name: str, examples: Iterable[Example], left_out: Counter[str]) -> tuple[Pairs, list[Example]]:
        """Batches in the order of length, and the texts."""
        kept: list[Example] = []
        return self._batches(name, self._encode(examples, left_out, kept), left_out, None), kept

    def _encode(
        self, examples: Iterable[Example], left_out: Counter[str], kept: list[Example] | None = None
    ) -> Iterator[tuple[Ragged, Ragged]]:
        rest = iter(examples)
        while group := list(islice(rest, GROUP)):
            texts, wanted, tags = zip(*group, strict=True)
            sources, targets = self.tokenizers.encode_sources(texts, tags), self.tokenizers.encode_targets(wanted)
            fits = [max(len(x), len(y) + 1) <= self.limit for x, y in zip(sources, targets, strict=True)]
            left_out[f"longer than {self.limit:,} tokens"] += len(fits) - sum(fits)
            if kept is not None:
                kept.extend(compress(group, fits))
            yield Ragged.of(compress(sources, fits)), Ragged.of(compress(targets, fits))

    def _batches(
        self, name: str, encoded: Iterable[tuple[Ragged, Ragged]], left_out: Counter[str], seed: int | None
    ) -> Pairs:
        parts = list(encoded)
        sources, targets = (Ragged.joined([part[side] for part in parts]) for side in (0, 1))
        told = _told(left_out)
        require(len(sources) > 0, f"the {name} data", "pairs that can be used", f"none{told}", DataError)
        self.report.append(f"{name}: {_many(len(sources), 'pair')}, {_many(len(targets.flat), 'target token')}{told}")
        return Pairs(sources, targets, self.budget, seed, self.tokenizers.target.ids)


def _phrases(config: RunConfig, folder: Path, tokenizers: Tokenizers | None) -> Prepared:
    language, size, seed = config.data.language, config.data.num_examples, config.seed

    def epoch(index: int) -> Iterator[Example]:
        return islice(phrases.examples(seed, language, "train", start=index * size), size)

    if tokenizers is None:
        some = list(islice(phrases.examples(seed, language, "train"), TOKENIZER_PHRASES))
        tokenizers = _train_tokenizers(config.tokenizer, lambda: some, ())
    encoder = _Encoder(tokenizers, config)
    first = encoder.training("train, the first epoch", epoch(0), Counter(), seed)
    train = FreshPairs(lambda index: encoder.training("train", epoch(index), Counter(), seed) if index else first)
    held_out = [_distinct(phrases.examples(seed, language, part), HELD_OUT_PHRASES) for part in ("valid", "test")]
    digest = hashlib.blake2b(repr(held_out).encode(), digest_size=16).hexdigest()
    _keep(folder, {"phrases": digest} | _digests(tokenizers))
    valid, valid_examples = encoder.measuring("valid", held_out[0], Counter())
    _, test_examples = encoder.measuring("test", held_out[1], Counter())
    return Prepared(tokenizers, train, valid, valid_examples, test_examples, [*encoder.report])


def _distinct(examples: Iterator[Example], number: int) -> list[Example]:
    distinct: dict[Example, None] = {}
    while len(distinct) < number:
        distinct[next(examples)] = None
    return list(distinct)


def _root(data: DataConfig) -> Path:
    root = Path(data.root).expanduser()
    require(root.is_dir(), "data.root", "a folder", data.root, DataError)
    return root


def _digests(tokenizers: Tokenizers) -> dict[str, str]:
    return {"source tokenizer": tokenizers.source.digest, "target tokenizer": tokenizers.target.digest}


def _keep(folder: Path, made_from: dict[str, str]) -> None:
    """Refuse data that is not what the run began with."""
    if read_manifest(folder, made_from) is None:
        write_manifest(folder, made_from, {})


def _vocabulary(tokenizers: Tokenizers) -> str:
    sides = {"tokenizer": tokenizers.target}
    if not tokenizers.joint:
        sides = {"source tokenizer": tokenizers.source, "target tokenizer": tokenizers.target}
    return ", ".join(f"{name}: {side.kind} of {_many(side.vocab_size, 'id')}" for name, side in sides.items())


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _told(left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number)
    return f"; left out: {reasons}" * bool(reasons)
