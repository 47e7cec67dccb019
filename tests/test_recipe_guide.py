"""What docs/how-to/write-a-recipe.md must hold: every key with its default, and recipes that are recipes."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from triglot.config import BlockOptions, ExpertOptions, RopeScaling, RunConfig, TrainConfig
from triglot.evaluation import score_translations
from triglot.recipe import from_dict
from triglot.training.session import train

GUIDE = (Path(__file__).parents[1] / "docs" / "how-to" / "write-a-recipe.md").read_text(encoding="utf-8")
SECTIONS = {field.name: field.type for field in dataclasses.fields(RunConfig) if field.name != "seed"} | {
    "model.options": BlockOptions,
    "model.options.rope_scaling": RopeScaling,
    "model.options.experts": ExpertOptions,
}


@pytest.mark.parametrize(("section", "config"), SECTIONS.items())
def test_every_key_stands_there_with_its_default(section, config):
    table = GUIDE.split(f"### [{section}]\n")[1].split("\n### ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    fields = [field for field in dataclasses.fields(config) if not dataclasses.is_dataclass(field.default)]
    assert list(told) == [field.name.rstrip("_") for field in fields]
    for field, text in zip(fields, told.values(), strict=True):
        if field.default is dataclasses.MISSING:
            assert text == "–"
        elif field.default is None:
            assert text == "`none`"
        else:
            [value] = tomllib.loads(f"x = {text.strip('`')}").values()
            assert (tuple(value) if isinstance(value, list) else value) == field.default, field.name


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL))
def test_its_recipes_are_recipes(text):
    from_dict(RunConfig, tomllib.loads(text))


def test_every_field_of_metrics_stands_there(tmp_path):
    (tmp_path / "pairs.tsv").write_text("".join(f"{n} ab\t{n} ba\n" for n in range(40)), encoding="utf-8")
    experts = {"options": {"experts": {"num_experts": 3}}}
    values = {
        "model": {"kind": "encoder_decoder", "d_model": 6, "num_heads": 2, "num_layers": 1, "d_ff": 7, **experts},
        "data": {"kind": "pairs", "root": str(tmp_path), "files": ["pairs.tsv"], "valid": 0.1},
        "tokenizer": {"kind": "byte"},
        "train": {"max_steps": 2, "log_every": 1, "label_smoothing": 0.1, "keep_best": "bleu", "precision": "fp32"},
        "generation": {"max_new_tokens": 3},
    }
    train(from_dict(RunConfig, values), tmp_path / "run", evaluators=[score_translations], device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    table = GUIDE.split("## What a run tells\n")[1]
    for kind, after in (("train", "eval"), ("eval", "skipped")):
        found = {name for line in lines if line["kind"] == kind for name in (*line, *line.get("experts", {}))}
        told = set(re.findall(r"`(\w+)`", table.split(f"\n| {kind} |")[1].split(f"\n| {after} |")[0]))
        assert found - {"kind", "step"} <= told
        assert told - found <= {field.name for field in dataclasses.fields(TrainConfig)}
