"""The command line: what it says, what it refuses in one line, and a run from its recipe to its translations."""

import gzip
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner, Result

import triglot
from tests.conftest import needs_compiler
from triglot.generation.int8 import multiplies_bytes
from triglot.recipe import from_dict, to_dict

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
COMMON = """
[model]
kind = "{kind}"
d_model = 14
num_layers = 1
num_heads = 2
d_ff = 23
max_seq_length = 41
[tokenizer]
kind = "byte"
[train]
max_steps = 3
batch_tokens = 500
context = 19
eval_every = 2
precision = "fp32"
threads = 1
warmup_steps = 1
[generation]
max_new_tokens = 7
beam = 2
"""


def invoke(*arguments: object, text: str | bytes = "") -> Result:
    from triglot.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def succeed(*arguments: object, text: str | bytes = "") -> str:
    result = invoke(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """The one line that tells why not."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two recipes with their data, and the run of each."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("\n\n".join(f"Line {n}: to be or not to be." for n in range(40)), encoding="utf-8")
    text = f'[data]\nkind = "text"\nroot = "{folder.as_posix()}"\nfiles = ["text.txt"]\ndocument = "paragraph"\n'
    (folder / "writer.toml").write_text(COMMON.format(kind="decoder_only") + text, encoding="utf-8")
    rows = "".join(f"{n} ab\t{n} ba\t{'up' if n % 2 else 'down'}\n" for n in range(40))
    (folder / "pairs.tsv").write_text(rows, encoding="utf-8")
    pairs = f'[data]\nkind = "pairs"\nroot = "{folder.as_posix()}"\nfiles = ["pairs.tsv"]\nvalid = 0.1\n'
    (folder / "translator.toml").write_text(COMMON.format(kind="encoder_decoder") + pairs, encoding="utf-8")
    for name in ("writer", "translator"):
        succeed("train", folder / f"{name}.toml", "--out", folder / name, "--device", "cpu")
    return folder


def test_a_reader_who_has_had_enough_is_no_error(folder):
    """`triglot translate RUN FILE | head -1`: more lines than a pipe holds, and nobody to read them."""
    lines = folder / "many.txt"
    lines.write_text("\n" * 300_000, encoding="utf-8")
    command = f'"{sys.executable}" -m triglot translate "{folder / "translator"}" "{lines}" --tag up | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


# Without a run


def test_help_loads_no_torch_and_names_every_command():
    code = (
        "import sys; sys.argv = ['triglot', '--help']\n"
        "from triglot.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'tokenizers', 'matplotlib'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    for command in (
        "demo",
        "tokenizer",
        "train",
        "generate",
        "translate",
        "alternatives",
        "score",
        "evaluate",
        "inspect",
        "explain",
        "runs",
    ):
        assert f"\N{BOX DRAWINGS LIGHT VERTICAL} {command} " in output


def test_the_choices_of_the_command_line_are_the_librarys():
    from triglot.cli import base, text
    from triglot.decoding.search import Lengths
    from triglot.generation import options, scoring
    from triglot.layers.packed import Precision

    same = [
        (base.Precision, Precision),
        (base.TooLong, options.TooLong),
        (base.TooLong, scoring.TooLong),
        (text.PastContext, options.PastContext),
        (text.PastWindow, scoring.PastContext),
        (text.Lengths, Lengths),
    ]
    for named, literal in same:
        assert {one.value for one in named} == set(get_args(literal))


def test_version_is_the_packages():
    assert succeed("--version") == f"{triglot.__version__}\n"


def test_every_public_name_is_where_it_says(monkeypatch):
    for name in triglot.__all__:
        monkeypatch.delitem(vars(triglot), name, raising=False)
        assert getattr(triglot, name).__name__ == name
    assert set(dir(triglot)) >= {*triglot.__all__, "__version__"}
    with pytest.raises(AttributeError, match="module 'triglot' has no attribute 'nothing'"):
        triglot.nothing  # noqa: B018


def test_importing_triglot_imports_no_torch():
    code = "import sys, triglot; from triglot import ModelConfig, DataError; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "False\n"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_prints_the_whole_recipe_by_name_or_path(recipe):
    from triglot.config import RunConfig

    printed = json.loads(succeed("train", recipe.stem, "--dry-run", "--set", "train.max_steps=7"))
    assert json.loads(succeed("train", recipe, "--dry-run")) | {"train": 0} == printed | {"train": 0}
    assert printed["train"]["max_steps"] == 7
    config = from_dict(RunConfig, printed)
    assert json.loads(json.dumps(to_dict(config))) == printed
    written = tomllib.loads(recipe.read_text(encoding="utf-8"))
    assert printed["model"]["d_model"] == written["model"]["d_model"]


def test_a_dry_run_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.toml").write_text(COMMON.format(kind="decoder_only") + '[data]\nkind = "text"\nfiles = ["no"]')
    succeed("train", "some.toml", "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["some.toml"]


def test_what_a_recipe_does_not_know_is_refused_in_one_line():
    assert "`RECIPE` must be a file, or one of" in refuse("train", "nothing-of-the-kind")
    assert "`train.max_stepz` must be one of" in refuse("train", RECIPES[0], "--dry-run", "--set", "train.max_stepz=3")
    assert "`--set` must be of the form a.b=value" in refuse("train", RECIPES[0], "--dry-run", "--set", "seed")


@pytest.mark.parametrize(
    "command", [["generate"], ["translate"], ["evaluate"], ["inspect"], ["explain", "--text", "a"]]
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, command):
    assert "`run` must be a folder with checkpoints" in refuse(command[0], tmp_path, *command[1:])
    assert "`run` must be a folder that exists, with checkpoints" in refuse(command[0], tmp_path / "none", *command[1:])


def test_what_is_our_own_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("triglot.cli.runs.find_recipe", lambda _: 1 / 0)
    result = invoke("train", "any")
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_a_tokenizer_is_trained_from_files(tmp_path, kind):
    (tmp_path / "a.txt").write_text("ein Text über Text\n" * 9, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"noch ein Text\n"))
    files = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    succeed("tokenizer", "train", *files, "--out", tmp_path / "made", "--kind", kind, "--vocab-size", 270)
    tokenizer = triglot.Tokenizer.load(tmp_path / "made" / "tokenizer.json")
    assert tokenizer.kind == kind
    assert tokenizer.decode(tokenizer.encode("über Text")) == "über Text"
    assert tokenizer.vocab_size <= 270 or kind == "char"
    assert "without tokenizer.json" in refuse("tokenizer", "train", files[0], "--out", tmp_path / "made")


# With a run


def test_training_leaves_a_run_with_its_curves(folder):
    for name in ("writer", "translator"):
        assert (folder / name / "config.json").is_file()
        assert (folder / name / "curves.png").stat().st_size > 1000


def test_a_run_is_never_overwritten(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "writer").rglob("*")}
    assert "`run` must be a new folder" in refuse("train", folder / "writer.toml", "--out", folder / "writer")
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "writer").rglob("*")}


def test_a_run_goes_to_runs_under_the_recipes_name_and_is_resumed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short, long = ("--set", "train.max_steps=1"), ("--set", "train.max_steps=2")
    assert "runs" in succeed("train", folder / "writer.toml", *short, "--device", "cpu")
    assert (tmp_path / "runs" / "writer" / "checkpoints" / "step-00000001").is_dir()
    output = succeed("train", folder / "writer.toml", *long, "--resume", "--device", "cpu")
    assert "last step 2" in output
    assert (tmp_path / "runs" / "writer" / "checkpoints" / "step-00000002").is_dir()


def test_generate_prints_the_prompt_and_what_the_engine_makes_of_it(folder):
    engine = triglot.load(folder / "writer")
    options = (
        "--seed",
        3,
        "--temperature",
        0.9,
        "--top-k",
        50,
        "--top-p",
        0.99,
        "--max-new-tokens",
        9,
        "--device",
        "cpu",
    )
    expected = engine.generate(["Line"], seed=3, temperature=0.9, top_k=50, top_p=0.99, max_new_tokens=9)[0].text
    assert succeed("generate", folder / "writer", "--prompt", "Line", *options) == f"Line{expected}\n"
    assert succeed("generate", folder / "writer", *options).endswith("\n")


def test_compiled_texts_come_from_what_was_compiled(folder, monkeypatch):
    def refused(*_):
        raise triglot.errors.ConfigError("the compiler was asked")

    monkeypatch.setattr("triglot.generation.compiled.compile_module", refused)
    assert "the compiler was asked" in refuse("generate", folder / "writer", "--compiled", "--device", "cpu")


@needs_compiler
def test_translations_by_kernels_are_those_without(folder, tmp_path, monkeypatch):
    (lines := tmp_path / "lines").write_text("7 ab\n\nb a 2\n", encoding="utf-8")
    how = ("translate", folder / "translator", lines, "--tag", "up", "--device", "cpu", "--json")
    plain = [json.loads(line) for line in succeed(*how, "--no-compiled").splitlines()]
    ours = [json.loads(line) for line in succeed(*how, "--compiled").splitlines()]
    monkeypatch.setattr("triglot.generation.paged.kernel", lambda *_, **_given: 1 / 0)
    assert isinstance(invoke(*how, "--compiled").exception, ZeroDivisionError)
    assert succeed(*how, "--no-compiled")
    for [one], [other] in zip(ours, plain, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)


@needs_compiler
@pytest.mark.skipif(not multiplies_bytes(), reason="kernels were not seen to pay on such a processor")
def test_texts_and_their_drafts_are_by_kernels_unless_that_is_not_wanted(folder, monkeypatch):
    how = ("generate", folder / "writer", "--prompt", "Line", "--temperature", 0.0, "--device", "cpu")
    plain = succeed(*how, "--no-compiled")
    assert succeed(*how) == plain
    monkeypatch.setattr("triglot.generation.paged.kernel", lambda *_, **_given: 1 / 0)
    assert isinstance(invoke(*how).exception, ZeroDivisionError)
    guessed = ("--speculate", 3, "--draft", folder / "writer")
    assert succeed(*how, "--no-compiled", *guessed) == plain


@needs_compiler
def test_what_cannot_be_compiled_is_refused_by_its_option(folder, monkeypatch):
    monkeypatch.setattr("triglot.generation.ready.multiplies_bytes", lambda: False)
    told = refuse("generate", folder / "writer", "--compiled", "--precision", "int4", "--device", "cpu")
    assert "`precision` must be fp32, bf16 or int8 where texts are `compiled` for a processor without AVX2, but" in told


def test_generate_slides_past_the_context_only_when_it_is_told_to(folder):
    options = ("--prompt", "x", "--max-new-tokens", 60, "--device", "cpu")
    assert "`max_new_tokens` must be at most 40" in refuse("generate", folder / "writer", *options)
    succeed("generate", folder / "writer", *options, "--past-context", "slide")


def test_interactive_prompts_are_continued_until_the_input_ends(folder):
    arguments = ("generate", folder / "writer", "--interactive", "--temperature", 0.0, "--device", "cpu")
    alone = [succeed("generate", folder / "writer", "--prompt", prompt, *arguments[3:]) for prompt in ("ab", "cd")]
    result = invoke(*arguments, text=f"ab\n{'x' * 50}\ncd\n")
    assert result.stdout == "".join(alone)
    assert "`prompt 1` must be at most 40 tokens long" in result.stderr
    assert result.exit_code == 0


def test_interactive_texts_draw_from_one_seed_after_another(folder):
    options = ("--max-new-tokens", 9, "--device", "cpu")
    engine = triglot.load(folder / "writer", device="cpu")
    expected = engine.generate(["ab", "cd", "ef"], seed=7, max_new_tokens=9)
    said = invoke("generate", folder / "writer", "--interactive", "--seed", 7, *options, text="ab\ncd\nef\n").stdout
    assert said == "".join(f"{prompt}{one.text}\n" for prompt, one in zip(["ab", "cd", "ef"], expected, strict=True))
    begun = ("generate", folder / "writer", "--interactive", "--prompt", "ab", "--seed", 7, *options)
    assert invoke(*begun, text="cd\nef\n").stdout == said


@pytest.mark.parametrize("source", ["-", "file", "gzip"])
def test_translate_reads_files_and_standard_input_alike(folder, tmp_path, source):
    text = "12 ab\n\n7 ab\r\n"
    engine, how = triglot.load(folder / "translator"), {"beam": 3, "length_penalty": 0.5, "tags": "up"}
    expected = [" ".join(row[0].text.splitlines()) for row in engine.translate(["12 ab", "", "7 ab"], **how)]
    path = tmp_path / ("text.gz" if source == "gzip" else "text")
    path.write_bytes(gzip.compress(text.encode()) if source == "gzip" else text.encode())
    arguments = ("--beam", 3, "--length-penalty", 0.5, "--tag", "up", "--device", "cpu")
    output = succeed("translate", folder / "translator", "-" if source == "-" else path, *arguments, text=text)
    assert output == "".join(f"{line}\n" for line in expected)


def test_n_best_translations_carry_line_and_score(folder):
    arguments = ("--nbest", 2, "--tag", "down", "--device", "cpu")
    rows = [
        line.split("\t")
        for line in succeed("translate", folder / "translator", *arguments, text="1\n\n2\n").splitlines()
    ]
    assert [row[0] for row in rows] == ["1", "1", "2", "3", "3"]
    assert float(rows[0][1]) >= float(rows[1][1])


def test_translate_names_the_line_that_is_too_long_and_the_tags_that_are_known(folder, tmp_path):
    (tmp_path / "text").write_text("a\n" + "b" * 50, encoding="utf-8")
    run = folder / "translator"
    strict = refuse("translate", run, tmp_path / "text", "--tag", "up", "--too-long", "error")
    assert "`line 2` must be at most 41 tokens long" in strict
    cut = invoke("translate", run, tmp_path / "text", "--tag", "up")
    assert cut.exit_code == 0
    assert cut.stdout.count("\n") == 2
    assert cut.stderr == "line 2 has 53 tokens: all beyond 41 were cut\n"
    assert "`the target tag` must be one of" in refuse("translate", run, tmp_path / "text")
    assert "`tag` must be a known one" in refuse("translate", run, tmp_path / "text", "--tag", "left")
    assert "cannot be read" in refuse("translate", run, tmp_path / "none", "--tag", "up")


def test_generate_passes_every_option_on(folder, tmp_path):
    engine = triglot.load(folder / "writer", device="cpu", precision="bf16")
    how = {
        "max_new_tokens": 9, "temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "seed": 4,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_new_tokens": 2,
        "no_repeat_ngram": 3, "n": 2, "top_logprobs": 2, "past_context": "slide",
    }  # fmt: skip
    arguments = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", value)]
    arguments += ["--logit-bias", "104=2.5", "--logit-bias", "2=-inf", "--ban", "e", "--ban", "th", "--stop", "zz"]
    said = succeed("generate", folder / "writer", *arguments, "--precision", "bf16", "--json", "--device", "cpu")
    expected = engine.generate(
        [""], logit_bias={104: 2.5, 2: -float("inf")}, banned_words=["e", "th"], stop=["zz"], **how
    )
    for line, one in zip(said.splitlines(), expected, strict=True):
        told = json.loads(line)
        assert (told["text"], told["tokens"], told["log_probs"]) == (one.text, one.tokens, one.log_probs)
        assert (told["ended"], told["stop"], told["log_prob"]) == (one.ended, one.stop, one.log_prob)
        assert told["alternatives"] == [[list(pair) for pair in among] for among in one.alternatives]


@pytest.mark.parametrize(("option", "text"), [("--json-schema", '{"enum": ["rot"]}'), ("--grammar", 'start: "rot"')])
def test_generate_reads_forms_from_files(folder, tmp_path, option, text):
    pytest.importorskip("llguidance")
    (tmp_path / "form").write_text(text, encoding="utf-8")
    said = succeed("generate", folder / "writer", option, tmp_path / "form", "--max-new-tokens", 30, "--device", "cpu")
    assert said.strip().strip('"') == "rot"
    none = tmp_path / "none"
    refused = refuse("generate", folder / "writer", option, none, "--device", "cpu")
    assert refused == f"{none}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("how", [(), ("--json", "--n", 2)])
def test_a_form_that_the_limit_cut_off_is_told(folder, how):
    pytest.importorskip("llguidance")
    run = ("generate", folder / "writer", *how, "--device", "cpu")
    cut = invoke(*run, "--regex", "(abc){5}", "--max-new-tokens", 5)
    told = "A text ended by its limit (--max-new-tokens): what it has to follow may be unfinished.\n"
    assert (cut.exit_code, cut.stderr) == (0, told)
    assert invoke(*run, "--regex", "(abc){1}", "--max-new-tokens", 5).stderr == ""
    assert invoke(*run, "--max-new-tokens", 1, "--logit-bias", "2=-inf").stderr == ""


def test_generate_refuses_in_one_line(folder):
    run = ("generate", folder / "writer", "--device", "cpu")
    assert "`--n` must be left out without --json, but is 2 instead" in refuse(*run, "--n", 2)
    assert "`--top-logprobs` must be left out without --json" in refuse(*run, "--top-logprobs", 2)
    assert "`--system` must be left out without --chat, but is 'x' instead" in refuse(*run, "--system", "x")
    assert "`--draft` must be left out without --speculate, but is 'x' instead" in refuse(*run, "--draft", "x")
    assert "`--logit-bias` must be of the form ID=NUMBER, but is 'x'" in refuse(*run, "--logit-bias", "x")
    assert "`stop` must be texts of at least one character" in refuse(*run, "--stop", "")
    assert "`top_p` must be above 0" in refuse(*run, "--top-p", 0)


def test_translate_passes_every_option_on(folder, tmp_path):
    engine = triglot.load(folder / "translator", device="cpu", precision="int8")
    how = {
        "beam": 3, "nbest": 2, "length_penalty": 0.5, "lengths": "gnmt", "patience": float("inf"), "max_new_tokens": 6,
        "min_new_tokens": 1, "no_repeat_ngram": 2,
    }  # fmt: skip
    arguments = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", value)]
    (tmp_path / "begun").write_text("4\n\n1\n", encoding="utf-8")
    arguments += ["--ban", "b", "--prefixes", tmp_path / "begun", "--alignments", "--json", "--tag", "up"]
    arguments += ["--precision", "int8", "--device", "cpu"]
    said = succeed("translate", folder / "translator", *arguments, text="4 ab\n\n12 ab\n")
    expected = engine.translate(
        ["4 ab", "", "12 ab"], banned_words=["b"], prefixes=["4", "", "1"], alignments=True, tags="up", **how
    )
    for line, hypotheses in zip(said.splitlines(), expected, strict=True):
        for told, one in zip(json.loads(line), hypotheses, strict=True):
            aligned = None if one.alignment is None else one.alignment._asdict()
            assert told == {**one._asdict(), "alignment": aligned}
    (tmp_path / "begun").write_text("4\n", encoding="utf-8")
    run = ("translate", folder / "translator", folder / "pairs.tsv", "--tag", "up", "--device", "cpu")
    uneven = invoke(*run, "--prefixes", tmp_path / "begun")
    assert uneven.exit_code == 2
    assert "`prefixes` must be as many as lines, but line 2 is in one of the files alone" in uneven.stderr
    assert "`--alignments` must be left out without --json, but is given instead" in refuse(*run, "--alignments")


def test_only_much_work_is_shared_among_processes_by_itself(folder, tmp_path, monkeypatch):
    (lines := tmp_path / "lines").write_text("7 ab\n" * 9, encoding="utf-8")
    monkeypatch.setattr("triglot.cli.text._cores", lambda: 3)
    monkeypatch.setattr("triglot.generation.workers.Workers.search", lambda *_: 1 / 0)
    how = ("translate", folder / "translator", lines, "--tag", "up", "--beam", 1, "--device", "cpu")
    alone = succeed(*how)
    assert alone.count("\n") == 9
    monkeypatch.setattr("triglot.generation.files.ENOUGH", 1)
    assert isinstance(invoke(*how).exception, ZeroDivisionError)
    assert succeed(*how, "--workers", 1) == alone
    said = refuse("translate", folder / "writer", lines, "--device", "cpu")
    assert "`the model of the run` must be one that translates" in said


def test_alternatives_are_told_line_by_line(folder):
    engine = triglot.load(folder / "translator", device="cpu")
    arguments = ("--text", "12 ab", "--prefix", "1", "--count", 3, "--beam", 2, "--tag", "up", "--device", "cpu")
    rows = [line.split("\t") for line in succeed("alternatives", folder / "translator", *arguments).splitlines()]
    for row, one in zip(rows, engine.alternatives("12 ab", "1", 3, beam=2, tag="up"), strict=True):
        assert row == [f"{one.log_prob:.4f}", one.piece, " ".join(one.best.text.splitlines())]


def test_alternatives_pass_every_option_on(folder):
    engine = triglot.load(folder / "translator", device="cpu")
    how = {
        "beam": 3, "length_penalty": 0.5, "lengths": "gnmt", "patience": 1.0, "max_new_tokens": 6, "min_new_tokens": 2,
        "no_repeat_ngram": 2, "too_long": "cut",
    }  # fmt: skip
    arguments = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", value)]
    run = ("alternatives", folder / "translator", "--text", "b" * 50, "--tag", "up", "--device", "cpu")
    said = invoke(*run, *arguments, "--ban", "b")
    assert said.stderr == "line 1 has 53 tokens: all beyond 41 were cut\n"
    with pytest.warns(match="were cut"):
        expected = engine.alternatives("b" * 50, tag="up", banned_words=["b"], **how)
    texts = [" ".join(one.best.text.splitlines()) for one in expected]
    assert [line.split("\t")[2] for line in said.stdout.splitlines()] == texts
    assert "`line 1` must be at most 41 tokens long" in refuse(*run)


def test_score_tells_log_p_tokens_and_text(folder, tmp_path):
    (tmp_path / "a").write_text("12 ab\n7 ab\n", encoding="utf-8")
    (tmp_path / "b").write_text("12 ba\nx\n", encoding="utf-8")
    for name, rest, texts in (("writer", (), ["12 ab", "7 ab"]), ("translator", ("--tag", "up"), ["12 ba", "x"])):
        engine = triglot.load(folder / name, device="cpu")
        given = (["12 ab", "7 ab"],) if name == "writer" else (["12 ab", "7 ab"], texts)
        scored = engine.score(*given, **({} if name == "writer" else {"tags": "up"}))
        rest = (*rest, *(() if name == "writer" else ("--targets", tmp_path / "b")))
        said = succeed("score", folder / name, tmp_path / "a", *rest, "--device", "cpu")
        expected = [f"{one.log_prob:.4f}\t{len(one.tokens)}\t{text}\n" for one, text in zip(scored, texts, strict=True)]
        assert said == "".join(expected)
    refused = refuse("score", folder / "translator", tmp_path / "a", "--device", "cpu")
    assert "`--targets` must be a file of translations, since the run translates" in refused


def test_texts_are_scored_behind_prompts_and_with_their_end(folder, tmp_path):
    (tmp_path / "texts").write_text("12 ab\n" * 2, encoding="utf-8")
    (tmp_path / "prompts").write_text("a\nLine\n", encoding="utf-8")
    engine, score = triglot.load(folder / "writer", device="cpu"), ("score", folder / "writer", tmp_path / "texts")
    scored = engine.score(["12 ab"] * 2, ["a", "Line"], end=True)
    said = succeed(*score, "--prompts", tmp_path / "prompts", "--end", "--device", "cpu")
    assert said == "".join(f"{one.log_prob:.4f}\t6\t12 ab\n" for one in scored)
    (tmp_path / "prompts").write_text("a\n", encoding="utf-8")
    assert "`prompts` must be as many as lines" in refuse(*score, "--prompts", tmp_path / "prompts", "--device", "cpu")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("writer", ["--targets", "b"], "`--targets` must be left out where the run goes on from texts, but is 'b'"),
        ("writer", ["--tag", "up"], "`--tag` must be left out where the run goes on from texts, but is 'up'"),
        ("writer", ["--too-long", "cut"], "`--too-long` must be left out where the run goes on from texts"),
        ("writer", ["--context", 30], "`--context` must be left out without --whole, but is 30"),
        ("writer", ["--whole", "--end"], "`--end` must be left out with --whole, but is given"),
        ("writer", ["--whole", "--past-context", "windows"], "`--past-context` must be left out with --whole"),
        ("translator", ["--targets", "b", "--end"], "`--end` must be left out where the run translates, but is given"),
        ("translator", ["--targets", "b", "--prompts", "c"], "`--prompts` must be left out where the run translates"),
        ("translator", ["--targets", "b", "--past-context", "error"], "`--past-context` must be left out where the"),
    ],
)  # fmt: skip
def test_score_refuses_what_does_not_count(folder, name, options, message):
    assert message in refuse("score", folder / name, folder / "pairs.tsv", *options, "--device", "cpu")


def test_what_translations_alone_have_is_refused_elsewhere(folder):
    for option, value in (("beam", 3), ("precision", "int8")):
        said = refuse("evaluate", folder / "writer", f"--{option}", value, "--device", "cpu")
        assert f"`{option}` must be left out for a run that goes on from texts, but is {value!r} instead" in said


def test_the_perplexity_of_a_file_is_that_of_the_engine(folder):
    path, engine = folder / "text.txt", triglot.load(folder / "writer", device="cpu")
    said = succeed("score", folder / "writer", path, "--whole", "--context", 30, "--device", "cpu")
    found = engine.score_file(path, context=30)
    told = dict(line.split() for line in said.splitlines())
    assert told["perplexity"] == f"{found.perplexity:.4f}"
    assert told["bits_per_byte"] == f"{found.bits_per_byte:.4f}"
    assert int(told["tokens"]) == found.tokens
    assert "`--whole` must be with a file" in refuse("score", folder / "writer", "--whole", "--device", "cpu")


def test_evaluate_translates_in_the_precision_asked_for(folder, monkeypatch):
    from triglot.generation.engine import Engine

    asked, real = [], Engine.__init__

    def init(self, *given, precision="fp32", **rest):
        asked.append(precision)
        real(self, *given, precision=precision, **rest)

    monkeypatch.setattr(Engine, "__init__", init)
    succeed("evaluate", folder / "translator", "--precision", "int8", "--device", "cpu")
    assert asked == ["int8"]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:x", "meta"])
def test_a_device_that_is_not_here_is_refused_in_one_line(folder, device):
    said = refuse("generate", folder / "writer", "--device", device)
    assert "`--device` must be one that is here, but is" in said


def test_a_run_is_resumed_without_its_recipe(folder, tmp_path):
    run = tmp_path / "run"
    succeed("train", folder / "writer.toml", "--out", run, "--device", "cpu")
    said = succeed("train", "--resume", "--out", run, "--set", "train.max_steps=5", "--device", "cpu")
    assert "last step 5" in said
    assert "`RECIPE` must be given" in refuse("train")
    assert "`run` must be a run that was started before" in refuse("train", "--resume", "--out", tmp_path / "none")


def test_a_run_stopped_before_anything_was_logged_says_where_it_stands(folder, tmp_path, monkeypatch):
    from triglot.training import trainer

    monkeypatch.setattr(trainer.Stop, "signal", 15)
    result = invoke("train", folder / "writer.toml", "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 143
    assert "best checkpoint none yet, last step 0" in result.stdout


def test_evaluate_tells_the_same_in_words_and_in_json(folder):
    for name, metric in (("writer", "bits_per_byte"), ("translator", "bleu")):
        scores = json.loads(succeed("evaluate", folder / name, "--json", "--device", "cpu"))
        words = succeed("evaluate", folder / name, "--device", "cpu")
        assert f"{scores[metric]:.4f}" in words
        assert scores["loss"] > 0
    assert "`split` must be" in refuse("evaluate", folder / "writer", "--split", "test", "--device", "cpu")


def test_inspect_counts_the_parameters(folder):
    parameters = sum(weight.numel() for weight in triglot.load(folder / "writer").model.parameters())
    assert f"{parameters:,}" in succeed("inspect", folder / "writer")


def test_explain_writes_a_page(folder, tmp_path):
    page = tmp_path / "page.html"
    assert str(page) in succeed("explain", folder / "writer", "--text", "to be", "--out", page).replace("\n", "")
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_runs_are_compared_in_the_terminal_and_on_a_page(folder, tmp_path):
    page = tmp_path / "deep" / "runs.html"
    output = succeed("runs", folder, "--sort", "loss", "--html", page)
    for said in ("writer", "translator", "finished", "model.kind", str(page)):
        assert said in output.replace("\n", " ")
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    succeed("runs", folder, "--html", page)


@pytest.mark.parametrize("command", [["runs", "--html"], ["explain", "--text", "to be", "--out"]])
def test_a_page_takes_the_place_of_an_older_one_and_of_nothing_else(folder, tmp_path, command):
    (notes := tmp_path / "notes.html").write_text("<p>mine</p>")
    name, *options = command
    what = folder if name == "runs" else folder / "writer"
    said = refuse(name, what, *options, notes)
    assert f"{options[-1].lstrip('-')}` must be a new file, or a page written here" in said
    assert notes.read_text() == "<p>mine</p>"
    succeed(name, what, *options, tmp_path / "page.html")
    succeed(name, what, *options, tmp_path / "page.html")


def test_what_holds_no_run_or_was_not_measured_so_is_refused(folder, tmp_path, monkeypatch):
    assert "`FOLDER` must be a folder with runs" in refuse("runs", tmp_path)
    assert "`--sort` must be one of name, started, loss" in refuse("runs", folder, "--sort", "speed")
    monkeypatch.chdir(tmp_path)
    assert "`FOLDER` must be a folder, but is 'runs'" in refuse("runs")
