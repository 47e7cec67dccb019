"""Files line by line: order and empty lines kept, in chunks of any size, gzipped or not."""

import gzip
import io
from types import SimpleNamespace

import pytest

from triglot.errors import DataError
from triglot.generation.files import CHUNK, lines_of, pays, translate_lines, written
from triglot.generation.results import Hypothesis


class Upper:
    """Stands in for an engine, and remembers how much it was given at a time."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def translate(self, lines, *, first_line, nbest=1):
        self.calls.append((first_line, len(lines)))
        return [[Hypothesis(line.upper(), -float(rank), [], False, []) for rank in range(nbest)] for line in lines]


@pytest.fixture
def upper(monkeypatch):
    """The stand-in, past the check of types."""
    return Upper()


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
@pytest.mark.usefixtures("without_shape_checks")
def test_lines_keep_their_order_and_their_number_in_any_chunks(upper, chunk):
    lines = ["a", "", "b c", " ", "d"]
    assert "".join(written(translate_lines(upper, iter(lines), chunk=chunk))) == "A\n\nB C\n \nD\n"
    assert [first for first, _ in upper.calls] == list(range(1, 6, chunk or 5))


@pytest.mark.usefixtures("without_shape_checks")
def test_no_more_than_a_chunk_is_read_ahead(upper):
    read = []
    results = translate_lines(upper, (read.append(n) or str(n) for n in range(100)), chunk=7)
    next(results)
    assert len(read) == 7


@pytest.mark.usefixtures("without_shape_checks")
def test_n_best_lists_tell_line_and_score(upper):
    lines = list(written(translate_lines(upper, ["a", "b"], nbest=2), nbest=2))
    assert lines == ["1\t-0.0000\tA\n", "1\t-1.0000\tA\n", "2\t-0.0000\tB\n", "2\t-1.0000\tB\n"]


@pytest.mark.parametrize("enough", [1, 1025, 3072, 3073, 10**6])
@pytest.mark.usefixtures("without_shape_checks")
def test_lines_are_read_ahead_until_they_are_enough_work(translator, monkeypatch, enough):
    """Of a token each, by a model that is looked at as one of a parameter."""
    monkeypatch.setattr("triglot.generation.files.ENOUGH", 2 * enough)
    monkeypatch.setattr("triglot.generation.files.count_active_parameters", lambda _: 1)
    read, total = [], 3 * CHUNK
    found, lines = pays(translator, (read.append(n) or "a" for n in range(total)), beam=2)
    assert found == (enough <= total)
    assert len(read) == min(total, -(-enough // CHUNK) * CHUNK)
    assert list(lines) == ["a"] * total


def test_a_line_feed_in_a_translation_does_not_make_two_lines():
    one = Hypothesis("a\nb\r\nc\x85d", 0.0, [], False, [])
    assert list(written([[one], [one]])) == ["a b c d\n", "a b c d\n"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_files_and_standard_input_are_read_alike(tmp_path, monkeypatch, pack, source):
    raw = "eins\r\n\nzwei\u2028drei\nvier".encode()
    expected = ["eins", "", "zwei\u2028drei", "vier"]
    if source == "file":
        path = tmp_path / ("text.gz" if pack is gzip.compress else "text")
        path.write_bytes(pack(raw))
        assert list(lines_of(path)) == expected
    elif pack is bytes:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
        assert list(lines_of(None)) == expected


def test_text_that_is_no_utf8_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a\n\xff\n")))
    with pytest.raises(DataError, match="standard input, line 2"):
        list(lines_of(None))
