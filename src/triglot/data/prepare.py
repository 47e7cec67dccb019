"""From a recipe to what is trained on: files are read, split, counted and encoded before anything is trained."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from triglot.config import DataConfig, RunConfig, TokenizerConfig
from triglot.data import phrases
from triglot.data.corpus import Example, PairCorpus, Piece, Survey, TextCorpus, find_files, stdlib_files
from triglot.data.corpus import choose_characters, choose_documents
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


def prepare(config: RunConfig, folder: Path, tokenizers: Tokenizers | None) -> Prepared:
    """Read, split and encode the data of a recipe; `folder` is the run's, what is kept lies in its "data".

    Without `tokenizers` the recipe's are used, or new ones are trained on the training part. Raises DataError where the
    data can not be used, or is not what this run was prepared from before.
    """
    if tokenizers is None and config.tokenizer.path is not None:
        tokenizers = Tokenizers.load(Path(config.tokenizer.path).expanduser())
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
        texts = (piece.text for piece in split.train())
        tokenizer = Tokenizer.train(config.tokenizer.kind, texts, config.tokenizer.vocab_size)
        tokenizers = Tokenizers(tokenizer, tokenizer)
    tokenizer = tokenizers.target
    made_from = {"text": survey.digest, "validation part": split.digest, "tokenizer": tokenizer.digest}
    shards = token_shards(folder, made_from, {"train": split.train(), "valid": split.valid()}, tokenizer)
    train: Dataset
    valid: Dataset
    if data.packing == "documents":
        train = Packed(shards["train"], context, budget, config.seed)
        valid = Packed(shards["valid"], context, budget, None)
    else:
        train, valid = Crops(shards["train"], context, budget, config.seed), Windows(shards["valid"], context, budget)
    report = [
        f"text: {_many(len(files), 'file')}, {_many(survey.size, 'document')}, {_many(survey.characters, 'character')}"
        + _told(survey.left_out),
        _vocabulary(tokenizers),
        *(f"{name}: {_many(len(shards[name]), 'token')}" for name in shards),
    ]
    return Prepared(tokenizers, train, valid, None, None, report)


class _TextSplit(NamedTuple):
    train: Callable[[], Iterator[Piece]]
    valid: Callable[[], Iterator[Piece]]
    digest: str


def _split_text(corpus: TextCorpus, survey: Survey, data: DataConfig, seed: int) -> _TextSplit:
    if isinstance(data.valid, str):
        other = TextCorpus(find_files([data.valid], _root(data), "data.valid"), data.document)
        return _TextSplit(corpus.pieces, other.pieces, other.survey().digest)
    if data.hold_out == "tail":
        border = int(survey.characters * (1 - data.valid))
        require(0 < border < survey.characters, "data.valid", "a part that holds a character", data.valid, DataError)
        return _TextSplit(
            lambda: choose_characters(corpus.pieces(), 0, border),
            lambda: _without_last_end(choose_characters(corpus.pieces(), border, survey.characters)),
            f"{data.valid} tail",
        )
    rule = 'a file, or data.hold_out "tail", for a text of one document'
    require(survey.size > 1, "data.valid", rule, data.valid, DataError)
    held = _drawn(survey.size, data, seed)
    return _TextSplit(
        lambda: choose_documents(corpus.pieces(), ~held),
        lambda: choose_documents(corpus.pieces(), held),
        f"{data.valid} seed {seed}",
    )


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
    sources = {"train": survey}
    train, valid = corpus.examples, corpus.examples
    if data.valid_source is not None or isinstance(data.valid, str):
        names = () if data.valid_source is not None else (str(data.valid),)
        other = _pair_corpus(data.valid_source, data.valid_target, names, root, "data.valid")
        sources["valid"], valid = other.survey(), other.examples
        told = sources["valid"].digest
    else:
        require(survey.size > 1, "data.valid", "a file, for a single example", data.valid, DataError)
        held = _drawn(survey.size, data, config.seed)
        train, valid = _only(corpus, ~held), _only(corpus, held)
        told = f"{data.valid} {data.hold_out} seed {config.seed}"
    test = None
    if data.test_source is not None:
        test = _pair_corpus(data.test_source, data.test_target, (), root, "data.test")
        sources["test"] = test.survey()
    if tokenizers is None:
        tokenizers = _train_tokenizers(config.tokenizer, train, survey.tags)
    for tag in sorted({tag for one in sources.values() for tag in one.tags}):
        tokenizers.source.tag_id(tag)
    _keep(folder, {"pairs": survey.digest, "validation part": told} | _digests(tokenizers))
    encoder = _Encoder(tokenizers, config)
    report = [_vocabulary(tokenizers)]
    train_set = encoder.pairs("train", train(), report, config.seed, survey.left_out)
    valid_set, valid_examples = encoder.measured("valid", valid(), report, sources.get("valid"))
    test_examples = None
    if test is not None:
        test_examples = encoder.measured("test", test.examples(), report, sources["test"])[1]
    return Prepared(tokenizers, train_set, valid_set, valid_examples, test_examples, report)
