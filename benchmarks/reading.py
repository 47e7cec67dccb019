"""Lines to read: `python -m benchmarks.reading [--clones DIR] [--json FILE]`.

Counts lines of code (blank lines, comments and docstrings left out) of the files that hold a model, its training and
its decoding, here and in four codebases that teach: clones below DIR under their own names. Beside what a reader reads
stands what the command that trains imports: all modules of the project that its imports lead to.
"""

import argparse
import ast
import io
import json
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


class Project(NamedTuple):
    """A codebase: its clone's name, what to read of it by part, and what its training and decoding begin with."""

    clone: str
    parts: Mapping[str, Sequence[str]]
    entries: Sequence[str]
    """Modules, by their paths from the folder `base`."""
    base: str = "."


OURS = {
    "layers": ("attention", "masks", "positions", "feed_forward", "norm", "embedding", "initialise"),
    "experts": ("moe", "routing"),
}
"""Of `layers/`: what all three models are made of, and what the third one adds."""
MODEL = (*(f"layers/{name}.py" for name in OURS["layers"]), "blocks.py", "models/stack.py")
TRAINING = ("losses.py", "objective.py", "training/optim.py", "training/trainer.py")
DECODING = ("layers/cache.py", "decoding/sampling.py", "decoding/search.py")
HERE = {
    "language model": Project(
        ".",
        {"model": (*MODEL, "models/decoder_only.py"), "training": TRAINING, "decoding": DECODING},
        ("triglot.training.session", "triglot.generation.engine"),
        "src/triglot",
    ),
    "translator": Project(
        ".",
        {
            "model": (*MODEL, "models/encoder_decoder.py"),
            "training": TRAINING,
            "decoding": (*DECODING, "decoding/beam.py"),
        },
        ("triglot.training.session", "triglot.generation.engine"),
        "src/triglot",
    ),
    "mixture of experts": Project(
        ".", {"layer": tuple(f"layers/{name}.py" for name in OURS["experts"])}, (), "src/triglot"
    ),
}
PEERS = {
    "nanoGPT": Project(
        "nanoGPT",
        {"model": ("model.py",), "training": ("train.py", "configurator.py"), "decoding": ("sample.py",)},
        ("train", "sample", "configurator"),
    ),
    "LLMs-from-scratch": Project(
        "LLMs-from-scratch",
        {"model": ("previous_chapters.py",), "training": ("gpt_train.py",), "decoding": ("gpt_generate.py",)},
        ("gpt_train", "gpt_generate"),
        "ch05/01_main-chapter-code",
    ),
    "LLMs-from-scratch, experts": Project(
        "LLMs-from-scratch", {"model": ("gpt_with_kv_moe.py",)}, ("gpt_with_kv_moe",), "ch04/07_moe"
    ),
    "Annotated Transformer": Project(
        "annotated-transformer",
        {"model, training, decoding": ("the_annotated_transformer.py",)},
        ("the_annotated_transformer",),
    ),
    "JoeyNMT": Project(
        "joeynmt",
        {
            "model": ("embeddings.py", "transformer_layers.py", "encoders.py", "decoders.py", "model.py"),
            "training": ("loss.py", "builders.py", "training.py"),
            "decoding": ("search.py",),
        },
        ("joeynmt.training", "joeynmt.prediction"),
        "joeynmt",
    ),
}


def lines_of_code(text: str) -> int:
    """Lines with code on them; strings that stand alone are comments."""
    alone = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for one in tokens if one.type not in LAYOUT for line in range(one.start[0], one.end[0] + 1)}
    return len(lines - alone)


def count(path: Path) -> int:
    """Lines of code of a file."""
    return lines_of_code(path.read_text(encoding="utf-8"))


def by_part(project: Project, clones: Path) -> dict[str, int]:
    """Lines of each part of what a reader reads, and of all."""
    folder = clones / project.clone / project.base
    found = {part: sum(count(folder / file) for file in files) for part, files in project.parts.items()}
    return {**found, "to read": sum(found.values())}


def imported(project: Project, clones: Path) -> dict[str, int]:
    """Lines of every module that the entries lead to, by name; what is imported inside functions counts, too."""
    folder = clones / project.clone / project.base
    root = folder if not any("." in entry for entry in project.entries) else folder.parent
    found: dict[str, int] = {}
    waiting = list(project.entries)
    while waiting:
        module = waiting.pop()
        stem = root.joinpath(*module.split("."))
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        if module in found or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found[module] = lines_of_code(text)
        waiting += named(text)
    return found


def named(text: str) -> Iterator[str]:
    """What a text imports: modules, and what may be modules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)


def tests_of(folders: Sequence[Path]) -> tuple[int, int]:
    """Test functions and lines of test code below some folders."""
    files = [path for folder in folders for path in sorted(folder.rglob("*test*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in files]
    functions = [
        node
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    return len(functions), sum(map(lines_of_code, texts))


def rows(projects: Mapping[str, Project], clones: Path) -> dict[str, dict[str, int]]:
    """By project: lines of its parts, all there is to read, and all that is imported."""
    found = {}
    for name, project in projects.items():
        all_of_it = sum(imported(project, clones).values())
        found[name] = by_part(project, clones) | ({"imported": all_of_it} if all_of_it else {})
    return found


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=Path, metavar="DIR", help="clones of the other codebases, by their names")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = {f"here, {name}": row for name, row in rows(HERE, ROOT).items()}
    if options.clones:
        found |= rows(PEERS, options.clones)
        for name, folder in (("JoeyNMT", "joeynmt/test"), ("LLMs-from-scratch", "LLMs-from-scratch")):
            functions, lines = tests_of([options.clones / folder])
            found[name] |= {"test functions": functions, "test lines": lines}
    functions, lines = tests_of([ROOT / "tests"])
    found["here, tests"] = {"test functions": functions, "test lines": lines}
    for name, row in found.items():
        print(f"{name:28} {'  '.join(f'{part} {number:,}' for part, number in row.items())}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
