"""Runs on a GPU; without one these tests are left out."""

import dataclasses
import json
import math

import pytest
import torch

from tests.conftest import WARNS_OF_ITSELF
from triglot.training.session import train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.usefixtures("without_shape_checks"),
    *WARNS_OF_ITSELF,
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_and_goes_on_there(config_of, architecture, precision, tmp_path):
    config = config_of(architecture, precision=precision, max_steps=12, learning_rate=3e-3)
    run = tmp_path / "run"
    train(config, run, device="cuda")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(map(math.isfinite, losses))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=15))
    assert train(longer, run, resume=True, device="cuda").exit_code == 0
