"""What `translate` and `alternatives` can be told: what each option does to a translation, and what is refused."""

import itertools
import math
from functools import partial

import pytest
import torch

import triglot
from tests.conftest import needs_compiler
from triglot import checkpoint
from triglot.config import GenerationConfig
from triglot.decoding.beam import BeamSearch
from triglot.decoding.search import normalised
from triglot.errors import CheckpointError, ConfigError, DataError
from triglot.generation import sentences
from triglot.generation.engine import Engine
from triglot.generation.results import Alignment, Hypothesis
from triglot.generation.workers import Workers
from triglot.layers.masks import create_masks
from triglot.layers.packed import multiplies_bf16
from triglot.recipe import from_dict
from triglot.tokenizer import SpecialIds, Tokenizer

LINES = ["one two three", "", "a", "ein langer Satz, mit Komma", "   ", "zwei", "drei vier"]
TEXTS = [row for row, line in enumerate(LINES) if line.strip()]


@pytest.fixture(scope="module")
def folder(translator, tmp_path_factory):
    """The translator as a run."""
    folder = tmp_path_factory.mktemp("run")
    translator.tokenizers.save(folder)
    config, progress = translator.config, checkpoint.Progress(step=1)
    checkpoint.save_checkpoint(folder, "step-00000001", config, translator.model, progress)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The run's engine."""
    return triglot.load(folder, device="cpu")


@torch.no_grad()
def test_log_probs_are_those_of_a_forced_pass(translator):
    for line, hypotheses in zip(LINES, translator.translate(LINES, beam=3, nbest=2), strict=True):
        for one in hypotheses if line.strip() else ():
            [source] = translator.tokenizers.encode_sources([line], [None])
            src, tgt = torch.tensor([source]), torch.tensor([[1, *one.tokens[:-1]]])
            logits = translator.model(src, tgt, *create_masks(src, tgt)[:2]).logits[0]
            logits[:, :2] = -math.inf
            expected = logits.log_softmax(1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=1e-3)
            assert one.score == pytest.approx(sum(one.log_probs) / len(one.tokens))


@pytest.mark.parametrize("beam", [1, 3])
def test_scores_that_nobody_asks_for_change_no_text(translator, beam):
    for [one], [other] in zip(
        translator.translate(LINES, beam=beam),
        translator.translate(LINES, beam=beam, log_probs=False),
        strict=True,
    ):
        assert (other.text, other.tokens, other.truncated) == (one.text, one.tokens, one.truncated)
        assert math.isnan(other.score) or not one.tokens
        assert other.log_probs == []


def test_the_best_texts_differ_in_what_they_spell(make):
    """Of "a", "b" and "ab", by which a text has many spellings; a token's probability is the same everywhere."""
    tokenizer, how = Tokenizer.train("bpe", ["ab ab " * 9], 260), {"beam": 12, "nbest": 8, "length_penalty": 0.0}
    engine, logits = make("encoder_decoder", tokenizer=tokenizer), torch.full((tokenizer.vocab_size,), -1e9)
    a, b = tokenizer.encode_batch(["a", "b"])
    logits[[*a, *b, *tokenizer.encode("ab"), SpecialIds().eos]] = torch.tensor([2.0, 1.9, 1.3, 2.2])
    with torch.no_grad():
        engine.model.final_layer.weight.zero_()
        engine.model.final_layer.bias.copy_(logits)
    [found], [raw] = engine.translate(["one"], **how), engine._find([[1, 5, 2]], BeamSearch(eos_ids=[2], **how), 11)
    texts = [tokenizer.decode(one.ids) for one in raw]
    assert texts[:8].count("ab") == 2
    assert [one.text for one in found] == list(dict.fromkeys(texts))[:8]
    assert [one.tokens for one in found] == [raw[texts.index(one.text)].ids for one in found]
    assert engine.translate(["one"], **how | {"nbest": 1})[0] == found[:1]


@pytest.mark.parametrize("lengths", ["power", "gnmt"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_scores_are_divided_by_what_was_asked_for(translator, lengths, alpha):
    for row in translator.translate(LINES, beam=3, nbest=3, lengths=lengths, length_penalty=alpha):
        for one in row:
            if one.tokens:
                assert one.score == normalised(sum(one.log_probs), len(one.tokens), alpha, lengths)


def test_more_patience_finds_no_worse_translations(translator):
    lines, how = [f"{number} drei" for number in range(40)], {"beam": 3, "length_penalty": 1.0, "max_new_tokens": 30}
    scores = [
        [row[0].score for row in translator.translate(lines, patience=patience, **how)]
        for patience in (0.3, 1.0, 100.0, math.inf)
    ]
    for of_row in zip(*scores, strict=True):
        assert list(of_row) == sorted(of_row)
    assert scores[0] != scores[1] != scores[2]
    assert scores[3] == scores[2]  # the bound ends a search only where nothing better can come
    assert scores[3] == [row[0].score for row in translator.translate(lines, **how)]


def test_the_patience_of_a_run_is_in_its_recipe():
    assert GenerationConfig().patience is None
    assert from_dict(GenerationConfig, {"patience": 1}).patience == 1.0
    assert from_dict(GenerationConfig, {"patience": math.inf}).patience is None  # which JSON can hold
    with pytest.raises(ConfigError, match="`patience` must be above 0, or inf, but is 0.0 instead"):
        from_dict(GenerationConfig, {"patience": 0.0})


def test_no_end_comes_early_no_n_gram_twice_and_no_banned_word(translator):
    free = [one for row in translator.translate(LINES, beam=3, nbest=3) for one in row]
    word = next(letter for one in free for letter in one.text if letter.isascii() and letter.isprintable())
    how = {"min_new_tokens": 6, "no_repeat_ngram": 2, "banned_words": [word]}
    for row in TEXTS:
        for one in translator.translate(LINES, beam=3, nbest=3, **how)[row]:
            assert len(one.tokens) > 6
            assert SpecialIds().eos not in one.tokens[:6]
            pairs = list(itertools.pairwise(one.tokens))
            assert len(pairs) == len(set(pairs))
            assert word not in one.text


def test_translations_begin_as_they_have_to(translator):
    prefixes = [f"no {row}" for row in range(len(LINES))]
    found = translator.translate(LINES, prefixes=prefixes, beam=3, nbest=2)
    for row in TEXTS:
        for one in found[row]:
            forced = len(translator.tokenizers.target.encode(prefixes[row]))
            assert one.text.startswith(prefixes[row])
            assert one.log_probs[:forced] == [0.0] * forced
            assert all(value < 0 for value in one.log_probs[forced:])
    assert found[1] == [Hypothesis("", 0.0, [], False, [])]
    assert translator.translate(LINES, prefixes=[""] * len(LINES)) == translator.translate(LINES)


def test_a_translations_own_beginning_changes_nothing_when_it_is_forced(translator):
    found = translator.translate(LINES, beam=1)
    begun = [row[0].text[:3] if "\ufffd" not in row[0].text else "" for row in found]
    assert any(begun)
    forced = translator.translate(LINES, beam=1, prefixes=begun)
    assert [row[0].tokens for row in forced] == [row[0].tokens for row in found]


@torch.no_grad()
def test_alternatives_are_the_likeliest_tokens_each_with_the_best_text_that_goes_on_so(translator):
    line, prefix = "zwei drei", "ab"
    [source], begun = translator.tokenizers.encode_sources([line], [None]), [1, *b"ab"]
    src, tgt = torch.tensor([source]), torch.tensor([[1, *(3 + byte for byte in begun[1:])]])
    logits = translator.model(src, tgt, *create_masks(src, tgt)[:2]).logits[0, -1]
    logits[:2] = -math.inf
    expected = logits.log_softmax(0).topk(4)
    found = translator.alternatives(line, prefix, 4, beam=3)
    assert [one.token for one in found] == expected.indices.tolist()
    torch.testing.assert_close(torch.tensor([one.log_prob for one in found]), expected.values, atol=1e-4, rtol=1e-4)
    for one in found:
        assert one.piece == translator.tokenizers.target.pieces([one.token])[0]
        assert one.best.tokens[:3] == [*tgt[0, 1:].tolist(), one.token]
        if one.token == SpecialIds().eos:
            assert one.best.text == "ab"
    assert SpecialIds().eos in [one.token for one in translator.alternatives(line, prefix, 100)]


def test_the_best_alternative_goes_on_as_the_translation_does(translator):
    greedy = translator.translate(["drei vier"], beam=1)[0][0]
    [first] = translator.alternatives("drei vier", count=1, beam=1)
    assert first.best.tokens == greedy.tokens
    assert first.log_prob == pytest.approx(greedy.log_probs[0], abs=1e-5)


@torch.no_grad()
def test_alignments_are_the_attention_of_the_step_that_reads_the_token(translator):
    plain, aligned = translator.translate(LINES, nbest=2), translator.translate(LINES, nbest=2, alignments=True)
    assert [[one._replace(alignment=None) for one in row] for row in aligned] == plain
    assert aligned[1][0].alignment == Alignment([], [], [])
    for line, row in zip(LINES, aligned, strict=True):
        for one in row if line.strip() else ():
            produced = [token for token in one.tokens if token != SpecialIds().eos]
            weights = torch.tensor(one.alignment.weights).view(len(produced), -1)
            assert weights.shape[0] == len(one.alignment.target) == len(produced)
            if not produced:
                continue
            torch.testing.assert_close(weights.sum(1), torch.ones(len(produced)))
            [source] = translator.tokenizers.encode_sources([line], [None])
            assert one.alignment.source == translator.tokenizers.source.pieces(source[1:-1])
            src, tgt = torch.tensor([source]), torch.tensor([[1, *produced]])
            attention = translator.model(src, tgt, *create_masks(src, tgt)[:2]).dec_enc_attention[0][0]
            text = attention.mean(0)[1:, 1:-1]
            torch.testing.assert_close(weights, text / text.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_the_last_token_of_the_longest_translation_is_aligned_too(translator):
    [[one]] = translator.translate(["abc"], max_new_tokens=99, min_new_tokens=36, alignments=True, beam=1)
    assert one.truncated
    assert len(one.alignment.weights) == len(one.tokens) == 36


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beams": 3}, ConfigError, "`the option` must be one of beam, nbest, .*but is 'beams' instead"),
        ({"beam": 0}, ConfigError, "`beam` must be at least 1"),
        ({"beam": 2, "nbest": 3}, ConfigError, r"`nbest` must be between 1 and beam \(2\)"),
        ({"nbest": 0}, ConfigError, "`nbest` must be between 1 and beam"),
        ({"length_penalty": -1.0}, ConfigError, "`length_penalty` must be at least 0"),
        ({"beam": 2.5}, ConfigError, "`beam` must be a whole number or None, but is 2.5"),
        ({"beam": True}, ConfigError, "`beam` must be a whole number or None, but is True"),
        ({"alignments": 1}, ConfigError, "`alignments` must be true or false, but is 1"),
        ({"length_penalty": "1"}, ConfigError, "`length_penalty` must be a number or None, but is '1'"),
        ({"patience": 0.0}, ConfigError, "`patience` must be above 0, or inf, but is 0.0"),
        ({"max_new_tokens": 0}, ConfigError, "`max_new_tokens` must be at least 1, but is 0"),
        ({"min_new_tokens": -1}, ConfigError, "`min_new_tokens` must be at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, ConfigError, r"`min_new_tokens` must be at most max_new_tokens"),
        ({"no_repeat_ngram": 0}, ConfigError, "`no_repeat_ngram` must be at least 1"),
        ({"banned_words": "ab"}, ConfigError, "`banned_words` must be a list of texts"),
        ({"banned_words": [""]}, ConfigError, "`banned_words` must be texts of at least one character"),
        ({"prefixes": "a"}, ConfigError, "`prefixes` must be a list of texts"),
        ({"prefixes": ["a"]}, DataError, "`prefixes` must be one for each of 2 lines, but is 1"),
        ({"prefixes": ["", "abc"], "max_new_tokens": 3}, DataError, "`the prefix of line 2` must be at most 2 tokens"),
        ({"tags": ["a"]}, DataError, "`tags` must be one for each of 2 lines, but is 1"),
    ],
)
def test_what_can_not_be_is_refused_before_work_starts(translator, monkeypatch, options, error, message):
    monkeypatch.setattr(translator, "_find", lambda *_: 1 / 0)
    with pytest.raises(error, match=message):
        translator.translate(["a", "b"], **options)


def test_alternatives_are_of_a_line_and_one_at_least(translator):
    with pytest.raises(ConfigError, match="`count` must be between 1 and "):
        translator.alternatives("a", count=0)
    with pytest.raises(DataError, match="`line` must be no empty one"):
        translator.alternatives(" ")
    with pytest.raises(DataError, match="`prefix` must be at most 10 tokens long, for a text of at most 11"):
        translator.alternatives("a", "b" * 11)
    with pytest.raises(ConfigError, match="`nbest` must be 1, one for each alternative, but is 2"):
        translator.alternatives("a", nbest=2)


def test_a_beginning_that_is_banned_is_told(translator):
    with pytest.raises(ConfigError, match="`the number of tokens that the rules leave line 9` must be at least 1"):
        translator.translate(["a", "", "b"], prefixes=["x", "", "y"], banned_words=["y"], first_line=7)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])  # one that rounding to bf16 could turn to a number
def test_weights_that_are_no_numbers_are_told(make, compiled, beam, bits):
    for part in ("final_layer.weight", "decoder.layers.0.around_self_attention.norm.weight"):
        engine = make("encoder_decoder", precision="bf16" if compiled else "fp32", compiled=compiled, d_model=32)
        engine.model.get_parameter(part).detach().view(torch.int32)[7] = bits
        with pytest.raises(CheckpointError, match="`logits` must be numbers, but is 'NaN' instead"):
            engine.translate(["x"], beam=beam)


# Precision and processes


def test_several_processes_find_what_one_does(folder, run):
    how = {"beam": 3, "nbest": 2, "no_repeat_ngram": 2, "prefixes": ["", "a", "b", "", "c", "", "d"]}
    several = triglot.load(folder, device="cpu", workers=2)
    try:
        assert several.translate(LINES, **how) == run.translate(LINES, **how)
        assert several.alternatives("zwei", "a") == run.alternatives("zwei", "a")
        assert several.translate([]) == []
    finally:
        several.close()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_workers_search_as_they_are_told(folder, compiled):
    search = sentences.worker_search(folder, "best", "bf16", compiled)
    ready = search.args[0]
    assert ready.prepared.by_kernels == compiled
    assert ready.precision == "bf16"


def test_shares_of_workers_know_their_own_requests(translator, monkeypatch):
    """Without processes: what is sent to each is worked off here, in shares of any number."""
    how = {"beam": 3, "prefixes": ["", "a", "b", "", "c", "", "d"]}
    expected = translator.translate(LINES, **how)
    for number in (1, 2, 3, 9):
        pool = Workers(partial(sentences.search_all, translator._ready), number)
        monkeypatch.setattr(pool, "pool", Here(partial(sentences.search_all, translator._ready)))
        other = Engine(translator.model, translator.config, translator.tokenizers, workers=pool)
        assert other.translate(LINES, **how) == expected


class Here:
    """Stands in for a pool of processes."""

    def __init__(self, find):
        self.find = find

    def submit(self, function, sources: list[list[int]], how: BeamSearch, limit: int):
        found = self.find(sources, how, limit)
        return type("Task", (), {"result": lambda self: found})()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_less_precision_changes_scores_a_little(folder, run, precision):
    engine = triglot.load(folder, device="cpu", precision=precision)
    exact = run.translate(["zwei"], beam=1, max_new_tokens=1)[0][0]
    other = engine.translate(["zwei"], beam=1, max_new_tokens=1, prefixes=[""])[0][0]
    changes = precision == "bf16" or multiplies_bf16()  # else so small a model's products stay in fp32
    assert (other.score != exact.score) == changes
    assert other.score == pytest.approx(exact.score, abs=0.5)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_precision_is_one_that_is_there(folder):
    with pytest.raises(ConfigError, match="`precision` must be one of fp32, bf16, .*but is 'int3' instead"):
        triglot.load(folder, device="cpu", precision="int3")
    with pytest.raises(ConfigError, match="`precision` must be fp32 unless the model is on a processor, in fp32"):
        triglot.load(folder, device="cpu", precision="int8", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="`workers` must be at least 1, but is 0"):
        triglot.load(folder, device="cpu", workers=0)
    with pytest.raises(ConfigError, match="`workers` must be 1 unless the model is on a processor, in fp32"):
        triglot.load(folder, device="cpu", workers=2, dtype=torch.bfloat16)


def test_pairs_are_scored_by_the_engine(translator):
    scored = translator.score(["ab", "c"], ["x", "yz"])
    assert [len(one.tokens) for one in scored] == [2, 3]
    assert scored[1] == translator.score(["c"], ["yz"])[0]
    with pytest.raises(DataError, match="`pair 8` must be at most 37"):
        translator.score(["a", "b" * 99], ["a", "b"], first=7)
    with pytest.raises(ConfigError, match="the model of the run` must be one that continues texts"):
        translator.score_file("x")
