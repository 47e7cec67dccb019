"""What holds for reading: no character is lost or made up, and what is wrong is named by file and line."""

import codecs
import gzip
import sysconfig
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.data import corpus
from triglot.data.corpus import (
    Example,
    PairCorpus,
    TextCorpus,
    choose_characters,
    choose_documents,
    find_files,
    read_blocks,
    read_lines,
    stdlib_files,
)
from triglot.errors import DataError
from triglot.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("aé中🙂 \n\r\u2028\x0b\x85."), max_size=97)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@settings(deadline=None, max_examples=100)
@given(text=TEXTS, block=st.integers(1, 31))
def test_blocks_joined_are_the_file_with_its_line_ends_as_line_feeds(folder, text, block):
    path = write(folder / "text.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", block)
        assert "".join(read_blocks(path)) == with_line_feeds(text)


@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_only_a_newline_ends_a_line(folder, text):
    path = write(folder / "lines.txt", text)
    expected = [line.removesuffix("\r") for line in text.split("\n")]
    assert list(read_lines(path)) == (expected[:-1] if text.endswith("\n") or not text else expected)


def test_blocks_encode_to_the_ids_of_the_whole(tmp_path, monkeypatch):
    text = "To be, or not to be:\n  that is  the question — n'est-ce pas?\n\n" * 29
    tokenizer = Tokenizer.train("bpe", [text], 347)
    monkeypatch.setattr(corpus, "BLOCK", 53)
    blocks = list(read_blocks(write(tmp_path / "text.txt", text)))
    assert len(blocks) > 29
    assert list(chain.from_iterable(tokenizer.encode_batch(blocks))) == tokenizer.encode(text)


def test_a_text_without_words_is_still_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 53)
    blocks = list(read_blocks(write(tmp_path / "text.txt", "中" * 10_007)))
    assert "".join(blocks) == "中" * 10_007
    assert max(map(len, blocks)) < 53 * 7


@pytest.mark.parametrize("name", ["text.txt.gz", "text.txt"])
def test_gzip_is_known_by_its_content_or_its_name(tmp_path, name):
    path = write(tmp_path / name, gzip.compress("a\né".encode()))
    assert list(read_lines(path)) == ["a", "é"]
    assert "".join(read_blocks(path)) == "a\né"


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"x" * 997)[:-13], gzip.compress(b"abcdef")[:11] + b"zzzz"],
    ids=["no gzip", "cut", "spoiled"],  # the bytes have the time in them
)
@pytest.mark.parametrize("read", [read_lines, read_blocks])
def test_damaged_gzip_is_refused_by_name(tmp_path, content, read):
    with pytest.raises(DataError, match=r"bad\.gz: cannot be read"):
        list(read(write(tmp_path / "bad.gz", content)))


@pytest.mark.parametrize("read", [read_lines, read_blocks])
@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(("content", "line"), [(b"a\n\nb\xe9c\n", 3), (b"\xffa", 1), (b"a\nb\n\xe2\x82", 3)])
def test_what_is_no_utf8_is_refused_by_file_and_line(tmp_path, monkeypatch, read, block, content, line):
    monkeypatch.setattr(corpus, "BLOCK", block)
    with pytest.raises(DataError, match=rf"latin\.txt:{line}: the text must be UTF-8, but has the byte 0x"):
        list(read(write(tmp_path / "latin.txt", content)))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "text.txt", codecs.BOM_UTF8 + "a\ufeff\n".encode())
    assert "".join(read_blocks(path)) == "a\ufeff\n"
    assert list(read_lines(path)) == ["a\ufeff"]


def test_files_are_found_by_name_folder_and_glob_in_order_and_once(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden/x.txt", "a/b/c.txt", "a/.x.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "a/image.png", b"\x89PNG\0\0")
    write(tmp_path / "a/empty.txt", "")
    named = [
        path.relative_to(tmp_path).as_posix() for path in find_files(["b.txt", "a", "*/*.md", "**/*.txt"], tmp_path)
    ]
    assert named == ["b.txt", "a/b/c.txt", "a/z.md", "a/.hidden/x.txt", "a/.x.txt"]
    assert find_files([str(tmp_path / "*.txt")], Path("elsewhere")) == [tmp_path / "b.txt"]


@pytest.mark.parametrize("name", ["empty.txt", "absent.txt", "*.csv", "nothing"])
def test_what_holds_no_text_is_refused_by_name(tmp_path, name):
    write(tmp_path / "empty.txt", "")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        DataError, match=r"`data\.files` must be files with text \(below data.root\), but .*" + name.replace("*", r"\*")
    ):
        find_files([name], tmp_path)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_documents_joined_are_the_text(folder, texts):
    paths = [write(folder / f"{number}.txt", text) for number, text in enumerate(texts)]
    lines = [line.removesuffix("\r") for text in texts for line in text.split("\n")]
    whole, by_line, by_paragraph = (
        list(TextCorpus(paths, document).pieces()) for document in ("file", "line", "paragraph")
    )
    assert "".join(piece.text for piece in whole) == "".join(map(with_line_feeds, texts))
    assert [piece.text for piece in by_line] == [line for line in lines if line.strip()]
    assert "\n".join(piece.text for piece in by_paragraph) == "\n".join(piece.text for piece in by_line)
    for piece in by_line + by_paragraph:
        assert piece.begins
        assert piece.ends


def test_paragraphs_end_at_blank_lines_and_files(tmp_path):
    paths = [write(tmp_path / "1", "a\r\nb\r\n\r\n \t\nc"), write(tmp_path / "2", "\n\nd\u2028e\n")]
    assert [piece.text for piece in TextCorpus(paths, "paragraph").pieces()] == ["a\nb", "c", "d\u2028e"]


def test_a_long_document_comes_in_pieces_of_which_one_begins_and_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 13)
    paths = [write(tmp_path / "1", "to be or not " * 17), write(tmp_path / "2", "short")]
    pieces = list(TextCorpus(paths).pieces())
    assert len(pieces) > 5
    assert [piece.ends for piece in pieces[:-2]] == [False] * (len(pieces) - 2)
    assert pieces[-2].ends
    assert all(second.begins == first.ends for first, second in pairwise(pieces))


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), limit=st.integers(1, 97))
def test_no_more_bytes_are_read_than_asked_for(folder, texts, limit):
    paths = [write(folder / f"{number}.txt", text) for number, text in enumerate(texts)]
    pieces = list(TextCorpus(paths, max_bytes=limit).pieces())
    read, whole = "".join(piece.text for piece in pieces), "".join(map(with_line_feeds, texts))
    assert whole.startswith(read)
    assert len(read.encode()) <= limit
    assert len(read) == len(whole) or len(whole[: len(read) + 1].encode()) > limit
    assert not pieces or pieces[-1].ends


def test_a_survey_counts_and_sees_every_change(tmp_path):
    path = write(tmp_path / "text.txt", "a\n\nbé\n")
    survey = TextCorpus([path], "line").survey()
    assert (survey.size, survey.characters, survey.left_out) == (2, 3, Counter({"blank lines": 1}))
    digests = {survey.digest, TextCorpus([path]).survey().digest}
    for text in ("a\nbe\n", "ab\né\n", "a\nb\né"):
        digests.add(TextCorpus([write(path, text)], "line").survey().digest)
    assert len(digests) == 5
    assert TextCorpus([write(path, "a\n\nbé\n")], "line").survey().digest == survey.digest


def test_blank_files_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"blank\.txt has none"):
        TextCorpus([write(tmp_path / "blank.txt", "\n \n")], "line").survey()


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXTS.filter(bool), min_size=1, max_size=5), data=st.data(), block=st.integers(3, 31))
def test_the_parts_of_a_text_are_the_text(folder, texts, data, block):
    paths = [write(folder / f"{number}.txt", text) for number, text in enumerate(texts)]
    texts = list(map(with_line_feeds, texts))
    whole = "".join(texts)
    border = data.draw(st.integers(0, len(whole)))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", block)
        pieces = list(TextCorpus(paths).pieces())
    head, tail = choose_characters(pieces, 0, border), list(choose_characters(pieces, border, len(whole)))
    assert "".join(piece.text for piece in head) == whole[:border]
    assert "".join(piece.text for piece in tail) == whole[border:]
    ends = np.cumsum([len(text) for text in texts])
    assert sum(piece.ends for piece in tail) == (ends > border).sum()
    assert sum(piece.begins for piece in tail) == (ends[:-1] >= border).sum() + (border == 0)
    kept = "".join(piece.text for piece in choose_documents(pieces, chosen))
    assert kept == "".join(text for text, wanted in zip(texts, chosen, strict=True) if wanted)


def test_pairs_come_from_two_files_line_by_line(tmp_path):
    files = [write(tmp_path / "en", "a\u2028b\r\nc\n\ne"), write(tmp_path / "de", "A\nC\nD\n \n")]
    pairs, left_out = PairCorpus(files, separate=True), Counter()
    assert list(pairs.examples(left_out)) == [Example("a\u2028b", "A"), Example("c", "C")]
    assert left_out == {"empty on a side": 2}
    assert pairs.survey().size == 2


@pytest.mark.parametrize(("sources", "targets"), [(3, 7), (7, 3)])
def test_unequal_files_are_refused_with_both_counts(tmp_path, sources, targets):
    files = [write(tmp_path / "en", "a\n" * sources), write(tmp_path / "de", "b\n" * targets)]
    with pytest.raises(DataError, match=rf"en has {sources} and \S*de has {targets} instead"):
        PairCorpus(files, separate=True).survey()


def test_pairs_come_from_columns_with_tags(tmp_path):
    files = [write(tmp_path / "1.tsv", "a\tA\tde\r\n\nb\tB\tfr\n"), write(tmp_path / "2.tsv", "c\tC\tde\n\tD\tcs")]
    survey = PairCorpus(files, separate=False).survey()
    assert (survey.size, survey.tags, survey.left_out["empty on a side"]) == (3, ("de", "fr"), 2)
    assert next(PairCorpus(files, separate=False).examples()) == Example("a", "A", "de")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tA\nb\n", ":2: a line must have 2 columns like the first line, but has 1"),
        ("a\tA\nb\tB\tde\n", ":2: a line must have 2 columns like the first line, but has 3"),
        ("\na\n", ":2: a line must have 2 or 3 columns, but has 1"),
        ("a\tb\tc\td\n", ":1: a line must have 2 or 3 columns, but has 4"),
        ("a\tA\tde\nb\tB\t\n", ":2: the third column must be a target tag, but is empty"),
    ],
)
def test_wrong_columns_are_refused_by_file_and_line(tmp_path, content, message):
    with pytest.raises(DataError, match=r"bad\.tsv" + message):
        PairCorpus([write(tmp_path / "bad.tsv", content)], separate=False).survey()


def test_pairs_without_an_example_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"blank\.tsv have none"):
        PairCorpus([write(tmp_path / "blank.tsv", "\n\t\n\n")], separate=False).survey()


def test_the_standard_library_is_text_in_a_stable_order_without_tests():
    files = stdlib_files(200_000)
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in files]
    assert names == sorted(names)
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
    assert sum(path.stat().st_size for path in files) >= 200_000
    assert TextCorpus(files, max_bytes=200_000).survey().size == len(files)
