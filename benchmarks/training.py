"""Training steps beside peers: `python -m benchmarks.training [--quick] [--json FILE] [--nanogpt DIR]`.

The same work on both sides: the same shapes, batches, dropout, AdamW (fused) and clipping; a step is forward, backward,
clip and update. nanoGPT is given as a checkout (github.com/karpathy/nanoGPT); transformers is the installed package.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import Row, Work
from triglot.allocator import keep_freed_memory
from triglot.checkpoint import Progress
from triglot.config import BlockOptions, DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from triglot.data.batch import IGNORED, Batch, LanguageBatch, PairBatch, num_targets
from triglot.data.prepare import prepare
from triglot.distributed.parallel import Parallel
from triglot.distributed.team import Team
from triglot.layers.masks import create_padding_mask
from triglot.models.factory import build_model
from triglot.objective import Objective, to_device
from triglot.training.compiling import compile_blocks
from triglot.training.metrics import MetricsLog, Silent
from triglot.training.optim import make_optimizer
from triglot.training.trainer import MicroBatch, Trainer


class Shape(NamedTuple):
    """Of a decoder and its batch."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    rows: int
    device: str = "cpu"

    @property
    def flops_per_token(self) -> float:
        """Of a training step: three times the forward pass' products, attention at half for causality."""
        per_layer = 2 * 12 * self.width**2 + 2 * 2 * self.context * self.width / 2
        return 3 * (self.layers * per_layer + 2 * self.vocab * self.width)


SMALL = Shape(6, 384, 6, 256, 256, 16)
LARGE = Shape(12, 768, 12, 1024, 50304, 16, "cuda")
"""GPT-2's 124 million parameters, for a GPU."""
SPECIFIED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Floating-point operations per second in bf16 without sparsity, by the makers' data sheets."""
PAIR = {"d_model": 128, "d_ff": 256, "num_layers": 4, "num_heads": 4, "max_seq_length": 128}
PAIR_TOKENS, PAIR_VOCAB, DROPOUT, SMOOTHING = 4096, 10_000, 0.1, 0.1


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[Any],
    precision: str,
) -> Work:
    """A peer's training steps, with the trainer's own optimizer and clipping."""
    device = next(model.parameters()).device
    turns = cycle([to_device(batch, device) for batch in batches])

    def step() -> int:
        batch = next(turns)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        return num_targets(batch)

    return step


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of the peers."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def our_steps(config: ModelConfig, train: TrainConfig, batches: Sequence[Batch], on: str = "cpu") -> Work:
    """Steps of `triglot train`, metrics and all."""
    torch.manual_seed(1)
    device = torch.device(on)
    objective = Objective(build_model(config).to(device), train.label_smoothing)
    if device.type == "cuda":
        compile_blocks(objective.model)
    folder = Path(tempfile.mkdtemp())
    trainer = Trainer(
        train,
        Parallel(Team(), objective, make_optimizer(objective.model, train)),
        data=None,  # type: ignore[arg-type]
        valid=None,  # type: ignore[arg-type]
        progress=Progress(),
        save=lambda _: None,
        evaluators=[],
        log=MetricsLog(folder / "metrics.jsonl"),
        reporter=Silent(),
        device=device,
    )
    turns = cycle(batches)

    def step() -> int:
        batch = next(turns)
        trainer.step([MicroBatch(0, 0, batch)])
        return num_targets(batch)

    return step


def cycle(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches, over and over."""
    while True:
        yield from batches


# Decoder-only, 6 × 384


def text_batches(shape: Shape) -> list[LanguageBatch]:
    """A few batches of random tokens."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.rows, shape.context + 1)
    windows = [torch.randint(3, shape.vocab, size, generator=generator) for _ in range(4)]
    return [LanguageBatch(window[:, :-1].contiguous(), window[:, 1:].contiguous(), None) for window in windows]


def our_decoder(precision: str, shape: Shape = SMALL) -> Work:
    """`DecoderLLM` as GPT-2 is built: pre-norm LayerNorm, learned positions, GELU, biases, tied embeddings."""
    options = BlockOptions(
        norm_order="pre", positions="learned", activation="gelu", tie_embeddings=True, scale_embeddings=False
    )
    config = ModelConfig(
        kind="decoder_only",
        d_model=shape.width,
        num_heads=shape.heads,
        num_layers=shape.layers,
        d_ff=4 * shape.width,
        max_seq_length=shape.context,
        vocab_size=shape.vocab,
        dropout=0.0,
        options=options,
    )
    train = TrainConfig(precision=precision, context=shape.context)  # type: ignore[arg-type]
    return our_steps(config, train, text_batches(shape), shape.device)


def nanogpt(checkout: Path, precision: str, *, fused_attention: bool, compiled: bool, shape: Shape = SMALL) -> Work:
    """nanoGPT's model; its attention written out where `fused_attention` is off, as it is without SDPA."""
    module = measure.module_of(checkout / "model.py", "nanogpt_model")
    torch.manual_seed(1)
    config = module.GPTConfig(
        block_size=shape.context,
        vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        dropout=0.0,
        bias=True,
    )
    model = module.GPT(config).to(shape.device)
    if not fused_attention:
        mask = torch.tril(torch.ones(shape.context, shape.context)).view(1, 1, shape.context, shape.context)
        for block in model.transformer.h:
            block.attn.flash = False
            block.attn.register_buffer("bias", mask)
    run = torch.compile(model) if compiled else model
    return steps(
        model, adamw(model), lambda batch: run(batch.input_ids, batch.targets)[1], text_batches(shape), precision
    )


def gpt2(precision: str) -> Work:
    """transformers' GPT-2, its attention chosen by itself."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=SMALL.vocab,
        n_positions=SMALL.context,
        n_embd=SMALL.width,
        n_layer=SMALL.layers,
        n_head=SMALL.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config).train()

    def loss_of(batch: LanguageBatch) -> Tensor:
        logits = model(batch.input_ids).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    return steps(model, adamw(model), loss_of, text_batches(SMALL), precision)


# Encoder–decoder, 4 + 4 × 128


def pair_batches(data: Path, number: int = 24) -> list[PairBatch]:
    """Batches of Multi30k English–German as training sees them, over the epoch."""
    names = {"source": "train.en.gz", "target": "train.de.gz", "valid_source": "val.en.gz", "valid_target": "val.de.gz"}
    config = RunConfig(
        model=ModelConfig(kind="encoder_decoder", **PAIR),
        data=DataConfig(kind="pairs", root=str(data / "multi30k"), **names),
        tokenizer=TokenizerConfig(vocab_size=PAIR_VOCAB),
        train=TrainConfig(batch_tokens=PAIR_TOKENS),
    )
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config, Path(folder), None)
        batches = list(prepared.train.epoch(0))
    return batches[:: max(1, len(batches) // number)][:number]  # type: ignore[return-value]


def our_translator(precision: str, batches: Sequence[PairBatch]) -> Work:
    """`Transformer` as Marian is built: post-norm, sinusoids, ReLU, three-way tied embeddings."""
    options = BlockOptions(tie_embeddings=True, attention_dropout=0.0, activation_dropout=0.0)
    config = ModelConfig(
        kind="encoder_decoder",
        **PAIR,
        vocab_size=PAIR_VOCAB,
        src_vocab_size=PAIR_VOCAB,
        dropout=DROPOUT,
        options=options,
    )
    train = TrainConfig(precision=precision, label_smoothing=SMOOTHING, batch_tokens=PAIR_TOKENS)  # type: ignore[arg-type]
    return our_steps(config, train, batches)


def marian(precision: str, batches: Sequence[PairBatch]) -> Work:
    """transformers' Marian, its attention chosen by itself."""
    import transformers

    torch.manual_seed(1)
    config = transformers.MarianConfig(
        vocab_size=PAIR_VOCAB,
        d_model=PAIR["d_model"],
        encoder_layers=PAIR["num_layers"],
        decoder_layers=PAIR["num_layers"],
        encoder_attention_heads=PAIR["num_heads"],
        decoder_attention_heads=PAIR["num_heads"],
        encoder_ffn_dim=PAIR["d_ff"],
        decoder_ffn_dim=PAIR["d_ff"],
        max_position_embeddings=PAIR["max_seq_length"],
        activation_function="relu",
        scale_embedding=True,
        dropout=DROPOUT,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        use_cache=False,
    )
    model = transformers.MarianMTModel(config).train()

    def loss_of(batch: PairBatch) -> Tensor:
        logits = model(
            input_ids=batch.src,
            attention_mask=create_padding_mask(batch.src)[:, 0, 0].long(),
            decoder_input_ids=batch.tgt_in,
        ).logits
        wanted = batch.tgt_out.flatten()
        return F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, label_smoothing=SMOOTHING)

    return steps(model, adamw(model), loss_of, batches, precision)


# What is measured


def works(section: str, options: argparse.Namespace) -> dict[str, Callable[[], Work]]:
    """Everyone's training steps in a section, ours first."""
    precision = "fp32" if options.laptop else "bf16"
    if section == "pairs":
        precisions = ["fp32"] if options.laptop else ["bf16", "fp32"]
        return {"triglot": lambda: our_translator(precision, pair_batches(options.data))} | {
            f"transformers Marian, {one}": partial(their_translator, options, one) for one in precisions
        }
    if section == "gpu":
        large = partial(nanogpt, options.nanogpt, "bf16", fused_attention=True, compiled=True, shape=LARGE)
        theirs = {} if options.nanogpt is None else {"nanoGPT, compiled": large}
        return {"triglot": lambda: our_decoder("bf16", LARGE), **theirs}
    sides = {"triglot": lambda: our_decoder(precision), "transformers GPT-2": lambda: gpt2(precision)}
    if options.nanogpt is not None:
        tuned, shipped = "nanoGPT, tuned", "nanoGPT as shipped"
        sides[tuned] = lambda: nanogpt(options.nanogpt, precision, fused_attention=False, compiled=True)
        sides[shipped] = lambda: nanogpt(options.nanogpt, "fp32", fused_attention=True, compiled=False)
    return sides


def their_translator(options: argparse.Namespace, precision: str) -> Work:
    """Marian over the same batches."""
    return marian(precision, pair_batches(options.data))


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    data = os.environ.get("TRIGLOT_DATA")
    known = "holds multi30k/ (default: TRIGLOT_DATA)"
    parser.add_argument("--data", type=Path, default=Path(data) if data else None, metavar="DIR", help=known)
    parser.add_argument("--only", nargs="+", choices=("decoder", "pairs", "gpu"), help="default: what can be")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--laptop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        section, name = options.side
        if name == "triglot":
            keep_freed_memory()  # as `triglot train` does
        measure.serve(works(section, options)[name])
        return
    possible = {"decoder": True, "pairs": options.data is not None, "gpu": torch.cuda.is_available()}
    sections = options.only or [section for section, can_be in possible.items() if can_be]
    found = list[Row]()
    for section in sections:
        for laptop in (False,) if section == "gpu" else (False, True):
            found += section_rows(section, laptop, options)
    measure.report(found, options.json)


def section_rows(section: str, laptop: bool, options: argparse.Namespace) -> list[Row]:
    """A section's rows: speed of all sides in turns, the share of the machine's matmul rate, and peak memory."""
    options.laptop = laptop
    passed = ["--nanogpt", str(options.nanogpt)] if options.nanogpt else []
    passed += ["--data", str(options.data)] if options.data else []
    passed += ["--laptop"] * laptop
    environment = measure.LAPTOP if laptop else None
    sides = {
        name: measure.Side("benchmarks.training", ["--side", section, name, *passed], environment)
        for name in works(section, options)
    }
    rounds, seconds = (1, 1.0) if options.quick else (5, 5.0)
    found = measure.rates(sides, rounds, seconds)
    memory = {name: [side.ask(0.0)["memory"] / 2**20] for name, side in sides.items()}
    for side in sides.values():
        side.end()
    title = f"{section}, {'AVX2, fp32' if laptop else 'bf16'}"
    rows = measure.rows(title, found, "triglot", "tokens/s")
    if laptop:
        return rows
    if section == "decoder":
        rate = measure.matmul_rate(torch.bfloat16)
        rows.append(share_of_rate(f"{title}: share of the matmul rate", found["triglot"], SMALL, rate))
    if section == "gpu":
        rows += [
            share_of_rate(f"{title}, {side}: share of the specified rate", speeds, LARGE, measure.specified(SPECIFIED))
            for side, speeds in found.items()
        ]
    return rows + measure.rows(f"{title}, peak memory", memory, "triglot", "MiB")


def share_of_rate(name: str, speeds: Sequence[float], shape: Shape, rate: float) -> Row:
    """How much of a rate of floating-point operations a decoder's training step comes to."""
    reached = statistics.median(speeds) * shape.flops_per_token
    return {
        "name": name,
        "ours": reached / 1e9,
        "peer": rate / 1e9,
        "ratio": reached / rate,
        "unit": "GFLOP/s",
        "runs": len(speeds),
    }


if __name__ == "__main__":
    main()
