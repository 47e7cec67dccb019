"""What the README shows, done."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = {
    "pairs": ("model.d_model=12", "tokenizer.vocab_size=300"),
    "text": ("model.d_model=16", "tokenizer.vocab_size=300", "train.context=32", "train.batch_tokens=64"),
}
FEWER = ("model.num_layers=1", "model.d_ff=13", "train.max_steps=2", "train.eval_every=2")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("") for line in block.splitlines() if line.startswith("triglot ")]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "DATA").mkdir()
    lines = [f"a man rides {number} bikes\n" for number in range(101)]
    (folder / "DATA" / "source.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "DATA" / "target.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def small(command: str) -> list[str]:
    """The command through this Python, and a training so small that it takes seconds."""
    words = shlex.split(command)
    settings = (*FEWER, *SMALL[words[2]]) if words[1] == "train" else ()
    return [sys.executable, "-m", *words, *(word for setting in settings for word in ("--set", setting))]


def test_every_command_works_in_the_order_shown(folder):
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        said = run(small(command), folder)
        assert said.strip(), command
    assert (folder / "explain.html").stat().st_size > 1000


@pytest.mark.parametrize("program", blocks("python"))
def test_every_program_works(program, tmp_path):
    assert "torch.Size([2, 4, 1000])" in run([sys.executable, "-c", program], tmp_path)


def test_the_tree_names_what_there_is():
    source = Path(__file__).parents[1] / "src" / "triglot"
    there = {
        path.name + "/" * path.is_dir()
        for path in source.iterdir()
        if not path.name.startswith(("__init__", "__pycache__"))
    }
    shown = set(re.findall(r"^  ((?:\S+\.py ?|\S+/)(?: +\S+\.py)*)", README, re.MULTILINE))
    names = {name for row in shown for name in row.split()}
    assert there - {"py.typed"} <= names
