"""The demo leaves four runs that every command takes, overwrites none, and says plainly when it fell short."""

import io
import json

import pytest
import torch
from rich.console import Console

from triglot.checkpoint import load_model
from triglot.demo import ENOUGH, RECIPES, judge, run
from triglot.errors import ConfigError, TriglotError
from triglot.evaluation import evaluate
from triglot.generation.engine import load
from triglot.layers.moe import MixtureOfExperts
from triglot.recipe import load_recipe, shipped_recipes

SMALL = (
    "train.max_steps=3",
    "train.eval_every=2",
    "train.log_every=1",
    "train.batch_tokens=256",
    "train.precision=fp32",
    "train.warmup_steps=1",
    "data.num_examples=500",
    "data.max_bytes=60000",
    "model.d_model=16",
    "model.d_ff=23",
    "model.num_layers=2",
    "generation.max_new_tokens=5",
    "generation.beam=1",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out, console = tmp_path_factory.mktemp("demo") / "deep", Console(file=io.StringIO(), width=120)
    torch.manual_seed(0)
    outcomes = run(out, settings=SMALL, enough=0.0, console=console)
    return out, outcomes, console.file.getvalue()


def test_trains_a_transformer_and_a_language_model_without_and_with_experts():
    configs = {name: load_recipe(shipped_recipes()[name]) for name in RECIPES}
    kinds = [(config.model.kind, config.model.options.experts is not None) for config in configs.values()]
    assert kinds[0] == ("encoder_decoder", False)
    assert set(kinds) == {(kind, experts) for kind in ("encoder_decoder", "decoder_only") for experts in (False, True)}
    assert configs["demo-phrases"].data.kind == "phrases"


def test_leaves_runs_with_pictures_and_pages(small):
    out, outcomes, said = small
    assert [outcome.name for outcome in outcomes] == list(RECIPES)
    for name in RECIPES:
        for artefact in ("config.json", "tokenizer.json", "metrics.jsonl", "curves.png", "explain.html"):
            assert (out / name / artefact).stat().st_size > 0
        assert (out / name / "curves.png").name in said
        assert name in said


def test_runs_can_be_used_and_measured(small):
    out, outcomes, _ = small
    assert load(out / "demo-phrases").translate(["seventeen"])
    assert load(out / "demo-stdlib-moe").generate(["def "], max_new_tokens=3)
    assert evaluate(out / "demo-stdlib")["loss"] == pytest.approx(outcomes[1].reached["loss"])
    model = load_model(out / "demo-phrases-moe").model
    assert any(isinstance(module, MixtureOfExperts) for module in model.modules())


def test_pages_of_runs_with_experts_show_them(small):
    for name in RECIPES:
        html = (small[0] / name / "explain.html").read_text(encoding="utf-8")
        page = json.loads(html.split('id="data">')[1].split("</script>")[0])
        assert bool(page["experts"]) == name.endswith("moe")


def test_says_what_was_reached_on_phrases_that_were_held_out(small):
    _, outcomes, said = small
    assert f"exact match {outcomes[0].reached['exact match']:.1%}" in said
    assert "exact match on 500 held-out phrases" in said
    assert all(outcome.reached["loss"] > 0 for outcome in outcomes)


def test_falling_short_is_an_error_that_names_the_share(small):
    few = small[1][0]._replace(reached={"exact match": 0.9444})
    with pytest.raises(TriglotError, match=r"demo-phrases must translate 95% .* but does so with 94\.4% of them"):
        judge(few, ENOUGH)
    judge(few._replace(reached={"exact match": 0.95}), ENOUGH)


def test_overwrites_nothing_and_trains_nothing_where_a_run_is_there(tmp_path):
    (tmp_path / "demo-stdlib").mkdir()
    with pytest.raises(ConfigError, match=r"`--out` must be a folder without demo-stdlib"):
        run(tmp_path, settings=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-stdlib"]
    assert not list((tmp_path / "demo-stdlib").iterdir())


@pytest.mark.slow
def test_the_whole_demo_reaches_what_it_promises(tmp_path):
    outcomes = run(tmp_path)
    assert outcomes[0].reached["exact match"] >= ENOUGH
    assert sum(outcome.seconds for outcome in outcomes) < 300 or torch.get_num_threads() < 2
