"""The same small models in codebases that teach: `python -m benchmarks.classics --clones DIR --data DIR [--quick]`.

Training steps in turns, each side as it is shipped on a processor: the peers in fp32 as they compute, ours in fp32 and
in the precision that it chooses. The same batches, optimizer, clipping and cross-entropy for all; the peers' classes
are taken from clones below DIR without what their files import beside torch.
"""

import __future__

import argparse
import ast
import copy
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import Work
from benchmarks.training import (
    DROPOUT,
    PAIR,
    PAIR_VOCAB,
    SMALL,
    SMOOTHING,
    adamw,
    nanogpt,
    our_decoder,
    our_steps,
    pair_batches,
    steps,
    text_batches,
)
from triglot.allocator import keep_freed_memory
from triglot.config import ModelConfig, TrainConfig
from triglot.data.batch import IGNORED, LanguageBatch, PairBatch

Precision = Literal["fp32", "bf16"]


def definitions(*files: Path) -> dict[str, Any]:
    """The classes and functions of files, later ones knowing those before; of what they import there is torch alone."""
    known: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "copy": copy}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                try:
                    exec(
                        compile(ast.Module([node], []), str(file), "exec", __future__.annotations.compiler_flag), known
                    )
                except NameError:  # a class or a default of what was not imported: none that is measured
                    continue
    return known


def llms_from_scratch(clones: Path) -> Work:
    """The GPT of LLMs-from-scratch, chapter 5."""
    names = definitions(clones / "LLMs-from-scratch/ch05/01_main-chapter-code/previous_chapters.py")
    torch.manual_seed(1)
    config = {
        "vocab_size": SMALL.vocab,
        "context_length": SMALL.context,
        "emb_dim": SMALL.width,
        "n_heads": SMALL.heads,
        "n_layers": SMALL.layers,
        "drop_rate": 0.0,
        "qkv_bias": True,
    }
    model = names["GPTModel"](config).train()

    def loss_of(batch: LanguageBatch) -> Tensor:
        return F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.targets.flatten())

    return steps(model, adamw(model), loss_of, text_batches(SMALL), "fp32")


def our_pairs(precision: Precision, batches: Sequence[PairBatch]) -> Work:
    """`Transformer` as it is by default: post-norm, sinusoids, ReLU, three tables of embeddings, dropout everywhere."""
    vocab = {"vocab_size": PAIR_VOCAB, "src_vocab_size": PAIR_VOCAB}
    config = ModelConfig(kind="encoder_decoder", **PAIR, **vocab, dropout=DROPOUT)
    return our_steps(config, TrainConfig(precision=precision, label_smoothing=SMOOTHING), batches)


def cross_entropy(logits: Tensor, batch: PairBatch) -> Tensor:
    """The loss of all translators."""
    wanted = batch.tgt_out.flatten()
    return F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, label_smoothing=SMOOTHING)


def annotated_transformer(clones: Path, batches: Sequence[PairBatch]) -> Work:
    """The model of The Annotated Transformer."""
    names = definitions(clones / "annotated-transformer/the_annotated_transformer.py")
    torch.manual_seed(1)
    shape = {"N": PAIR["num_layers"], "d_model": PAIR["d_model"], "d_ff": PAIR["d_ff"], "h": PAIR["num_heads"]}
    model = names["make_model"](PAIR_VOCAB, PAIR_VOCAB, dropout=DROPOUT, **shape).train()
    look_ahead = names["subsequent_mask"]

    def loss_of(batch: PairBatch) -> Tensor:
        src_mask, real = (batch.src != 0)[:, None], (batch.tgt_in != 0)[:, None]
        hidden = model(batch.src, batch.tgt_in, src_mask, real & look_ahead(batch.tgt_in.size(1)))
        return cross_entropy(model.generator.proj(hidden), batch)

    return steps(model, adamw(model), loss_of, batches, "fp32")


def joeynmt(clones: Path, batches: Sequence[PairBatch]) -> Work:
    """JoeyNMT's Transformer: its embeddings, encoder and decoder, pre-norm as its recipes are."""
    files = ("helpers", "builders", "embeddings", "transformer_layers", "encoders", "decoders")
    names = definitions(*(clones / f"joeynmt/joeynmt/{name}.py" for name in files))
    torch.manual_seed(1)
    shape = {"hidden_size": PAIR["d_model"], "ff_size": PAIR["d_ff"], "layer_norm": "pre", "dropout": DROPOUT}
    shape |= {"num_layers": PAIR["num_layers"], "num_heads": PAIR["num_heads"], "emb_dropout": DROPOUT}
    tables = [names["Embeddings"](PAIR["d_model"], True, PAIR_VOCAB, 0) for _ in range(2)]
    encoder, decoder = names["TransformerEncoder"](**shape), names["TransformerDecoder"](vocab_size=PAIR_VOCAB, **shape)
    model = nn.ModuleList([*tables, encoder, decoder]).train()

    def loss_of(batch: PairBatch) -> Tensor:
        src_mask, real = (batch.src != 0)[:, None], (batch.tgt_in != 0)[:, None]
        memory, _ = encoder(tables[0](batch.src), None, src_mask)
        logits, *_ = decoder(tables[1](batch.tgt_in), memory, None, src_mask, None, None, real)
        return cross_entropy(logits, batch)

    return steps(model, adamw(model), loss_of, batches, "fp32")


def works(section: str, options: argparse.Namespace) -> dict[str, Callable[[], Work]]:
    """Everyone's training steps in a section, ours first."""
    clones = options.clones
    if section == "pairs":
        batches = partial(pair_batches, options.data)
        return {
            "triglot": lambda: our_pairs("fp32", batches()),
            "triglot, bf16": lambda: our_pairs("bf16", batches()),
            "Annotated Transformer": lambda: annotated_transformer(clones, batches()),
            "JoeyNMT": lambda: joeynmt(clones, batches()),
        }
    return {
        "triglot": lambda: our_decoder("fp32"),
        "triglot, bf16": lambda: our_decoder("bf16"),
        "nanoGPT": lambda: nanogpt(clones / "nanoGPT", "fp32", fused_attention=True, compiled=False),
        "LLMs-from-scratch": lambda: llms_from_scratch(clones),
    }


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    data = os.environ.get("TRIGLOT_DATA")
    parser.add_argument("--clones", type=Path, required=True, metavar="DIR", help="clones, by their own names")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None, metavar="DIR", help="multi30k/")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        section, name = options.side
        if name.startswith("triglot"):
            keep_freed_memory()  # as `triglot train` does
        measure.serve(works(section, options)[name])
        return
    found = []
    for section in ["decoder"] + ["pairs"] * (options.data is not None):
        passed = ["--clones", str(options.clones), *(["--data", str(options.data)] if options.data else [])]
        sides = {
            name: measure.Side("benchmarks.classics", ["--side", section, name, *passed])
            for name in works(section, options)
        }
        rounds, seconds = (1, 1.0) if options.quick else (5, 5.0)
        speeds = measure.rates(sides, rounds, seconds)
        memory = {name: [side.ask(0.0)["memory"] / 2**20] for name, side in sides.items()}
        for side in sides.values():
            side.end()
        for ours in ("triglot", "triglot, bf16"):
            found += measure.rows(section, speeds, ours, "tokens/s") + measure.rows(section, memory, ours, "MiB")
    measure.report(found, options.json)


if __name__ == "__main__":
    main()
