"""Runs from the command line: made, measured, looked into, compared; and tokenizers by themselves."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from triglot.cli.base import Device, InPrecision, Precision, Run, Tag, Which, app, device_of
from triglot.errors import ConfigError, require

tokenizers_app = typer.Typer(no_args_is_help=True, help="Tokenizers by themselves.")
app.add_typer(tokenizers_app, name="tokenizer")


class Kind(StrEnum):
    """Kinds of tokenizers."""

    bpe = "bpe"
    char = "char"
    byte = "byte"


class Split(StrEnum):
    """Parts of the data that a run can be measured on."""

    valid = "valid"
    test = "test"


class SummingRouter(StrEnum):
    """Routers whose weights sum to 1."""

    softmax = "softmax"
    softmax_of_chosen = "softmax_of_chosen"
    sigmoid = "sigmoid"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where its runs and pages go.")] = Path("runs/demo"),
) -> None:
    """Show the main job on embedded data: train, translate, continue, explain."""
    from triglot import demo

    demo.run(out)


@tokenizers_app.command("train")
def train_tokenizer(
    files: Annotated[list[str], typer.Argument(metavar="FILES…", help="Files, folders or globs.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for tokenizer.json.", show_default=False)],
    kind: Annotated[Kind, typer.Option(help="Pieces of words, characters, or bytes.")] = Kind.bpe,
    vocab_size: Annotated[int, typer.Option(help="Size of a BPE vocabulary.")] = 8000,
) -> None:
    """Train a tokenizer on text."""
    from triglot.data.corpus import find_files, read_blocks
    from triglot.tokenizer import Tokenizer, Tokenizers

    path = out / "tokenizer.json"
    require(not path.exists(), "--out", "a folder without tokenizer.json", str(out), ConfigError)
    texts = (text for file in find_files(files, Path(), "FILES") for text in read_blocks(file))
    tokenizer = Tokenizer.train(kind.value, texts, vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    Tokenizers(tokenizer, tokenizer).save(out)
    typer.echo(f"{tokenizer.vocab_size:,} tokens: {path}")


class PublicData(StrEnum):
    """Data that recipes are measured on."""

    multi30k = "multi30k"


@app.command()
def data(
    name: Annotated[PublicData, typer.Argument(metavar="NAME", help="Which: multi30k.", show_default=False)],  # noqa: ARG001 there is one
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where its files go.")] = Path("data/multi30k"),
    from_hub: Annotated[bool, typer.Option("--from-hub", help="Download it from huggingface.co.")] = False,
) -> None:
    """Bring public data, as recipes read it; its content is checked."""
    from triglot import hub

    require(from_hub, "--from-hub", "given, since nothing is downloaded unless asked", False, ConfigError)
    for path in hub.multi30k(out):
        typer.echo(str(path))


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A TOML file, or a shipped recipe's name.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Another value for a key; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of --out; RECIPE may be left out.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and touch no data.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write RUN/tensorboard, too.")] = False,
    device: Device = None,
) -> None:
    """Train what a recipe describes."""
    from triglot.recipe import load_recipe, overridden, to_dict

    require(
        recipe is not None or (resume and out is not None),
        "RECIPE",
        "given, or --resume with --out",
        recipe,
        ConfigError,
    )
    changes = tuple(settings or ())
    if recipe is not None:
        path = find_recipe(recipe)
        config = load_recipe(path, changes)
    else:
        from triglot.training.session import config_of_run

        assert out is not None
        path = out
        config = overridden(config_of_run(out), changes)
    if dry_run:
        typer.echo(json.dumps(to_dict(config), indent=2, ensure_ascii=False))
        return
    from triglot.distributed.team import this_rank
    from triglot.evaluation import score_translations
    from triglot.insight.curves import draw
    from triglot.insight.progress import Bar
    from triglot.training.metrics import MetricsLog
    from triglot.training.session import train

    log = MetricsLog
    if tensorboard:
        from triglot.training.board import Board

        log = Board
    run = out or Path("runs") / path.stem
    evaluators = [score_translations] if config.train.keep_best != "loss" else []
    where = device_of(device)
    result = train(config, run, resume=resume, evaluators=evaluators, reporter=Bar(), log=log, device=where)
    if this_rank() == 0:
        if (run / "metrics.jsonl").exists():  # a run stopped in its first steps has logged nothing
            draw(run / "metrics.jsonl", run / "curves.png")
        typer.echo(f"{run}: best checkpoint {result.progress.best or 'none yet'}, last step {result.progress.step}")
    raise typer.Exit(result.exit_code)


def find_recipe(recipe: str) -> Path:
    """The recipe's file: a path, or a name among the recipes shipped with the package or lying in the repository."""
    if Path(recipe).is_file():
        return Path(recipe)
    from triglot.recipe import shipped_recipes

    shipped = shipped_recipes()
    rule = f"a file, or one of {', '.join(sorted(shipped))}"
    require(recipe.removesuffix(".toml") in shipped, "RECIPE", rule, recipe, ConfigError)
    return shipped[recipe.removesuffix(".toml")]


@app.command()
def evaluate(
    run: Run,
    split: Annotated[Split, typer.Option(help="What to measure on.")] = Split.valid,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    root: Annotated[Path | None, typer.Option(help="Where the data lies, if it moved.", show_default=False)] = None,
    beam: Annotated[int | None, typer.Option(help="As the run says by default.", show_default=False)] = None,
    precision: InPrecision = Precision.fp32,
    which: Which = "best",
    device: Device = None,
) -> None:
    """Measure a run: loss and bits per byte; BLEU, chrF and exact match of pairs."""
    from triglot.evaluation import evaluate

    scores = evaluate(
        run,
        which=which,
        split=split.value,
        root=root,
        beam=beam,
        device=device_of(device),
        precision=precision.value,
    )
    if as_json:
        typer.echo(json.dumps(scores))
        return
    width = max(map(len, scores))
    for name, value in scores.items():
        typer.echo(f"{name:{width}}  {value:.4f}" if isinstance(value, float) else f"{name:{width}}  {value}")


@app.command()
def upcycle(
    run: Run,
    experts: Annotated[int, typer.Option(help="How many experts a layer gets.")] = 8,
    top_k: Annotated[int, typer.Option(help="How many of them a token visits.")] = 2,
    every: Annotated[int, typer.Option(help="2: every second block; and so on.")] = 1,
    router: Annotated[SummingRouter, typer.Option(help="How they are chosen.")] = SummingRouter.softmax,
    out: Annotated[
        Path | None, typer.Option(metavar="NEW", help="The new run; RUN-upcycled by default.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the routers' first weights.")] = 0,
    which: Which = "best",
) -> None:
    """Turn a dense run into one with experts that computes the same, to train on from."""
    from triglot.config import ExpertOptions
    from triglot.upcycling import upcycle

    out = out or run.with_name(f"{run.resolve().name}-upcycled")
    upcycle(run, out, ExpertOptions(num_experts=experts, top_k=top_k, every=every, router=router.value), which, seed)
    told = {"num_experts": experts, "top_k": top_k, "every": every, "router": router.value}
    settings = " ".join(f"--set model.options.experts.{key}={value}" for key, value in told.items())
    typer.echo(f"{out}: to train on, add to its recipe: --set init.from={out} {settings}")


class To(StrEnum):
    """Whose checkpoint is written."""

    triglot = "triglot"
    hf = "hf"
    gguf = "gguf"
    ctranslate2 = "ctranslate2"


class Dtype(StrEnum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Numbers(StrEnum):
    """How numbers are stored in GGUF."""

    f32 = "F32"
    f16 = "F16"
    q8_0 = "Q8_0"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A run; or a folder of transformers, GGUF, llama2.c.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="A new folder, or file of GGUF.")],
    to: Annotated[To, typer.Option(help="Whose checkpoint to write; hf: transformers.")] = To.triglot,
    numbers: Annotated[
        Numbers | None, typer.Option(help="Of weights in GGUF; Q8_0 by default.", show_default=False)
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights in a run and with hf; float32 by default.", show_default=False)
    ] = None,
    which: Which = "best",
    from_hub: Annotated[bool, typer.Option("--from-hub", help="SRC is a name on huggingface.co: download it.")] = False,
) -> None:
    """Bring a checkpoint in as a run, or take a run out to where other engines serve it."""
    import torch

    from triglot import hub
    from triglot.interop import runs as interop

    require(numbers is None or to == To.gguf, "--numbers", "left out unless --to gguf", numbers, ConfigError)
    typed = to in (To.triglot, To.hf)
    require(dtype is None or typed, "--dtype", "left out unless --to triglot or hf", dtype, ConfigError)
    named = out.suffix == ".gguf"
    require(
        named == (to == To.gguf), "DST", "a name that ends in .gguf with --to gguf, and no other", str(out), ConfigError
    )
    rule = "left out with --to triglot: another library's checkpoint is one alone"
    require(which == "best" or to != To.triglot, "--checkpoint", rule, which, ConfigError)
    kind: torch.dtype = getattr(torch, dtype or Dtype.float32)
    if from_hub:
        source = hub.checkpoint(source.as_posix())
    match to:
        case To.triglot:
            interop.to_run(source, out, kind)
        case To.hf:
            interop.to_transformers(source, out, which, kind)
        case To.gguf:
            interop.to_gguf(source, out, numbers or Numbers.q8_0, which)
        case To.ctranslate2:
            interop.to_ctranslate2(source, out, which)
    typer.echo(str(out))


@app.command()
def inspect(
    run: Run,
    batch: Annotated[int, typer.Option(help="Rows of the random batch whose shapes are shown.")] = 2,
    length: Annotated[int, typer.Option(help="Its tokens in a row; a target has one more.")] = 7,
    which: Which = "best",
) -> None:
    """Show a run's modules, shapes, parameters and costs."""
    from triglot.insight.inspect import inspect

    inspect(run, batch=batch, length=length, which=which)


@app.command()
def explain(
    run: Run,
    text: Annotated[str, typer.Option(help="What the model reads.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(help="A translation to explain; the run's own by default.", show_default=False)
    ] = None,
    tag: Tag = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page; an older one is replaced.")] = Path(
        "explain.html"
    ),
    which: Which = "best",
) -> None:
    """Write a page that shows what a model does with a text."""
    from triglot.insight.explain import explain

    typer.echo(explain(run, text, target=target, tag=tag, out=out, which=which))


@app.command()
def experts(
    run: Run,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=FILE]…", help="Text or pairs of each domain; by default the run's target tags."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    which: Which = "best",
) -> None:
    """Show which experts compute which domain: languages, kinds of text."""
    from triglot.insight.domains import as_dict, expert_domains, table

    given = [_named(one) for one in files or []]
    named = dict(given)
    names = [name for name, _ in given]
    require(len(named) == len(given), "NAME=FILE", "given once for each name", names, ConfigError)
    found = expert_domains(run, named, which)
    typer.echo(json.dumps(as_dict(found)) if as_json else table(found))


def _named(given: str) -> tuple[str, Path]:
    name, _, file = given.partition("=")
    require(bool(name) and Path(file).is_file(), "NAME=FILE", "a name, = and a file", given, ConfigError)
    return name, Path(file)


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]…", help="Runs, or folders of runs; runs by default.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="A page with their curves, too; an older one is replaced.", show_default=False
        ),
    ] = None,
    sort: Annotated[str, typer.Option(metavar="METRIC", help="loss, bleu, …: best first; or name, started.")] = "name",
) -> None:
    """Compare runs: what they reached, how far they are, and where their recipes differ."""
    from triglot.insight.page import require_free
    from triglot.insight.runs import compare
    from triglot.insight.runs_page import write_page

    if html is not None:
        require_free(html, "--html")
    found = compare(folders or [Path("runs")], sort=sort)
    if html is not None:
        typer.echo(write_page(found, html))
