"""What holds for the figures a run is judged by."""

import dataclasses
import math
from pathlib import Path

import pytest
import sacrebleu
import torch

from triglot.checkpoint import Progress, load_model, save_checkpoint, step_name
from triglot.config import RunConfig
from triglot.data.corpus import Example
from triglot.data.prepare import prepare
from triglot.errors import ConfigError
from triglot.evaluation import (
    evaluate,
    exact_match,
    score_translations,
    text_scores,
    translate_examples,
    translation_scores,
)
from triglot.generation.engine import Engine
from triglot.generation.kernels import kernels_pay
from triglot.layers.packed import multiplies_bf16
from triglot.models.factory import build_model
from triglot.recipe import from_dict
from triglot.tokenizer import Tokenizer, Tokenizers

CPU = torch.device("cpu")
TEXT = "Käse und Brot und Wein\nein Fluß\n\nzwölf Boxkämpfer jagen\nQuark\n"
PAIRS = [("eins zwei", "one two"), ("drei", "three"), ("vier fünf sechs", "four five six"), ("elf", "elf")]


def make_run(folder: Path, kind: str) -> Path:
    """A run with an untrained model, and data beside it."""
    data, run = folder / "data", folder / "run"
    data.mkdir()
    run.mkdir()
    (data / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, column in (("source", 0), ("target", 1)):
        (data / name).write_text("".join(f"{pair[column]}\n" for pair in PAIRS), encoding="utf-8")
    if kind == "decoder_only":
        where = {"kind": "text", "files": ["text.txt"], "valid": "text.txt"}
    else:
        sides = {"source": "source", "target": "target"}
        where = {"kind": "pairs", **sides, **{f"{part}_{key}": key for part in ("valid", "test") for key in sides}}
    tokenizer = Tokenizer.train("byte", [])
    size = tokenizer.vocab_size
    shape = {"d_model": 6, "num_heads": 2, "num_layers": 1, "d_ff": 11, "vocab_size": size, "src_vocab_size": size}
    config = from_dict(
        RunConfig,
        {
            "model": {"kind": kind, **shape, "max_seq_length": 31},
            "data": {"root": str(data), **where},
            "tokenizer": {"kind": "byte"},
            "train": {"context": 7, "batch_tokens": 35},
            "generation": {"beam": 2, "max_new_tokens": 13},
        },
    )
    Tokenizers(tokenizer, tokenizer).save(run)
    save_checkpoint(run, step_name(0), config, build_model(config.model), Progress())
    return run


@pytest.mark.parametrize("kind", ["decoder_only", "encoder_decoder"])
def test_the_figures_are_those_of_a_computation_token_by_token(tmp_path, kind):
    run = make_run(tmp_path, kind)
    found = evaluate(run)
    model, config, tokenizers = load_model(run)
    nats, tokens = 0.0, 0
    for batch in prepare(config, run, tokenizers).valid.epoch(0):
        for row in range(len(batch[0])):
            if kind == "decoder_only":
                targets, logits = batch.targets[row], model(batch.input_ids[row : row + 1]).logits[0]
            else:
                targets = batch.tgt_out[row]
                src, length = batch.src[row : row + 1], int((targets != -100).sum())
                look_ahead = torch.ones(length, length, dtype=torch.bool).tril()
                logits = model(src[:, src[0] != 0], batch.tgt_in[row : row + 1, :length], None, look_ahead).logits[0]
            for at, target in enumerate(targets.tolist()):
                if target != -100:
                    nats -= logits[at].log_softmax(-1)[target].item()
                    tokens += 1
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    num_bytes = len(TEXT.encode()) if kind == "decoder_only" else sum(len(target.encode()) for _, target in PAIRS)
    assert found["bytes"] == num_bytes
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [7, 21, 70])
def test_the_loss_does_not_depend_on_how_the_text_is_cut_into_batches(tmp_path, batch_tokens):
    run = make_run(tmp_path, "decoder_only")
    model, config, tokenizers = load_model(run)
    expected = evaluate(run)
    train = dataclasses.replace(config.train, batch_tokens=batch_tokens)
    data = prepare(dataclasses.replace(config, train=train), run, tokenizers).valid
    assert text_scores(model, data, tokenizers.target, CPU) == pytest.approx(expected, rel=1e-6)


def test_bleu_and_chrf_are_sacrebleus_own(tmp_path):
    model, config, tokenizers = load_model(make_run(tmp_path, "encoder_decoder"))
    examples = [Example(source, target, None) for source, target in PAIRS]
    found = translation_scores(model, tokenizers, config, examples)
    hypotheses = translate_examples(Engine(model, config, tokenizers), examples)
    references = [[target for _, target in PAIRS]]
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, references).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, references).score
    assert f"version:{sacrebleu.__version__}" in found["bleu_signature"]
    resampled = translation_scores(model, tokenizers, config, examples, resamples=50)
    assert "bs:50" in resampled["bleu_signature"]
    assert resampled["bleu"] == found["bleu"]
    assert resampled["bleu_ci95"] >= 0.0
    assert {type(value) for value in resampled.values()} <= {float, int, str}  # what JSON can hold
    assert found["bleu_signature"] != found["chrf_signature"]
    assert found["sentences"] == len(PAIRS)


def test_a_translator_that_knows_the_answers_scores_the_most_there_is(tmp_path, monkeypatch):
    answers = dict(PAIRS)
    monkeypatch.setattr(
        "triglot.evaluation.translate_examples", lambda *given, **_: [answers[one.source] for one in given[-1]]
    )
    model, config, tokenizers = load_model(make_run(tmp_path, "encoder_decoder"))
    long = [Example(source, target, None) for source, target in PAIRS]
    scores = translation_scores(model, tokenizers, config, long)
    assert scores["exact_match"] == 1
    assert scores["chrf"] == 100


def test_exact_match_is_to_the_letter():
    assert exact_match(["a", "b ", "C"], ["a", "b", "c"]) == pytest.approx(1 / 3)


def test_the_evaluator_for_training_scores_the_validation_examples(tmp_path):
    run = make_run(tmp_path, "encoder_decoder")
    model, config, tokenizers = load_model(run)
    scores = score_translations(model, prepare(config, run, tokenizers), config)
    assert scores == {name: evaluate(run)[name] for name in ("bleu", "chrf", "exact_match")}


def test_the_test_part_of_a_text_is_scored_by_itself(tmp_path):
    """Validation and test change places: so do their scores, and their bytes are those of the parts."""
    run = make_run(tmp_path, "decoder_only")
    model, config, tokenizers = load_model(run)
    half = dataclasses.replace(config.data, valid=0.3, test=0.3, hold_out="tail")
    config = dataclasses.replace(config, data=half)
    save_checkpoint(run, step_name(0), config, model, Progress())
    scored = evaluate(run, split="test")
    prepared = prepare(config, run, tokenizers)
    assert scored == text_scores(model, prepared.test, tokenizers.target, CPU)
    assert scored != evaluate(run, split="valid")


def test_text_that_is_tokenised_already_is_scored_on_its_own_words(tmp_path, monkeypatch):
    pairs = [("a", "ein mann , der läuft ."), ("b", "zwei hunde , die bellen .")]
    answers = ["ein mann, der läuft .", "zwei hunde , die bellen."]
    monkeypatch.setattr("triglot.evaluation.translate_examples", lambda *_, **__: answers)
    model, config, tokenizers = load_model(make_run(tmp_path, "encoder_decoder"))
    examples = [Example(source, target, None) for source, target in pairs]
    plain = translation_scores(model, tokenizers, config, examples)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenized=True))
    found = translation_scores(model, tokenizers, config, examples)
    expected = sacrebleu.corpus_bleu(answers, [[target for _, target in pairs]], tokenize="none", force=True)
    assert found["bleu"] == expected.score
    assert found["bleu"] < plain["bleu"] == pytest.approx(100)
    assert "tok:none" in found["bleu_signature"]


def test_running_text_has_no_translations_and_no_test_split(tmp_path):
    run = make_run(tmp_path, "decoder_only")
    model, config, tokenizers = load_model(run)
    assert score_translations(model, prepare(config, run, tokenizers), config) == {}
    with pytest.raises(
        ConfigError, match=r"`split` must be valid, since the recipe keeps no part of the text to test on"
    ):
        evaluate(run, split="test")
    for option in ({"beam": 2}, {"precision": "int8"}):
        [name] = option
        with pytest.raises(ConfigError, match=f"`{name}` must be left out for a run that goes on from texts, but is"):
            evaluate(run, **option)


def test_the_precision_that_is_told_is_the_one_that_translations_were_made_in(tmp_path, monkeypatch):
    """So small a model has no projection that whole numbers would make faster but by kernels."""
    run, without = make_run(tmp_path, "encoder_decoder"), "bf16" if multiplies_bf16() else "fp32"
    assert evaluate(run)["precision"] == "fp32"
    assert evaluate(run, precision="bf16")["precision"] == "bf16"
    assert evaluate(run, precision="int8")["precision"] == ("int8" if kernels_pay() else without)
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    assert evaluate(run, precision="int8")["precision"] == without


def test_a_split_may_lie_elsewhere_now_and_be_the_test_split(tmp_path):
    run = make_run(tmp_path, "encoder_decoder")
    expected = evaluate(run, split="test")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert evaluate(run, split="test", root=tmp_path / "moved") == expected
