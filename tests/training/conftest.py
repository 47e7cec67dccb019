"""What the tests of whole runs share: small data, recipes over it, and what of a run must be the same again.

Nothing of triglot is imported here before a fixture runs, so that jaxtyping's hook comes first.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODELS = {
    "encoder-decoder": {"kind": "encoder_decoder"},
    "decoder-only": {"kind": "decoder_only"},
    "experts": {
        "kind": "decoder_only",
        "options": {"experts": {"num_experts": 3, "capacity_factor": 1.0, "router": "sigmoid"}},
    },
}
SHAPE = {"d_model": 6, "num_heads": 2, "num_layers": 1, "d_ff": 11, "max_seq_length": 61}
TRAIN = {
    "max_steps": 23, "accumulate": 2, "context": 23, "batch_tokens": 230, "warmup_steps": 3, "eval_every": 3,
    "log_every": 1, "threads": 1, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """Texts and pairs, some thousand bytes of each."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("data")
    lines = [" ".join(draw.choices(["ein", "zwei", "drei", "vier", "fünf"], k=draw.randint(1, 7))) for _ in range(97)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "pairs.tsv").write_text("".join(f"{line}\t{line[::-1]}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session", params=MODELS)
def architecture(request: pytest.FixtureRequest) -> str:
    """The three architectures in turn, by name."""
    return request.param


@pytest.fixture(scope="session")
def config_of(small_data) -> Callable[..., Any]:
    """Makes the RunConfig of an architecture, with other values of [train]."""

    def make(model: str = "decoder-only", **train: Any) -> Any:
        from triglot.config import RunConfig
        from triglot.recipe import from_dict

        pairs = model == "encoder-decoder"
        source = {"kind": "pairs", "files": ["pairs.tsv"]} if pairs else {"kind": "text", "files": ["text.txt"]}
        values = {
            "model": MODELS[model] | SHAPE,
            "data": {"root": str(small_data), "valid": 0.1, "document": "line", **source},
            "tokenizer": {"kind": "byte"},
            "train": TRAIN | train,
            "generation": {"max_new_tokens": 5},
        }
        return from_dict(RunConfig, values)

    return make


@pytest.fixture(scope="session")
def content_of() -> Callable[[Path], dict[str, str]]:
    """Hashes the files of a run."""
    return _content_of


def _content_of(run: Path) -> dict[str, str]:
    """The SHA-256 of each file that training goes on from; of those that tell times, of all the rest in them."""
    from triglot.checkpoint import find_checkpoint, read_progress
    from triglot.training.metrics import read_metrics

    last = find_checkpoint(run, "last")
    files = [*last.glob("*.safetensors"), last / "config.json", find_checkpoint(run) / "model.safetensors"]
    files += [run / "config.json", run / "tokenizer.json", *(run / "data").iterdir(), *run.glob("samples.md")]
    contents = {str(path.relative_to(run)): path.read_bytes() for path in files}
    lines = [_untimed(line) for line in read_metrics(run / "metrics.jsonl")]  # each step's loss: the order of the data
    told = {"metrics": lines, "state": _untimed(dataclasses.asdict(read_progress(last)))}
    contents |= {name: json.dumps(value).encode() for name, value in told.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


def _untimed(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
