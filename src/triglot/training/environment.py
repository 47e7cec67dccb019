"""Where a run is made, and what of that is not as it was."""

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from triglot.config import RunConfig


def environment(config: RunConfig, device: torch.device, num_processes: int) -> dict[str, Any]:
    """Where a run was made: what its last bits depend on."""
    on_gpu = device.type == "cuda"
    return {
        "triglot": version("triglot"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.cpu.get_capabilities().get("cpu_name", "cpu"),
        "processes": num_processes,
        "threads": config.train.threads,
        "precision": config.train.precision,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def changes(path: Path, now: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the run was last started, and may change its last bits."""
    if not path.exists():
        return []
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return [f"{path} is damaged, so nobody knows what has changed since the last start: {error}"]
    differing = [key for key in now if key != "started" and before.get(key) != now[key]]
    return [
        f"{key} is {now[key]} and was {before.get(key)}: results may differ in their last bits" for key in differing
    ]
