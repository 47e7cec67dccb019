"""A run's folder: what is needed to use a model, and to go on training it as if it had never stopped.

    config.json                     the resolved recipe
    tokenizer.json                  or source.json and target.json, or the files of an import's tokenizer
    metrics.jsonl, samples.md       for people, like environment.json; no model is loaded from them
    checkpoints/step-00000200/      config.json, model.safetensors, optimizer.safetensors, rng.safetensors, state.json
                                    and, written last, manifest.json with the SHA-256 of each, of the tokenizer and of
                                    data/manifest.json
    checkpoints/damaged-step-…/     what --resume found damaged, and nothing reads any more

A checkpoint is written into a temporary folder, flushed to disk and renamed, so it is whole or not there; the rename is
the one moment at which the run moves on. There are no pointers to keep in step: the last checkpoint is the one with the
highest number, and its state.json names the best.

What is damaged later is never loaded. Training goes on from the newest checkpoint that is whole; a model to be used is
the one that was asked for, or an error that names the damaged file and the checkpoints that are whole.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from triglot.config import RunConfig
from triglot.errors import CheckpointError, ConfigError, DamagedError, reason, require
from triglot.files import sync, write_json
from triglot.manifest import find_damage, read_manifest, verified, write_manifest
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.factory import build_model
from triglot.recipe import from_dict, to_dict
from triglot.tokenizer import TOKENIZER_FILES, Tokenizers

DATA_FILE = "data/manifest.json"
STEP_FOLDER = r"step-\d+(\.replaced)?"


@dataclass
class Progress:
    """Where a run stands: all of it that is not a tensor."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    """Micro-batches of the epoch that have been used."""
    tokens: int = 0
    """Scored tokens trained on."""
    seconds: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Sums of nats, smoothed nats and tokens since the last line of metrics."""
    usual: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last applied steps, oldest first: what a spike is told by."""
    skipped: list[int] = field(default_factory=list)
    """The steps whose update was not applied."""
    spikes: list[list[float]] = field(default_factory=list)
    """Epoch, loss and gradient norm of those among them that were finite."""
    evaluated: int = 0
    """The step of the last evaluation."""
    scores: dict[str, float] = field(default_factory=dict)
    """What it found."""
    best: str | None = None
    """The name of the best checkpoint so far."""
    best_score: float | None = None
    stale: int = 0
    """Evaluations since the best one."""
    lowest: list[Any] | None = None
    """The lowest validation loss so far, the training loss at that time, and the step."""
    above: int = 0
    """Evaluations in a row, of late, that found the run overfitting."""


def step_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first; one that is being replaced precedes its successor."""
    folders = (path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(STEP_FOLDER, path.name))
    return sorted(folders, key=lambda folder: (folder.stem, not folder.suffix))


def find_checkpoint(run: Path, which: str = "best") -> Path:
    """The folder of the checkpoint called `which`: best, last, or a number of steps."""
    steps = step_checkpoints(run)
    there = "" if run.exists() else "that exists, "
    rule = f"a folder {there}with checkpoints (`triglot convert` makes one of another library's)"
    require(bool(steps), "run", rule, str(run), CheckpointError)
    if which == "last":
        return steps[-1]
    folders = {folder.stem: folder for folder in steps}
    if which == "best":
        which = read_progress(steps[-1]).best or steps[-1].stem
    name = step_name(int(which)) if which.isdecimal() else which
    require(name in folders, "checkpoint", f"best, last or one of {', '.join(folders)}", which, CheckpointError)
    return folders[name]


# Writing


def save_checkpoint(
    run: Path,
    name: str,
    config: RunConfig,
    model: nn.Module,
    progress: Progress,
    optimizer: Optimizer | None = None,
    random: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write weights, optimizer, random state and progress as `checkpoints/name`, or leave everything as it was.

    `random` are the random states of all of a run's processes, where it has several.
    Raises CheckpointError where the disk does not take it.
    """
    folder, partial = run / "checkpoints" / name, run / "checkpoints" / f".writing-{name}"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        _save_tensors(weights_of(model), partial / "model.safetensors")
        if optimizer is not None:
            _save_tensors(optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
            _save_tensors(random_state() if random is None else random, partial / "rng.safetensors")
        write_json(partial / "config.json", to_dict(config))
        write_json(partial / "state.json", dataclasses.asdict(progress) | {"torch": torch.__version__})
        beside = [f"../../{file}" for file in (*TOKENIZER_FILES, DATA_FILE) if (run / file).exists()]
        write_manifest(partial, beside)
        _rename(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} could not be written: {reason(error)}") from error
    return folder


def _rename(partial: Path, folder: Path) -> None:
    old = folder.with_suffix(".replaced")
    if folder.exists():
        remove_checkpoint(old)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    sync(folder.parent.parent)
    remove_checkpoint(old)


def remove_checkpoints(run: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the best that each of these knows of."""
    steps = step_checkpoints(run)
    wanted: set[str | None] = {folder.name for folder in steps[-keep:]}
    for folder in steps[-keep:]:
        with suppress(DamagedError):  # it is told where it would be used
            wanted.add(read_progress(folder).best)
    for folder in steps:
        if wanted.isdisjoint((folder.name, folder.stem)):
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint if it is there; hidden first, so that half of one never passes for a damaged one."""
    if folder.exists():
        hidden = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove what processes that were killed had begun to write or to remove."""
    for folder in (run / "checkpoints").glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing takes it for one; what had that name before is removed."""
    aside = folder.with_name(f"damaged-{folder.name}")
    remove_checkpoint(aside)
    folder.rename(aside)
    sync(folder.parent)
    return aside


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


# Reading


class Newest(NamedTuple):
    """Where training goes on."""

    folder: Path | None
    """The newest whole checkpoint; None where there is none yet."""
    damaged: dict[Path, str]
    """What is wrong with those after it."""


def newest_whole(run: Path) -> Newest:
    """The newest checkpoint of which every byte is as it was written; CheckpointError if all are damaged."""
    damaged: dict[Path, str] = {}
    for folder in reversed(step_checkpoints(run)):
        fault = find_damage(folder)
        if fault is None:
            return Newest(folder, damaged)
        damaged[folder] = fault
    if damaged:
        raise CheckpointError(f"{run} has no whole checkpoint to go on from: {' '.join(damaged.values())}")
    return Newest(None, {})


def verify_data(folder: Path) -> None:
    """Raise CheckpointError where a run's prepared data is not what the checkpoint `folder` was trained on."""
    verified(folder, f"../../{DATA_FILE}")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(verified(folder, name).read_text(encoding="utf-8"))
    return values


def read_progress(folder: Path) -> Progress:
    """How far a run was at a checkpoint."""
    values = _read_json(folder, "state.json")
    names = {entry.name for entry in dataclasses.fields(Progress)}
    return Progress(**{name: values[name] for name in names & values.keys()})  # an older one may know fewer


def read_config(folder: Path) -> RunConfig:
    """The resolved recipe that a checkpoint was made with."""
    try:
        return from_dict(RunConfig, _read_json(folder, "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights by name, on the processor; tied ones appear once."""
    return load_file(verified(folder, "model.safetensors"))


class Loaded(NamedTuple):
    """A trained model and what it was trained with."""

    model: Transformer | DecoderLLM
    config: RunConfig
    tokenizers: Tokenizers


def load_model(
    run: Path, which: str = "best", device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """The model of a run's checkpoint `which` (best, last, or a number of steps), in evaluation mode.

    Raises CheckpointError where something is missing or damaged, or where weights do not fit the config.
    """
    try:
        folder = find_checkpoint(run, which)
        config, weights = read_config(folder), read_weights(folder)
    except DamagedError as error:
        whole = ", ".join(folder.name for folder in step_checkpoints(run) if find_damage(folder) is None)
        raise DamagedError(f"{error} Whole checkpoints of this run: {whole or 'none'}.") from error
    tokenizers = load_tokenizers(run, folder)
    ids, rows = tokenizers.target.vocab_size, config.model.vocab_size
    require(ids <= rows, f"the tokenizer of {run}", f"of at most the model's {rows} ids", ids, CheckpointError)
    model = build_model(config.model)
    set_weights(model, weights, str(folder))
    return Loaded(model.to(device, dtype).eval(), config, tokenizers)


def load_tokenizers(run: Path, folder: Path) -> Tokenizers:
    """A run's tokenizers, if they are the ones that the checkpoint `folder` was trained with."""
    known = read_manifest(folder)
    for name in TOKENIZER_FILES:
        if (run / name).exists() or f"../../{name}" in known:
            verified(folder, f"../../{name}")
    return Tokenizers.load(run)


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Put model, optimizer and random state into the state of a checkpoint, and return how far it was."""
    set_weights(model, read_weights(folder), str(folder))
    set_optimizer_tensors(model, optimizer, load_file(verified(folder, "optimizer.safetensors")), str(folder))
    set_random_state(read_random_state(folder))
    return read_progress(folder)


def read_random_state(folder: Path) -> dict[str, Tensor]:
    """The random states that a checkpoint was made with."""
    return load_file(verified(folder, "rng.safetensors"))


# Tensors by name


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and persistent buffers by name; of tied ones only the first."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place not in seen:
            weights[name] = tensor
        seen.add(place)
    return weights


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, all of them and no others; ties stay tied.

    Raises CheckpointError listing every name that is missing, unknown or of another shape.
    """
    own = weights_of(model)
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    faults += [
        f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if faults:
        raise CheckpointError(f"The weights of {source} do not fit the model: {'; '.join(sorted(faults))}.")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _names(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [(names[id(weight)], weight) for group in optimizer.param_groups for weight in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `weight's name/quantity`; its settings follow from the config and are not part of it."""
    return {
        f"{name}/{quantity}": value
        for name, weight in _names(model, optimizer)
        for quantity, value in optimizer.state.get(weight, {}).items()
    }


def set_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give an optimizer the state that `optimizer_tensors` read off one over the same weights."""
    names = [name for name, _ in _names(model, optimizer)]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in names:
            raise CheckpointError(f"The optimizer of {source} knows a weight that the model does not have: {name}.")
        state.setdefault(names.index(name), {})[quantity] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> dict[str, Tensor]:
    """The state of every random generator that PyTorch draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put the generators that exist here into the given states."""
    torch.set_rng_state(states["cpu"])
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{number}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{number}"], number)
