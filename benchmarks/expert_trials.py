"""Dense against experts at equal active parameters: `python -m benchmarks.expert_trials languages|code --out DIR`.

Paired: an arm and a seed differ from the dense run of that seed in the feed-forwards alone; data, order, steps and
schedule are the same. `languages` translates Multi30k's English into German, French and Czech by one model, told which
by a tag; `code` continues Python: the standard library and whatever packages are installed. Reported are validation
losses, the differences by seed, how even the load came out, and which expert computed which language or package.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import measure
from triglot.data.corpus import read_lines

LANGUAGES = ("de", "fr", "cs")
WIDTH, HALF = 256, 128
"""Of the dense feed-forward, and of an expert, of which a token visits two."""
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "softmax": {"num_experts": 8, "top_k": 2},
    "sigmoid": {"num_experts": 8, "top_k": 2, "router": "sigmoid", "balance_weight": 0.0, "bias_rate": 0.003},
}
COMMON = {"d_model": 128, "num_heads": 4, "dropout": 0.1}
OPTIONS = {"norm": "rms", "norm_order": "pre", "activation": "gelu", "bias": False, "tie_embeddings": True}
PACKAGES = ("numpy", "torch", "sympy", "networkx", "transformers", "matplotlib")
PACKAGE_BYTES, DOMAIN_BYTES = 4_000_000, 200_000
HELD_OUT = 8
"""Every so many-th file of a package is not trained on."""


def languages_data(data: Path, out: Path) -> dict[str, Any]:
    """Every English line with its translation and the language's tag, in turn by language."""
    for split in ("train", "val"):
        source = lines_of(data / "multi30k" / f"{split}.en.gz")
        targets = {tag: lines_of(data / "multi30k" / f"{split}.{tag}.gz") for tag in LANGUAGES}
        rows = [f"{text}\t{targets[tag][number]}\t{tag}\n" for number, text in enumerate(source) for tag in LANGUAGES]
        (out / f"{split}.tsv").write_text("".join(rows), encoding="utf-8")
    return {"kind": "pairs", "root": str(out), "files": ["train.tsv"], "valid": "val.tsv"}


def lines_of(path: Path) -> list[str]:
    """Without tabs, which stand between columns."""
    return [" ".join(line.split()) for line in read_lines(path)]


def code_data(out: Path) -> dict[str, Any]:
    """As much of the standard library and of each package; what is held out of each is a domain of the table."""
    paths, trained = sysconfig.get_paths(), list[str]()
    for name in ("stdlib", *PACKAGES):
        folder = Path(paths["stdlib"]) if name == "stdlib" else Path(paths["purelib"]) / name
        found = sorted(folder.glob("*.py" if name == "stdlib" else "**/*.py"))
        files = [file for file in found if is_text(file)]
        held = b"".join(file.read_bytes() for file in files[::HELD_OUT])[:DOMAIN_BYTES]
        (out / f"{name}.txt").write_text(held.decode(errors="ignore"), encoding="utf-8")
        size = 0
        for number, file in enumerate(files):
            size += file.stat().st_size if number % HELD_OUT else 0
            if number % HELD_OUT and size <= PACKAGE_BYTES:
                trained.append(str(file))
    return {"kind": "text", "root": "/", "files": trained, "valid": 0.02}


def is_text(path: Path) -> bool:
    """Whether there is something in a file that a tokenizer reads."""
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False


def recipe(task: str, arm: str, seed: int, data: dict[str, Any], steps: int) -> dict[str, Any]:
    """All of a run but its folder."""
    options: dict[str, Any] = dict(OPTIONS)
    if (experts := ARMS[arm]) is not None:
        options["experts"] = experts | {"d_ff": HALF}
    pairs = task == "languages"
    options |= {"output_bias": False, "attention_dropout": 0.0} if pairs else {"positions": "rotary"}
    options |= {} if pairs else {"scale_embeddings": False}
    model = COMMON | {"d_ff": WIDTH, "options": options}
    model |= {"kind": "encoder_decoder", "num_layers": 2} if pairs else {"kind": "decoder_only", "num_layers": 4}
    model |= {"max_seq_length": 128 if pairs else 256} | ({} if pairs else {"dropout": 0.0})
    return {
        "seed": seed,
        "model": model,
        "tokenizer": {"kind": "bpe", "vocab_size": 4000 if pairs else 2000},
        "data": data,
        "train": {
            "max_steps": steps, "batch_tokens": 2048, "context": 256, "learning_rate": 3e-3, "schedule": "linear",
            "warmup_steps": steps // 10, "eval_every": steps, "log_every": 10, "threads": 1, "samples": 0,
            "label_smoothing": 0.1 if pairs else 0.0, "precision": "fp32", "weight_decay": 0.01, "betas": [0.9, 0.98],
        },
    }  # fmt: skip


def as_toml(values: dict[str, Any], name: str = "") -> str:
    """A recipe's text."""
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    text = f"[{name}]\n" if name and flat else ""
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in flat.items())
    for key, value in values.items():
        text += as_toml(value, f"{name}.{key}".lstrip(".")) if isinstance(value, dict) else ""
    return text


def triglot(*arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "triglot", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def trial(task: str, arm: str, seed: int, data: dict[str, Any], out: Path, steps: int) -> dict[str, Any]:
    """Train one, unless that was done before, and look at it."""
    name = f"{task}-{arm}-{seed}"
    run = out / name
    if not (run / "curves.png").exists():
        path = out / f"{name}.toml"
        path.write_text(as_toml(recipe(task, arm, seed, data, steps)), encoding="utf-8")
        triglot("train", str(path), "--out", str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {"loss": next(line for line in reversed(lines) if line["kind"] == "eval")["loss"]}
    found["seconds"] = lines[-1]["seconds"]
    if ARMS[arm] is not None:
        files = [] if task == "languages" else [f"{path.stem}={path}" for path in sorted(out.glob("*.txt"))]
        found["domains"] = json.loads(triglot("experts", str(run), *files, "--json", "--checkpoint", "last"))
        found["table"] = triglot("experts", str(run), *files, "--checkpoint", "last")
    print(f"{name}: loss {found['loss']:.4f}, {found['seconds']:,.0f} s", flush=True)
    return found


def main() -> None:
    """Train, compare and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["languages", "code"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where data, recipes and runs go")
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds multi30k/, for languages")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = languages_data(options.data, options.out) if options.task == "languages" else code_data(options.out)
    asked = [(arm, seed) for seed in options.seeds for arm in options.arms]

    def one(asked: tuple[str, int]) -> dict[str, Any]:
        return trial(options.task, *asked, data, options.out, options.steps)

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(asked, pool.map(one, asked), strict=True))
    print("| seed | " + " | ".join(options.arms) + " |\n|---|" + "---|" * len(options.arms))
    for seed in options.seeds:
        print(f"| {seed} | " + " | ".join(f"{found[arm, seed]['loss']:.4f}" for arm in options.arms) + " |")
    for arm in options.arms:
        if arm == "dense" or "dense" not in options.arms:
            continue
        apart = [found[arm, seed]["loss"] - found["dense", seed]["loss"] for seed in options.seeds]
        slower = statistics.mean(found[arm, s]["seconds"] / found["dense", s]["seconds"] for s in options.seeds)
        spread = statistics.stdev(apart) if len(apart) > 1 else math.nan
        even = [max(found[arm, seed]["domains"]["largest"]) for seed in options.seeds]
        print(f"{arm} − dense: {statistics.mean(apart):+.4f} ± {spread:.4f} nats, {slower:.2f} × the time;", end=" ")
        print(f"fullest expert of any layer {max(even):.2f} even shares; seed {options.seeds[0]}:")
        print(found[arm, options.seeds[0]]["table"])
    print(json.dumps(measure.machine()))


if __name__ == "__main__":
    main()
