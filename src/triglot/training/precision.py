"""The choice between fp32 and bf16, by the clock.

bf16 pays where the processor multiplies in it, and costs more than a factor of two where it does not
(pytorch issue 118499), so both are timed on a real batch.
"""

import copy
import time
from typing import Literal

import torch

from triglot.data.batch import Batch
from triglot.objective import Objective, autocast, same_randomness, to_device

Precision = Literal["fp32", "bf16"]
ROUNDS = 5
MARGIN = 0.9
"""bf16 must take less than this share of fp32's time, so that near a draw noise does not decide."""


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return any(bool(able.get(name)) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))


def faster_precision(objective: Objective, batch: Batch, device: torch.device) -> Precision:
    """Which precision's forward and backward pass takes less time, by the best of a few; changes nothing.

    A copy of the model is timed, and the random state is put back.
    """
    if not has_bf16(device):
        return "fp32"
    trial, batch = copy.deepcopy(objective).train(), to_device(batch, device)
    times: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    with same_randomness(device):
        for _ in range(1 + ROUNDS):
            for precision, seconds in times.items():
                seconds.append(_time(trial, batch, device, precision))
    best = {precision: min(seconds[1:]) for precision, seconds in times.items()}  # noise only slows
    return "bf16" if best["bf16"] < MARGIN * best["fp32"] else "fp32"


def _time(trial: Objective, batch: Batch, device: torch.device, precision: Precision) -> float:
    trial.zero_grad()
    began = time.perf_counter()
    with autocast(device, precision):
        loss = trial(batch).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
