"""A board shows what metrics.jsonl says, each step once, and a run does not know of it."""

import sys

import pytest

from triglot.recipe import flat
from triglot.training.metrics import Silent, read_metrics
from triglot.training.session import train


@pytest.fixture
def board() -> type:
    pytest.importorskip("tensorboard", reason="event files need tensorboard, and there is none here")
    from triglot.training.board import Board

    return Board


class End(BaseException):
    """The end of a process."""


class Ending(Silent):
    """Ends the process after a step, or after its evaluation."""

    def __init__(self, step: int, after: str) -> None:
        self.at, self.after = step, after

    def step(self, line) -> None:
        if (line["step"], self.after) == (self.at, line["kind"]):
            raise End

    def evaluated(self, line, is_best) -> None:
        self.step(line)


def shown(run) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all scalars, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(run) -> dict[str, list[tuple[int, float]]]:
    """The same, as metrics.jsonl has it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run / "metrics.jsonl"):
        for name, value in flat(line).items():
            if name not in ("step", "kind", "experts.load", "experts/load"):
                found.setdefault(f"{line['kind']}/{name}", []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_a_board_shows_the_metrics_and_the_run_is_as_without_it(tmp_path, board, config_of, content_of, architecture):
    config = config_of(architecture, max_steps=7, log_every=2)
    for name, how in (("with", {"log": board}), ("without", {})):
        train(config, tmp_path / name, **how)
    assert shown(tmp_path / "with") == logged(tmp_path / "with")
    assert {"train/loss", "train/learning_rate", "eval/loss"} <= shown(tmp_path / "with").keys()
    assert ("train/experts.load_max" in shown(tmp_path / "with")) == (architecture == "experts")
    assert content_of(tmp_path / "with") == content_of(tmp_path / "without")


def test_a_resumed_run_goes_on_with_each_step_once(tmp_path, board, config_of):
    config, longer = config_of(max_steps=10), config_of(max_steps=13)
    ends = [(2, "train"), (3, "eval"), (5, "train"), (6, "eval")]
    for number, end in enumerate(ends):
        with pytest.raises(End):
            train(config, tmp_path / "run", resume=number > 0, reporter=Ending(*end), log=board)
    for now in (config, config, longer):
        train(now, tmp_path / "run", resume=True, log=board)
        assert shown(tmp_path / "run") == logged(tmp_path / "run")
    assert [step for step, _ in shown(tmp_path / "run")["eval/loss"]] == [3, 6, 9, 10, 12, 13]


def test_without_tensorboard_it_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from triglot.cli import app

    for name in ("torch.utils.tensorboard", "triglot.training.board"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    command = ["train", "demo-stdlib", "--tensorboard", "--out", str(tmp_path / "run"), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "`--tensorboard` must be left out where `pip install 'triglot[tensorboard]'` was not done" in result.stderr
    assert not (tmp_path / "run").exists()
