"""What fewer bits cost: `python -m benchmarks.precision [--translator RUN] [--writer RUN] --data DIR [--json FILE]`.

DIR has multi30k/ and tinyshakespeare/. BLEU (13a, cased) of test_2016 by a run that translates; mean nats a character
of the last tenth of tinyshakespeare, in windows side by side, by a run that writes. Each precision beside fp32.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import sacrebleu
import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.measure import Row
from triglot.checkpoint import load_model
from triglot.data.corpus import read_lines
from triglot.generation.engine import load
from triglot.generation.kernels import kernels_pay
from triglot.generation.prepared import Prepared
from triglot.layers.attend import FORBIDDEN

PRECISIONS = ("fp32", "bf16", "int8", "int4")


def bleu(run: Path, data: Path, precision: Any, number: int | None) -> float:
    """Of test_2016 from raw text."""
    engine = load(run, device="cpu", precision=precision)
    sources, references = (
        list(read_lines(data / "multi30k" / f"test_2016_flickr.{side}.gz"))[:number] for side in ("en", "de")
    )
    found = [row[0].text for row in engine.translate(sources, too_long="cut")]
    return float(sacrebleu.corpus_bleu(found, [references]).score)


@torch.no_grad()
def loss(run: Path, data: Path, precision: Any, windows: int | None) -> float:
    """Of the last tenth, in windows of the training's context."""
    model, config, tokenizers = load_model(run, device="cpu")
    prepared, context = Prepared(model, precision, by_kernels=kernels_pay()), config.train.context
    text = (data / "tinyshakespeare" / "input.txt").read_text("utf-8")
    ids = torch.tensor(tokenizers.target.encode(text[int(0.9 * len(text)) :]))
    rows = ids[: (len(ids) - 1) // context * context + 1][: None if windows is None else windows * context + 1]
    inputs, wanted = rows[:-1].view(-1, context), rows[1:].view(-1, context)
    look_ahead = torch.full((context, context), FORBIDDEN).triu(1)[None, None]
    nats = 0.0
    for some, targets in zip(inputs.split(16), wanted.split(16), strict=True):
        logits = prepared.logits(prepared.decoder.whole(some, look_ahead))
        nats += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return nats / wanted.numel()


def rows_of(name: str, unit: str, values: dict[str, float]) -> list[Row]:
    """Each precision beside fp32; what stands for a ratio is the difference."""
    return [
        {
            "name": f"{name}, {precision} against fp32 (last column: difference)",
            "ours": value,
            "peer": values["fp32"],
            "ratio": value - values["fp32"],
            "unit": unit,
            "runs": 1,
        }
        for precision, value in values.items()
        if precision != "fp32"
    ]


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    data = os.environ.get("TRIGLOT_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None, metavar="DIR")
    parser.add_argument("--translator", type=Path, metavar="RUN")
    parser.add_argument("--writer", type=Path, metavar="RUN")
    options: argparse.Namespace = parser.parse_args()
    found: list[Row] = []
    if options.translator:
        number = 50 if options.quick else None
        values = {one: bleu(options.translator, options.data, one, number) for one in PRECISIONS}
        found += rows_of("test_2016", "BLEU", values)
    if options.writer:
        number = 4 if options.quick else None
        values = {one: loss(options.writer, options.data, one, number) for one in PRECISIONS}
        found += rows_of("tinyshakespeare", "nats", values)
    measure.report(found, options.json)


if __name__ == "__main__":
    main()
