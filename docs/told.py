"""What the reference prints of the library itself: modules, commands, recipes, and the founding document's names."""

import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from made import ROOT, extent, found, say, table
from typer.main import get_command

import triglot
from benchmarks.reading import count
from triglot.cli import app
from triglot.models.document import translate_name
from triglot.models.factory import build_model, count_parameters
from triglot.recipe import load_recipe

VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value of a type that says no name of its own."""


def public_names() -> None:
    """Print what `import triglot` gives, with the first sentence of each docstring."""
    rows = []
    for name in triglot.__all__:
        found = getattr(triglot, name)
        sentence = re.split(r"(?<=[.:]) ", inspect.cleandoc(found.__doc__).replace("\n", " "))[0].rstrip(":")
        rows.append([f"[`{name}`][{found.__module__}.{name}]", sentence, f"`{found.__module__}`"])
    table(rows, ["name", "what it is", "where"])


def modules(*names: str) -> None:
    """Print the reference of modules; a package stands for all that are in it."""
    for name in names:
        inner = list(inner_modules(name))
        if not inner or has_code(name):
            say(f"\n::: {name}\n")
        modules(*inner)


def inner_modules(name: str) -> Iterator[str]:
    """The modules of a package, not those of its packages; what needs a library that is not here is one, too."""
    spec = importlib.util.find_spec(name)
    path = (spec and spec.submodule_search_locations) or []
    yield from sorted(one.name for one in pkgutil.iter_modules(path, f"{name}."))


def has_code(package: str) -> bool:
    found = importlib.import_module(package)
    return any(getattr(one, "__module__", "") == package for one in vars(found).values())


# The command line


def commands() -> None:
    """Print every command with its arguments and options, from its own help."""
    for path, command in found_commands("triglot", get_command(app)):
        given = [one for one in command.params if not one.opts[0].startswith("-")]
        words = [one.metavar if one.required else f"[{one.metavar}]" for one in given]
        say(f"\n## {path}\n\n```\n{' '.join([path, *words, '[OPTIONS]'])}\n```\n\n{command.help}\n")
        hints = get_type_hints(command.callback)
        table([option(one, hints[one.name]) for one in command.params], ["", "", "default"])


def found_commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name in sorted(inner):
        yield from found_commands(f"{path} {name}", inner[name])


def option(one: Any, hint: Any) -> list[str]:
    """An option's row: how it is written, its help, its default."""
    kind = next((part for part in get_args(hint) if part is not NoneType), hint)
    values = "|".join(str(each.value) for each in kind) if inspect.isclass(kind) and issubclass(kind, Enum) else ""
    written = one.opts[0] if one.opts[0].startswith("-") else ""
    if not getattr(one, "is_flag", False):
        written = f"{written} {one.metavar or values or VALUES[kind]}".strip()
    else:
        written = "/".join([written, *one.secondary_opts])
    default = one.default.value if isinstance(one.default, Enum) else one.default
    shown = "" if default in (None, False, "") or one.show_default is False else f"`{default}`"
    return [f"`{written}`", one.help or "", "required" if one.required else shown]


# Recipes


def recipes() -> None:
    """Print the shipped recipes: what their first comment says, and the whole file."""
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        lead = re.match(r"(?:#.*\n)+", text)
        assert lead, f"{path.name} begins without a comment that says what it is for"
        said = re.sub(r"^# ?", "", lead[0], flags=re.MULTILINE)
        say(f"\n## {path.stem}\n\n{said}\n```toml\n{text[lead.end() :].strip()}\n```\n")


# The founding document's names


def signature(path: str) -> str:
    """How a public name of ours is called: names and defaults, without types."""
    found: Any = triglot
    for part in path.split("."):
        found = getattr(found, part)
    shown, keyword_only = [], False
    for one in inspect.signature(found).parameters.values():
        if one.name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        default = "" if one.default is one.empty else f"={one.default!r}"
        shown.append(one.name + ("=…" if len(default) > 12 else default))
    return f"({', '.join(shown)})"


def names(document: str) -> None:
    """Print the document's names, of lines `theirs | ours | what is different`, beside ours with its whole call form.

    Ours is a public name, or a text in parentheses where there is none.
    """
    for line in document.strip().splitlines():
        theirs, ours, different = (part.strip() for part in line.split("|"))
        ours = ours[1:-1] if ours.startswith("(") else f"`{ours}{signature(ours)}`"
        say(f"\n`{theirs}`\n:   → {ours}" + f"<br>{different}" * bool(different))


def weights(document: str) -> None:
    """Print what tensors that the document's code saved are called here."""
    table([[f"`{name}`", f"`{translate_name(name)}`"] for name in document.split()], ["saved as", "here"])


def size_of(recipe: str) -> None:
    """Print how large a recipe's model is, before any data is read."""
    found = load_recipe(ROOT / "recipes" / f"{recipe}.toml")
    config, vocab = found.model, found.tokenizer.vocab_size
    with torch.device("meta"):
        model = build_model(replace(config, vocab_size=vocab, src_vocab_size=vocab))
    shape = f"{config.num_layers} layers of width {config.d_model} with {config.num_heads} heads"
    say(f"`{recipe}` is a model of {shape}: {count_parameters(model):,} parameters with {vocab:,} pieces of text.\n")


# Readability

PATH = {
    "layers/attention.py": "scaled dot products, several heads",
    "layers/masks.py": "who may attend to whom",
    "layers/positions.py": "where a token stands",
    "layers/feed_forward.py": "what happens at each position",
    "layers/norm.py": "norms, and the residual connection around every sublayer",
    "layers/embedding.py": "tokens to vectors",
    "layers/initialise.py": "weights before training",
    "layers/moe.py": "the mixture of experts",
    "layers/routing.py": "which expert computes which token",
    "blocks.py": "the body of all blocks",
    "models/stack.py": "blocks over one another",
    "models/encoder_decoder.py": "`Transformer`",
    "models/decoder_only.py": "`DecoderLLM`",
    "losses.py": "what training minimises",
}
"""What one reads to know the three models, in this order."""


def reading_path() -> tuple[int, int]:
    """Print the files of the reading path with their lines; all lines, and lines of code."""
    source = ROOT / "src" / "triglot"
    rows = [[f"`{name}`", why, whole_lines(source / name), count(source / name)] for name, why in PATH.items()]
    whole, code = (sum(row[at] for row in rows) for at in (2, 3))
    table([*rows, ["**together**", "", whole, code]], ["", "", "lines", "of code"])
    return whole, code


def by_package() -> tuple[int, int]:
    """Print the lines of `src` by package, the largest first; all lines, and lines of code."""
    source = ROOT / "src" / "triglot"
    rows = []
    for path in sorted(source.iterdir()):
        files = list(path.rglob("*.py")) if path.is_dir() else [path] * (path.suffix == ".py")
        if files:
            sizes = [sum(map(one, files)) for one in (whole_lines, count)]
            rows.append([f"`{path.name}{'/' * path.is_dir()}`", len(files), *sizes])
    rows.sort(key=lambda row: -row[3])
    files, whole, code = (sum(row[at] for row in rows) for at in (1, 2, 3))
    table([["**together**", files, whole, code], *rows], ["", "files", "lines", "of code"])
    return whole, code


def outside(packages: Collection[str]) -> tuple[int, int]:
    """Lines of `src` that are in none of these packages; all lines, and lines of code."""
    source = ROOT / "src" / "triglot"
    files = [path for path in source.rglob("*.py") if path.relative_to(source).parts[0] not in packages]
    return sum(map(whole_lines, files)), sum(map(count, files))


def whole_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def questions(text: str) -> None:
    """Print questions, each with its answer and the places that give it folded away.

    `text` has three lines for each: the question, the answer, and the places as `module:name`; a place that does not
    exist ends the build.
    """
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    for number, (question, answer, places) in enumerate(blocks, 1):
        shown = []
        for place in places.split():
            module, name = place.split(":")
            path, _, node = found(module, name)
            shown.append(f"`{path.relative_to(ROOT / 'src' / 'triglot')}` line {extent(node)[0]}, `{name}`")
        say(f'\n??? question "{number}. {question}"\n\n    {answer}\n\n    {"; ".join(shown)}\n')
