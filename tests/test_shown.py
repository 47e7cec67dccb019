"""What README and the how-to pages show, done: a page's files, commands and programs in their order, in one folder.

A block with a title is a file. Trainings are made so small that they take a second. A line with RUN in it is a form,
not a command.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from triglot.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *ROOT.glob("docs/how-to/*.md"))}
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {
    "pairs": ("model.d_model=12", "tokenizer.vocab_size=300"),
    "text": ("model.d_model=16", "tokenizer.vocab_size=300", "train.context=32", "train.batch_tokens=64"),
    "demo-phrases": ("model.d_model=16", "data.num_examples=200"),
    "demo-stdlib-moe": ("model.d_model=16", "data.max_bytes=50000"),
    "more.toml": ("train.context=32", "train.batch_tokens=64"),
}
FEWER = ("generation.max_new_tokens=20", "train.max_steps=2", "train.eval_every=2", "train.precision=fp32")
SHALLOW = ("model.num_layers=1", "model.d_ff=13")
WITHOUT_COMMANDS = {
    f"docs/how-to/{name}.md" for name in ("add-a-variant", "generate", "several-processes", "write-a-recipe")
}
FORM = re.compile(r"\b(RUN|SRC|DST)\b")


def steps(page: str) -> list[tuple[str, str]]:
    """Files, commands and programs, each with its text."""
    found = []
    for language, said, text in BLOCK.findall(PAGES[page].read_text(encoding="utf-8")):
        if title := re.search('title="(.+?)"', said):
            found.append((title[1], text))
        elif language == "python" and "exec=" not in said:
            found.append(("python", text))
        elif language == "":
            lines = [line for line in text.splitlines() if line.startswith("triglot ") and not FORM.search(line)]
            found += [("triglot", line) for line in lines]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the pages speak of."""
    for name, what in (("DATA", "bikes"), ("OTHER", "boats")):
        (tmp_path / name).mkdir()
        lines = "".join(f"a man rides {number} {what}\n" for number in range(101))
        for file in ("source.txt", "target.txt") if name == "DATA" else ("new.txt",):
            (tmp_path / name / file).write_text(lines, encoding="utf-8")
    (tmp_path / "src" / "triglot").mkdir(parents=True)
    for text in ("README.md", "src/triglot/blocks.py"):
        shutil.copy(ROOT / text, tmp_path / text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(command: str) -> str:
    words = shlex.split(command)[1:]
    if words[0] == "train" and "--resume" not in words:
        small = SMALL.get(words[1], SMALL["text"])
        shape = () if words[1] == "more.toml" else SHALLOW  # which is that of the run it starts from
        words += [word for setting in (*FEWER, *shape, *small) for word in ("--set", setting)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{command}\n{done.output}"
    return done.output


def checkpoint_of_others(folder: Path, tokenizer: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


@pytest.mark.parametrize("page", PAGES)
def test_everything_shown_works_in_the_order_shown(page, folder, family, capfd):
    found = steps(page)
    if "THEIRS" in PAGES[page].read_text(encoding="utf-8"):
        checkpoint_of_others(folder / "THEIRS", family("llama3"))
    for recipe in ("demo-phrases", "demo-stdlib-moe"):
        if f"runs/demo/{recipe} " in PAGES[page].read_text(encoding="utf-8") and page != "README.md":
            do(f"triglot train {recipe} --out runs/demo/{recipe}")
    assert sum(kind == "triglot" for kind, _ in found) >= 3 or page in WITHOUT_COMMANDS
    for kind, text in found:
        if kind == "triglot":
            assert do(text).strip() or capfd.readouterr().out.strip(), text
        elif kind == "python":
            exec(compile(text, page, "exec"), {"__name__": "__main__"})
        else:
            (folder / kind).write_text(text, encoding="utf-8")


def test_the_tree_names_what_there_is():
    source = ROOT / "src" / "triglot"
    there = {
        path.name + "/" * path.is_dir()
        for path in source.iterdir()
        if not path.name.startswith(("__init__", "__pycache__"))
    }
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    shown = set(re.findall(r"^  ((?:\S+\.py ?|\S+/)(?: +\S+\.py)*)", readme, re.MULTILINE))
    names = {name for row in shown for name in row.split()}
    assert there - {"py.typed"} <= names
