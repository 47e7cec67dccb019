"""What holds for prepared token streams: they are the text's ids, and are used again only for that text."""

import hashlib
import json

import numpy as np
import pytest

from triglot.data import shards
from triglot.data.corpus import Piece
from triglot.data.shards import read_manifest, token_shards, write_manifest
from triglot.errors import DataError
from triglot.tokenizer import Tokenizer

BYTES = Tokenizer.train("byte", [])
PARTS = {"train": [Piece("abc ", True, False), Piece("déf", False, True), Piece("", True, True)], "valid": []}


def expected(parts, tokenizer):
    return [
        token
        for piece in parts
        for token in [1] * piece.begins + tokenizer.encode(piece.text) + [2] * piece.ends
    ]  # fmt: skip


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_stream_is_the_ids_between_begin_and_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(shards, "BLOCK", block)
    streams = token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)
    assert streams["train"].tolist() == expected(PARTS["train"], BYTES)
    assert isinstance(streams["train"], np.memmap)
    assert streams["train"].dtype == np.uint16
    assert streams["valid"].tolist() == []
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "valid.bin", "manifest.json"}


def test_a_large_vocabulary_has_wider_tokens(tmp_path):
    tokenizer = Tokenizer.train(
        "char", ["".join(map(chr, range(0x4E00, 0x4E00 + 20_000))), "".join(map(chr, range(0x20000, 0x20000 + 47_000)))]
    )
    piece = Piece(chr(0x20000 + 46_999), True, True)
    streams = token_shards(tmp_path, {}, {"train": [piece]}, tokenizer)
    assert streams["train"].dtype == np.uint32
    assert streams["train"].tolist() == [1, tokenizer.vocab_size - 1, 2]


def test_what_was_made_from_the_same_is_used_again(tmp_path):
    token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)

    def unread():
        raise AssertionError("the text is not read again")
        yield

    again = token_shards(tmp_path, {"text": "1"}, {"train": unread(), "valid": unread()}, BYTES)
    assert again["train"].tolist() == expected(PARTS["train"], BYTES)


@pytest.mark.parametrize("made_from", [{"text": "2"}, {"text": "1", "tag": ""}, {}])
def test_what_was_made_from_something_else_is_refused(tmp_path, made_from):
    token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)
    with pytest.raises(DataError, match=r"made from, but its (tag|text) changed"):
        token_shards(tmp_path, made_from, PARTS, BYTES)


def test_an_interrupted_preparation_leaves_nothing_that_would_be_used(tmp_path):
    def interrupted():
        yield PARTS["train"][0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_shards(tmp_path, {"text": "1"}, {"train": interrupted()}, BYTES)
    assert list(tmp_path.iterdir()) == []
    assert token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)["train"].tolist() == expected(PARTS["train"], BYTES)


def test_any_byte_of_a_stream_that_changed_is_found_and_its_file_is_named(tmp_path):
    token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)
    path = tmp_path / "train.bin"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"damaged \(train\.bin is not what was written\); remove the folder"):
            token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)


def test_ids_that_the_tokenizer_does_not_have_are_refused_whoever_wrote_them(tmp_path):
    token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)
    path, manifest = tmp_path / "train.bin", read_manifest(tmp_path, {"text": "1"})
    np.full(manifest["tokens"]["train"], BYTES.vocab_size, "<u2").tofile(path)
    hashes = manifest["sha256"] | {"train": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_manifest(tmp_path, {"text": "1"}, {"tokens": manifest["tokens"], "sha256": hashes})
    with pytest.raises(DataError, match=rf"damaged \(train.bin has the id {BYTES.vocab_size}, and there are"):
        token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)


@pytest.mark.parametrize("damage", ["shorten", "remove", "garbage", "no counts", "no list"])
def test_damage_is_refused_by_the_folders_name(tmp_path, damage):
    token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)
    stream, manifest = tmp_path / "train.bin", tmp_path / "manifest.json"
    match damage:
        case "shorten":
            stream.write_bytes(stream.read_bytes()[:-2])
        case "remove":
            stream.unlink()
        case "garbage":
            manifest.write_bytes(b"\xff{")
        case "no counts":
            manifest.write_text(json.dumps({"made_from": {"text": "1"}}))
        case "no list":
            manifest.write_text("[]")
    with pytest.raises(DataError, match=f"{tmp_path.name}: the prepared data is damaged"):
        token_shards(tmp_path, {"text": "1"}, PARTS, BYTES)


def test_a_manifest_comes_back(tmp_path):
    assert read_manifest(tmp_path, {"pairs": "1"}) is None
    write_manifest(tmp_path / "new", {"pairs": "1"}, {"more": [3]})
    assert read_manifest(tmp_path / "new", {"pairs": "1"}) == {"made_from": {"pairs": "1"}, "more": [3]}
