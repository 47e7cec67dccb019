"""What a run writes of what it can do: at each evaluation, once, and without a trace in the run itself."""

import dataclasses
import itertools

import numpy as np
import pytest

from triglot.checkpoint import Progress, load_model
from triglot.data.dataset import Packed, Windows
from triglot.data.prepare import prepare
from triglot.errors import CheckpointError
from triglot.generation.engine import Engine
from triglot.tokenizer import Tokenizer
from triglot.training import samples
from triglot.training.metrics import Silent, read_metrics
from triglot.training.session import train


def visible(text: str) -> str:
    """A text without what a file for people may show otherwise."""
    return "".join(letter for letter in text if letter.isprintable() and letter not in " \ufffd")


def steps(run) -> list[int]:
    return [step for step, _ in samples.read(run / samples.FILE)]


@pytest.mark.parametrize("number", [1, 5])
def test_a_run_with_samples_is_bit_for_bit_the_one_without(tmp_path, config_of, content_of, architecture, number):
    for name, count in (("without", 0), ("with", number)):
        train(config_of(architecture, samples=count, max_steps=7), tmp_path / name)
    assert not (tmp_path / "without" / samples.FILE).exists()
    evaluated = [line["step"] for line in read_metrics(tmp_path / "with" / "metrics.jsonl") if line["kind"] == "eval"]
    assert steps(tmp_path / "with") == [0, *evaluated]
    ours, theirs = content_of(tmp_path / "with"), content_of(tmp_path / "without")
    told = {key for key in ours if key.endswith("config.json")} | {samples.FILE}
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} == told


def test_pairs_are_the_first_that_validate_translated_as_the_recipe_says(tmp_path, config_of):
    config = config_of("encoder-decoder", max_steps=31, eval_every=31, learning_rate=0.01)
    train(config, tmp_path / "run")
    ((_, _), (_, part)) = samples.read(tmp_path / "run" / samples.FILE)
    loaded = load_model(tmp_path / "run", "last")
    pairs = prepare(config, tmp_path / "run", loaded.tokenizers).valid_examples[: config.train.samples]
    found = Engine(*loaded).translate([pair.source for pair in pairs], max_new_tokens=config.generation.max_new_tokens)
    expected = [text for pair, (best, *_) in zip(pairs, found, strict=True) for text in (*pair[:2], best.text)]
    names = ["source", "reference", "hypothesis"] * len(pairs)
    told = "".join(f"{name}{text}" for name, text in zip(names, expected, strict=True))
    assert visible(part) == visible("## Step 31" + told)


@pytest.mark.parametrize("packing", ["crops", "documents"])
def test_texts_go_on_from_what_validates_by_a_seeded_draw(tmp_path, config_of, packing):
    config = config_of(max_steps=31, eval_every=31, learning_rate=0.01)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
    train(config, tmp_path / "run")
    ((_, _), (_, part)) = samples.read(tmp_path / "run" / samples.FILE)
    loaded = load_model(tmp_path / "run", "last")
    valid = prepare(config, tmp_path / "run", loaded.tokenizers).valid
    prompts = samples.prompts(valid, loaded.tokenizers.target, config.train.samples)
    how = {
        "temperature": samples.TEMPERATURE,
        "max_new_tokens": config.generation.max_new_tokens,
        "past_context": "slide",
    }
    texts = Engine(*loaded).generate(prompts, seed=config.seed, **how)
    told = "".join(f"prompt{prompt}goeson{new.text}" for prompt, new in zip(prompts, texts, strict=True))
    assert visible(part) == visible("## Step 31" + told)


def tokens(*texts: str) -> np.ndarray:
    encode = Tokenizer.train("byte", []).encode
    return np.array([token for text in texts for token in encode(text, bos=True, eos=True)], np.uint16)


@pytest.mark.parametrize("batch_tokens", [14, 140, 1400])
def test_prompts_are_spread_over_the_text_whatever_the_batches(batch_tokens):
    text = "".join(f"{number:03}" for number in range(500))
    valid = Windows(tokens(text), 14, batch_tokens)
    found = samples.prompts(valid, Tokenizer.train("byte", []), 5)
    assert all(len(prompt) in (6, 7) and prompt in text for prompt in found)
    places = [text.index(prompt) for prompt in found]
    assert places[0] == 0
    assert all(later > place + 14 for place, later in itertools.pairwise(places))
    assert places[-1] > 1100


def test_a_prompt_is_whole_characters_of_one_document():
    valid = Packed(tokens("aé" * 3, "bé" * 3), 31, 31, None)
    assert samples.prompts(valid, Tokenizer.train("byte", []), 1) == ["aéa"]  # half of 10 tokens, the first of them BOS


class End(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("at", [3, 4, 6])
def test_what_a_resumed_run_writes_again_stands_there_once(tmp_path, config_of, at, monkeypatch):
    config, ended = config_of(max_steps=7), Silent()

    def end(line, is_best=False):
        if line["step"] == at:
            raise End

    monkeypatch.setattr(ended, "evaluated" if at % 3 == 0 else "step", end)
    train(config, tmp_path / "whole")
    with pytest.raises(End):
        train(config, tmp_path / "parts", reporter=ended)
    train(config, tmp_path / "parts", resume=True)
    assert steps(tmp_path / "parts") == [0, 3, 6, 7]
    assert (tmp_path / "parts" / samples.FILE).read_bytes() == (tmp_path / "whole" / samples.FILE).read_bytes()


def test_no_sample_is_taken_for_a_heading_or_an_order_to_the_terminal():
    part = samples._section(7, [{"prompt": "a\n## Step 9\n\x1b[2J", "goes on": "\u2028## Step 9\x00\tb"}])
    assert [line for line in part.splitlines() if line.startswith("#")] == ["## Step 7"]
    assert "\x1b" not in part
    assert "\x00" not in part


def test_only_what_came_after_the_last_evaluation_is_cut(tmp_path):
    path = tmp_path / samples.FILE
    parts = [f"## Step {step}\n\n    some text\n\n" for step in (3, 6, 9)]
    path.write_text("".join(["# Title\n\n", *parts]), encoding="utf-8")
    samples.cut(path, Progress(step=8, evaluated=6))
    assert path.read_text(encoding="utf-8") == "".join(["# Title\n\n", *parts[:2]])
    samples.cut(tmp_path / "none.md", Progress())


def test_a_full_disk_is_told_with_the_files_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / samples.FILE
    path.write_text("# Title\n\n", encoding="utf-8")
    monkeypatch.setattr(samples, "write_text", full)
    with pytest.raises(CheckpointError, match=r"samples\.md could not be written: .*No space left"):
        samples.cut(path, Progress())
