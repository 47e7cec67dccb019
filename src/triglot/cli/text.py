"""Text from the command line: continued, translated, scored."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from triglot.cli.base import Device, InPrecision, Precision, Run, Tag, TooLong, Which, app, device_of, left_out
from triglot.errors import ConfigError, DataError, TriglotError, reason, require


class PastContext(StrEnum):
    """What to do where a text outgrows the model's context."""

    error = "error"
    slide = "slide"


class PastWindow(StrEnum):
    """What to do with a text to be scored that is longer than the context."""

    error = "error"
    windows = "windows"


class Lengths(StrEnum):
    """What a translation's log p is divided by."""

    power = "power"
    gnmt = "gnmt"


Ban = Annotated[
    list[str] | None, typer.Option(metavar="WORD", help="A word that never comes; repeatable.", show_default=False)
]
Least = Annotated[int, typer.Option(help="No end token before so many.")]
NoRepeat = Annotated[int | None, typer.Option(help="So many tokens in a row come once.", show_default=False)]
Longest = Annotated[int | None, typer.Option(help="As the run says by default.", show_default=False)]
Beam = Annotated[int | None, typer.Option(help="As the run says by default.", show_default=False)]
Alpha = Annotated[float | None, typer.Option(help="α in score / n^α.", show_default=False)]
By = Annotated[Lengths, typer.Option(help="n^α, or GNMT's ((5 + n) / 6)^α.")]
Patience = Annotated[
    float | None,
    typer.Option(help="End when so many times `beam` texts have; inf: none can be better.", show_default=False),
]


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to continue; empty: a new document.")] = "",
    max_new_tokens: Longest = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; as the run says by default, else 1.", show_default=False)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest of so much.", show_default=False)] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from those of so much of the best one's.", show_default=False)
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option(help="Draw from the most typical of so much.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeat less, the prompt too.", show_default=False)
    ] = None,
    presence_penalty: Annotated[float, typer.Option(help="Off the logits of what came.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Off for each time that it came.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=NUMBER", help="On an id's logit; repeatable.", show_default=False)
    ] = None,
    ban: Ban = None,
    min_new_tokens: Least = 0,
    no_repeat_ngram: NoRepeat = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before it; repeatable.", show_default=False)
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON that is valid under it.", show_default=False)
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Text that matches it.", show_default=False)] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text that follows it (Lark).", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="The same seed draws the same text; with --interactive each text one more.")
    ] = 0,
    n: Annotated[int, typer.Option("--n", help="So many texts; with --json.")] = 1,
    top_logprobs: Annotated[int, typer.Option(help="So many alternatives of each token; with --json.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a text, when it is whole.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is said to a model that answers.")] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: what the model is told first.", show_default=False)
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Ask for prompts until the input ends.")] = False,
    past_context: Annotated[PastContext, typer.Option(help="Where a text outgrows the context.")] = PastContext.error,
    speculate: Annotated[int, typer.Option(help="Guess so many tokens a step; the text stays the same.")] = 0,
    draft: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Whose model guesses; else the text before.", show_default=False)
    ] = None,
    precision: InPrecision = Precision.fp32,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--no-compiled",
            help="Faster, once it has been compiled; without: by kernels where they pay.",
            show_default=False,
        ),
    ] = None,
    which: Which = "best",
    device: Device = None,
) -> None:
    """Continue a text, as it comes, or answer in a conversation."""
    from triglot.generation.engine import load

    if not as_json:
        left_out("without --json", n=None if n == 1 else n, top_logprobs=top_logprobs)
    if not chat:
        left_out("without --chat", system=system)
    if not speculate:
        left_out("without --speculate", draft=draft)
    require(not chat or interactive or bool(prompt), "--prompt", "given with --chat", prompt, ConfigError)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(map(_bias, logit_bias or [])),
        "banned_words": ban or [],
        "min_new_tokens": min_new_tokens,
        "no_repeat_ngram": no_repeat_ngram,
        "stop": stop or [],
        "json_schema": json_schema and _read(json_schema),
        "regex": regex,
        "grammar": grammar and _read(grammar),
        "past_context": past_context.value,
        "speculate": speculate,
    }
    where = device_of(device)
    engine = load(run, which=which, device=where, precision=precision.value, draft=draft, compiled=compiled)
    if compiled and sys.stderr.isatty():
        typer.secho("Making compiled code ready: some seconds, or up to two minutes the first time.", err=True)

    said: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def show(prompt: str, seed: int) -> None:
        asked = [*said, {"role": "user", "content": prompt}] if chat else prompt
        answer, ends = "", list[str | None]()
        if as_json:
            for one in engine.generate([asked], seed=seed, n=n, top_logprobs=top_logprobs, **options):
                told = {"prompt": prompt, **one._asdict(), "log_prob": one.log_prob}
                sys.stdout.write(json.dumps(told, ensure_ascii=False) + "\n")
                answer = one.text
                ends.append(one.ended)
        else:
            pieces = engine.stream(asked, seed=seed, **options)
            sys.stdout.write("" if chat else prompt)
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
                answer += piece
            sys.stdout.write("\n")
            ends.append(pieces.ended)
        if "limit" in ends and (json_schema or regex or grammar) is not None:
            cut = "A text ended by its limit (--max-new-tokens): what it has to follow may be unfinished."
            typer.secho(cut, fg=typer.colors.YELLOW, err=True)
        said.extend([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])

    if not interactive or prompt:
        show(prompt, seed)
        seed += 1
    while interactive:
        sys.stderr.write("> ")
        sys.stderr.flush()
        if not (line := sys.stdin.readline()):
            break
        try:
            show(line.removesuffix("\n"), seed)
            seed += 1
        except TriglotError as error:  # a prompt that is too long is no reason to leave
            typer.secho(str(error), fg=typer.colors.RED, err=True)


@app.command()
def translate(
    run: Run,
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="Lines to translate, or standard input.")] = "-",
    beam: Beam = None,
    nbest: Annotated[int, typer.Option(help="Above 1: line number, score and text of so many.")] = 1,
    length_penalty: Alpha = None,
    lengths: By = Lengths.power,
    patience: Patience = None,
    max_new_tokens: Longest = None,
    min_new_tokens: Least = 0,
    no_repeat_ngram: NoRepeat = None,
    ban: Ban = None,
    prefixes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="How translations begin, line by line.", show_default=False)
    ] = None,
    alignments: Annotated[bool, typer.Option("--alignments", help="With --json: token by token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of hypotheses for each line.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; where they pay a core each by default.", show_default=False)
    ] = None,
    tag: Tag = None,
    too_long: Annotated[TooLong, typer.Option(help="Where a line is longer than the model reads.")] = TooLong.cut,
    precision: InPrecision = Precision.fp32,
    compiled: Annotated[
        bool | None,
        typer.Option("--compiled/--no-compiled", help="By kernels; without: where they pay.", show_default=False),
    ] = None,
    which: Which = "best",
    device: Device = None,
) -> None:
    """Translate line by line, to standard output; empty lines stay empty, lines that were cut are told."""
    from triglot.generation.engine import load
    from triglot.generation.files import CHUNK, as_json_lines, lines_of, pays, translate_lines, written

    if not as_json:
        left_out("without --json", alignments=alignments)
    lines, where = lines_of(None if file == "-" else Path(file)), device_of(device)
    asked = file == "-" and sys.stdin.isatty()
    engine = load(run, which=which, device=where, precision=precision.value, workers=workers, compiled=compiled)
    if workers is None and where == "cpu" and not asked and _cores() > 1:
        enough, lines = pays(engine, lines, beam or engine.config.generation.beam)
        if enough:
            workers = _cores()
            engine = load(run, which=which, device=where, precision=precision.value, workers=workers, compiled=compiled)
    results = translate_lines(
        engine,
        lines,
        prefixes=None if prefixes is None else lines_of(prefixes),
        chunk=1 if asked else CHUNK * (workers or 1),
        beam=beam,
        nbest=nbest,
        length_penalty=length_penalty,
        lengths=lengths.value,
        patience=patience,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        no_repeat_ngram=no_repeat_ngram,
        banned_words=ban or [],
        alignments=alignments,
        log_probs=as_json or nbest > 1,
        tags=tag,
        too_long=too_long.value,
    )
    with told_of_cuts():
        for line in as_json_lines(results) if as_json else written(results, nbest=nbest):
            sys.stdout.write(line)
            if sys.stdout.isatty():
                sys.stdout.flush()
    engine.close()


@app.command()
def alternatives(
    run: Run,
    text: Annotated[str, typer.Option(help="The line to translate.", show_default=False)],
    prefix: Annotated[str, typer.Option(help="How its translation begins.")] = "",
    count: Annotated[int, typer.Option(help="So many alternatives.")] = 5,
    beam: Beam = None,
    length_penalty: Alpha = None,
    lengths: By = Lengths.power,
    patience: Patience = None,
    max_new_tokens: Longest = None,
    min_new_tokens: Least = 0,
    no_repeat_ngram: NoRepeat = None,
    ban: Ban = None,
    tag: Tag = None,
    too_long: Annotated[TooLong, typer.Option(help="Where the line is longer than the model reads.")] = TooLong.error,
    precision: InPrecision = Precision.fp32,
    which: Which = "best",
    device: Device = None,
) -> None:
    """The likeliest tokens at a place of a translation: log p, token, and the best translation that goes on so."""
    from triglot.generation.engine import load

    engine = load(run, which=which, device=device_of(device), precision=precision.value)
    options: dict[str, Any] = {
        "beam": beam,
        "length_penalty": length_penalty,
        "lengths": lengths.value,
        "patience": patience,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "no_repeat_ngram": no_repeat_ngram,
        "banned_words": ban or [],
        "too_long": too_long.value,
    }
    with told_of_cuts():
        for one in engine.alternatives(text, prefix, count, tag=tag, **options):
            typer.echo(f"{one.log_prob:.4f}\t{one.piece}\t{' '.join(one.best.text.splitlines())}")


@app.command()
def score(
    run: Run,
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="Texts or sources, line by line.")] = "-",
    targets: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the sources become, line by line.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the texts follow, line by line.", show_default=False)
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="Of texts: score the end token, too.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="FILE as one text: perplexity, bits per byte.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Of --whole; the training's by default.", show_default=False)
    ] = None,
    tag: Tag = None,
    too_long: Annotated[
        TooLong | None, typer.Option(help="Where a pair's side is too long; error by default.", show_default=False)
    ] = None,
    past_context: Annotated[
        PastWindow | None, typer.Option(help="Where a text is too long; error by default.", show_default=False)
    ] = None,
    which: Which = "best",
    device: Device = None,
) -> None:
    """How probable texts or translations are: Σ log p, number of tokens and text, line by line."""
    from triglot.generation.engine import load
    from triglot.generation.files import lines_of, score_lines

    engine = load(run, which=which, device=device_of(device))
    of_pairs, of_texts = {"tag": tag, "too_long": too_long}, {"prompts": prompts, "past_context": past_context}
    if whole:
        require(file != "-", "--whole", "with a file", file, ConfigError)
        left_out("with --whole", targets=targets, **of_pairs, **of_texts, end=end)
        found = engine.score_file(file, context=context)
        told = {
            "perplexity": f"{found.perplexity:.4f}",
            "bits_per_byte": f"{found.bits_per_byte:.4f}",
            "nats": f"{found.nats:.4f}",
            "tokens": found.tokens,
            "bytes": found.bytes,
        }
        for name, value in told.items():
            typer.echo(f"{name:13}  {value}")
        return
    left_out("without --whole", context=context)
    options: dict[str, Any]
    if engine.config.model.kind == "encoder_decoder":
        rule = "a file of translations, since the run translates"
        require(targets is not None, "--targets", rule, targets, ConfigError)
        left_out("where the run translates", **of_texts, end=end)
        beside, options = targets, {"tags": tag, "too_long": TooLong(too_long or "error").value}
    else:
        left_out("where the run goes on from texts", targets=targets, **of_pairs)
        beside, options = prompts, {"end": end, "past_context": PastWindow(past_context or "error").value}
    lines = lines_of(None if file == "-" else Path(file))
    for line in score_lines(engine, lines, None if beside is None else lines_of(beside), **options):
        sys.stdout.write(line)


@contextmanager
def told_of_cuts() -> Iterator[None]:
    """Lines of which only the beginning is read are told, each once."""
    from triglot.generation.sentences import TextWasCut

    with warnings.catch_warnings():
        warnings.simplefilter("always", TextWasCut)
        warnings.showwarning = lambda message, *_, **__: typer.secho(str(message), fg=typer.colors.YELLOW, err=True)
        yield


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bias(given: str) -> tuple[int, float]:
    token, _, number = given.partition("=")
    try:
        return int(token), float(number)
    except ValueError as error:
        raise ConfigError(f"`--logit-bias` must be of the form ID=NUMBER, but is {given!r} instead.") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error
