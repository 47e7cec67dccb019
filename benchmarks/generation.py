"""Decoding beside peers: `python -m benchmarks.generation [--quick] [--json FILE] [--data DIR --run RUN]`.

The same weights on all sides, the same rule of when to stop, decoding alone is timed (ids in, ids out). RUN is a run of
the recipe multi30k-en-de-marian, whose sentences of test_2016 are translated; the decoder-only shapes have random
weights. Every side takes the best of its settings (precision, workers and threads, batch), found in a first turn.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, exports, measure
from benchmarks.measure import Row, Work
from triglot.allocator import keep_freed_memory
from triglot.checkpoint import load_model
from triglot.config import BlockOptions
from triglot.data.corpus import read_lines
from triglot.decoding.beam import BeamSearch
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Decoded, generate, stream
from triglot.generation.compiled import Compiled, start_compiled
from triglot.generation.kernels import kernels_pay
from triglot.generation.prepared import Prepared
from triglot.generation.steps import search, start_texts
from triglot.generation.workers import Search, Workers
from triglot.models.decoder_only import DecoderLLM

BOS, EOS = exports.BOS, exports.EOS
LIMIT = 100
"""Tokens of a translation at most."""
PROMPT, NEW = 32, 128
TURNS = 9
"""Of steps and readings of the memory."""
PACKAGES = {
    "transformers": ("transformers",),
    "CTranslate2": ("ctranslate2",),
    "llama.cpp": ("llama-cpp-python", "gguf"),
    "OpenVINO GenAI": ("openvino-genai", "nncf", "gguf"),
}
UNHELD = ("llama.cpp", "OpenVINO GenAI")


def our_model(model: Any, precision: Any, by_kernels: bool | None, banned: Sequence[int] = ()) -> Prepared:
    """Ready to decode: by kernels where they pay, as `triglot.load` has it, if nothing else is said."""
    by_kernels = kernels_pay() if by_kernels is None else by_kernels
    return Prepared(model, precision, banned, by_kernels=by_kernels)


# Translation


def sources_of(run: Path, data: Path, number: int | None) -> list[list[int]]:
    """The ids of test_2016's English sentences."""
    _, _, tokenizers = load_model(run)
    lines = list(read_lines(data / "multi30k" / "test_2016_flickr.en.gz"))[:number]
    return tokenizers.encode_sources(lines, [None] * len(lines))


def our_search(run: Path, precision: Any, by_kernels: bool | None = None) -> Search:
    """A worker's search."""
    keep_freed_memory()
    model, _, tokenizers = load_model(run)
    prepared = our_model(model, precision, by_kernels, tokenizers.target.ids.banned)

    def find(sources: list[list[int]], how: BeamSearch, limit: int) -> list[list[Decoded]]:
        return search(prepared, sources, [limit] * len(sources), how, BOS)

    return find


def our_translations(
    run: Path, sources: list[list[int]], beam: int, precision: str, by_kernels: bool | None, workers: int
) -> Work:
    """Tokens of the best hypotheses of all sources."""
    how = BeamSearch(beam=beam, eos_ids=[EOS], patience=1.0, scored=False)  # nor does CTranslate2 tell scores
    if workers == 1:
        find = our_search(run, precision, by_kernels)
    else:
        pool = Workers(partial(our_search, run, precision, by_kernels), workers)
        find = pool.search
    return lambda: sum(len(texts[0].ids) for texts in find(sources, how, LIMIT))


def ctranslate2_translations(
    run: Path, sources: list[list[int]], beam: int, precision: str, workers: int, threads: int, batch: int
) -> Work:
    """The same by CTranslate2; with patience above 1 it waits, as the others do, until `beam` texts have finished."""
    import ctranslate2

    folder = Path(tempfile.mkdtemp())
    exports.to_ctranslate2(load_model(run).model, folder)
    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=precision, inter_threads=workers, intra_threads=threads
    )
    words = [[str(token) for token in ids] for ids in sources]

    def work() -> int:
        found = translator.translate_batch(
            words,
            beam_size=beam,
            max_batch_size=batch,
            patience=1.0001 if beam > 1 else 1,
            length_penalty=1,
            max_decoding_length=LIMIT,
        )
        return sum(len(one.hypotheses[0]) + 1 for one in found)

    return work


def transformers_translations(run: Path, sources: list[list[int]], beam: int, batch: int) -> Work:
    """The same by transformers, sentences of like lengths together."""
    model = exports.to_transformers(load_model(run).model)
    rows = sorted(sources, key=len, reverse=True)

    @torch.no_grad()
    def work() -> int:
        done = 0
        for first in range(0, len(rows), batch):
            some = [torch.tensor(ids) for ids in rows[first : first + batch]]
            src = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=exports.PAD)
            found = model.generate(
                input_ids=src,
                attention_mask=(src != exports.PAD).long(),
                num_beams=beam,
                early_stopping=beam > 1,
                length_penalty=1.0,
                max_new_tokens=LIMIT,
                do_sample=False,
            )
            done += int((found[:, 1:] != exports.PAD).sum())
        return done

    return work


def translation_settings(options: argparse.Namespace, beam: int) -> dict[str, dict[str, Callable[[], Work]]]:
    """Everyone's settings."""
    if options.run is None or options.data is None:
        return {}
    run, sources = options.run, partial(sources_of, options.run, options.data, 100 if options.quick else None)

    def ours(by_kernels: bool | None) -> dict[str, Callable[[], Work]]:
        return {
            f"{precision}, {workers} × {2 // workers}": partial(
                _ours, run, sources, beam, precision, by_kernels, workers
            )
            for precision in ("fp32", "bf16", "int8")
            for workers in (1, 2)
        }

    theirs = {
        f"{precision}, {workers} × {threads}, batch {batch}": partial(
            _theirs, run, sources, beam, precision, workers, threads, batch
        )
        for precision, batches in (("float32", (64,)), ("int8", (8, 16, 32, 64)))
        for workers, threads in ((2, 1),)  # 1 × 2 has a third of its speed
        for batch in batches
    }
    plain = {f"fp32, batch {batch}": partial(_transformers, run, sources, beam, batch) for batch in (32, 64)}
    return {
        "triglot": ours(by_kernels=None),
        "triglot, without kernels": ours(by_kernels=False),
        "transformers": plain,
        "CTranslate2": theirs,
    }


def _ours(run: Path, sources: Callable[[], list[list[int]]], *how: Any) -> Work:
    return our_translations(run, sources(), *how)


def _theirs(run: Path, sources: Callable[[], list[list[int]]], *how: Any) -> Work:
    return ctranslate2_translations(run, sources(), *how)


def _transformers(run: Path, sources: Callable[[], list[list[int]]], beam: int, batch: int) -> Work:
    return transformers_translations(run, sources(), beam, batch)


# Decoder-only


def gpt2_shape() -> DecoderLLM:
    """GPT-2's 124 million parameters, at random."""
    torch.manual_seed(1)
    options = BlockOptions(
        norm_order="pre", positions="learned", activation="gelu", tie_embeddings=True, scale_embeddings=False
    )
    return DecoderLLM(50257, 768, 12, 12, 3072, 1024, options=options).eval()


def smollm2_shape() -> DecoderLLM:
    """SmolLM2's 135 million parameters, at random."""
    torch.manual_seed(1)
    options = BlockOptions(
        norm="rms",
        norm_order="pre",
        positions="rotary",
        activation="swiglu",
        num_kv_heads=3,
        bias=False,
        tie_embeddings=True,
        scale_embeddings=False,
    )
    return DecoderLLM(49152, 576, 9, 30, 1536, 2048, options=options).eval()


SHAPES = {"GPT-2 124M": gpt2_shape, "SmolLM2 135M": smollm2_shape}


def prompts(rows: int, below: int = 49152) -> list[list[int]]:
    """Random ones."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(3, below, (rows, PROMPT), generator=draw).tolist()


def our_texts(shape: str, rows: int, precision: Any, compiles: bool = False, by_kernels: bool | None = None) -> Work:
    """Greedy tokens after each prompt."""
    keep_freed_memory()
    model, sampler = SHAPES[shape](), Sampler(temperature=0.0)
    prepared = our_model(model, precision, by_kernels)
    start = partial(start_compiled, Compiled(model, precision)) if compiles else start_texts

    def work() -> int:
        first, steps = start(prepared, prompts(rows), PROMPT + NEW)
        return sum(len(text.ids) for text in generate(first, steps, sampler, NEW))

    return work


def ctranslate2_texts(shape: str, rows: int, precision: str) -> Work:
    """The same by CTranslate2."""
    import ctranslate2

    folder = Path(tempfile.mkdtemp())
    exports.to_ctranslate2(SHAPES[shape](), folder)
    generator = ctranslate2.Generator(str(folder), device="cpu", compute_type=precision, intra_threads=2)
    words = [[str(token) for token in ids] for ids in prompts(rows)]

    def work() -> int:
        found = generator.generate_batch(
            words, max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False
        )
        return sum(len(one.sequences[0]) for one in found)

    return work


def transformers_texts(shape: str, rows: int) -> Work:
    """The same by transformers."""
    return generated(exports.to_transformers(SHAPES[shape]()), torch.tensor(prompts(rows)))


def generated(model: Any, ids: torch.Tensor) -> Work:
    """Greedy tokens of transformers' model after each prompt."""

    @torch.no_grad()
    def work() -> int:
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
        return found[:, PROMPT:].numel()

    return work


def llama_cpp_texts(shape: str, rows: int, precision: str, flash: bool) -> Work:
    """The same by llama.cpp."""
    return engine_texts(
        lambda folder: engines.llama_cpp_file(SHAPES[shape](), folder, precision),
        lambda file: engines.llama_cpp(file, prompts(rows), NEW, flash),
    )


def openvino_texts(shape: str, rows: int, precision: str, backend: str) -> Work:
    """The same by OpenVINO GenAI."""
    return engine_texts(
        lambda folder: engines.openvino_folder(SHAPES[shape](), folder, precision),
        lambda folder: engines.openvino(folder, prompts(rows), NEW, backend),
    )


def engine_texts(write: Callable[[Path], Path], read: Callable[[Path], engines.Texts]) -> Work:
    """An engine that has read what is written for it."""
    with tempfile.TemporaryDirectory() as folder:
        texts = read(write(Path(folder)))
    return lambda: sum(len(text) for text in texts())


def text_settings(shape: str, rows: int, precision: str) -> dict[str, dict[str, Callable[[], Work]]]:
    """Everyone's settings; transformers and CTranslate2 have none of 4 bits, OpenVINO no GPT-2."""
    given = (shape, rows, precision)
    flash = {"without": False, "with": True}
    known: dict[str, dict[str, Callable[[], Work]]] = {
        "triglot": {precision: partial(our_texts, *given)},
        "triglot, compiled": {precision: partial(our_texts, *given, compiles=True)},
        "triglot, without kernels": {precision: partial(our_texts, *given, by_kernels=False)},
        "transformers": {"fp32": partial(transformers_texts, shape, rows)},
        "CTranslate2": {"int8": partial(ctranslate2_texts, shape, rows, "int8")},
        "llama.cpp": {
            f"{precision}, {name} flash attention": partial(llama_cpp_texts, *given, on) for name, on in flash.items()
        },
    }
    if shape.startswith("SmolLM2"):
        known["OpenVINO GenAI"] = {
            f"{precision}, {name}": partial(openvino_texts, *given, name) for name in ("SDPA", "PA")
        }
    return known


def shares_of_bandwidth(shape: str, precision: Any, *, compiles: bool) -> list[Row]:
    """Bytes of weights that steps read a second beside what the machine reads, in turns; the prompt is read before.

    Beside what it reads of as many bytes, some of them from a cache if that is large, and of memory.
    """
    model, sampler = SHAPES[shape](), Sampler(temperature=0.0)
    prepared = our_model(model, precision, by_kernels=None)
    start = partial(start_compiled, Compiled(model, precision)) if compiles else start_texts
    read, rates = list[float](), {"as many bytes": list[float](), "memory": list[float]()}
    for turn in range(TURNS + 1):
        tokens = stream(*start(prepared, prompts(1), PROMPT + NEW), sampler, NEW)
        next(tokens)  # which takes no step
        spent = measure.seconds(lambda: sum(1 for _ in tokens))  # noqa: B023  # called at once
        if turn:
            read.append(prepared.num_bytes * (NEW - 1) / spent)
            rates["as many bytes"].append(measure.read_rate(prepared.num_bytes, rounds=5))
            rates["memory"].append(measure.read_rate(rounds=3))
    ours, name = statistics.median(read), f"text: {shape}, batch 1, {'compiled, ' * compiles}{precision}"
    most = {of: statistics.median(those) for of, those in rates.items()}
    return [
        {
            "name": f"{name}: weights read by steps, of what the machine reads of {of}",
            "ours": ours / 1e9,
            "peer": rate / 1e9,
            "ratio": ours / rate,
            "unit": "GB/s",
            "runs": TURNS,
        }
        for of, rate in most.items()
    ]


# What is measured


def settings(section: str, options: argparse.Namespace) -> dict[str, dict[str, Callable[[], Work]]]:
    """Everyone's settings in a section, ours first."""
    kind, _, rest = section.partition(": ")
    if kind == "translation":
        return translation_settings(options, int(rest.removeprefix("beam ")))
    shape, rows, precision = rest.split(", ")
    return text_settings(shape, int(rows.removeprefix("batch ")), precision)


SECTIONS = ["translation: beam 5", "translation: beam 1"] + [
    f"text: {shape}, batch {rows}, {precision}"
    for shape in SHAPES
    for rows, precision in ((1, "int8"), (8, "int8"), (1, "int4"))
]


def main() -> None:
    """Measure and report."""
    parser = measure.parser(__doc__)
    data = os.environ.get("TRIGLOT_DATA")
    known = "holds multi30k/ (default: TRIGLOT_DATA)"
    parser.add_argument("--data", type=Path, default=Path(data) if data else None, metavar="DIR", help=known)
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run of the recipe multi30k-en-de-marian")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="sections whose names have one of these words")
    parser.add_argument("--laptop", action="store_true", help="hold all sides to AVX2")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        section, name, setting = options.side
        measure.serve(settings(section, options)[name][setting])
        return
    chosen = [one for one in SECTIONS if not options.only or any(word in one for word in options.only)]
    measure.report([row for section in chosen for row in section_rows(section, options)], options.json)


def section_rows(section: str, options: argparse.Namespace) -> list[Row]:
    """Speeds of all sides in turns, each with the setting that was the fastest in a first turn."""
    passed = [
        part for name in ("run", "data") if (value := getattr(options, name)) for part in (f"--{name}", str(value))
    ]
    passed += ["--quick"] * options.quick
    environment = measure.LAPTOP | {"CT2_FORCE_CPU_ISA": "AVX2"} if options.laptop else None

    def side(name: str, setting: str) -> measure.Side:
        return measure.Side("benchmarks.generation", ["--side", section, name, setting, *passed], environment)

    rounds, seconds = (1, 0.5) if options.quick else (5, 5.0)
    sides = {f"{name}, {best}": side(name, best) for name, best in bests(section, options, side).items()}
    found = measure.rates(sides, rounds, seconds)
    for one in sides.values():
        one.end()
    title = f"{section}, AVX2" if options.laptop else section
    peers = {name: speeds for name, speeds in found.items() if not name.startswith("triglot")}
    rows = list[Row]()
    for ours in (name for name in found if name.startswith("triglot")):
        rows += measure.rows(title, peers | {ours: found[ours]}, ours, "tokens/s")
        if ", batch 1" in section and not options.laptop and "without" not in ours:
            shape, _, precision = section.removeprefix("text: ").split(", ")
            rows += shares_of_bandwidth(shape, precision, compiles="compiled" in ours)
    return rows


def bests(section: str, options: argparse.Namespace, side: Callable[[str, str], measure.Side]) -> dict[str, str]:
    """The setting of each side that a first turn of each finds fastest."""
    chosen = {}
    for name, known in settings(section, options).items():
        if why := left_out(name, options):
            print(f"{section}: {name} is left out: {why}", flush=True)
            continue
        if len(known) == 1:
            chosen[name] = next(iter(known))
            continue
        speeds = {setting: first_speed(side(name, setting)) for setting in known}
        for setting, speed in speeds.items():
            print(f"{section}: {name}, {setting}: {speed:,.0f} tokens/s", flush=True)
        chosen[name] = max(speeds, key=lambda setting: speeds[setting])
    return chosen


def left_out(name: str, options: argparse.Namespace) -> str | None:
    """Why a side is not measured."""
    missing = [package for package in PACKAGES.get(name, ()) if measure.installed(package) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "it is not held to AVX2" if options.laptop and name in UNHELD else None


def first_speed(side: measure.Side) -> float:
    """The better of two turns."""
    answers = [side.ask(1.0) for _ in range(2)]
    side.end()
    return max(answer["done"] / answer["seconds"] for answer in answers)


if __name__ == "__main__":
    main()
