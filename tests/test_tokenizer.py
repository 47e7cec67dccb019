"""What holds for every tokenizer: text comes back exactly, and no text becomes a special token."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.errors import CheckpointError, DataError
from triglot.tokenizer import Tokenizer, Tokenizers, word_boundary

KINDS = ("byte", "char", "bpe")
TAGS = ("de", "cs-CZ")
TRAINED_ON = [
    "The quick brown fox, the lazy dog; the the the.\n" * 7,
    "<pad><pad><pad> <bos> <eos> <2de><2de> " * 31,
    "déjà vu — žluťoučký kůň 1984 19 84\r\n\t",
]
AWKWARD = [
    "",
    " ",
    "\r\n\r\n\n\r",
    "a\x00b\x1f\x7f\x85\u2028\u2029c",
    "<pad><bos><eos><2de><0x41><0x4",
    "e\u0301 \u0301 ﷽ 👩‍👩‍👧 \U0010ffff \ufffd \ufeff",
    "   two  \t three\n\n   ",
    "ⅷ²٣१ 123456789",
]
SENTENCES = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\r\t<>abPAD0x4"), st.sampled_from("éž中🙂\u0301"))
)
TOKENIZERS = {kind: Tokenizer.train(kind, TRAINED_ON, 311, TAGS) for kind in KINDS}  # type: ignore[arg-type]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=100)
@given(kind=st.sampled_from(KINDS), text=SENTENCES)
def test_any_text_comes_back_exactly_and_without_special_tokens(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 + len(TAGS) <= token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert tokenizer.decode([0, 1, *ids, 2, 3]) == text


@settings(deadline=None, max_examples=50)
@given(kind=st.sampled_from(KINDS), text=SENTENCES)
def test_a_stream_gives_the_text_in_whole_characters(kind, text):
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.stream()
    parts = [stream.push(token_id) for token_id in tokenizer.encode(text, bos=True, eos=True)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.flush() == text


@settings(deadline=None, max_examples=50)
@given(kind=st.sampled_from(KINDS), ids=st.lists(st.integers(0, 258)))
def test_a_stream_of_any_tokens_gives_what_decode_gives(kind, ids):
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


@settings(deadline=None, max_examples=50)
@given(kind=st.sampled_from(KINDS), texts=st.lists(SENTENCES, max_size=7))
def test_a_batch_is_its_texts_one_by_one(kind, texts):
    assert TOKENIZERS[kind].encode_batch(texts) == [TOKENIZERS[kind].encode(text) for text in texts]


@settings(deadline=None, max_examples=100)
@given(text=SENTENCES, more=SENTENCES)
def test_a_text_cut_at_a_word_boundary_has_the_ids_of_the_whole(text, more):
    text += " fox, the " + more
    cut = word_boundary(text)
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


def test_special_tokens_and_tags_come_first(tokenizer):
    assert (tokenizer.ids.start, tokenizer.ids.bos, tokenizer.ids.ends) == (1, 1, (2,))
    assert tokenizer.ids.banned == (0, 1, 3, 4)
    assert tokenizer.tags == TAGS
    assert [tokenizer.tag_id(tag) for tag in TAGS] == [3, 4]
    assert tokenizer.pieces(range(5)) == ["<pad>", "<bos>", "<eos>", "<2de>", "<2cs-CZ>"]


def test_an_unknown_tag_is_refused_with_the_known_ones(tokenizer):
    with pytest.raises(DataError, match=r"`tag` must be a known one \(de, cs-CZ\), but is 'fr' instead\."):
        tokenizer.tag_id("fr")


@pytest.mark.parametrize("tag", ["", " de", "a b", "<x>", "-", "é"])
def test_a_tag_that_text_could_be_taken_for_is_refused(tag):
    with pytest.raises(DataError, match="`tag` must be letters"):
        Tokenizer.train("byte", [], tags=[tag])


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_refused_by_name_and_place(kind):
    message = r"has the lone surrogate U\+D83D at character 2 instead"
    with pytest.raises(DataError, match=message):
        TOKENIZERS[kind].encode("ab\ud83d")
    with pytest.raises(DataError, match=message):
        TOKENIZERS[kind].encode_batch(["fine", "ab\ud83d"])
    if kind != "byte":
        with pytest.raises(DataError, match=message):
            Tokenizer.train(kind, iter(["fine", "ab\ud83d"]), 300)


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, token_id):
    with pytest.raises(DataError, match="`token id` must be between 0 and"):
        tokenizer.decode([token_id])


def test_pieces_are_readable():
    pieces = TOKENIZERS["byte"].pieces(TOKENIZERS["byte"].encode("a b\n\x00é"))
    assert pieces == ["a", "▁", "b", "\\n", "\\x00", "<0xC3>", "<0xA9>"]
    assert TOKENIZERS["char"].pieces(TOKENIZERS["char"].encode("é€")) == ["é", "<0xE2>", "<0x82>", "<0xAC>"]
    assert "▁the" in TOKENIZERS["bpe"].pieces(TOKENIZERS["bpe"].encode("in the sea"))


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert (loaded.kind, loaded.vocab_size, loaded.tags) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.tags)
    assert loaded.digest == tokenizer.digest
    for text in AWKWARD:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("text", ["  Hello, world: déjà <0x41> 1984\r\n", "\u2028 中🙂"])
def test_the_saved_file_means_the_same_to_the_library(tokenizer, tmp_path, text):
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert [token.content for token in theirs.get_added_tokens_decoder().values() if token.special] == [
        "<pad>", "<bos>", "<eos>", "<2de>", "<2cs-CZ>",
    ]  # fmt: skip


def test_bpe_has_the_size_that_is_asked_for_and_learns_the_frequent():
    tokenizer = Tokenizer.train("bpe", iter(["abcabc abcabc xyz"] * 29), 263)
    assert tokenizer.vocab_size == 263
    assert len(tokenizer.encode("abcabc")) < 6
    with pytest.raises(DataError, match="`vocab_size` must be at least 259"):
        Tokenizer.train("bpe", [""], 258)


def test_training_twice_gives_the_same_tokenizer():
    words = [f"w{a * b % 97}ord{a % 7} {b}ing" for a in range(97) for b in range(13)]
    assert Tokenizer.train("bpe", iter(words), 499).digest == Tokenizer.train("bpe", iter(words), 499).digest


@pytest.mark.parametrize("character", ["a", " ", "\n", "中", "<", "\u0301", "7"])
def test_a_megabyte_without_words_is_no_trouble(tokenizer, character):
    text = character * (1_000_000 // len(character.encode()))
    began = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - began < 5
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"model": {"type": "WordPiece"}}',
        b'{"model": {"type": "BPE"}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        Tokenizer.load(tmp_path / "absent.json")


def foreign(change) -> library.Tokenizer:
    values = json.loads(TOKENIZERS["bpe"]._backend.to_str())
    change(values)
    return values


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["added_tokens"].pop(0),
        lambda v: v["added_tokens"][3].update(content="<de>"),
        lambda v: v.update(normalizer={"type": "Lowercase"}),
        lambda v: v.update(pre_tokenizer={"type": "WhitespaceSplit"}),
        lambda v: v["model"]["vocab"].update({"あ": len(v["model"]["vocab"])}),
        lambda v: v["model"]["vocab"].pop("Ġ"),
    ],
)
def test_a_foreign_tokenizer_is_refused_with_its_path(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(foreign(change)), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_both_sides_come_back_from_a_folder(tmp_path):
    joint, separate = tmp_path / "joint", tmp_path / "separate"
    for folder in (joint, separate):
        folder.mkdir()
    Tokenizers(TOKENIZERS["bpe"], TOKENIZERS["bpe"]).save(joint)
    Tokenizers(TOKENIZERS["bpe"], TOKENIZERS["char"]).save(separate)
    assert Tokenizers.load(joint).joint
    assert Tokenizers.load(joint / "tokenizer.json").joint
    two = Tokenizers.load(separate)
    assert (two.joint, two.source.kind, two.target.kind) == (False, "bpe", "char")
    with pytest.raises(CheckpointError, match="`tokenizer` must be"):
        Tokenizers.load(tmp_path)


def test_a_source_is_framed_behind_its_tag():
    pair = Tokenizers(TOKENIZERS["char"], TOKENIZERS["char"])
    body = TOKENIZERS["char"].encode("dog")
    assert pair.encode_sources(["dog", "dog"], [None, "cs-CZ"]) == [[1, *body, 2], [4, 1, *body, 2]]


def child(queue) -> None:
    queue.put((os.environ["TOKENIZERS_PARALLELISM"], TOKENIZERS["bpe"].encode_batch(["the dog"] * 97)[-1]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_forked_process_can_encode():
    TOKENIZERS["bpe"].encode_batch(["the dog"] * 97)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get() == ("false", TOKENIZERS["bpe"].encode("the dog"))
    process.join()


def test_characters_of_a_real_text_have_an_id_each():
    folder = os.environ.get("TRIGLOT_DATA")
    if not folder:
        pytest.skip("TRIGLOT_DATA does not name the data folder")
    text = (Path(folder) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.train("char", [text])
    assert tokenizer.vocab_size == 3 + 256 + len(set(text))
    began = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - began < 5
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
