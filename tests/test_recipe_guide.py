"""What docs/how-to/write-a-recipe.md must hold: every key with its default, and recipes that are recipes."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from triglot.config import BlockOptions, ExpertOptions, RopeScaling, RunConfig
from triglot.recipe import from_dict

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
