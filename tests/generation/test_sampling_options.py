"""What `generate` and `stream` can be told: what each option does to a text, and what is refused before any work."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.errors import CheckpointError, ConfigError, DataError
from triglot.generation import texts as texts_module
from triglot.tokenizer import SpecialIds, Tokenizer

PROMPTS = ["", "To be", "ü", "a longer prompt, to be sure", "x"]
EOS = SpecialIds().eos


@pytest.fixture(scope="module")
def endless(make):
    """A writer that only a limit or a stop string ends."""
    engine = make("decoder_only")
    with torch.no_grad():
        engine.model.lm_head.bias[EOS] = -1e9
    return engine


def by_transformers(engine, prompt: str, limit: int, processors) -> list[int]:
    """Greedy tokens of the plain model, whose logits pass through transformers' own processors."""
    ids = engine.tokenizers.target.encode(prompt)
    made: list[int] = []
    while len(made) < limit and made[-1:] != [EOS]:
        logits = engine.model(torch.tensor([[*ids, *made]])).logits[:, -1]
        logits[:, :2] = -math.inf  # padding and begin
        for reads_prompt, processor in processors:
            logits = processor(torch.tensor([[*ids, *made] if reads_prompt else made], dtype=torch.long), logits)
        made.append(int(logits.argmax()))
    return made


@torch.no_grad()
def test_penalties_and_bans_are_those_of_transformers(writer):
    generation = pytest.importorskip("transformers.generation.logits_process")
    for prompt in PROMPTS[1:]:
        length = len(writer.tokenizers.target.encode(prompt))
        found = writer.generate(
            [prompt], temperature=0.0, max_new_tokens=9, repetition_penalty=1.9, min_new_tokens=5, no_repeat_ngram=2
        )
        least = generation.MinNewTokensLengthLogitsProcessor(length, 5, EOS)
        processors = [
            (True, generation.RepetitionPenaltyLogitsProcessor(1.9)),
            (True, least),
            (False, generation.NoRepeatNGramLogitsProcessor(2)),
        ]
        assert found[0].tokens == by_transformers(writer, prompt, 9, processors)


@pytest.mark.parametrize("past_context", ["error", "slide"])
def test_a_text_ends_before_the_first_stop_string_that_stands_in_it(endless, past_context):
    limit = 30 if past_context == "error" else 70
    how = {"past_context": past_context, "max_new_tokens": limit, "seed": 3}
    [whole] = endless.generate(["abc"], **how)
    assert (whole.ended, whole.stop) == ("limit", None)
    for at in (0, 5, len(whole.text) - 2):
        stop = whole.text[at : at + 2]
        [cut] = endless.generate(["abc"], stop=["\0never", stop], **how)
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.ended, cut.stop, cut.truncated) == ("stop", stop, False)
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        assert cut.log_probs == whole.log_probs[: len(cut.tokens)]
        assert writer_text(endless, "abc", stop=[stop], **how) == cut.text


def writer_text(engine, prompt: str, **options) -> str:
    pieces = list(engine.stream(prompt, **options))
    assert all(pieces)
    return "".join(pieces)


def test_texts_that_stop_leave_the_others_as_they_are(endless):
    how = {"max_new_tokens": 20, "seed": 5, "past_context": "slide"}
    whole = endless.generate(PROMPTS, **how)
    stop = whole[1].text[3:5]
    for one, cut in zip(whole, endless.generate(PROMPTS, stop=[stop], **how), strict=True):
        assert cut.text == one.text.partition(stop)[0]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 99),
    stop=st.lists(st.text("abct eo", min_size=1, max_size=2), max_size=3),
    slide=st.booleans(),
    penalty=st.floats(0.7, 1.5),
    count=st.integers(1, 60),
)
def test_a_stream_spells_what_is_generated(writer, seed, stop, slide, penalty, count):
    how = {
        "seed": seed, "stop": stop, "repetition_penalty": penalty, "max_new_tokens": count if slide else min(count, 35),
        "past_context": "slide" if slide else "error",
    }  # fmt: skip
    assert writer_text(writer, "t", **how) == writer.generate(["t"], **how)[0].text


def test_samples_of_a_prompt_stand_side_by_side_and_draw_from_seeds_of_their_own(writer):
    several = writer.generate(PROMPTS, n=3, seed=7)
    assert len(several) == 3 * len(PROMPTS)
    for number, one in enumerate(several):
        assert writer.generate([PROMPTS[number // 3]], seed=7 + number) == [one]
    assert several == writer.generate(PROMPTS, n=3, seed=list(range(7, 22)))
    assert len({one.text for one in several[3:6]}) > 1


def test_alternatives_are_the_likeliest_of_each_place(writer):
    for one in writer.generate(PROMPTS, temperature=0.0, top_logprobs=4):
        assert len(one.alternatives) == len(one.tokens)
        for token, log_prob, among in zip(one.tokens, one.log_probs, one.alternatives, strict=True):
            assert among[0] == (token, log_prob)
            values = [value for _, value in among]
            assert len(among) == 4
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1 + 1e-6
    assert writer.generate(["x"])[0].alternatives is None


def test_log_probs_are_those_of_the_model_and_do_not_depend_on_the_temperature(writer):
    """`score` knows no banned ids, whose share of the probability is here next to nothing."""
    for one in writer.generate(PROMPTS[1:], temperature=0.6, top_k=30, seed=2):
        assert one.log_prob == sum(one.log_probs)
    with torch.no_grad():
        [one] = writer.generate(["To be"], temperature=0.6, seed=2)
        ids = writer.tokenizers.target.encode("To be")
        logits = writer.model(torch.tensor([ids + one.tokens])).logits[0, len(ids) - 1 : -1]
        logits[:, :2] = -math.inf
        expected = logits.log_softmax(1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=1e-4)


def test_a_bias_makes_a_token_certain_or_impossible(writer):
    letter = writer.tokenizers.target.encode("q")[0]
    for one in writer.generate(PROMPTS, logit_bias={letter: 1e4}):
        assert set(one.text) <= {"q"}
        assert one.text
    for one in writer.generate(PROMPTS, logit_bias={EOS: -math.inf}, max_new_tokens=9):
        assert one.ended == "limit"
        assert len(one.tokens) == 9


def test_banned_words_never_come(writer):
    words = sorted({letter for one in writer.generate(PROMPTS, n=5) for letter in one.text if letter.isascii()})[:20]
    assert words
    for one in writer.generate(PROMPTS, n=5, banned_words=words):
        assert not set(words) & set(one.text)


def test_a_word_is_banned_after_a_space_too(make):
    tokenizer = Tokenizer.train("bpe", ["the cat and the dog " * 9], 290)
    engine = make("decoder_only", tokenizer=tokenizer)
    alone, after = tokenizer.encode_batch(["the", " the"])
    assert alone != after
    bias = {alone[0]: 1e3, after[0]: 1e3}
    assert "the" in engine.generate(["a"], logit_bias=bias)[0].text
    assert "the" not in engine.generate(["a"], logit_bias=bias, banned_words=["the"])[0].text


def test_tokens_that_came_are_penalised_by_how_often_they_did(endless):
    how = {"max_new_tokens": 30, "temperature": 0.0}
    [free], [once] = endless.generate(["ab"], **how), endless.generate(["ab"], presence_penalty=1e4, **how)
    assert len(set(once.tokens)) == 30 > len(set(free.tokens))
    [even] = endless.generate(["ab"], frequency_penalty=1e4, logit_bias={5: 1e7, 6: 1e7}, **how)
    assert even.tokens.count(5) == even.tokens.count(6) == 15


@pytest.mark.parametrize("past_context", ["error", "slide"])
def test_what_is_written_follows_its_form_past_the_context_too(writer, past_context):
    pytest.importorskip("llguidance")
    low, high = (3, 6) if past_context == "error" else (30, 40)
    how = {"past_context": past_context, "max_new_tokens": 2 * high + 1, "n": 2}
    prompts = ["", "x", "a prompt"]
    if past_context == "error":
        how["max_new_tokens"] = 20
    for one in writer.generate(prompts, regex=rf"(ab|cd){{{low},{high}}}", no_repeat_ngram=1, **how):
        assert one.ended == "end"
        assert re.fullmatch(rf"(ab|cd){{{low},{high}}}", one.text)
    for one in writer.generate(prompts, json_schema={"enum": ["rot", 3, None]}, **how):
        assert json.loads(one.text) in ("rot", 3, None)
    for one in writer.generate(prompts, grammar='start: "x" ("a" | "b")', **how):
        assert one.text in ("xa", "xb")


def test_a_form_that_a_ban_leaves_nothing_of_is_told(writer):
    pytest.importorskip("llguidance")
    told = "`the number of tokens that the rules leave the text after prompt 1` must be at least 1, but is 0 instead"
    with pytest.raises(ConfigError, match=told):
        writer.generate(["x"], regex="ab", banned_words=["b"])
    with pytest.raises(ConfigError, match=told.replace("prompt 1", "prompt 2")):
        writer.generate(["x" * 36, "y"], regex="ab", banned_words=["b"], n=2, past_context="slide", min_new_tokens=1)


def test_a_top_k_past_the_vocabulary_keeps_all(writer):
    assert writer.generate(PROMPTS, top_k=10**6) == writer.generate(PROMPTS)


def test_cuts_so_narrow_that_one_is_left_are_greedy(writer):
    greedy = [one.tokens for one in writer.generate(PROMPTS, temperature=0.0)]
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert [one.tokens for one in writer.generate(PROMPTS, **cut)] == greedy


def test_weights_that_are_no_numbers_are_told(make):
    engine = make("decoder_only")
    with torch.no_grad():
        engine.model.lm_head.weight[7] = math.nan
    with pytest.raises(CheckpointError, match="`logits` must be numbers, but is 'NaN' instead"):
        engine.generate(["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temprature": 1.0},
            "`the option` must be one of max_new_tokens, temperature, .*but is 'temprature'",
        ),
        ({"temperature": -1.0}, "`temperature` must be at least 0 and finite"),
        ({"temperature": math.nan}, "`temperature` must be at least 0 and finite"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1"),
        ({"min_p": 1.5}, "`min_p` must be between 0 and 1"),
        ({"typical_p": 0.0}, "`typical_p` must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0 and finite"),
        ({"presence_penalty": math.inf}, "`presence_penalty` must be finite"),
        ({"frequency_penalty": math.nan}, "`frequency_penalty` must be finite"),
        ({"logit_bias": {5: math.inf}}, "`logit_bias` must be of numbers below infinity"),
        ({"logit_bias": {259: 1.0}}, "`logit_bias` must be of ids between 0 and 258, but is 259"),
        ({"logit_bias": {-1: 1.0}}, "`logit_bias` must be of ids between 0 and 258, but is -1"),
        ({"banned_words": "abc"}, "`banned_words` must be a list of texts"),
        ({"banned_words": [""]}, "`banned_words` must be texts of at least one character"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"min_new_tokens": -1}, "`min_new_tokens` must be at least 0"),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, r"`min_new_tokens` must be at most max_new_tokens \(3\)"),
        ({"no_repeat_ngram": 0}, "`no_repeat_ngram` must be at least 1"),
        ({"stop": "x"}, "`stop` must be a list of texts"),
        ({"stop": [""]}, "`stop` must be texts of at least one character"),
        ({"regex": "a", "grammar": 'start: "a"'}, "`json_schema, regex and grammar` must be one at most"),
        ({"n": 0}, "`n` must be at least 1"),
        ({"seed": [1, 2]}, "`seed` must be one number, or one for each of 1 texts, but is 2"),
        ({"top_logprobs": -1}, "`top_logprobs` must be at least 0"),
        ({"max_new_tokens": 37}, "`max_new_tokens` must be at most 36"),
    ],
)
def test_what_can_not_be_is_refused_before_work_starts(writer, monkeypatch, options, message):
    monkeypatch.setattr(texts_module, "write", None)
    for call in (lambda: writer.generate(["x"], **options), lambda: writer.stream("x", **options)):
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_stream_is_one_text(writer):
    with pytest.raises(ConfigError, match="`n` must be 1 in a stream, but is 2"):
        writer.stream("x", n=2)
    with pytest.raises(ConfigError, match="`top_logprobs` must be 0 in a stream of text"):
        writer.stream("x", top_logprobs=1)


def test_texts_are_scored_by_the_engine(writer):
    scored = writer.score(["ab", "", "c"], ["x", "y", ""])
    assert [len(one.tokens) for one in scored] == [2, 0, 1]
    assert scored[0] == writer.score(["ab"], ["x"])[0]
    assert writer.score(["c"])[0] == scored[2]
    with pytest.raises(DataError, match="`text 8` must be at most 37"):
        writer.score(["a", "b" * 99], first=7)


def test_a_file_is_scored_by_the_engine(writer, tmp_path):
    (tmp_path / "text").write_text("to be or not", encoding="utf-8")
    found = writer.score_file(tmp_path / "text", context=30)
    assert found.tokens == found.bytes == 12
    assert found.nats == pytest.approx(-writer.score(["to be or not"])[0].log_prob, rel=1e-5)
