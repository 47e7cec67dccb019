"""A run that was given experts computes what it computed before, and is trained on from there."""

import json

import pytest
import torch
from typer.testing import CliRunner

from triglot.checkpoint import load_model
from triglot.cli import app
from triglot.config import ExpertOptions, RunConfig
from triglot.data.prepare import prepare
from triglot.errors import ConfigError
from triglot.insight.domains import expert_domains, table
from triglot.layers.masks import create_masks
from triglot.layers.moe import MixtureOfExperts, move_biases
from triglot.recipe import from_dict, to_dict
from triglot.training.metrics import read_metrics
from triglot.training.session import train
from triglot.upcycling import upcycle

KINDS = ["encoder_decoder", "decoder_only"]
SHAPE = {"d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 12, "max_seq_length": 64}


def recipe(folder, kind: str, **changes) -> RunConfig:
    pairs = kind == "encoder_decoder"
    data = (
        {"kind": "pairs", "files": ["pairs.tsv"]}
        if pairs
        else {"kind": "text", "files": ["text.txt"], "document": "line"}
    )
    values = {
        "model": {"kind": kind, **SHAPE, **changes.pop("model", {})},
        "data": {"root": str(folder), "valid": 0.2, **data},
        "tokenizer": {"kind": "byte"},
        "train": {"max_steps": 4, "context": 16, "batch_tokens": 160, "log_every": 1, "eval_every": 4, "threads": 1,
                  "precision": "fp32", "warmup_steps": 0},
        "generation": {"max_new_tokens": 5},
        **changes,
    }  # fmt: skip
    return from_dict(RunConfig, values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycling")
    rows = "".join(f"{n} ab cd\t{n} {'ba' if n % 2 else 'dc'}\t{'up' if n % 2 else 'down'}\n" for n in range(60))
    (folder / "pairs.tsv").write_text(rows, encoding="utf-8")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 40, encoding="utf-8")
    for kind in KINDS:
        train(recipe(folder, kind), folder / kind, device="cpu")
    return folder


def logits(run, kind: str) -> torch.Tensor:
    model = load_model(run).model
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(5))
    return model(ids, ids, *create_masks(ids, ids)).logits if kind == "encoder_decoder" else model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "experts",
    [{}, {"every": 2}, {"router": "sigmoid", "top_k": 3}, {"router": "softmax_of_chosen"}],
    ids=str,
)
def test_whatever_the_routers_choose_it_computes_what_it_did(folder, tmp_path, kind, experts):
    config = upcycle(folder / kind, tmp_path / "new", ExpertOptions(**({"num_experts": 5} | experts)))
    torch.testing.assert_close(logits(tmp_path / "new", kind), logits(folder / kind, kind), atol=1e-5, rtol=0)
    layers = [one for one in load_model(tmp_path / "new").model.modules() if isinstance(one, MixtureOfExperts)]
    sides = 2 if kind == "encoder_decoder" else 1
    assert len(layers) == sides * SHAPE["num_layers"] // experts.get("every", 1)
    assert config.model.options.experts.num_experts == 5


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_on_from_there_and_its_experts_part(folder, tmp_path, kind):
    runner = CliRunner()
    done = runner.invoke(app, ["upcycle", str(folder / kind), "--experts", "3", "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    for setting in ("init.from=", "model.options.experts.num_experts=3", "model.options.experts.top_k=2"):
        assert f"--set {setting}" in done.output
    options = {"options": {"experts": {"num_experts": 3, "balance_weight": 0.05}}}  # how it learns may change
    config = recipe(folder, kind, model=options, init={"from": str(tmp_path / "new")})
    train(config, tmp_path / "on", device="cpu")
    layers = [one for one in load_model(tmp_path / "on").model.modules() if isinstance(one, MixtureOfExperts)]
    assert all((one.inner[0] != one.inner[1]).any() for one in layers)
    line = read_metrics(tmp_path / "on" / "metrics.jsonl")[0]
    assert len(line["experts"]["load"]) == len(layers)
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in line["experts"]["load"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "softmax", "top_k": 1}, r"`top_k` must be at least 2, since the weight of a single choice"),
        ({"router": "expert_choice", "side": "encoder"}, r"`router` must be one whose weights sum to 1"),
        ({"renormalize": False}, r"`renormalize` must be left out or true, .* but is False instead"),
        ({"shared": 1}, r"`shared` must be 0"),
        ({"d_ff": 3}, r"`d_ff` must be left out"),
        ({"capacity_factor": 1.0}, r"`capacity_factor` must be None, since dropped tokens"),
    ],
)
def test_what_would_change_the_output_is_refused(folder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        upcycle(folder / "encoder_decoder", tmp_path / "new", ExpertOptions(num_experts=4, **options))
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_and_experts_are_given_once(folder, tmp_path):
    with pytest.raises(ConfigError, match="`out` must be a new folder"):
        upcycle(folder / "decoder_only", folder / "decoder_only", ExpertOptions(num_experts=4))
    upcycle(folder / "decoder_only", tmp_path / "new", ExpertOptions(num_experts=4))
    with pytest.raises(ConfigError, match="`run` must be one without experts, but is 'one with 4' instead"):
        upcycle(tmp_path / "new", tmp_path / "newer", ExpertOptions(num_experts=4))


# The balancing bias


def test_the_bias_moves_against_the_load_after_each_step_and_never_by_a_gradient(folder, tmp_path):
    rate = 0.01
    experts = {"num_experts": 4, "router": "sigmoid", "bias_rate": rate, "balance_weight": 0.0}
    config = recipe(folder, "decoder_only", model={"options": {"experts": experts}})
    train(config, tmp_path / "run", device="cpu")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    expected = sum((0.25 - torch.tensor(line["experts"]["load"])).sign() * rate for line in lines)
    model = load_model(tmp_path / "run", "last").model
    biases = [one.selection_bias for one in model.modules() if isinstance(one, MixtureOfExperts)]
    torch.testing.assert_close(torch.stack(biases), expected)
    assert not any("selection_bias" in name for name, _ in model.named_parameters())


def test_evaluation_and_other_routers_move_no_bias():
    layer = MixtureOfExperts(8, 4, 5, router="sigmoid").eval()
    layer(torch.randn(2, 5, 8))
    assert not layer.selection_bias.any()
    plain = MixtureOfExperts(8, 4, 5)
    move_biases(plain, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert plain.selection_bias is None


# Experts by domain


def test_loads_by_target_tag_are_those_of_its_pairs_and_sum_to_one(folder, tmp_path):
    upcycle(folder / "encoder_decoder", tmp_path / "new", ExpertOptions(num_experts=4))
    found = expert_domains(tmp_path / "new", {})
    assert found.layers == ["encoder 1", "encoder 2", "decoder 1", "decoder 2"]
    assert sorted(found.loads) == ["down", "up"]
    loaded = load_model(tmp_path / "new")
    for tag, of_domain in found.loads.items():
        torch.testing.assert_close(of_domain.sum(-1), torch.ones(4))
        examples = [
            one for one in prepare(loaded.config, tmp_path / "new", loaded.tokenizers).valid_examples if one.tag == tag
        ]
        (source,) = loaded.tokenizers.encode_sources([examples[0].source], [tag])
        assert len(examples) > 1
        counts = torch.zeros(4)
        for one in examples:
            (source,) = loaded.tokenizers.encode_sources([one.source], [tag])
            routing = loaded.model.encoder.run(torch.tensor([source])).routing[1]
            counts += torch.bincount(routing.experts.flatten(), minlength=4)
        torch.testing.assert_close(of_domain[1], counts / counts.sum())
    assert all(0 <= bits <= 1 for bits in found.bits())
    lines = table(found).splitlines()
    assert len(lines) == 4 * (2 + len(found.loads))


def test_a_domain_told_by_its_experts_has_as_many_bits_as_it_takes(folder, tmp_path):
    upcycle(folder / "decoder_only", tmp_path / "new", ExpertOptions(num_experts=4))
    (tmp_path / "a.txt").write_text("a" * 99, encoding="utf-8")
    (tmp_path / "b.txt").write_text("b" * 99, encoding="utf-8")
    found = expert_domains(tmp_path / "new", {"a": tmp_path / "a.txt", "b": tmp_path / "b.txt"})
    apart = found._replace(loads={"a": torch.tensor([[0.5, 0.5, 0, 0]]), "b": torch.tensor([[0, 0, 0.5, 0.5]])})
    assert apart.bits() == pytest.approx([1.0])
    assert apart.largest() == pytest.approx([1.0])
    same = found._replace(loads={"a": torch.tensor([[0.7, 0.3]]), "b": torch.tensor([[0.7, 0.3]])})
    assert same.bits() == pytest.approx([0.0], abs=1e-6)
    assert same.largest() == pytest.approx([1.4])
    model, tokenizer = load_model(tmp_path / "new").model, load_model(tmp_path / "new").tokenizers.target
    windows = torch.tensor(tokenizer.encode("a" * 96)).view(6, 16)
    counts = torch.stack([torch.bincount(one.experts.flatten(), minlength=4) for one in model.run(windows).routing])
    last = torch.tensor([tokenizer.encode("aa")])
    counts += torch.stack([torch.bincount(one.experts.flatten(), minlength=4) for one in model.run(last).routing])
    torch.testing.assert_close(found.loads["a"], counts / counts.sum(-1, keepdim=True))
    assert not torch.equal(found.loads["a"], found.loads["b"])
    told = CliRunner().invoke(app, ["experts", str(tmp_path / "new"), f"a={tmp_path / 'a.txt'}", "--json"])
    assert json.loads(told.output)["layers"] == ["layer 1", "layer 2"]


@pytest.mark.parametrize(
    ("run", "files", "message"),
    [
        ("decoder_only", [], "`run` must be one with experts"),
        ("decoder_only", ["a=missing.txt"], "`NAME=FILE` must be a name, = and a file"),
    ],
)
def test_experts_that_are_not_there_are_said_to_be_missing(folder, run, files, message):
    told = CliRunner().invoke(app, ["experts", str(folder / run), *files])
    assert told.exit_code == 2
    assert message in told.output


def test_recipes_of_all_routers_survive_their_way_through_json():
    for router in ("softmax", "softmax_of_chosen", "sigmoid", "expert_choice"):
        side = "encoder" if router == "expert_choice" else "both"
        options = ExpertOptions(num_experts=4, router=router, side=side)
        assert from_dict(ExpertOptions, json.loads(json.dumps(to_dict(options)))) == options


def test_a_dense_run_is_not_gone_on_from_with_experts_before_it_is_upcycled(folder, tmp_path):
    experts = {"options": {"experts": {"num_experts": 4}}}
    config = recipe(folder, "decoder_only", model=experts, init={"from": str(folder / "decoder_only")})
    with pytest.raises(ConfigError, match="such as `triglot upcycle` makes of a dense one"):
        train(config, tmp_path / "run", device="cpu")
