"""A run from its recipe to its last checkpoint: `train` puts the parts together."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from triglot import checkpoint
from triglot.checkpoint import Newest, Progress
from triglot.config import RunConfig
from triglot.data.prepare import Prepared, prepare
from triglot.distributed.parallel import Parallel, parallel
from triglot.distributed.team import Team, local_device, team
from triglot.errors import CheckpointError, ConfigError, require
from triglot.files import at_work, write_json
from triglot.generation.options import SAID
from triglot.layers.embedding import Embedding
from triglot.models.factory import build_model, count_parameters
from triglot.objective import Model, Objective
from triglot.recipe import flat, from_dict, load_config, to_dict
from triglot.tokenizer import Tokenizers
from triglot.training import samples
from triglot.training.compiling import compile_blocks
from triglot.training.environment import changes, environment
from triglot.training.metrics import MetricsLog, Reporter, Silent
from triglot.training.optim import make_optimizer
from triglot.training.precision import faster_precision
from triglot.training.trainer import Trainer

Evaluator = Callable[[Model, Prepared, RunConfig], Mapping[str, float]]
"""Scores of a model that are logged beside its validation loss and can choose the best checkpoint."""

MAY_CHANGE = (
    "train.max_steps",
    "train.max_epochs",
    "train.max_minutes",
    "train.max_skipped",
    "train.eval_every",
    "train.log_every",
    "train.patience",
    "train.samples",
    "train.parallel",
    "data.root",
)
"""What a resumed run may have changed: when it ends, what is told, how processes share the work, where the data lies.

Cosine and linear rates follow max_steps.
"""

LEARNING = (
    "balance_weight",
    "importance_weight",
    "z_weight",
    "bias_rate",
    "noise",
    "capacity_factor",
    "capacity_over",
    "min_capacity",
)
"""Of experts: what changes how a model learns, and not what its weights mean."""

CHOSEN = {
    "model.vocab_size": 0,
    "model.src_vocab_size": 0,
    "train.precision": "auto",
    "train.threads": None,
}
"""What a recipe may leave open, as it says so; the first start chooses, and a resumed run keeps the choice."""

KEPT = 3
"""The last checkpoints of a run that stay, besides the best."""

BEGUN = ".config.json.writing"
"""All there is of a run that was killed in its very first moment."""


class RunResult(NamedTuple):
    """What came of a run."""

    run: Path
    progress: Progress
    signal: int | None
    """The signal that stopped it."""

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal


def train(
    config: RunConfig,
    run: Path,
    *,
    resume: bool = False,
    evaluators: Sequence[Evaluator] = (),
    reporter: Reporter | None = None,
    log: Callable[[Path], MetricsLog] = MetricsLog,
    device: str | None = None,
) -> RunResult:
    """Train what `config` describes in the folder `run`, or with `resume` go on where its newest whole checkpoint is.

    A resumed run is bit for bit the uninterrupted one where processor, threads and PyTorch are the same. Ctrl-C and
    SIGTERM end the run after the current step with a checkpoint. Where a launcher such as torchrun has started several
    processes, each of them calls this, and together they train the one run. Raises ConfigError where the folder is not
    empty, or on resuming a run of another recipe, DataError for data that can not be used, CheckpointError for a
    damaged run.
    """
    where = local_device(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    with team(where) as processes:
        check(config, evaluators, processes.size)
        with claimed(run, resume) if processes.is_first else nullcontext():
            newest = None
            if processes.is_first:
                newest = checkpoint.newest_whole(run) if resume else None
                config = with_tokenizer_of_init(config) if newest is None else going_on(config, run, newest)
            number = processes.told(config.train.threads or torch.get_num_threads())
            config = replace_in(config, "train", threads=number)
            with threads(number):
                with emptied_on_failure(run if processes.is_first and not resume else None):
                    session = Session(config, run, where, processes, newest)
                shown = reporter if reporter and processes.is_first else Silent()
                return session.train(evaluators, shown, log(run / "metrics.jsonl"))


def going_on(config: RunConfig, run: Path, newest: Newest) -> RunConfig:
    """What a run that goes on from `newest` leaves of a given recipe: what it chose for itself stays (`merge`)."""
    stored = stored_config(run, newest.folder)
    if config.init.from_ is not None:  # the tokenizer came from there, whatever the recipe says
        config = dataclasses.replace(with_said(config, stored), tokenizer=stored.tokenizer)
    return merge(config, stored)


@contextmanager
def claimed(run: Path, resume: bool) -> Iterator[None]:
    """Be the only one to train in a run's folder, which is new and empty unless `resume`; ConfigError otherwise."""
    if resume:
        require(run.is_dir(), "run", "a run that was started before, to be resumed", str(run), CheckpointError)
    else:
        occupied = run.exists() and (not run.is_dir() or any(path.name != BEGUN for path in run.iterdir()))
        rule = "a new folder, since nothing is overwritten (`--resume` goes on, `--out` names another)"
        require(not occupied, "run", rule, str(run), ConfigError)
    made = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    try:
        with at_work(run):
            yield
    except BlockingIOError as error:
        rule = "a folder that no other process is training in"
        raise ConfigError(f"`run` must be {rule}, but in {str(run)!r} one is.") from error
    finally:
        if made and not any(run.iterdir()):
            run.rmdir()


class Session:
    """A run whose data is prepared, whose model stands, and whose open choices are made and written down.

    Of several processes the first prepares and chooses, the others wait and then read what it has written.
    """

    def __init__(
        self, config: RunConfig, run: Path, device: torch.device, team: Team = Team(), newest: Newest | None = None
    ) -> None:
        self.run, self.device, self.team = run, device, team
        self.last, self.damaged = newest or Newest(None, {})
        tokenizers, self.changes = None, list[str]()
        if team.is_first:
            if not (run / "config.json").exists():
                write_json(run / "config.json", to_dict(config))  # from here on the run can be resumed
        else:
            resolved, last = team.told(None)
            config, tokenizers = from_dict(RunConfig, resolved), Tokenizers.load(run)
            self.last = None if last is None else run / "checkpoints" / last
        initial = None
        if config.init.from_ is not None and self.last is None:
            initial = checkpoint.load_model(Path(config.init.from_))
            tokenizers = initial.tokenizers
        if self.last is not None:
            tokenizers = checkpoint.load_tokenizers(run, self.last)
        known = (run / checkpoint.DATA_FILE).exists()
        self.prepared = prepare(config, run, tokenizers)
        if self.last is not None:
            with emptied_on_failure(None if known else run / "data"):  # so that the right data can still be brought
                checkpoint.verify_data(self.last)
        torch.manual_seed(config.seed)
        config = with_vocab_sizes(config, self.prepared.tokenizers)
        self.model = build_model(config.model).to(device)
        if initial is not None:
            checkpoint.set_weights(self.model, checkpoint.weights_of(initial.model), str(config.init.from_))
        if config.train.zero_start:
            hold_at_zero(self.model, self.prepared.tokenizers.target.ids.start)
        self.objective = Objective(self.model, config.train.label_smoothing, config.train.r_drop)
        self.config = config
        if team.is_first:
            self.choose()
            team.told([to_dict(self.config), None if self.last is None else self.last.name])

    def choose(self) -> None:
        """Choose what the recipe left open, bf16 or fp32, and write down all that the run began with."""
        config = self.config
        if config.train.precision == "auto":
            batch = next(iter(self.prepared.train.epoch(0)))
            config = replace_in(config, "train", precision=faster_precision(self.objective, batch, self.device))
        self.config = config
        self.prepared.tokenizers.save(self.run)
        write_json(self.run / "config.json", to_dict(config))
        now = environment(config, self.device, self.team.size)
        self.changes = changes(self.run / "environment.json", now)
        write_json(self.run / "environment.json", now)

    def train(self, evaluators: Sequence[Evaluator], reporter: Reporter, log: MetricsLog) -> RunResult:
        """Train from the last checkpoint, or from the start, to the end."""
        together, progress = self.together()
        notes = self.notes()
        if self.device.type == "cuda" and self.team.size == 1:
            compile_blocks(self.model)
        if self.team.is_first:
            log.cut(progress)
            samples.cut(self.run / samples.FILE, progress)
            notes += self.clear()
        seen = self.model, self.prepared, self.config
        found = [partial(evaluator, *seen) for evaluator in evaluators]
        if self.config.train.samples:
            found.append(partial(samples.write, self.run / samples.FILE, *seen, progress))
        trainer = Trainer(
            self.config.train,
            together,
            self.prepared.train,
            self.prepared.valid,
            progress=progress,
            save=partial(self.save, together),
            evaluators=found,
            log=log,
            reporter=reporter,
            device=self.device,
        )
        reporter.start(self.config, self.model, progress, notes)
        signal = None
        try:
            signal = trainer.fit()
        finally:
            log.close()
            reporter.finish(progress, signal is not None)
        return RunResult(self.run, progress, signal)

    def together(self) -> tuple[Parallel[Objective], Progress]:
        """The model and its optimizer as the processes train them, and how far they are."""
        train, last = self.config.train, self.last
        make, progress = partial(make_optimizer, config=train), Progress()
        optimizer = make(self.objective)
        states = None
        if last is not None:
            progress = checkpoint.restore_checkpoint(last, self.model, optimizer)
            states = self.team.own(checkpoint.read_random_state(last))
        if states is not None:
            checkpoint.set_random_state(states)
        elif not self.team.is_first:  # the first goes on as it would alone
            torch.manual_seed(seed_of(self.config.seed, self.team.rank, progress.step))
        return parallel(train.parallel, self.team, self.objective, optimizer, make), progress

    def save(self, together: Parallel[Objective], progress: Progress) -> None:
        """Write a checkpoint, the same whatever the number of processes, and remove those that are no longer needed."""
        together.collect_weights()
        together.collect_optimizer()
        random = self.team.together(checkpoint.random_state())
        if self.team.is_first:
            name, optimizer = checkpoint.step_name(progress.step), together.whole_optimizer
            checkpoint.save_checkpoint(self.run, name, self.config, self.model, progress, optimizer, random)
            checkpoint.remove_checkpoints(self.run, keep=KEPT)

    def clear(self) -> list[str]:
        """Leave only whole checkpoints of what is gone on from, and tell which were damaged."""
        checkpoint.remove_leftovers(self.run)
        moved = {checkpoint.set_aside(folder): fault for folder, fault in self.damaged.items()}
        return [
            f"WARNING: {fault} Training goes on from {self.last.name}; what was damaged is now {aside.name}."
            for aside, fault in moved.items()
            if self.last is not None
        ]

    def notes(self) -> list[str]:
        """What the data is, and what was chosen."""
        train, size = self.config.train, count_parameters(self.model)
        chosen = f"{size:,} parameters, {train.precision} on {self.device}, {train.threads} threads"
        if self.team.size > 1:
            chosen += f" in each of {self.team.size} processes ({train.parallel})"
        return [*self.prepared.report, chosen, *self.changes]


def check(config: RunConfig, evaluators: Sequence[Evaluator], num_processes: int) -> None:
    """Refuse what would only show itself later."""
    number = config.train.accumulate
    rule = (
        f"divisible by the number of processes ({num_processes}), which share a step's micro-batches (such as"
        f" --set train.accumulate={num_processes} with a train.batch_tokens divided by as much)"
    )
    require(number % num_processes == 0, "train.accumulate", rule, number, ConfigError)
    metric, pairs = config.train.keep_best, config.model.kind == "encoder_decoder"
    require(metric == "loss" or pairs, "train.keep_best", "loss in a language model", metric, ConfigError)
    held = not config.train.zero_start or (pairs and config.train.parallel != "fsdp")
    require(held, "train.zero_start", "false in a language model and with fsdp", True, ConfigError)
    require(metric == "loss" or bool(evaluators), "evaluators", f"given to find {metric}", list(evaluators))


def with_tokenizer_of_init(config: RunConfig) -> RunConfig:
    """The config with the tokenizer that comes with the run it starts from, whatever it says itself.

    Raises ConfigError where that run's model is of another shape.
    """
    if config.init.from_ is None:
        return config
    path = Path(config.init.from_)
    is_run = (path / "config.json").is_file() and (path / "checkpoints").is_dir()
    rule = "a run's folder (`triglot convert` makes one of another library's checkpoint)"
    require(is_run, "init.from", rule, config.init.from_, ConfigError)
    initial = stored_config(path, None)
    dense = initial.model.options.experts is None and config.model.options.experts is not None
    rule = "a run with experts, such as `triglot upcycle` makes of a dense one"
    require(not dense, "init.from", rule, config.init.from_, ConfigError)
    here, there = flat(to_dict(config.model)), flat(to_dict(initial.model))
    rates = ("dropout", *(f"options.{kind}_dropout" for kind in ("attention", "activation", "embedding")))
    learning = [f"options.experts.{name}" for name in LEARNING]
    for key in sorted((here.keys() | there.keys()) - {"vocab_size", "src_vocab_size", *rates, *learning}):
        rule = f"{there.get(key)!r} as in {config.init.from_}"
        require(here.get(key) == there.get(key), f"model.{key}", rule, here.get(key), ConfigError)
    sizes = {name: getattr(initial.model, name) for name in ("vocab_size", "src_vocab_size")}
    config = replace_in(with_said(config, initial), "model", **sizes)
    return dataclasses.replace(config, tokenizer=initial.tokenizer)


def with_said(config: RunConfig, other: RunConfig) -> RunConfig:
    """The config with what another one says of decoding where it says nothing itself."""
    said = {name: getattr(other.generation, name) for name in SAID if getattr(config.generation, name) is None}
    return replace_in(config, "generation", **said)


def hold_at_zero(model: Model, token: int) -> None:
    """Make the vector of a token zero wherever tokens are embedded, and let no step change it."""
    weights = {module.tokens.weight for module in model.modules() if isinstance(module, Embedding)}
    for weight in weights:
        with torch.no_grad():
            weight[token] = 0.0
        row = torch.tensor([token], device=weight.device)
        weight.register_hook(lambda gradient, row=row: gradient.index_fill(0, row, 0.0))


def seed_of(seed: int, rank: int, step: int) -> int:
    """The seed of a process that has no random state of its own to go on from."""
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0])


def with_vocab_sizes(config: RunConfig, tokenizers: Tokenizers) -> RunConfig:
    """The config with the vocabulary sizes that the tokenizers have, or larger ones that an import's model had."""
    source = tokenizers.source.vocab_size if config.model.kind == "encoder_decoder" else 0
    sizes = {"vocab_size": tokenizers.target.vocab_size, "src_vocab_size": source}
    return replace_in(config, "model", **{name: max(size, getattr(config.model, name)) for name, size in sizes.items()})


def replace_in(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The config with other values in one of its tables."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def stored_config(run: Path, last: Path | None) -> RunConfig:
    """The resolved recipe of a run: its last checkpoint's, which is known to be whole, if it has one."""
    if last is not None:
        return checkpoint.read_config(last)
    path = run / "config.json"
    require(path.exists(), "run", "a run that was started before, to be resumed", str(run), CheckpointError)
    try:
        return load_config(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`run` must hold a readable config.json to be resumed, but {path}: {error}") from error


def config_of_run(run: Path) -> RunConfig:
    """The resolved recipe of a run that was started: its own, or, where that is damaged, its newest checkpoint's."""
    try:
        return load_config(run / "config.json")
    except (OSError, ValueError):
        return stored_config(run, checkpoint.newest_whole(run).folder)


def merge(given: RunConfig, stored: RunConfig) -> RunConfig:
    """What to resume with: the stored config, with what may change as it is given.

    Raises ConfigError listing all that differs beyond that.
    """
    new, old = flat(to_dict(given)), flat(to_dict(stored))
    differing = [
        f"{key} ({old.get(key)!r} there, {new.get(key)!r} here)"
        for key in sorted(new.keys() | old.keys())
        if key not in MAY_CHANGE and new.get(key) != old.get(key) and not (key in CHOSEN and new[key] == CHOSEN[key])
    ]
    if differing:
        raise ConfigError(f"The run to resume has another recipe: {'; '.join(differing)}.")
    for section, _, field in (key.partition(".") for key in MAY_CHANGE):
        stored = replace_in(stored, section, **{field: new[f"{section}.{field}"]})
    return stored


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute on so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def emptied_on_failure(folder: Path | None) -> Iterator[None]:
    """Leave nothing in a folder if what fills it fails, so that the mended recipe can have it."""
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if folder is not None else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
