"""What holds for a run's folder, whatever happens while it is written."""

import json
from pathlib import Path

import pytest
import torch

from triglot import checkpoint
from triglot.checkpoint import Progress, find_checkpoint, load_model, save_checkpoint, step_name
from triglot.config import BlockOptions, DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from triglot.errors import CheckpointError
from triglot.models.factory import build_model
from triglot.tokenizer import Tokenizer, Tokenizers
from triglot.training.optim import make_optimizer

VOCAB, D_MODEL, D_FF = 259, 6, 11


@pytest.fixture
def config() -> RunConfig:
    options = BlockOptions(tie_embeddings=True)
    model = ModelConfig(
        kind="encoder_decoder",
        d_model=D_MODEL,
        num_heads=2,
        num_layers=1,
        d_ff=D_FF,
        max_seq_length=13,
        vocab_size=VOCAB,
        src_vocab_size=VOCAB,
        options=options,
    )
    return RunConfig(model=model, data=DataConfig(kind="phrases"), tokenizer=TokenizerConfig(kind="byte"))


@pytest.fixture
def run(tmp_path, config) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3, the second of them the best."""
    tokenizer = Tokenizer.train("byte", [])
    Tokenizers(tokenizer, tokenizer).save(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path, config, step, "step-00000001" if step == 1 else "step-00000002")
    return tmp_path


def model_of(config: RunConfig, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(config.model)


def save(run: Path, config: RunConfig, step: int, best: str | None = None) -> Path:
    model = model_of(config, step)
    optimizer = make_optimizer(model, TrainConfig())
    train_a_step(model, optimizer)
    return save_checkpoint(run, step_name(step), config, model, Progress(step=step, best=best), optimizer)


def train_a_step(model, optimizer) -> None:
    ids = torch.randint(VOCAB, (2, 5))
    model(ids, ids).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_restored_goes_on_exactly_as_what_was_saved(run, config):
    kept, other = model_of(config, 5), model_of(config, 7)
    kept_optimizer, optimizer = (make_optimizer(model, TrainConfig()) for model in (kept, other))
    train_a_step(kept, kept_optimizer)
    folder = save_checkpoint(run, step_name(4), config, kept, Progress(step=4, window=[0.1, 0.2, 3.0]), kept_optimizer)
    train_a_step(kept, kept_optimizer)
    progress = checkpoint.restore_checkpoint(folder, other, optimizer)
    train_a_step(other, optimizer)  # draws its tokens from the restored random state
    assert progress == Progress(step=4, window=[0.1, 0.2, 3.0])
    assert same(kept.state_dict(), other.state_dict())
    assert same(*(checkpoint.optimizer_tensors(m, o) for m, o in ((kept, kept_optimizer), (other, optimizer))))


def test_tied_weights_are_saved_once_and_tied_after_loading(run):
    names = checkpoint.read_weights(find_checkpoint(run)).keys()
    assert sum("tokens.weight" in name or "final_layer.weight" in name for name in names) == 1
    model = load_model(run).model
    assert model.final_layer.weight is model.decoder.embedding.tokens.weight is model.encoder.embedding.tokens.weight


def test_best_last_and_numbered_checkpoints_are_found(run, config):
    for which, step in (("best", 2), ("last", 3), ("1", 1), ("step-00000001", 1)):
        expected = model_of(config, step)
        train_a_step(expected, make_optimizer(expected, TrainConfig()))
        assert same(load_model(run, which).model.state_dict(), expected.state_dict())


def test_a_model_is_loaded_in_evaluation_mode_and_in_the_type_asked_for(run):
    loaded = load_model(run, dtype=torch.bfloat16)
    assert not any(module.training for module in loaded.model.modules())
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}


def test_an_unknown_checkpoint_is_refused_with_the_known_ones(run):
    with pytest.raises(CheckpointError, match=r"best, last or one of step-00000001, .*, but is '17' instead"):
        load_model(run, "17")
    with pytest.raises(CheckpointError, match="a folder that exists, with checkpoints"):
        load_model(run / "nowhere")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "state.json", "manifest.json", "../../tokenizer.json"]
)
def test_any_damaged_file_is_named_and_never_loaded(run, name, damage):
    path = (find_checkpoint(run) / name).resolve()
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-3])
    steps = checkpoint.step_checkpoints(run)
    if name == "state.json":  # a model alone is loaded without its own state
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.read_progress(steps[1])
    elif name == "manifest.json" and damage == "remove":
        with pytest.raises(CheckpointError, match="step-00000002"):
            load_model(run)
    else:
        with pytest.raises(CheckpointError, match=r"manifest.json|" + path.name):
            load_model(run)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "state.json"])
def test_a_damaged_state_is_not_resumed_from(run, config, name):
    folder, model = find_checkpoint(run, "last"), model_of(config, 0)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.restore_checkpoint(folder, model, make_optimizer(model, TrainConfig()))


def test_a_full_disk_is_told_and_leaves_everything_as_it_was(run, config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(CheckpointError, match=r"step-00000004 could not be written: .*No space left"):
        save(run, config, 4)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [step_name(step) for step in (1, 2, 3)]


def test_all_but_the_last_and_the_best_are_removed(run, config):
    save(run, config, 4, "step-00000002")
    checkpoint.remove_checkpoints(run, keep=1)
    assert [folder.name for folder in checkpoint.step_checkpoints(run)] == [step_name(2), step_name(4)]


def test_weights_that_do_not_fit_are_listed_by_name(config):
    model = model_of(config, 0)
    weights = dict(checkpoint.weights_of(model))
    weights["extra"] = weights.pop("final_layer.bias")
    weights["encoder.layers.0.feed_forward.inner.weight"] = torch.zeros(2, 3)
    name = next(name for name in weights if weights[name].dim() == 2 and weights[name].shape == (D_FF, D_MODEL))
    weights[name] = torch.zeros(2, 3)
    with pytest.raises(CheckpointError) as error:
        checkpoint.set_weights(model, weights, "somewhere")
    assert "final_layer.bias is missing" in str(error.value)
    assert "extra is unknown" in str(error.value)
    assert f"{name} is [2, 3], not [{D_FF}, {D_MODEL}]" in str(error.value)


def test_nothing_in_a_checkpoint_is_a_pickle(run):
    for path in run.rglob("*.*"):
        assert path.suffix in (".json", ".safetensors") or path.is_dir()
    json.loads((find_checkpoint(run) / "manifest.json").read_text(encoding="utf-8"))
