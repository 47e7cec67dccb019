"""What holds for a run from its recipe to its last checkpoint, however often it is interrupted."""

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from triglot import checkpoint
from triglot.checkpoint import find_checkpoint, load_model, read_progress, read_weights, step_checkpoints
from triglot.config import RunConfig, TokenizerConfig
from triglot.errors import CheckpointError, ConfigError, DataError, TriglotError
from triglot.objective import Objective
from triglot.recipe import from_dict, load_config, to_dict
from triglot.training.metrics import Silent, read_metrics
from triglot.training.session import CHOSEN, MAY_CHANGE, Session, flat, merge, train

CPU = torch.device("cpu")
WORDS = ["ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
EXPERTS = {"num_experts": 3, "top_k": 2, "capacity_factor": 1.0}


@pytest.fixture
def data(tmp_path) -> Path:
    """Texts and pairs, a few hundred bytes of each."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(67)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    pairs = [f"{sentence}\t{' '.join(reversed(sentence.split()))}\n" for sentence in sentences]
    (folder / "pairs.tsv").write_text("".join(pairs), encoding="utf-8")
    return folder


def make_config(data: Path, kind: str = "decoder_only", experts: bool = False, **train) -> RunConfig:
    files = ["text.txt"] if kind == "decoder_only" else ["pairs.tsv"]
    shape = {"d_model": 6, "num_heads": 2, "num_layers": 1, "d_ff": 11, "max_seq_length": 61}
    values = {
        "model": {"kind": kind, **shape, "options": {"experts": EXPERTS} if experts else {}},
        "data": {
            "kind": "text" if kind == "decoder_only" else "pairs",
            "root": str(data),
            "files": files,
            "valid": 0.1,
            "document": "line",
        },
        "tokenizer": {"kind": "byte"},
        "train": {
            "max_steps": 11, "accumulate": 2, "context": 23, "batch_tokens": 230, "warmup_steps": 3, "eval_every": 3,
            "log_every": 2, "threads": 1, "precision": "fp32", "label_smoothing": 0.1,
        } | train,
        "generation": {"max_new_tokens": 5},
    }  # fmt: skip
    return from_dict(RunConfig, values)


class Crash(BaseException):
    """Stands for the end of the process."""


class Ending(Silent):
    """Ends the run after a step, by a signal or by a crash."""

    def __init__(self, step: int, by: str) -> None:
        self.at, self.by = step, by

    def step(self, line) -> None:
        if line["step"] == self.at:
            if self.by == "crash":
                raise Crash
            signal.raise_signal(signal.Signals[self.by])

    skipped = step


def untimed(run: Path) -> list[dict]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: line[key] for key in line if key not in ("seconds", "tokens_per_second")} for line in lines]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3
    return {f"{file.stem}/{name}": one for file in files for name, one in checkpoint.load_file(file).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert untimed(one) == untimed(other)
    assert (one / "samples.md").read_bytes() == (other / "samples.md").read_bytes()
    ours, theirs = find_checkpoint(one, "last"), find_checkpoint(other, "last")
    assert ours.name == theirs.name
    mine, their = all_tensors(ours), all_tensors(theirs)
    assert mine.keys() == their.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, their[name]), name
    states = [dataclasses.replace(read_progress(folder), seconds=0.0) for folder in (ours, theirs)]
    assert states[0] == states[1]
    best = [read_weights(find_checkpoint(run, "best")) for run in (one, other)]
    assert all(torch.equal(tensor, best[1][name]) for name, tensor in best[0].items())


@pytest.mark.parametrize(
    ("kind", "experts"), [(k, e) for k in ("encoder_decoder", "decoder_only") for e in (False, True)]
)
@pytest.mark.parametrize(
    "ends",
    [
        [(5, "crash")],  # after checkpoint and metrics, within a window of the log
        [(5, "SIGINT")],
        [(6, "SIGTERM")],  # an evaluation is due and not made
        [(1, "crash"), (4, "SIGINT"), (8, "crash"), (10, "SIGTERM")],  # the first one before any checkpoint
    ],
    ids=str,
)
def test_resumed_is_bit_for_bit_uninterrupted(tmp_path, data, kind, experts, ends):
    config = make_config(data, kind, experts)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train(config, whole)
    assert result.progress.epoch >= 2, "the test should cross the borders of epochs"
    resume = False
    for step, by in ends:
        try:
            assert train(config, parts, resume=resume, reporter=Ending(step, by)).signal == signal.Signals[by]
        except Crash:
            assert by == "crash"
        torch.rand(7)  # whatever the next process does first
        resume = True
    train(config, parts, resume=True)
    assert_same_run(whole, parts)


class Spoiled(Objective):
    """Gives no finite loss for the batches whose numbers of tokens leave a remainder of 1."""

    def forward(self, batch):
        totals = super().forward(batch)
        bad = self.training and totals.tokens % 3 == 1
        return totals._replace(loss=totals.loss * math.nan) if bad else totals


def test_resumed_is_uninterrupted_where_steps_are_skipped(tmp_path, data, monkeypatch):
    monkeypatch.setattr("triglot.training.session.Objective", Spoiled)
    monkeypatch.setattr("triglot.training.guard.ENOUGH", 3)
    monkeypatch.setattr("triglot.training.guard.SIGMAS", 1.0)  # so that there are spikes, too
    config = make_config(data, "encoder_decoder", max_skipped=50, max_steps=23)
    result = train(config, tmp_path / "whole")
    reasons = {line["reason"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "reason" in line}
    assert any("finite" in reason for reason in reasons)
    assert any("spike" in reason for reason in reasons)
    assert 0 < len(result.progress.skipped) < 23
    for number, (step, by) in enumerate([(5, "crash"), (10, "SIGINT"), (15, "crash")]):
        with pytest.raises(Crash) if by == "crash" else nullcontext():
            train(config, tmp_path / "parts", resume=number > 0, reporter=Ending(step, by))
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_skipped_too_much_goes_on_from_its_last_checkpoint_where_more_is_allowed(
    tmp_path, data, monkeypatch
):
    monkeypatch.setattr("triglot.training.session.Objective", Spoiled)
    config = make_config(data, "encoder_decoder", max_skipped=2)
    with pytest.raises(TriglotError, match=r"train\.max_skipped allows 2 of 128 steps"):
        train(config, tmp_path / "run")
    more = make_config(data, "encoder_decoder", max_skipped=50)
    assert train(more, tmp_path / "run", resume=True).progress.step == 11
    train(more, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resumed_in_bf16_is_bit_for_bit_uninterrupted(tmp_path, data):
    config = make_config(data, precision="bf16")
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", reporter=Ending(5, "SIGINT"))
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_ended_and_is_given_more_steps_is_one_of_so_many_steps(tmp_path, data):
    config = make_config(data, schedule="constant", log_every=1)
    longer = make_config(data, schedule="constant", log_every=1, max_steps=17)
    train(longer, tmp_path / "whole")
    train(config, tmp_path / "parts")
    train(longer, tmp_path / "parts", resume=True)
    weights = [read_weights(find_checkpoint(tmp_path / run, "last")) for run in ("whole", "parts")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_resuming_what_has_ended_changes_nothing(tmp_path, data):
    config = make_config(data)
    before = train(config, tmp_path / "run")
    files = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    metrics = untimed(tmp_path / "run")
    after = train(config, tmp_path / "run", resume=True)
    assert after.progress == before.progress
    assert untimed(tmp_path / "run") == metrics
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_runs_exit_code_tells_the_signal(tmp_path, data, name, code):
    assert train(make_config(data), tmp_path / "run", reporter=Ending(2, name)).exit_code == code
    assert find_checkpoint(tmp_path / "run", "last").name == "step-00000002"


@pytest.mark.parametrize(("by", "stopped"), [("crash", False), ("SIGINT", True)])
def test_whoever_shows_a_run_is_told_of_its_end_whatever_ends_it(tmp_path, data, by, stopped):
    told = []
    reporter = Ending(2, by)
    reporter.finish = lambda progress, stopped: told.append((progress.step, stopped))
    with pytest.raises(Crash) if by == "crash" else nullcontext():
        train(make_config(data), tmp_path / "run", reporter=reporter)
    assert told == [(2, stopped)]


def test_nothing_is_overwritten(tmp_path, data):
    config = make_config(data)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"`run` must be a new folder, since nothing is overwritten .*, but is"):
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_start_that_fails_leaves_no_folder(tmp_path, data):
    config = make_config(data)
    (data / "text.txt").unlink()
    with pytest.raises(DataError):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_cannot_be_resumed(tmp_path, data):
    with pytest.raises(CheckpointError, match=r"must be a run that was started before"):
        train(make_config(data), tmp_path / "nowhere", resume=True)


def test_resuming_another_recipe_is_refused_by_dotted_name(tmp_path, data):
    config = make_config(data)
    train(config, tmp_path / "run", reporter=Ending(2, "SIGINT"))
    other = make_config(data, learning_rate=0.5, accumulate=3, max_steps=5)
    message = r"train.accumulate \(2 there, 3 here\); train.learning_rate \(0.001 there, 0.5 here\)\.$"
    with pytest.raises(ConfigError, match=message):
        train(other, tmp_path / "run", resume=True)


def test_what_the_first_start_chose_is_kept_and_what_may_change_is_taken(data):
    open_config = make_config(data, precision="auto", threads=None, max_steps=99)
    stored = make_config(data, precision="bf16", threads=3)
    stored = dataclasses.replace(stored, model=dataclasses.replace(stored.model, vocab_size=259))
    merged = merge(open_config, stored)
    assert (merged.train.precision, merged.train.threads, merged.model.vocab_size) == ("bf16", 3, 259)
    assert merged.train.max_steps == 99
    assert {*MAY_CHANGE, *CHOSEN} <= flat(to_dict(stored)).keys()


def test_the_resolved_config_leaves_nothing_open_and_the_run_is_loaded_from_it(tmp_path, data):
    run = tmp_path / "run"
    train(make_config(data, "encoder_decoder", precision="auto", threads=None), run)
    written = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert written["train"]["precision"] in ("fp32", "bf16")
    assert written["train"]["threads"] == torch.get_num_threads()
    assert written["model"]["vocab_size"] == written["model"]["src_vocab_size"] == 259
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert environment["torch"] == torch.__version__
    loaded = load_model(run)
    assert loaded.config == load_config(run / "config.json") == load_config(find_checkpoint(run) / "config.json")
    assert loaded.tokenizers.joint


def test_a_process_killed_while_it_prepared_its_data_is_resumed_from_the_start(tmp_path, data):
    config, run = make_config(data, threads=None, precision="auto"), tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    (run / "data").mkdir()
    (run / "data" / "train.bin").write_bytes(b"half")
    assert train(config, run, resume=True).progress.step == 11
    assert load_model(run).config.model.vocab_size == 259


def test_another_pytorch_is_told_when_a_run_is_resumed(tmp_path, data):
    run, told = tmp_path / "run", []
    reporter = Ending(99, "SIGINT")
    reporter.start = lambda *given: told.append(given[-1])
    train(make_config(data), run, reporter=reporter)
    before = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    (run / "environment.json").write_text(json.dumps(before | {"torch": "1.0"}), encoding="utf-8")
    for _ in range(2):
        train(make_config(data), run, resume=True, reporter=reporter)
    assert [sum("and was 1.0" in note for note in notes) for notes in told] == [0, 1, 0]


def test_the_use_of_experts_is_logged(tmp_path, data):
    train(make_config(data, experts=True), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    for line in lines:
        found = line["experts"]
        assert 1 <= found["load_max"] <= 3
        assert 0 < found["dropped"] < 1  # factor 1 drops where the router is not even
        assert found["dead"] == 0
        assert 0 < found["entropy"] <= math.log(3)


def test_threads_are_afterwards_as_before(tmp_path, data):
    before = torch.get_num_threads()
    train(make_config(data, threads=2, max_steps=1), tmp_path / "run")
    assert torch.get_num_threads() == before


def test_a_run_may_start_from_anothers_weights_and_tokenizer(tmp_path, data):
    train(make_config(data), tmp_path / "first")
    config = make_config(data)
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, from_=str(tmp_path / "first")), seed=5)
    (tmp_path / "second").mkdir()
    session = Session(config, tmp_path / "second", CPU)
    theirs = load_model(tmp_path / "first").model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in session.model.state_dict().items())
    assert session.last is None


def test_a_run_of_another_shape_is_refused_as_a_start(tmp_path, data):
    train(make_config(data), tmp_path / "first")
    config = make_config(data)
    wider = dataclasses.replace(config.model, d_ff=13)
    config = dataclasses.replace(
        config, model=wider, init=dataclasses.replace(config.init, from_=str(tmp_path / "first"))
    )
    with pytest.raises(ConfigError, match=r"`model\.d_ff` must be 11 as in .*first, but is 13 instead"):
        train(config, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_run_that_starts_from_another_records_the_tokenizer_that_it_has_and_can_be_resumed(tmp_path, data):
    first = make_config(data)
    train(first, tmp_path / "first")
    config = dataclasses.replace(
        first,
        tokenizer=TokenizerConfig(kind="char"),
        init=dataclasses.replace(first.init, from_=str(tmp_path / "first")),
    )
    train(config, tmp_path / "second")
    assert load_config(tmp_path / "second" / "config.json").tokenizer == first.tokenizer
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=config.train.max_steps + 1))
    assert train(longer, tmp_path / "second", resume=True).progress.step == config.train.max_steps + 1


def test_evaluators_see_the_model_and_can_choose_the_best(tmp_path, data):
    scores = iter([1.0, 9.0, 4.0, 2.0])
    seen = []

    def evaluator(model, prepared, config):
        seen.append((model.training, len(prepared.valid_examples), config.train.max_steps))
        return {"bleu": next(scores)}

    config = make_config(data, "encoder_decoder", keep_best="bleu")
    result = train(config, tmp_path / "run", evaluators=[evaluator])
    assert (result.progress.best, result.progress.best_score) == ("step-00000006", 9.0)
    assert seen == [(False, 7, 11)] * 4
    assert find_checkpoint(tmp_path / "run").name == "step-00000006"


def chance(model, prepared, config) -> dict[str, float]:
    """A score as good as thrown, but the same for the same weights."""
    return {"bleu": round(1e6 * sum(weight.sum().item() for weight in model.parameters())) % 13.0}


def test_a_run_that_patience_ended_goes_on_only_where_there_is_more_of_it(tmp_path, data):
    how = {"keep_best": "bleu", "eval_every": 1, "max_steps": 211, "learning_rate": 0.01}
    config, more = (make_config(data, "encoder_decoder", patience=patience, **how) for patience in (3, 5))
    ended = train(config, tmp_path / "whole", evaluators=[chance]).progress
    assert 3 < ended.step < 211
    for number, by in enumerate(("crash", "SIGINT")):
        with pytest.raises(Crash) if by == "crash" else nullcontext():
            reporter = Ending(ended.step - 1 + number, by)
            train(config, tmp_path / "parts", resume=number > 0, reporter=reporter, evaluators=[chance])
    for _ in range(2):
        assert train(config, tmp_path / "parts", resume=True, evaluators=[chance]).progress.stale == 3
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
    train(more, tmp_path / "parts", resume=True, evaluators=[chance])
    assert train(more, tmp_path / "more", evaluators=[chance]).progress.step > ended.step
    assert untimed(tmp_path / "more") == untimed(tmp_path / "parts")


def rising(model, prepared, config) -> dict[str, float]:
    """Validation losses that rise as training goes on."""
    return {"loss": sum(weight.square().sum().item() for weight in model.parameters())}


def test_overfitting_is_told_once_however_often_a_run_is_resumed(tmp_path, data):
    config = make_config(data, eval_every=1, max_steps=31, learning_rate=0.03)
    train(config, tmp_path / "whole", evaluators=[rising])
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    (note,) = (line for line in lines if line["kind"] == "note")
    assert 4 <= note["step"] < 25
    for number, step in enumerate(range(note["step"] - 2, note["step"] + 3)):
        with pytest.raises(Crash):
            train(config, tmp_path / "parts", resume=number > 0, reporter=Ending(step, "crash"), evaluators=[rising])
    train(config, tmp_path / "parts", resume=True, evaluators=[rising])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_language_model_has_no_bleu_to_choose_by(tmp_path, data):
    with pytest.raises(ConfigError, match="keep_best"):
        train(make_config(data, keep_best="bleu"), tmp_path / "run", evaluators=[lambda *_: {}])
    assert not (tmp_path / "run").exists()


def test_training_learns_the_text(tmp_path, data):
    train(make_config(data, max_steps=61, learning_rate=0.03), tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert losses[-1] < losses[0] - 1


PROGRAM = """
import sys, torch
from pathlib import Path
from triglot.recipe import load_config
from triglot.training.session import train
sys.exit(train(load_config(Path(sys.argv[1])), Path(sys.argv[2]), resume=sys.argv[3] == "resume").exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_process_that_is_killed_leaves_a_run_that_goes_on_as_if_nothing_had_been(tmp_path, data, name):
    config = make_config(data, max_steps=401, eval_every=7)
    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, path, run, "start"])
    while len(step_checkpoints(run)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    assert process.wait() == {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[name]
    assert subprocess.run([sys.executable, "-c", PROGRAM, path, run, "resume"], check=False).returncode == 0
    assert train(config, tmp_path / "whole").exit_code == 0
    assert_same_run(tmp_path / "whole", run)
