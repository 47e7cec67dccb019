"""A run whose tokenizer came from elsewhere generates, translates, scores, trains and is evaluated as any other."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from triglot.checkpoint import Progress, load_model, save_checkpoint, step_name
from triglot.cli import app
from triglot.config import BlockOptions, DataConfig, InitConfig, ModelConfig, RunConfig, TrainConfig
from triglot.data.batch import pair_batch
from triglot.errors import CheckpointError, ConfigError, DamagedError
from triglot.evaluation import evaluate
from triglot.files import write_json
from triglot.generation.engine import Engine, load
from triglot.insight.explain import explain
from triglot.layers.masks import NO_PADDING, create_masks
from triglot.models.factory import build_model
from triglot.objective import Objective
from triglot.recipe import to_dict
from triglot.tokenizer import Tokenizers
from triglot.training.session import train

MORE = 5
"""Rows of the model that the tokenizer knows no id for."""
CHAT = [{"role": "user", "content": "the dog?"}]


def make(folder, source, *, pairs=False, more=MORE, likely=(), **settings):
    """A run as an importer leaves it: the tokenizer's files, a config, and one checkpoint of random weights."""
    tokenizers = Tokenizers.load(source)
    size = tokenizers.target.vocab_size + more
    model = ModelConfig(
        kind="encoder_decoder" if pairs else "decoder_only",
        d_model=16, num_heads=2, num_layers=2, d_ff=31, max_seq_length=97, dropout=0.0,
        vocab_size=size, src_vocab_size=size if pairs else 0,
        options=BlockOptions(norm_order="pre", output_bias=True, tie_embeddings=pairs),
    )  # fmt: skip
    data = DataConfig(kind="pairs", files=("x",)) if pairs else DataConfig(kind="text", files=("x",))
    config = RunConfig(
        model=model, data=data, generation=replace(tokenizers.generation, **settings), train=TrainConfig(context=31)
    )
    torch.manual_seed(3)
    module = build_model(model)
    with torch.no_grad():
        for token, bias in dict(likely).items():
            module.projection.bias[token] += bias
    folder.mkdir()
    tokenizers.save(folder)
    write_json(folder / "config.json", to_dict(config))
    save_checkpoint(folder, step_name(0), config, module, Progress())
    return folder


def logits_of(model, source, read):
    """Of a pair in which no id is for padding."""
    src, tgt = torch.tensor([source]), torch.tensor([read])
    return model.eval()(src, tgt, *create_masks(src, tgt, pad_id=NO_PADDING)).logits[0]


def plain(run):
    """The engine of a run in another type, in which its model decodes as it is."""
    model, config, tokenizers = load_model(run)
    return Engine(model.double(), config, tokenizers)


@pytest.mark.parametrize("end", [1, 2])
def test_a_text_ends_at_any_of_the_ids_that_end_one(family, tmp_path, end):
    run = make(tmp_path / "run", family("llama3"), likely={end: 5.0, 404: 50.0})
    for engine in (load(run), plain(run)):
        found = engine.generate(["the dog"] * 20, max_new_tokens=40, temperature=1.0, top_p=1.0)
        assert {one.ended for one in found} == {"end"}
        assert end in {one.tokens[-1] for one in found}
        for one in found:
            assert not {1, 2} & set(one.tokens[:-1])
            assert one.text == engine.tokenizers.target.decode(one.tokens[:-1])
            assert max(one.tokens) < engine.tokenizers.target.vocab_size  # however likely the rest is
        least = engine.generate(["the dog"], max_new_tokens=9, min_new_tokens=9)[0]
        assert least.ended == "limit"


def test_greedy_texts_are_the_arg_max_of_the_model_after_what_transformers_reads(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("gpt2", "llama3", "qwen", "llama2"):
        run = make(tmp_path / name, family(name), more=0)
        engine, theirs = load(run), transformers.AutoTokenizer.from_pretrained(family(name))
        for prompt in ("the dog", ""):
            ids = theirs.encode(prompt) or [engine.tokenizers.target.ids.start]
            found = engine.generate([prompt], temperature=0.0, max_new_tokens=7, repetition_penalty=1.0)[0]
            expected = engine.model.generate(torch.tensor([ids]), 7, temperature=0.0)[0, len(ids) :].tolist()
            assert found.tokens == expected[: len(found.tokens)]


@pytest.mark.usefixtures("without_shape_checks")
def test_a_conversation_is_answered_as_its_text_is_gone_on_from(family, tmp_path):
    run = make(tmp_path / "run", family("qwen"), more=0)
    engine = load(run)
    text = engine.tokenizers.target.apply_chat_template(CHAT)
    how = {"temperature": 0.0, "max_new_tokens": 7, "stop": ["é"]}
    chat, mixed, other = engine.generate([CHAT, text, "the dog"], **how)
    assert chat == mixed == engine.generate([CHAT], **how)[0]
    assert chat != other
    assert "".join(engine.stream(CHAT, **how)) == chat.text
    with pytest.raises(ConfigError, match=r"`prompts\[0\]` must be a text or a list"):
        engine.generate(CHAT)
    with pytest.raises(ConfigError, match=r"`prompts\[0\]\[0\]` must be a dict"):
        engine.generate([["hello"]])
    with pytest.raises(ConfigError, match="`messages` must be one message or more"):
        engine.generate([[{"content": "hello"}]])


def test_the_command_line_says_and_shows_a_conversation(family, tmp_path):
    run = make(tmp_path / "run", family("qwen"), more=0)
    shared = ["generate", str(run), "--temperature", "0", "--max-new-tokens", "7", "--device", "cpu"]
    answer = CliRunner().invoke(app, [*shared, "--chat", "--prompt", "the dog?", "--system", "Be brief."])
    said = [{"role": "system", "content": "Be brief."}, *CHAT]
    expected = load(run).generate([said], temperature=0.0, max_new_tokens=7)[0].text
    assert answer.stdout == expected + "\n"
    told = CliRunner().invoke(app, [*shared, "--chat", "--interactive"], input="the dog?\nand?\n")
    first = load(run).generate([CHAT], temperature=0.0, max_new_tokens=7)[0].text
    longer = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    second = load(run).generate([longer], temperature=0.0, max_new_tokens=7)[0].text
    assert told.stdout == f"{first}\n{second}\n"
    assert CliRunner().invoke(app, [*shared, "--chat"]).exit_code == 2
    assert CliRunner().invoke(app, [*shared, "--system", "x"]).exit_code == 2


def test_a_run_decodes_as_its_config_says_unless_the_caller_does(family, tmp_path):
    run = make(tmp_path / "run", family("llama3"), temperature=0.0)
    engine = load(run)
    greedy = engine.generate(["the dog"], max_new_tokens=9)
    assert greedy == engine.generate(["the dog"], max_new_tokens=9, temperature=0.0, seed=7)
    assert greedy == engine.generate(["the dog"], max_new_tokens=9, temperature=None, top_k=None)
    assert greedy != engine.generate(["the dog"], max_new_tokens=9, temperature=1.5)
    shown = CliRunner().invoke(app, ["generate", str(run), "--prompt", "the dog", "--max-new-tokens", "9"])
    assert shown.stdout == f"the dog{greedy[0].text}\n"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_translation_begins_with_the_id_that_the_model_begins_with(family, tmp_path, name):
    run = make(tmp_path / "run", family(name), pairs=True, beam=3, max_new_tokens=11)
    engine, other = load(run), plain(run)
    lines = ["the dog", "", "der Hund und die Katze", "a"]
    found, same = engine.translate(lines), other.translate(lines)
    for one, two in zip(found, same, strict=True):
        assert one[0].tokens == two[0].tokens
        assert one[0].score == pytest.approx(two[0].score, abs=1e-4)
    ids = engine.tokenizers.target.ids
    [source] = engine.tokenizers.encode_sources(["the dog"], [None])
    [best] = engine.translate(["the dog"], beam=1, no_repeat_ngram=None, max_new_tokens=5)[0]
    logits = logits_of(engine.model, source, [ids.start, *best.tokens[:-1]])
    for place, token in enumerate(best.tokens):
        if place < len(ids.forced):
            assert (token, best.log_probs[place]) == (ids.forced[place], 0.0)
        elif engine.config.generation.no_repeat_ngram is None:
            assert token == logits[place, : engine.tokenizers.target.vocab_size].argmax()
    assert engine.translate(["the dog"], prefixes=["the"])[0][0].text.startswith("the")
    assert engine.alternatives("the dog", "the", 2)[0].best.text.startswith("the")


def test_padding_is_told_by_place_where_targets_begin_with_its_id(family, tmp_path):
    """T5 begins a target with the id that it pads with: a batch is its pairs one by one, all the same."""
    model, _, tokenizers = load_model(make(tmp_path / "run", family("t5"), pairs=True))
    sources = tokenizers.encode_sources(["the dog", "der Hund und <pad> die Katze", "a"], [None] * 3)
    targets = tokenizers.encode_targets(["der Hund", "the", "ein Satz, ein Wort"])
    objective = Objective(model).eval()
    with torch.no_grad():
        together = objective(pair_batch(sources, targets, tokenizers.target.ids))
        alone = [objective(pair_batch([x], [y], tokenizers.target.ids)) for x, y in zip(sources, targets, strict=True)]
    torch.testing.assert_close(together.nll, torch.stack([one.nll for one in alone]).sum())


def test_scores_are_those_of_the_model_itself(family, tmp_path):
    run = make(tmp_path / "text", family("llama3"))
    engine = load(run)
    [found] = engine.score(["the dog"], end=True)
    ids = [engine.tokenizers.target.ids.start, *engine.tokenizers.target.encode("the dog"), 2]
    log_p = engine.model.eval()(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    assert found.tokens == ids[1:]
    assert found.log_probs == pytest.approx(log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=1e-5)
    engine = load(make(tmp_path / "pairs", family("t5"), pairs=True))
    [pair] = engine.score(["the dog"], ["der Hund"])
    [source], [target] = (
        engine.tokenizers.encode_sources(["the dog"], [None]),
        engine.tokenizers.encode_targets(["der Hund"]),
    )
    logits = logits_of(engine.model, source, [0, *target]).log_softmax(-1)
    assert pair.tokens == [*target, 1]
    expected = logits.gather(1, torch.tensor([*target, 1])[:, None])[:, 0]
    assert pair.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(("name", "packing"), [("llama3", "documents"), ("qwen", "documents"), ("gpt2", "crops")])
def test_a_run_that_starts_from_an_import_trains_and_keeps_its_files(family, tmp_path, name, packing):
    source, text = make(tmp_path / "import", family(name)), tmp_path / "text.txt"
    text.write_text("the quick brown dog\nein Satz, ein Wort\n" * 40, encoding="utf-8")
    before = load_model(source)
    config = RunConfig(
        model=replace(before.config.model, vocab_size=0, dropout=0.1),
        data=DataConfig(kind="text", files=(str(text),), document="line", packing=packing, valid=0.1),
        train=TrainConfig(max_steps=3, batch_tokens=93, context=31, eval_every=2, samples=1, precision="fp32"),
        init=InitConfig(from_=str(source)),
    )
    run = tmp_path / "run"
    train(config, run, device="cpu")
    for file in family(name).iterdir():
        assert (run / file.name).read_bytes() == file.read_bytes()
    model, after, tokenizers = load_model(run, "last")
    assert after.model.vocab_size == before.config.model.vocab_size == tokenizers.target.vocab_size + MORE
    assert after.generation == before.config.generation
    assert not model.embedding.tokens.weight.equal(before.model.embedding.tokens.weight)
    scores = evaluate(run)
    assert scores["bytes"] > 0
    again = replace(config, train=replace(config.train, max_steps=5))
    assert train(again, run, resume=True, device="cpu").progress.step == 5
    page = explain(run, "the dog", out=tmp_path / "page.html")
    assert page.stat().st_size > 10_000


def test_pairs_train_from_an_import_and_are_evaluated(family, tmp_path):
    source, pairs = make(tmp_path / "import", family("bart"), pairs=True), tmp_path / "pairs.tsv"
    pairs.write_text("the dog\tder Hund\nthe quick fox\tein Satz\n" * 20, encoding="utf-8")
    before = load_model(source).config
    config = RunConfig(
        model=replace(before.model, vocab_size=0, src_vocab_size=0),
        data=DataConfig(kind="pairs", files=(str(pairs),), valid=0.1),
        train=TrainConfig(max_steps=2, batch_tokens=211, eval_every=2, samples=1, precision="fp32"),
        init=InitConfig(from_=str(source)),
    )
    train(config, tmp_path / "run", device="cpu")
    assert load_model(tmp_path / "run").config.generation.no_repeat_ngram == 3
    assert evaluate(tmp_path / "run")["sentences"] == 4
    explain(tmp_path / "run", "the dog", out=tmp_path / "page.html")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_damaged_or_gone_is_named(family, tmp_path, name):
    run = make(tmp_path / "run", family("qwen"))
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-1] + b" }")
    with pytest.raises(DamagedError, match=name):
        load_model(run)
    (run / name).unlink()
    with pytest.raises(DamagedError, match=name):
        load_model(run)
    (run / name).write_bytes(content)
    load_model(run)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(family, tmp_path):
    run = make(tmp_path / "run", family("qwen"), more=-1)
    with pytest.raises(CheckpointError, match="of at most the model's 400 ids"):
        load_model(run)
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] == 400
