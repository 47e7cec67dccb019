"""Text in, text out: what a text becomes does not depend on its company, and is the same in pieces as in one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triglot
from triglot import checkpoint
from triglot.decoding.search import Token
from triglot.errors import ConfigError, DataError
from triglot.generation import ready
from triglot.generation import texts as texts_module
from triglot.generation.engine import Engine
from triglot.generation.scoring import prompt_ids
from triglot.generation.sentences import TextWasCut
from triglot.models.factory import build_model

WINDOW = 37
LINES = ["one two three", "", "a", "ein längerer Satz, mit Komma", "   ", "zwei", "drei vier"]


def texts(results):
    return [[(one.text, one.tokens, one.truncated) for one in row] for row in results]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("budget", [250, 10**6])
def test_a_line_becomes_the_same_alone_and_in_any_batch(translator, beam, budget, monkeypatch):
    monkeypatch.setattr(ready, "BATCH_TOKENS", budget)
    together = translator.translate(LINES, beam=beam, nbest=beam)
    alone = [translator.translate([line], beam=beam, nbest=beam)[0] for line in LINES]
    assert texts(together) == texts(alone)
    assert len({one.text for row in together for one in row}) > 3
    assert together == alone


def test_order_is_kept(translator):
    there, back = translator.translate(LINES), translator.translate(LINES[::-1])
    assert texts(there) == texts(back[::-1])


def test_empty_lines_stay_empty(translator):
    results = translator.translate(LINES, nbest=2)
    for line, row in zip(LINES, results, strict=True):
        assert (row[0].text == "" and row[0].tokens == []) == (not line.strip())
    assert translator.translate([]) == []
    assert translator.translate([""])[0][0].text == ""


def test_hypotheses_come_best_first_with_the_score_of_their_tokens(translator):
    for alpha in (0.0, 1.0):
        for row in translator.translate(LINES, beam=5, nbest=5, length_penalty=alpha):
            scores = [one.score for one in row if not one.truncated]
            assert scores == sorted(scores, reverse=True)


def test_a_translation_is_as_long_as_it_may_be_and_says_so(translator):
    for row in translator.translate(LINES, beam=2, max_new_tokens=3):
        assert len(row[0].tokens) <= 3
        assert row[0].truncated == (row[0].tokens[-1:] != [2] and bool(row[0].tokens))


def test_a_line_too_long_is_named(translator):
    with pytest.raises(DataError, match=r"`line 12` must be at most 37 tokens long .* but is 42 instead"):
        translator.translate(["a", "b" * 40], first_line=11)


def test_target_tags_change_the_source_and_must_be_known(make):
    engine = make("encoder_decoder", ("de", "fr"))
    german, french = engine.translate(["abc"], tags="de"), engine.translate(["abc"], tags="fr")
    assert german[0][0].score != french[0][0].score
    assert texts(engine.translate(["abc", "abc"], tags=["de", "fr"])) == texts(german + french)
    assert not {0, 1, 3, 4} & {token for row in german + french for token in row[0].tokens}
    with pytest.raises(
        DataError,
        match="`the target tag` must be one of de, fr, since .* tags, but is None",
    ):
        engine.translate(["abc"])
    with pytest.raises(DataError, match="`tag` must be a known one"):
        engine.translate(["abc"], tags="cs")


PROMPTS = ["", "To be", "ü", "a longer prompt, to be sure", "x"]


@pytest.mark.parametrize("past_context", ["error", "slide"])
@pytest.mark.parametrize("budget", [60, 10**6])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_prompt_is_continued_the_same_alone_and_in_any_batch(writer, past_context, budget, temperature, monkeypatch):
    options = {"temperature": temperature, "past_context": past_context}
    monkeypatch.setattr(ready, "BATCH_TOKENS", budget)
    together = writer.generate(PROMPTS, seed=5, **options)
    alone = [writer.generate([prompt], seed=5 + row, **options)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone


@settings(deadline=None, max_examples=15)
@given(prompt=st.text(max_size=5), seed=st.integers(0, 999), past_context=st.sampled_from(["error", "slide"]))
def test_a_stream_spells_the_batch(writer, prompt, seed, past_context):
    options = {"seed": seed, "past_context": past_context, "temperature": 1.2, "top_p": 0.95}
    pieces = list(writer.stream(prompt, **options))
    assert "".join(pieces) == writer.generate([prompt], **options)[0].text
    assert all(pieces)


def test_a_stream_never_gives_half_a_character(writer, monkeypatch):
    ids = writer.tokenizers.target.encode("a€ü")
    tokens = [Token(0, token, 0.0) for token in ids]
    monkeypatch.setattr(texts_module, "stream", lambda *_, **__: iter(tokens))
    assert list(writer.stream("x", max_new_tokens=len(ids))) == ["a", "€", "ü"]
    monkeypatch.setattr(texts_module, "stream", lambda *_, **__: iter(tokens[:3]))
    assert list(writer.stream("x", max_new_tokens=3)) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_greedy_is_what_the_model_itself_generates(writer):
    for prompt in PROMPTS[1:]:
        ids = writer.tokenizers.target.encode(prompt)
        expected = writer.model.generate(torch.tensor([ids]), 7, temperature=0.0, eos_id=2)[0, len(ids) :].tolist()
        assert writer.generate([prompt], temperature=0.0, max_new_tokens=7)[0].tokens == expected


def test_sliding_goes_on_from_the_last_half_of_the_context(writer, make):
    monotone = make("decoder_only")
    with torch.no_grad():
        monotone.model.lm_head.bias[2] = -1e9  # never ends
    [result] = monotone.generate(["abc"], temperature=0.0, max_new_tokens=61, past_context="slide")
    ids = monotone.tokenizers.target.encode("abc")
    context, made = list(ids), []
    while len(made) < 61:
        context = context if len(context) < WINDOW else context[-(WINDOW // 2) :]
        room = min(WINDOW - len(context), 61 - len(made))
        context = monotone.model.generate(torch.tensor([context]), room, temperature=0.0)[0].tolist()
        made += context[-room:]
    assert result.tokens == made
    assert result.truncated


def test_a_prompt_longer_than_the_context_slides_too(writer):
    short, long = "b" * (WINDOW // 2), "a" * 99 + "b" * (WINDOW // 2)
    one, other = writer.generate([short, long], temperature=0.0, max_new_tokens=9, past_context="slide")
    assert one.tokens == other.tokens


def test_what_does_not_fit_is_refused_before_work_starts(writer, monkeypatch):
    monkeypatch.setattr(texts_module, "write", None)
    with pytest.raises(ConfigError, match=r"`max_new_tokens` must be at most 32 after the 5 tokens of prompt 2"):
        writer.generate(["x", "abcde"], max_new_tokens=33)
    with pytest.raises(ConfigError, match=r"`prompt 1` must be at most 36 tokens long"):
        writer.stream("x" * 37)
    with pytest.raises(ConfigError, match="`top_k` must be at least 1"):
        writer.stream("x", top_k=0)
    with pytest.raises(ConfigError, match="`max_new_tokens` must be at least 1"):
        writer.generate(["x"], max_new_tokens=0)


def test_without_a_limit_a_text_takes_what_the_context_leaves(writer):
    [result] = writer.generate(["x" * 30], temperature=0.0)
    assert len(result.tokens) <= WINDOW - 30


def test_only_whole_documents_begin_with_the_begin_token(make):
    crops, documents = make("decoder_only"), make("decoder_only", packing="documents")
    tokenizer = crops.tokenizers.target
    assert prompt_ids(crops.config, tokenizer, ["", "a"]) == [[1], [3 + ord("a")]]
    assert prompt_ids(documents.config, tokenizer, ["", "a"]) == [[1], [1, 3 + ord("a")]]


def test_each_kind_of_model_has_its_calls(translator, writer):
    with pytest.raises(ConfigError, match="must be one that continues texts; .* but is 'encoder_decoder'"):
        translator.generate(["x"])
    with pytest.raises(
        ConfigError, match="must be one that translates; .* `generate` and `score`, but is 'decoder_only'"
    ):
        writer.translate(["x"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_run_is_loaded_as_an_engine(writer, tmp_path, dtype):
    writer.tokenizers.save(tmp_path)
    with torch.no_grad():
        model = build_model(writer.config.model)
    checkpoint.save_checkpoint(tmp_path, "step-00000001", writer.config, model, checkpoint.Progress(step=1))
    engine = triglot.load(tmp_path, dtype=dtype)
    assert next(engine.model.parameters()).dtype == (dtype or torch.float32)
    assert not engine.model.training
    expected = Engine(model.to(dtype).eval(), writer.config, writer.tokenizers)
    assert engine.generate(PROMPTS, seed=3) == expected.generate(PROMPTS, seed=3)


def test_a_seed_has_64_bits_and_the_next_one_after_the_last_is_the_first(writer):
    for seed in (2**64, -1, [2**64]):
        with pytest.raises(ConfigError, match=r"`seed` must be a whole number from 0 to 2\^64 − 1"):
            writer.generate(["a"], seed=seed)
    most = writer.generate(["a", "a"], seed=2**64 - 1)
    assert most == writer.generate(["a", "a"], seed=[2**64 - 1, 0])


def test_what_is_not_said_is_as_the_run_says(translator):
    lines = ["one", "two three", "a b c d"]
    how = translator.config.generation
    said = translator.translate(lines, beam=how.beam, length_penalty=how.length_penalty)
    assert texts(translator.translate(lines)) == texts(said)
    assert len(translator.translate(lines, nbest=how.beam + 1)[0]) == how.beam + 1


def test_a_line_that_is_too_long_is_translated_as_its_beginning_and_told(translator):
    limit = translator.model.max_seq_length
    long = "ab " * limit
    with pytest.warns(TextWasCut, match=rf"line 2 has \d+ tokens: all beyond {limit} were cut"):
        found = translator.translate(["a", long], too_long="cut")
    kept = translator.tokenizers.encode_sources([long], [None])[0]
    head = translator.tokenizers.source.decode(kept[1 : limit - 1])
    assert texts(found) == texts(translator.translate(["a", head]))
    with pytest.raises(DataError, match="`line 2` must be at most"):
        translator.translate(["a", long])
