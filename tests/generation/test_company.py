"""A request alone and in any mix, order and batch: the same tokens and the same log-probabilities, bit for bit."""

from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import needs_compiler
from triglot.generation import ready
from triglot.generation.sentences import search_all

letters = st.sampled_from("abcde .ü€")
prompts = st.text(letters, max_size=50)
OPTIONS = {
    "post": {},
    "pre": {"norm_order": "pre"},
    "rotary": {"norm_order": "pre", "norm": "rms", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 1},
    "experts": {"norm_order": "pre", "experts": {"num_experts": 5, "top_k": 2, "router": "sigmoid", "shared": 1}},
}
ENGINES = [("pre", "fp32"), ("rotary", "int8"), ("experts", "fp32"), ("pre", "bf16")]
WIDE = [("pre", "bf16"), ("rotary", "int8")]
"""Writers of which all kernels have a share."""
BY_KERNELS = [("post", "bf16"), ("post", "int8"), ("pre", "bf16"), ("rotary", "fp32"), ("experts", "bf16")]

samplings = st.fixed_dictionaries(
    {"past_context": st.just("slide"), "max_new_tokens": st.integers(1, 60)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(1, 300),
        "top_p": st.floats(0.1, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "typical_p": st.floats(0.1, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-1.0, 1.0),
        "frequency_penalty": st.floats(-1.0, 1.0),
        "logit_bias": st.dictionaries(st.integers(0, 258), st.floats(-5, 5), max_size=4),
        "banned_words": st.lists(st.text(letters, min_size=1, max_size=2), max_size=3),
        "min_new_tokens": st.just(1),
        "no_repeat_ngram": st.integers(1, 4),
        "stop": st.lists(st.text(min_size=1, max_size=2), max_size=3),
        "top_logprobs": st.integers(0, 3),
    },
)
searches = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(5, 30)},
    optional={
        "beam": st.integers(3, 5),
        "nbest": st.integers(1, 3),
        "length_penalty": st.floats(0.0, 2.0),
        "lengths": st.sampled_from(["power", "gnmt"]),
        "patience": st.sampled_from([0.5, 1.0, 2.0, float("inf")]),
        "banned_words": st.lists(st.text(letters, min_size=1, max_size=2), max_size=3),
        "min_new_tokens": st.integers(0, 2),
        "no_repeat_ngram": st.integers(1, 4),
    },
)
forms = st.sampled_from([{}, {}, {"regex": "[a-e]{3,70}"}, {"regex": "(ab|cd|e.)*"}])


@pytest.fixture(
    scope="module",
    params=[(*one, 20) for one in ENGINES] + [(*one, 32) for one in WIDE],
    ids=lambda one: "-".join(map(str, one)),
)
def writer(make, request):
    options, precision, width = request.param
    return make("decoder_only", options=OPTIONS[options], precision=precision, d_model=width, d_ff=width)


@pytest.fixture(
    scope="module",
    params=[(*one, False) for one in ENGINES]
    + [pytest.param((*one, True), marks=needs_compiler) for one in BY_KERNELS],
    ids=lambda one: "-".join(one[:2]) + "-by-kernels" * one[2],
)
def translator(make, request):
    options, precision, compiled = request.param
    return make(
        "encoder_decoder",
        options=OPTIONS[options],
        precision=precision,
        compiled=compiled,
        d_model=32 if compiled else 20,
    )


def mixed_texts(engine, data):
    """Every text of a mix is what its request becomes alone."""
    options = data.draw(samplings) | data.draw(forms)
    if "regex" in options:  # or a ban may leave nothing that matches
        options.pop("banned_words", None)
    asked = data.draw(st.lists(st.tuples(prompts, st.integers(0, 99)), min_size=1, max_size=9))
    together = engine.generate([one for one, _ in asked], seed=[seed for _, seed in asked], **options)
    for (prompt, seed), result in zip(asked, together, strict=True):
        assert engine.generate([prompt], seed=seed, **options) == [result]
    order = data.draw(st.permutations(range(len(asked))))
    again = engine.generate([asked[at][0] for at in order], seed=[asked[at][1] for at in order], **options)
    assert again == [together[at] for at in order]


def mixed_lines(engine, data):
    """Every translation of a mix is what its line becomes alone."""
    options = data.draw(searches)
    line, prefix = st.text(letters, max_size=11), st.sampled_from(["", "a", "ü"])
    asked = data.draw(st.lists(st.tuples(line, prefix), min_size=1, max_size=9))
    lines, begun = [list(side) for side in zip(*asked, strict=True)]
    options["banned_words"] = [one for one in options.get("banned_words", []) if one not in "aü"]
    together = engine.translate(lines, prefixes=begun, **options)
    for (line, prefix), result in zip(asked, together, strict=True):
        given = [prefix] if prefix or data.draw(st.booleans()) else None
        assert engine.translate([line], prefixes=given, **options) == [result]
    order = data.draw(st.permutations(range(len(asked))))
    again = engine.translate([lines[at] for at in order], prefixes=[begun[at] for at in order], **options)
    assert again == [together[at] for at in order]


few = settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
many = settings(few, max_examples=500)  # thousands of requests, some at a time


@few
@given(data=st.data())
def test_a_text_is_the_same_in_any_company(writer, data):
    pytest.importorskip("llguidance")
    mixed_texts(writer, data)


@few
@given(data=st.data())
def test_a_translation_is_the_same_in_any_company(translator, data):
    mixed_lines(translator, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@many
@given(data=st.data())
def test_a_text_is_the_same_in_any_company_of_thousands(writer, data):
    pytest.importorskip("llguidance")
    mixed_texts(writer, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@many
@given(data=st.data())
def test_a_translation_is_the_same_in_any_company_of_thousands(translator, data):
    mixed_lines(translator, data)


def test_the_model_as_it_is_finds_what_the_prepared_one_finds(make, monkeypatch):
    """As on a GPU: in batches, with the rules of each request, past the context and from one prompt several times."""
    writer, translator = make("decoder_only"), make("encoder_decoder")
    plain_writer, plain_translator = make("decoder_only"), make("encoder_decoder")
    for engine in (plain_writer, plain_translator):  # in another type the model is not prepared
        engine.model.double()
        engine._ready = ready.Ready(engine.model, engine.config, engine.tokenizers)
        assert engine._ready.prepared is None
    plain_translator._find = partial(search_all, plain_translator._ready)
    monkeypatch.setattr(ready, "BATCH_TOKENS", 150)
    lines, prefixes = ["one two", "a", "", "drei vier fünf", "b"], ["", "x", "", "yz", "c"]
    how = {"prefixes": prefixes, "no_repeat_ngram": 2, "min_new_tokens": 4, "nbest": 3, "banned_words": ["e"]}
    for row, other in zip(translator.translate(lines, **how), plain_translator.translate(lines, **how), strict=True):
        assert [one.tokens for one in row] == [one.tokens for one in other]
        assert [one.score for one in row] == pytest.approx([one.score for one in other], abs=1e-4)
    how = {"n": 2, "past_context": "slide", "max_new_tokens": 50, "repetition_penalty": 1.3, "min_new_tokens": 40}
    for one, other in zip(writer.generate(lines, **how), plain_writer.generate(lines, **how), strict=True):
        assert one.tokens == other.tokens
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)
