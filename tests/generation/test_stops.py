"""A text that ends at a stop string is the cut whole text, whatever its tokens are, and never takes a piece back."""

from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from triglot.errors import ConfigError
from triglot.generation.stops import StoppingStream
from triglot.tokenizer import Tokenizer

BYTES = Tokenizer.train("byte", [])
CORPUS = ["aab abab abba baab 🙂🙃a b🙂 <|end|> <|user|> a€b " * 3]
TOKENIZERS = [BYTES, Tokenizer.train("char", CORPUS), Tokenizer.train("bpe", CORPUS, 290)]

letters = st.sampled_from("aab🙂🙃€<| \N{REPLACEMENT CHARACTER}")
texts = st.text(letters, max_size=25)
stop_lists = st.lists(st.text(letters, min_size=1, max_size=4), max_size=4)
tokenizers = st.sampled_from(TOKENIZERS)


class Cut(NamedTuple):
    text: str
    stop: str | None


def cut(text: str, stops: list[str]) -> Cut:
    """The rule, on the whole text: the first prefix of it that ends with a stop string, without the longest such."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return Cut(text[: end - len(stop)], stop)
    return Cut(text, None)


def pieces(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[list[str], StoppingStream]:
    stream = StoppingStream(tokenizer, stops)
    return [*map(stream.push, ids), stream.flush()], stream


@given(tokenizer=tokenizers, text=texts, stops=stop_lists)
@example(BYTES, "aaab", ["aab"])
@example(BYTES, "abab🙂", ["abb", "b🙂"])
def test_pieces_are_the_cut_text(tokenizer, text, stops):
    given_out, stream = pieces(tokenizer, tokenizer.encode(text), stops)
    assert Cut("".join(given_out), stream.stop) == cut(text, stops)
    assert stream.finished == (stream.stop is not None)


@given(text=texts, stops=stop_lists, data=st.data())
def test_other_tokens_of_the_same_bytes_give_the_same_text(text, stops, data):
    tokenizer = TOKENIZERS[2]
    by_bytes = {tokenizer.token_bytes(token): token for token in range(3, tokenizer.vocab_size)}
    rest, ids = text.encode(), []
    while rest:
        fitting = [piece for piece in by_bytes if rest.startswith(piece)]
        piece = data.draw(st.sampled_from(fitting))
        ids.append(by_bytes[piece])
        rest = rest[len(piece) :]
    given_out, stream = pieces(tokenizer, ids, stops)
    assert Cut("".join(given_out), stream.stop) == cut(text, stops)


@given(ids=st.lists(st.integers(0, 258), max_size=25), stops=stop_lists)
def test_bytes_that_are_no_text_are_cut_as_their_decoded_text(ids, stops):
    given_out, stream = pieces(BYTES, ids, stops)
    assert Cut("".join(given_out), stream.stop) == cut(BYTES.decode(ids), stops)


@given(tokenizer=tokenizers, text=texts, stops=stop_lists)
def test_what_was_given_out_stands_in_the_text_at_every_moment(tokenizer, text, stops):
    """Nothing is taken back, however the text goes on; and no more is held back than may be part of a stop string."""
    stream, shown, ids = StoppingStream(tokenizer, stops), "", tokenizer.encode(text)
    for number, token in enumerate(ids, 1):
        shown += stream.push(token)
        read = b"".join(map(tokenizer.token_bytes, ids[:number])).decode("utf-8", "ignore")
        for ending in ("", *stops):
            assert cut(read + ending, stops).text.startswith(shown)
        if not stream.finished:
            held = read.removeprefix(shown)
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(tokenizer=tokenizers, ids=st.lists(st.integers(0, 258), max_size=25))
def test_without_stop_strings_it_is_the_tokenizers_stream(tokenizer, ids):
    plain = tokenizer.stream()
    assert pieces(tokenizer, ids, [])[0] == [*map(plain.push, ids), plain.flush()]


def test_nothing_follows_a_stop_string():
    stream = StoppingStream(BYTES, ["🙂"])
    given_out = [stream.push(token) for token in BYTES.encode("a🙂b🙃")]
    assert given_out == ["a", *[""] * (len(given_out) - 1)]
    assert stream.flush() == ""
    assert stream.stop == "🙂"


def test_a_text_that_ends_within_a_stop_string_is_given_out_whole():
    given_out, stream = pieces(BYTES, BYTES.encode("ab<|en"), ["<|end|>"])
    assert given_out == ["a", "b", "", "", "", "", "<|en"]
    assert not stream.finished


def test_stop_strings_are_a_list_of_texts_that_are_not_empty():
    with pytest.raises(ConfigError, match=r"`stops` must be texts of at least one character, but is \['a', ''\] inste"):
        StoppingStream(BYTES, ["a", ""])
    with pytest.raises(ConfigError, match=r"`stops` must be a list of texts, but is 'ab' instead\."):
        StoppingStream(BYTES, "ab")
