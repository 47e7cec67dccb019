"""Texts on a GPU, in bf16, beside transformers: `python -m benchmarks.gpu [--quick] [--only WORD …] [--json FILE]`.

The same weights on both sides, random ones; NEW greedy tokens after PROMPT of each text, the prompts' reading included.
Beside the speeds stands what share of the memory's bandwidth the weights come to that are read for a text by itself:
of what the maker says, and of what the GPU reads here.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import exports, measure
from benchmarks.generation import NEW, PROMPT, SHAPES, generated, prompts
from benchmarks.measure import Row, Work
from triglot.config import BlockOptions
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate, stream
from triglot.generation.captured import Captured, start_captured
from triglot.models.decoder_only import DecoderLLM

SPECIFIED = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}
"""Bytes per second, by the makers' data sheets."""
GREEDY = Sampler(temperature=0.0)
ROWS = 1, 64


def llama_shape() -> DecoderLLM:
    """Llama 2's 6.7 billion parameters (Touvron et al. 2023), at random."""
    options = BlockOptions(
        norm="rms", norm_order="pre", positions="rotary", activation="swiglu", bias=False, scale_embeddings=False
    )
    return DecoderLLM(32_000, 4096, 32, 32, 11_008, 4096, options=options).eval()


LARGE_SHAPES = SHAPES | {"Llama 2 7B": llama_shape}


def made(shape: str) -> DecoderLLM:
    """A model on the GPU, which draws its weights too."""
    with torch.device("cuda"):
        return LARGE_SHAPES[shape]().to(torch.bfloat16)


def our_texts(captured: Captured, rows: int) -> Work:
    """Greedy tokens after each prompt."""
    given, mosts = prompts(rows, below=captured.model.vocab_size), [PROMPT + NEW] * rows
    return lambda: sum(len(text.ids) for text in generate(*start_captured(captured, given, mosts), GREEDY, NEW))


def speeds(sides: dict[str, Work], turns: int) -> dict[str, list[float]]:
    """Tokens per second of all sides in turns, the first of which warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, work in sides.items():
            spent, done = timed(work)
            if turn:
                found[name].append(done / spent)
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the GPU is done, and the result."""
    results: list[Any] = []
    torch.cuda.synchronize()

    def all_of_it() -> None:
        results.append(work())
        torch.cuda.synchronize()

    return measure.seconds(all_of_it), results[0]


def bytes_read(model: DecoderLLM) -> int:
    """Of weights, for a token: all but the vectors of other tokens."""
    table = model.embedding.tokens.weight
    parts = {id(part): part.nbytes for part in model.parameters() if part is not table}
    return sum(parts.values()) + (table.nbytes if model.lm_head.weight is table else 0)


def share_rows(shape: str, captured: Captured, how: str, turns: int) -> list[Row]:
    """Weights read by the steps of one text beside what the maker says and what the GPU reads, in turns."""
    read, rates = list[float](), list[float]()
    block = torch.ones(2**30, dtype=torch.bfloat16, device="cuda")
    for turn in range(turns + 1):
        [prompt] = prompts(1, below=captured.model.vocab_size)
        tokens = stream(*start_captured(captured, [prompt], [PROMPT + NEW]), GREEDY, NEW)
        next(tokens)
        spent, done = timed(lambda: sum(1 for _ in tokens))  # noqa: B023  # called at once
        if turn:
            read.append(bytes_read(captured.model) * (done - 1) / spent)  # one step began before the first was told
            rates.append(block.nbytes / min(timed(block.sum)[0] for _ in range(5)))
    ours, most = statistics.median(read), statistics.median(rates)
    name, said = f"{shape}, {how}: weights read by steps of one text", measure.specified(SPECIFIED)
    shared = {"ours": ours / 1e9, "unit": "GB/s", "runs": turns}
    return [
        {"name": f"{name}, of the specified bandwidth", "peer": said / 1e9, "ratio": ours / said, **shared},
        {"name": f"{name}, of the measured bandwidth", "peer": most / 1e9, "ratio": ours / most, **shared},
    ]


def section_rows(shape: str, turns: int) -> list[Row]:
    """Speeds at each number of texts, and the shares of the bandwidth."""
    model = made(shape)
    ours = {how: Captured(model, compiled=how == "compiled") for how in ("compiled", "default")}
    with torch.device("cuda"):
        theirs = exports.to_transformers(model).to(torch.bfloat16)
    found = list[Row]()
    for rows in ROWS:
        sides: dict[str, Work] = {f"triglot, {how}": our_texts(captured, rows) for how, captured in ours.items()}
        sides["transformers"] = generated(theirs, torch.tensor(prompts(rows, model.vocab_size), device="cuda"))
        rates = speeds(sides, turns)
        for how in ours:
            of = {name: rates[name] for name in (f"triglot, {how}", "transformers")}
            found += measure.rows(f"{shape}, {rows} texts", of, f"triglot, {how}", "tokens/s")
    for how, captured in ours.items():
        found += share_rows(shape, captured, how, turns)
    return found


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="shapes whose names have one of these words")
    options = parser.parse_args()
    chosen = [one for one in LARGE_SHAPES if not options.only or any(word in one for word in options.only)]
    found = list[Row]()
    for shape in chosen:
        found += section_rows(shape, 1 if options.quick else 5)
        torch.cuda.empty_cache()
    measure.report(found, options.json)


if __name__ == "__main__":
    main()
