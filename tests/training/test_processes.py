"""What holds for a run that several processes train: it is the one that a single process trains."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from triglot.checkpoint import find_checkpoint, load_file, load_model, read_config, read_progress, step_checkpoints
from triglot.config import RunConfig
from triglot.data.prepare import prepare
from triglot.errors import ConfigError
from triglot.recipe import from_dict
from triglot.training import samples
from triglot.training.metrics import read_metrics
from triglot.training.session import check, train

SIZE = 2
WORDS = ["ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
EXPERTS = {"num_experts": 5, "top_k": 2, "every": 2, "capacity_factor": 1.0, "router": "sigmoid", "shared": 1}
PROGRAM = """
import json, os, sys
from pathlib import Path
from triglot.config import RunConfig
from triglot.recipe import from_dict
from triglot.training.session import train
for port, (values, run, resume) in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    code = train(from_dict(RunConfig, values), Path(run), resume=resume, device="cpu").exit_code
sys.exit(code)
"""


def free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Processes:
    """As many as train together, each of which trains the given runs one after another."""

    def __init__(self, *runs: tuple[dict, Path, bool]) -> None:
        jobs = [(values, str(run), resume) for values, run, resume in runs]
        told = json.dumps(list(zip(free_ports(len(jobs)), jobs, strict=True)))
        around = os.environ | {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1"}
        self.all = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", PROGRAM, told],
                env=around | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(SIZE)
        ]

    def end(self) -> list[tuple[int, str]]:
        """Exit code and what was said on the error stream, of each."""
        try:
            told = [process.communicate(timeout=240)[1] for process in self.all]
            return [(process.returncode, said) for process, said in zip(self.all, told, strict=True)]
        finally:
            for process in self.all:
                process.kill()


def config_values(data: Path, kind: str, experts: bool, **train) -> dict:
    shape = {"d_model": 6, "num_heads": 2, "num_layers": 3, "d_ff": 11, "max_seq_length": 61}
    return {
        "model": {
            "kind": kind,
            **shape,
            "dropout": train.pop("dropout", 0.0),
            "options": {
                "bias": False,  # no bias of a key changes a softmax: Adam would make steps of what is rounding alone
                "tie_embeddings": kind == "encoder_decoder",
                "experts": EXPERTS if experts else None,
            },
        },
        "data": {
            "kind": "text" if kind == "decoder_only" else "pairs",
            "root": str(data),
            "files": ["text.txt"] if kind == "decoder_only" else ["pairs.tsv"],
            "valid": 0.1,
            "document": "line",
        },
        "tokenizer": {"kind": "byte"},
        "train": {
            "max_steps": 7, "accumulate": 2, "context": 23, "batch_tokens": 251, "warmup_steps": 3, "eval_every": 3,
            "log_every": 1, "threads": 1, "precision": "fp32", "label_smoothing": 0.1, "schedule": "constant",
        } | train,
        "generation": {"max_new_tokens": 5},
    }  # fmt: skip


slow = pytest.mark.slow
CASES = [
    pytest.param(("encoder_decoder", False, {"parallel": "ddp"}), id="dense pairs, replicated", marks=slow),
    pytest.param(("decoder_only", True, {"parallel": "ddp"}), id="experts, replicated"),
    pytest.param(("decoder_only", False, {"parallel": "fsdp"}), id="dense, sharded", marks=slow),
    pytest.param(("encoder_decoder", True, {"parallel": "fsdp"}), id="experts of pairs, sharded"),
    pytest.param(("decoder_only", True, {"parallel": "fsdp", "optimizer": "muon"}), id="muon, sharded", marks=slow),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(67)]
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    pairs = [f"{sentence}\t{' '.join(reversed(sentence.split()))}\n" for sentence in sentences]
    (folder / "pairs.tsv").write_text("".join(pairs), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=CASES)
def runs(request, tmp_path_factory, data) -> Path:
    """What two processes train, and one beside them."""
    kind, experts, how = request.param
    folder = tmp_path_factory.mktemp("runs")
    values = config_values(data, kind, experts, **how)
    short = config_values(data, kind, experts, **how, max_steps=3)
    epoch = config_values(data, kind, experts, **how, max_epochs=1, accumulate=4)
    noisy = config_values(data, kind, experts, **how, dropout=0.3)
    noisy_short = config_values(data, kind, experts, **how, dropout=0.3, max_steps=3)
    train(from_dict(RunConfig, values), folder / "one")
    train(from_dict(RunConfig, short), folder / "one, then two")
    train(from_dict(RunConfig, epoch), folder / "epoch by one")
    processes = Processes(
        (values, folder / "two", False),
        (values, folder / "one, then two", True),
        (short, folder / "two, then one", False),
        (epoch, folder / "epoch by two", False),
        (noisy, folder / "noisy", False),
        (noisy_short, folder / "noisy in parts", False),
        (noisy, folder / "noisy in parts", True),
    )
    ends = processes.end()
    assert all(code == 0 and not said for code, said in ends), "\n".join(said for _, said in ends)
    train(from_dict(RunConfig, values), folder / "two, then one", resume=True)
    return folder


def tensors(run: Path, *files: str) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(run, "last")
    return {f"{file}/{name}": one for file in files for name, one in load_file(folder / f"{file}.safetensors").items()}


def assert_close(one: Path, other: Path) -> None:
    ours, theirs = tensors(one, "model", "optimizer"), tensors(other, "model", "optimizer")
    muon = read_config(find_checkpoint(one)).train.optimizer == "muon"
    atol = 1e-3 if muon else 1e-6  # Muon may orthogonalise in bf16
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=atol, msg=lambda told, name=name: name + told)
    for mine, their in zip(*(read_metrics(run / "metrics.jsonl") for run in (one, other)), strict=True):
        assert mine.keys() == their.keys()
        assert mine["kind"] == their["kind"]
        loads = [line.get("experts", {}).pop("load", []) for line in (mine, their)]
        torch.testing.assert_close(*map(torch.tensor, loads), rtol=0, atol=2e-4)
        for key in mine.keys() - {"kind", "seconds", "tokens_per_second"}:
            assert mine[key] == pytest.approx(their[key], rel=1e-4 if muon else 1e-5), (key, mine["step"])
    mine, their = (read_progress(find_checkpoint(run, "last")) for run in (one, other))
    assert (mine.step, mine.epoch, mine.index, mine.tokens) == (their.step, their.epoch, their.index, their.tokens)


@pytest.mark.parametrize("other", ["two", "one, then two", "two, then one"])
def test_two_processes_train_what_one_trains(runs, other):
    assert_close(runs / "one", runs / other)


def test_a_last_step_that_has_not_a_batch_for_everyone_is_the_same_too(runs):
    config = read_config(find_checkpoint(runs / "epoch by two"))
    batches = prepare(config, runs / "epoch by two", load_model(runs / "epoch by two").tokenizers).train.num_batches(0)
    assert batches % SIZE == 1
    assert batches > config.train.accumulate
    assert_close(runs / "epoch by one", runs / "epoch by two")


def test_as_many_processes_go_on_bit_for_bit_with_the_dropout_of_each(runs):
    whole, parts = (tensors(runs / run, "model", "optimizer", "rng") for run in ("noisy", "noisy in parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert not torch.equal(whole["rng/cpu"], whole["rng/1/cpu"])


def test_what_several_wrote_is_loaded_like_any_other(runs):
    loaded = load_model(runs / "two")
    assert loaded.config == read_config(find_checkpoint(runs / "two"))
    assert json.loads((runs / "two" / "environment.json").read_text())["processes"] == SIZE
    assert [step for step, _ in samples.read(runs / "two" / samples.FILE)] == [0, 3, 6, 7]


def endless(data: Path, run: Path, how: str) -> Processes:
    """Processes in the middle of a run that has written a checkpoint."""
    values = config_values(data, "decoder_only", True, max_steps=10**6, eval_every=7, parallel=how)
    processes = Processes((values, run, False))
    while not step_checkpoints(run):
        assert all(process.poll() is None for process in processes.all), processes.end()
        time.sleep(0.05)
    return processes


@pytest.mark.parametrize(
    ("how", "killed"), [pytest.param("ddp", 0, marks=slow), ("ddp", 1), pytest.param("fsdp", 1, marks=slow)]
)
def test_a_process_that_is_killed_ends_the_others_and_leaves_the_last_checkpoint(tmp_path, data, how, killed):
    processes = endless(data, tmp_path / "run", how)
    processes.all[killed].kill()
    began = time.monotonic()
    ends = processes.end()
    assert time.monotonic() - began < 60, "the others should notice, and not wait until they are told"
    assert ends[killed][0] == -signal.SIGKILL
    code, said = ends[1 - killed]
    assert code > 0
    assert "This process of the run has lost another one" in said
    assert read_progress(find_checkpoint(tmp_path / "run", "last")).step % 7 == 0


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=slow)])
def test_killed_all_at_once_they_go_on_to_the_bits_of_a_run_that_was_left_alone(tmp_path, data, how):
    values = config_values(data, "decoder_only", True, dropout=0.3, max_steps=61, eval_every=3, parallel=how)
    killed = Processes((values, tmp_path / "killed", False))
    while not step_checkpoints(tmp_path / "killed"):
        time.sleep(0.01)
    for process in killed.all:
        process.kill()
    assert [code for code, _ in killed.end()] == [-signal.SIGKILL] * SIZE
    ends = Processes((values, tmp_path / "killed", True), (values, tmp_path / "whole", False)).end()
    assert all(code == 0 and not said for code, said in ends), "\n".join(said for _, said in ends)
    ours, theirs = (tensors(tmp_path / run, "model", "optimizer", "rng") for run in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_is_not_finite_ends_all_at_the_same_step_with_the_same_words(tmp_path, data):
    harm = {"learning_rate": 1e30, "warmup_steps": 0, "max_skipped": 1}
    values = config_values(data, "decoder_only", False, max_steps=100, **harm)
    ends = Processes((values, tmp_path / "run", False)).end()
    last = {said.splitlines()[-1].partition(": ")[2] for _, said in ends}
    assert all(code > 0 for code, _ in ends)
    assert len(last) == 1
    assert "had to be skipped, since" in last.pop()


@pytest.mark.parametrize(
    ("how", "asked"), [pytest.param("ddp", [1], marks=slow), pytest.param("fsdp", [0], marks=slow), ("ddp", [0, 1, 1])]
)
def test_a_stop_asked_of_any_process_ends_all_with_one_checkpoint(tmp_path, data, how, asked):
    processes = endless(data, tmp_path / "run", how)
    for rank in asked:
        processes.all[rank].send_signal(signal.SIGTERM)
    assert processes.end() == [(143, "")] * SIZE
    progress = read_progress(find_checkpoint(tmp_path / "run", "last"))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == progress.step


def test_micro_batches_that_cannot_be_shared_out_are_refused_with_what_to_set(data):
    config = from_dict(RunConfig, config_values(data, "decoder_only", False, accumulate=4))
    check(config, [], 2)
    message = r"`train.accumulate` must be divisible by the number of processes \(3\).*accumulate=3.*but is 4 instead"
    with pytest.raises(ConfigError, match=message):
        check(config, [], 3)


@slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_torchrun_trains_from_the_command_line(tmp_path, data, how):
    settings = {
        "data.root": json.dumps(str(data)), "tokenizer.kind": '"byte"', "model.num_layers": 1, "model.d_model": 16,
        "train.parallel": f'"{how}"', "train.max_steps": 7, "train.accumulate": SIZE, "train.context": 23,
        "train.batch_tokens": 251,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
    command += ["-m", "triglot", "train", "text", "--out", str(tmp_path / "run"), "--device", "cpu"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last step 7") == 1
    assert (tmp_path / "run" / "curves.png").exists()
