"""What a call is given is read once, whatever it is; what is of another type is refused in words before any work."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import triglot
from triglot import checkpoint
from triglot.errors import ConfigError, TriglotError
from triglot.models.factory import build_model
from triglot.typed import typed, words

LINES = ["one two", "", "drei"]


@pytest.mark.parametrize("taken", [list, tuple, iter, np.array, lambda texts: (text for text in texts)])
def test_any_iterable_of_texts_is_read_once(writer, translator, taken):
    assert writer.generate(taken(LINES)) == writer.generate(LINES)
    assert writer.score(taken(LINES), taken(LINES)) == writer.score(LINES, LINES)
    assert translator.translate(taken(LINES), prefixes=taken(LINES)) == translator.translate(LINES, prefixes=LINES)
    assert translator.translate(taken(LINES), tags=iter([None] * 3)) == translator.translate(LINES)
    assert translator.score(taken(LINES), taken(LINES)) == translator.score(LINES, LINES)


@pytest.fixture(scope="module")
def runs(writer, translator, tmp_path_factory) -> dict[str, Path]:
    runs = {}
    for name, engine in {"writer": writer, "translator": translator}.items():
        runs[name] = tmp_path_factory.mktemp(name)
        engine.tokenizers.save(runs[name])
        model, progress = build_model(engine.config.model), checkpoint.Progress(step=1)
        checkpoint.save_checkpoint(runs[name], "step-00000001", engine.config, model, progress)
    return runs


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, t: t.translate(None), "`lines` must be a list of texts, but is None"),
        (lambda w, t: t.translate("abc"), "`lines` must be a list of texts, but is 'abc'"),
        (lambda w, t: t.translate({"a": 1}), "`lines` must be a list of texts, but is {'a': 1}"),
        (lambda w, t: t.translate({"a"}), "`lines` must be a list of texts, but is {'a'}"),
        (lambda w, t: t.translate(["a", None]), r"`lines\[1\]` must be a text, but is None"),
        (lambda w, t: t.translate(iter(["a", b"b"])), r"`lines\[1\]` must be a text, but is b'b'"),
        (lambda w, t: t.translate(["a"], tags=5), "`tags` must be a text, a list of texts or None, but is 5"),
        (lambda w, t: t.translate(["a"], tags=[5]), r"`tags\[0\]` must be a text or None, but is 5"),
        (lambda w, t: t.translate(["a"], prefixes="a"), "`prefixes` must be a list of texts or None, but is 'a'"),
        (lambda w, t: t.translate(["a"], first_line="1"), "`first_line` must be a whole number, but is '1'"),
        (lambda w, t: t.translate(["a"], beam="2"), "`beam` must be a whole number or None, but is '2'"),
        (lambda w, t: t.translate(["a"], too_long=5), "`too_long` must be error or cut, but is 5"),
        (lambda w, t: t.translate(["a"], lengths=["power"]), r"`lengths` must be power or gnmt, but is \['power'\]"),
        (lambda w, t: t.translate(["a"], length_penalty=math.inf), "`length_penalty` must be at least 0 and finite"),
        (lambda w, t: t.translate(["a"], patience=math.nan), "`patience` must be above 0, or inf, but is nan"),
        (lambda w, t: t.translate(["a"], banned_words=[1]), r"`banned_words\[0\]` must be a text, but is 1"),
        (lambda w, t: t.alternatives(None), "`line` must be a text, but is None"),
        (lambda w, t: t.alternatives("a", None), "`prefix` must be a text, but is None"),
        (lambda w, t: t.alternatives("a", count="3"), "`count` must be a whole number, but is '3'"),
        (lambda w, t: t.alternatives("a", tag=["de"]), r"`tag` must be a text or None, but is \['de'\]"),
        (lambda w, t: w.generate("abc"), "`prompts` must be a list of texts or lists of dicts, but is 'abc'"),
        (lambda w, t: w.generate([5]), r"`prompts\[0\]` must be a text or a list of dicts, but is 5"),
        (lambda w, t: w.generate({"role": "user"}), "`prompts` must be a list of texts or lists of dicts, but is {"),
        (lambda w, t: w.generate([["Hello!"]]), r"`prompts\[0\]\[0\]` must be a dict, but is 'Hello!'"),
        (lambda w, t: w.stream(None), "`prompt` must be a text or a list of dicts, but is None"),
        (lambda w, t: w.generate(["a"], stop=[1]), r"`stop\[0\]` must be a text, but is 1"),
        (lambda w, t: w.generate(["a"], stop=5), "`stop` must be a list of texts, but is 5"),
        (lambda w, t: w.generate(["a"], stop=None), "`stop` must be a list of texts, but is None"),
        (lambda w, t: w.generate(["a"], banned_words="ab"), "`banned_words` must be a list of texts, but is 'ab'"),
        (lambda w, t: w.generate(["a"], logit_bias=[1]), "`logit_bias` must be a dict from whole numbers to numbers"),
        (lambda w, t: w.generate(["a"], logit_bias={"a": 1}), "`a key of logit_bias` must be a whole number, but is"),
        (lambda w, t: w.generate(["a"], logit_bias={5: "a"}), r"`logit_bias\[5\]` must be a number, but is 'a'"),
        (lambda w, t: w.generate(["a"], json_schema=5), "`json_schema` must be a dict, a text or None, but is 5"),
        (lambda w, t: w.generate(["a"], regex=5), "`regex` must be a text or None, but is 5"),
        (lambda w, t: w.generate(["a"], seed=True), "`seed` must be a whole number or a list of whole numbers"),
        (lambda w, t: w.generate(["a"], seed=[1.5]), r"`seed\[0\]` must be a whole number, but is 1.5"),
        (lambda w, t: w.generate(["a"], past_context="cut"), "`past_context` must be error or slide, but is 'cut'"),
        (lambda w, t: w.generate(["a"], n="2"), "`n` must be a whole number, but is '2'"),
        (lambda w, t: w.generate(["a"], temperature="1"), "`temperature` must be a number, but is '1'"),
        (lambda w, t: t.score(["a"]), r"`the number of lists to score` must be 2 \(sources and targets\), but is 1"),
        (lambda w, t: w.score(), r"`the number of lists to score` must be 1 or 2 \(texts, and their prompts\)"),
        (lambda w, t: t.score(["a"], 5), "`targets` must be a list of texts, but is 5"),
        (lambda w, t: t.score(["a"], ["b"], end=True), "`the option` must be one of tags, too_long, first, but is"),
        (lambda w, t: t.score(["a"], ["b"], too_long="x"), "`too_long` must be error or cut, but is 'x'"),
        (lambda w, t: w.score(["a"], tags="de"), "`the option` must be one of end, past_context, first, but"),
        (lambda w, t: w.score(["a"], past_context="slide"), "`past_context` must be error or windows, but is 'slide'"),
        (lambda w, t: w.score(["a"], [None]), r"`prompts\[0\]` must be a text, but is None"),
        (lambda w, t: w.score_file(5), "`path` must be a text or a path, but is 5"),
        (lambda w, t: w.score_file("a", context="5"), "`context` must be a whole number or None, but is '5'"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused_in_words(writer, translator, call, message):
    with pytest.raises(TriglotError, match=f"^{message}.* instead"):
        call(writer, translator)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("translator", {"which": 5}, "`which` must be a text, but is 5"),
        ("translator", {"workers": "2"}, "`workers` must be a whole number or None, but is '2'"),
        ("translator", {"device": "foo"}, "`device` must be one that is here, but is 'foo'"),
        ("translator", {"device": 5}, "`device` must be a text, a torch.device or None, but is 5"),
        ("translator", {"dtype": "fp16"}, "`dtype` must be a torch.dtype or None, but is 'fp16'"),
        ("translator", {"draft": "a"}, "`draft` must be left out for a run that translates, but is 'a'"),
        ("writer", {"draft": 5}, "`draft` must be a text, a path or None, but is 5"),
        ("writer", {"workers": 2}, "`the model of the run` must be one that translates, for `workers` to share in"),
    ],
)
def test_what_a_run_can_not_be_loaded_with_is_refused(runs, kind, options, message):
    with pytest.raises(ConfigError, match=f"^{message}.* instead"):
        triglot.load(runs[kind], **options)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_run_is_named_by_a_path():
    with pytest.raises(ConfigError, match="`run` must be a text or a path, but is 5 instead"):
        triglot.load(5)


@pytest.mark.usefixtures("without_shape_checks")
def test_numpys_numbers_are_numbers(writer):
    how = {"seed": np.int64(3), "temperature": np.float32(0.5), "top_k": np.int32(9)}
    assert writer.generate(["a"], **how) == writer.generate(["a"], seed=3, temperature=0.5, top_k=9)


def test_types_are_called_by_words():
    assert words(int | str | None) == "a whole number, a text or None"
    assert words(Literal["a", "b", "c"]) == "one of a, b, c"
    assert words(Sequence[Sequence[float]]) == "a list of lists of numbers"
    assert words(Mapping[str, Any] | None) == "a dict or None"
    assert words(tuple[int, int] | Path) == "a tuple or a path"


def test_what_a_call_returns_and_is_called_stays():
    @typed
    def call(first: int, /, *others: Any, named: Sequence[int] = (), **rest: Any) -> Any:
        """Say what came."""
        return first, others, named, rest

    assert call(1, 2, named=iter([3]), other=4) == (1, (2,), [3], {"other": 4})
    assert (call.__name__, call.__doc__) == ("call", "Say what came.")
