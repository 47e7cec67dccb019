"""Configs come back as they were written, refuse what they do not know by its dotted path, and say how to mend it."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.checkpoint import write_json
from triglot.config import (
    BlockOptions,
    DataConfig,
    ExpertOptions,
    GenerationConfig,
    ModelConfig,
    RopeScaling,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from triglot.errors import ConfigError, require
from triglot.recipe import from_dict, load_config, load_recipe, to_dict

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
FORM = re.compile(r"^`.+` must be .+, but is .+ instead\.$")
MINIMAL = {"model": {"kind": "decoder_only"}, "data": {"kind": "text", "files": ["a.txt"]}}

rates = st.none() | st.floats(0, 0.9)
experts = st.builds(
    ExpertOptions,
    num_experts=st.integers(3, 11), top_k=st.integers(1, 3), d_ff=st.none() | st.integers(1, 99),
    every=st.integers(1, 3), capacity_factor=st.none() | st.floats(0.1, 9), balance_weight=st.floats(0, 1),
    z_weight=st.floats(0, 1), router_bias=st.booleans(),
)  # fmt: skip
scalings = st.one_of(
    st.builds(RopeScaling, kind=st.just("linear"), factor=st.floats(1, 99)),
    st.builds(
        RopeScaling, kind=st.just("yarn"), factor=st.floats(1, 99), original_max_position=st.integers(1, 999),
        beta_fast=st.floats(2, 99), attention_factor=st.none() | st.floats(0.1, 9),
    ),
)  # fmt: skip
block_options = st.builds(
    BlockOptions,
    norm=st.sampled_from(["layer", "rms"]), norm_order=st.sampled_from(["pre", "post"]),
    norm_eps=st.floats(1e-9, 1e-3), final_norm=st.none() | st.booleans(),
    positions=st.just("rotary"), rope_theta=st.floats(1, 1e7), rope_scaling=st.none() | scalings,
    activation=st.sampled_from(["relu", "gelu", "swiglu", "geglu_tanh"]), bias=st.booleans(),
    qkv_bias=st.none() | st.booleans(), head_dim=st.sampled_from([None, 2, 6]),
    qk_norm=st.sampled_from([None, "head", "width"]), scale_attention=st.booleans(),
    output_bias=st.none() | st.booleans(), num_kv_heads=st.sampled_from([None, 1, 2, 4]),
    tie_embeddings=st.booleans(), scale_embeddings=st.booleans(), attention_dropout=rates,
    activation_dropout=rates, embedding_dropout=rates, experts=st.none() | experts,
)  # fmt: skip
models = st.builds(
    ModelConfig,
    kind=st.just("encoder_decoder"), d_model=st.sampled_from([8, 40, 88]), num_heads=st.just(4),
    num_layers=st.integers(3, 9), d_ff=st.integers(1, 99), max_seq_length=st.integers(1, 999),
    dropout=st.floats(0, 0.9), options=block_options,
)  # fmt: skip
runs = st.builds(
    RunConfig,
    model=models,
    data=st.builds(
        DataConfig, kind=st.just("phrases"), language=st.sampled_from(["de", "fr", "cs"]),
        valid=st.floats(0.01, 0.9) | st.text(min_size=1), files=st.lists(st.text()).map(tuple),
        max_bytes=st.none() | st.integers(1, 10**9),
    ),
    train=st.builds(
        TrainConfig, betas=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)), threads=st.none() | st.integers(1, 9),
        precision=st.sampled_from(["auto", "fp32", "bf16"]), clip_norm=st.none() | st.floats(0.1, 9),
    ),
    seed=st.integers(0, 2**31),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")  # beartype does, on tuples
@settings(deadline=None, max_examples=40)
@given(runs)
def test_a_config_comes_back_as_it_was_written(config):
    assert from_dict(RunConfig, to_dict(config)) == config
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_saved_config_loads_as_it_was(tmp_path):
    config = from_dict(RunConfig, MINIMAL | {"init": {"from": "another run"}, "seed": 7})
    write_json(tmp_path / "config.json", to_dict(config))
    assert load_config(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["init"] == {"from": "another run"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    config = load_recipe(path)
    assert from_dict(RunConfig, to_dict(config)) == config


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"kind": "decoder_only", "width": 3}}, "model.width"),
        ({"model": {"kind": "decoder_only", "options": {"norms": "rms"}}}, "model.options.norms"),
        ({"model": {"kind": "decoder_only", "options": {"experts": {"k": 2}}}}, "model.options.experts.k"),
        ({"init": {"from_": "x"}}, "init.from_"),
        ({"train": {"lr": 1e-3}}, "train.lr"),
    ],
)
def test_unknown_keys_are_refused_with_the_dotted_path(values, path):
    with pytest.raises(ConfigError, match=rf"^`{re.escape(path)}` must be one of .*, but is '\w+' instead\.$"):
        from_dict(RunConfig, MINIMAL | values)


def test_a_key_that_is_nearly_right_is_told_what_was_perhaps_meant():
    with pytest.raises(ConfigError, match=r"perhaps max_steps\), but is 'max_step' instead"):
        from_dict(RunConfig, MINIMAL | {"train": {"max_step": 3}})
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, MINIMAL | {"train": {"zzz": 3}})
    assert "perhaps" not in str(caught.value)


def model(**values) -> dict:
    return {"model": {"kind": "decoder_only"} | values}


@pytest.mark.parametrize(
    ("values", "path", "rule", "value"),
    [
        (model(kind="decoder"), "model.kind", "one of encoder_decoder, decoder_only", "'decoder'"),
        (model(d_model="512"), "model.d_model", "a whole number", "'512'"),
        (model(d_model=512.0), "model.d_model", "a whole number", "512.0"),
        (model(d_model=True), "model.d_model", "a whole number", "True"),
        (model(dropout=True), "model.dropout", "a float", "True"),
        (model(options={"bias": 1}), "model.options.bias", "a bool", "1"),
        ({"model": 3}, "model", "a table", "3"),
        ({"train": {"betas": [0.9]}}, "train.betas", "a list of 2", "[0.9]"),
        ({"train": {"betas": [0.9, "x"]}}, "train.betas[1]", "a float", "'x'"),
        ({"data": {"kind": "text", "files": "a.txt"}}, "data.files", "a list", "'a.txt'"),
        ({"data": {"kind": "text", "files": [3]}}, "data.files[0]", "a string", "3"),
        ({"seed": None}, "seed", "a whole number", "None"),
    ],
)
def test_what_is_of_the_wrong_type_is_named_by_its_dotted_path(values, path, rule, value):
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, MINIMAL | values)
    assert str(caught.value) == f"`{path}` must be {rule}, but is {value} instead."


def test_what_is_missing_is_named_by_its_dotted_path():
    with pytest.raises(ConfigError, match=r"^`model\.kind` must be given, but is None instead\.$"):
        from_dict(RunConfig, MINIMAL | {"model": {}})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (model(options={"norm_eps": 0.0}), "model.options.norm_eps"),
        (model(options={"experts": {"num_experts": 3, "top_k": 4}}), "model.options.experts.top_k"),
        (model(options={"experts": {"num_experts": 3, "router": "expert_choice"}}), "model.options.experts.router"),
        (model(options={"experts": {"num_experts": 3, "side": "encoder"}}), "model.options.experts.side"),
        (model(options={"experts": {"num_experts": 3, "every": 99}}), "model.options.experts.every"),
        (model(options={"num_kv_heads": 3}), "model.options.num_kv_heads"),
        (model(options={"rope_scaling": {"kind": "linear", "factor": 0.0}}), "model.options.rope_scaling.factor"),
        (model(options={"positions": "rotary", "head_dim": 7}), "model.options.head_dim"),
        (model(kind="encoder_decoder", options={"window": 7}), "model.options.window"),
        ({"data": {"kind": "text"}}, "data.files"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_a_table_refuses_is_named_by_its_dotted_path(values, name):
    with pytest.raises(ConfigError, match=rf"^`{re.escape(name)}` must be "):
        from_dict(RunConfig, MINIMAL | values)


REFUSED = [
    (ExpertOptions, {"num_experts": 0}),
    (ExpertOptions, {"num_experts": 3, "top_k": 4}),
    (ExpertOptions, {"num_experts": 3, "top_k": 0}),
    (ExpertOptions, {"num_experts": 3, "every": 0}),
    (ExpertOptions, {"num_experts": 3, "d_ff": 0}),
    (ExpertOptions, {"num_experts": 3, "capacity_factor": 0.0}),
    (ExpertOptions, {"num_experts": 3, "capacity_factor": math.nan}),
    (ExpertOptions, {"num_experts": 3, "balance_weight": -1.0}),
    (ExpertOptions, {"num_experts": 3, "z_weight": -1.0}),
    (BlockOptions, {"norm_eps": 0.0}),
    (BlockOptions, {"rope_theta": -1.0}),
    (BlockOptions, {"num_kv_heads": 0}),
    (BlockOptions, {"head_dim": 0}),
    (BlockOptions, {"window": 0}),
    (BlockOptions, {"relative_buckets": 8}),
    (BlockOptions, {"relative_distance": 99}),
    (BlockOptions, {"positions": "relative", "relative_buckets": 3}),
    (BlockOptions, {"positions": "relative", "relative_distance": 16}),
    (BlockOptions, {"positions": "relative", "num_kv_heads": 1}),
    (BlockOptions, {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}),
    (RopeScaling, {"kind": "linear", "factor": 0.5}),
    (RopeScaling, {"kind": "linear", "factor": math.inf}),
    (RopeScaling, {"kind": "linear", "factor": 2.0, "original_max_position": 7}),
    (RopeScaling, {"kind": "dynamic", "factor": 2.0, "original_max_position": None}),
    (RopeScaling, {"kind": "yarn", "factor": 2.0, "original_max_position": 7, "low_freq_factor": 2.0}),
    (RopeScaling, {"kind": "llama3", "factor": 2.0, "original_max_position": 7, "attention_factor": 2.0}),
    (RopeScaling, {"kind": "llama3", "factor": 2.0, "original_max_position": 7, "high_freq_factor": 1.0}),
    (RopeScaling, {"kind": "yarn", "factor": 2.0, "original_max_position": 7, "beta_fast": 1.0}),
    (BlockOptions, {"attention_dropout": 1.0}),
    (BlockOptions, {"activation_dropout": -0.1}),
    (BlockOptions, {"embedding_dropout": math.nan}),
    (ModelConfig, {"kind": "decoder_only", "d_model": 0}),
    (ModelConfig, {"kind": "decoder_only", "num_layers": 0}),
    (ModelConfig, {"kind": "decoder_only", "d_model": 33, "num_heads": 2}),
    (ModelConfig, {"kind": "decoder_only", "dropout": 1.0}),
    (ModelConfig, {"kind": "decoder_only", "options": BlockOptions(num_kv_heads=3)}),
    (ModelConfig, {"kind": "decoder_only", "d_model": 8 * 11, "options": BlockOptions(positions="rotary")}),
    (ModelConfig, {"kind": "decoder_only", "options": BlockOptions(positions="rotary", head_dim=11)}),
    (ModelConfig, {"kind": "encoder_decoder", "options": BlockOptions(window=11)}),
    (TokenizerConfig, {"vocab_size": 299}),
    (DataConfig, {"kind": "text"}),
    (DataConfig, {"kind": "text", "files": ("a",), "valid": 1.0}),
    (DataConfig, {"kind": "pairs"}),
    (DataConfig, {"kind": "phrases", "hold_out": "tail", "test": 0.1}),
    (DataConfig, {"kind": "text", "files": ("a",), "test": 0.1}),
    (DataConfig, {"kind": "text", "files": ("a",), "hold_out": "tail", "valid": "b", "test": 0.1}),
    (DataConfig, {"kind": "text", "files": ("a",), "hold_out": "tail", "valid": 0.5, "test": 0.5}),
    (DataConfig, {"kind": "pairs", "source": "a"}),
    (DataConfig, {"kind": "pairs", "source": "a", "target": "b", "files": ("c",)}),
    (DataConfig, {"kind": "pairs", "files": ("c",), "valid_source": "a"}),
    (DataConfig, {"kind": "pairs", "files": ("c",), "test_target": "a"}),
    (DataConfig, {"kind": "phrases", "num_examples": 0}),
    (TrainConfig, {"max_steps": 0}),
    (TrainConfig, {"batch_tokens": 0}),
    (TrainConfig, {"accumulate": 0}),
    (TrainConfig, {"eval_every": 0}),
    (TrainConfig, {"learning_rate": 0.0}),
    (TrainConfig, {"learning_rate": math.nan}),
    (TrainConfig, {"warmup_steps": -1}),
    (TrainConfig, {"min_learning_rate": 1.0}),
    (TrainConfig, {"label_smoothing": 1.0}),
    (TrainConfig, {"clip_norm": 0.0}),
    (TrainConfig, {"betas": (0.9, 1.0)}),
    (TrainConfig, {"weight_decay": -0.1}),
    (TrainConfig, {"weight_decay": math.nan}),
    (TrainConfig, {"adam_eps": 0.0}),
    (TrainConfig, {"learning_rate": math.inf}),
    (TrainConfig, {"max_minutes": 0.0}),
    (ExpertOptions, {"num_experts": 3, "capacity_factor": math.inf}),
    (ExpertOptions, {"num_experts": 3, "router": "expert_choice", "capacity_factor": 1.0}),
    (ExpertOptions, {"num_experts": 3, "renormalize": True, "top_k": 1}),
    (ExpertOptions, {"num_experts": 3, "router": "softmax_of_chosen", "top_k": 1}),
    (ExpertOptions, {"num_experts": 3, "router": "sigmoid", "renormalize": True}),
    (ExpertOptions, {"num_experts": 3, "bias_rate": 0.01}),
    (ExpertOptions, {"num_experts": 3, "capacity_over": "sequence"}),
    (ExpertOptions, {"num_experts": 3, "min_capacity": 8}),
    (ExpertOptions, {"num_experts": 3, "noise": -1.0}),
    (ExpertOptions, {"num_experts": 3, "shared": -1}),
    (ModelConfig, {"kind": "decoder_only", "vocab_size": -1}),
    (GenerationConfig, {"beam": 0}),
    (GenerationConfig, {"length_penalty": -1.0}),
    (GenerationConfig, {"max_new_tokens": 0}),
]


@pytest.mark.parametrize(("kind", "values"), REFUSED, ids=lambda part: getattr(part, "__name__", str(part)))
def test_values_that_cannot_work_are_refused_in_the_one_form(kind, values):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert FORM.match(str(caught.value)), str(caught.value)
    name = list(values)[-1]
    assert name in str(caught.value) or name == "options" or kind is DataConfig or kind is ModelConfig


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"kind": "phrases"}},
        {"model": {"kind": "encoder_decoder"}},
        {"train": {"context": 5001}},
        {
            "model": {"kind": "encoder_decoder", "options": {"tie_embeddings": True}}, "data": {"kind": "phrases"},
            "tokenizer": {"joint": False},
        },
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_refused_in_the_one_form(values):
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, MINIMAL | values)
    assert FORM.match(str(caught.value)), str(caught.value)


RECIPE = """
[model]
kind = "decoder_only"
[data]
kind = "text"
files = ["a.txt"]
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.max_steps=7", "train.max_steps", 7),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("model.options.norm=rms", "model.options.norm", "rms"),
        ("model.options.experts.num_experts=5", "model.options.experts.num_experts", 5),
        ("model.options.experts=none", "model.options.experts", None),
        ("model.options.rope_scaling=none", "model.options.rope_scaling", None),
        ("model.options.tie_embeddings=true", "model.options.tie_embeddings", True),
        ('data.files=["b.txt", "c.txt"]', "data.files", ("b.txt", "c.txt")),
        ("data.root=/some/where = odd", "data.root", "/some/where = odd"),
        ("data.valid=held out.txt", "data.valid", "held out.txt"),
        ("train.betas=[0.5, 0.75]", "train.betas", (0.5, 0.75)),
        ("init.from=runs/a", "init.from_", "runs/a"),
        ("seed=11", "seed", 11),
    ],
)
def test_an_override_sets_what_its_path_names(recipe, override, path, value):
    found = load_recipe(recipe, (override,))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_a_recipe_without_a_model_has_that_of_the_run_it_starts_from(recipe, tmp_path):
    before = load_recipe(recipe)
    write_json(tmp_path / "config.json", to_dict(before))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "more.toml").write_text(f'[data]\nkind = "{before.data.kind}"\nfiles = ["x"]\n', encoding="utf-8")
    init = f"init.from={tmp_path}"
    assert load_recipe(tmp_path / "more.toml", (init,)).model == before.model
    other = load_recipe(tmp_path / "more.toml", (init, "model.dropout=0.375", "model.options.attention_dropout=0.25"))
    assert (other.model.dropout, other.model.options.attention_dropout) == (0.375, 0.25)
    assert other.model.num_layers == before.model.num_layers
    with pytest.raises(ConfigError, match="`init.from` must be a run's folder"):
        load_recipe(tmp_path / "more.toml", (f"init.from={tmp_path / 'none'}",))
    with pytest.raises(ConfigError, match="`model` must be given"):
        load_recipe(tmp_path / "more.toml")


def test_of_two_overrides_the_later_holds(recipe):
    assert load_recipe(recipe, ("seed=3", "seed=5")).seed == 5


@pytest.mark.parametrize("override", ["seed", "=3", "train.max_step=3", "seed.a=3", "train.max_steps=many"])
def test_an_override_that_makes_no_sense_is_refused_in_the_one_form(recipe, override):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, (override,))
    assert FORM.match(str(caught.value)), str(caught.value)


def test_a_recipe_that_is_missing_or_no_toml_or_no_text_says_so(tmp_path):
    with pytest.raises(ConfigError, match="`recipe` must be a file that can be read, but is"):
        load_recipe(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="`recipe` must be a file that can be read, but is"):
        load_recipe(tmp_path)
    for content in (b"seed = ", b"\xff\xfe"):
        (tmp_path / "broken.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.toml"):
            load_recipe(tmp_path / "broken.toml")


def all_configs(kind: type = RunConfig) -> set[type]:
    found = {kind}
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= all_configs(part)
    return found


@pytest.mark.parametrize("kind", sorted(all_configs(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_configs_are_frozen_and_take_keywords_only(kind):
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert len(all_configs()) == 10


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ExpertOptions, {"num_experts": "4"}, "`num_experts` must be a whole number, but is '4' instead."),
        (ExpertOptions, {"num_experts": 1}, "`top_k` must be at most num_experts (1), and is 2 unless it is given,"),
        (ModelConfig, {"kind": "both"}, "`kind` must be encoder_decoder or decoder_only, but is 'both' instead."),
        (ModelConfig, {"kind": "decoder_only", "d_model": 8.0}, "`d_model` must be a whole number, but is 8.0"),
        (BlockOptions, {"activation": "tanh"}, "`activation` must be one of relu, gelu, gelu_tanh, silu, swiglu,"),
        (BlockOptions, {"experts": 4}, "`experts` must be a triglot.config.ExpertOptions or None, but is 4 instead."),
        (TrainConfig, {"betas": [0.9, 0.95]}, "`betas` must be a tuple, but is [0.9, 0.95] instead."),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused_in_words(kind, values, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        kind(**values)


def test_dropout_left_out_is_filled_in_and_given_is_kept():
    filled = BlockOptions(attention_dropout=0.25).with_dropout(attention=0.0, embedding=0.5)
    assert (filled.attention_dropout, filled.embedding_dropout) == (0.25, 0.5)
    assert BlockOptions().with_dropout(attention=0.0, embedding=0.5).attention_dropout == 0.0


def test_require_is_silent_when_it_holds_and_raises_what_it_is_told():
    require(True, "x", "good", 3)
    with pytest.raises(ConfigError, match=r"^`x` must be good, but is 'bad' instead\.$"):
        require(False, "x", "good", "bad", ConfigError)
    with pytest.raises(ValueError, match=r"^`x` must be good, but is 3 instead\.$"):
        require(False, "x", "good", 3)
