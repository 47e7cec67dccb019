"""What holds for what training tells."""

import json

import pytest
import torch

from triglot.checkpoint import Progress
from triglot.objective import ExpertStats
from triglot.training.metrics import MetricsLog, describe_experts, mean_load


def test_the_metrics_are_cut_behind_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for line in [{"kind": kind, "step": step} for step in (1, 2, 3) for kind in ("train", "eval", "note", "skipped")]:
        log.write(line)
    log.write({"kind": "eval", "step": 2})
    with log.path.open("a") as file:
        file.write('{"kind": "tra')
    log.cut(Progress(step=2, evaluated=1))
    kept = [(line["kind"], line["step"]) for line in map(json.loads, log.path.read_text().splitlines())]
    assert kept == [("train", 1), ("eval", 1), ("note", 1), ("skipped", 1), ("train", 2), ("skipped", 2)]


def test_experts_that_no_token_chose_are_dead_and_an_even_load_is_one():
    load = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5]])
    layers, one = torch.tensor([0.1, 0.3]), torch.tensor(1.0)
    choices = torch.tensor([8.0, 4.0])
    stats = [ExpertStats(load, choices, layers, layers, value, one) for value in (one, 3 * one)]
    found = describe_experts(stats)
    assert (found["load_max"], found["dead"], found["balance"]) == (2.0, 2, 2.0)
    assert found["entropy"] == pytest.approx(0.2)
    assert found["load"] == load.tolist()
    even = [ExpertStats(load[:1], choices[:1], layers[:1], layers[:1], one, one)]
    assert describe_experts(even)["load_max"] == 1
    small, large = (ExpertStats(torch.tensor([share]), torch.tensor([size]), layers[:1], layers[:1], one, one)
                    for share, size in (([1.0, 0.0], 1.0), ([0.0, 1.0], 3.0)))  # fmt: skip
    torch.testing.assert_close(mean_load([small, large]), torch.tensor([[0.25, 0.75]]))
