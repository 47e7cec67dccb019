"""The training loop."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from triglot.checkpoint import Progress, step_name
from triglot.config import TrainConfig
from triglot.data.batch import Batch, num_targets, unscored
from triglot.data.dataset import Dataset
from triglot.distributed.parallel import Parallel
from triglot.errors import ConfigError, DataError, TriglotError, require
from triglot.layers.moe import move_biases
from triglot.objective import ExpertStats, Objective, Totals, autocast, evaluating, score_batches, to_device
from triglot.training.guard import WINDOW, fault, num_recent, seen
from triglot.training.metrics import Line, MetricsLog, Reporter, describe_experts, mean_load
from triglot.training.optim import learning_rate
from triglot.training.overfit import overfitting

Evaluate = Callable[[], Mapping[str, float]]
"""Scores of the model as it is, beside its validation loss; called in evaluation mode."""


@dataclass(frozen=True)
class MicroBatch:
    """A batch, and where in the data it is."""

    epoch: int
    index: int
    batch: Batch


class Feed:
    """A data set's micro-batches, epoch after epoch, from any position on."""

    def __init__(self, data: Dataset, progress: Progress, max_epochs: int | None) -> None:
        self.data, self.progress, self.max_epochs = data, progress, max_epochs
        self.batches: Iterator[Batch] | None = None
        self.length = 1
        """Micro-batches of the epoch that is open."""

    @property
    def empty(self) -> bool:
        """Whether the last epoch is over."""
        return self.max_epochs is not None and self.progress.epoch >= self.max_epochs

    def take(self, count: int) -> list[MicroBatch]:
        """The next `count` micro-batches, fewer at the very end; the position moves on behind them."""
        taken: list[MicroBatch] = []
        at = self.progress
        while len(taken) < count and not self.empty:
            if self.batches is None:
                self.length = self.data.num_batches(at.epoch)
                require(self.length > 0, "the number of training batches", "at least 1", self.length, DataError)
                self.batches = iter(self.data.epoch(at.epoch, at.index))
            taken.append(MicroBatch(at.epoch, at.index, next(self.batches)))
            at.index += 1
            if at.index == self.length:
                at.epoch, at.index, self.batches = at.epoch + 1, 0, None
        return taken


class Stop:
    """Whether someone has asked the run to stop, and by which signal."""

    signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None


@contextmanager
def stop_requests(alone: bool = True) -> Iterator[Stop]:
    """Note Ctrl-C and SIGTERM instead of dying of them; a second one does what it would do without us.

    Not `alone`, a second one is noted, too: the terminal and the launcher may both hand on the first.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread gets signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        stop.signal = number
        if alone:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            if handler is None:  # it was not set from Python, and cannot be
                handler = signal.SIG_DFL
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


class Gradients(NamedTuple):
    """What the forward and backward passes of one step came to, before anything is changed."""

    nll: float
    smoothed: float
    tokens: int
    norm: Tensor
    passes: list[Totals]

    @property
    def loss(self) -> float:
        """Nats per token, unsmoothed."""
        return self.nll / self.tokens


def _tensors(totals: Totals) -> tuple[Tensor, ...]:
    return (*totals[:4], *(totals.experts or ()))


def _totals(tensors: Sequence[Tensor]) -> Totals:
    loss, smoothed, nll, tokens, *experts = tensors
    return Totals(loss, smoothed, nll, tokens, ExpertStats(*experts) if experts else None)


class Trainer:
    """Trains an objective's model from `progress` on until the config, the data or a signal ends it.

    Several processes go through the same steps: they share a step's micro-batches, agree on whether to go on, and wait
    while the first one evaluates and saves.
    """

    def __init__(
        self,
        config: TrainConfig,
        parallel: Parallel[Objective],
        data: Dataset,
        valid: Dataset,
        *,
        progress: Progress,
        save: Callable[[Progress], None],
        evaluators: Sequence[Evaluate],
        log: MetricsLog,
        reporter: Reporter,
        device: torch.device,
    ) -> None:
        assert config.precision != "auto"
        self.config, self.parallel, self.team = config, parallel, parallel.team
        self.valid, self.evaluators, self.save = valid, evaluators, save
        self.progress, self.log, self.reporter = progress, log, reporter
        self.device, self.precision = device, config.precision
        self.feed = Feed(data, progress, config.max_epochs)
        self.began = time.perf_counter() - progress.seconds
        self.lap, self.lap_tokens = time.perf_counter(), 0
        self.saved = progress.step
        """The step of the last checkpoint."""

    def fit(self) -> int | None:
        """Train; returns the signal that stopped it, or None. Either way the last checkpoint is of the last step."""
        with stop_requests(alone=self.team.size == 1) as stop:
            while not self.stopped(stop):
                finished, paused = self.finished(), time.perf_counter()
                due = finished or self.progress.step % self.config.eval_every == 0
                if due and self.evaluate(stop):
                    self.checkpoint()
                    self.lap += time.perf_counter() - paused
                if finished or self.out_of_patience or (due and self.stopped(stop)):
                    break
                self.step(self.feed.take(self.config.accumulate))
            if self.saved != self.progress.step:
                self.checkpoint()
            return self.stopped(stop)

    def stopped(self, stop: Stop) -> int | None:
        """The signal that came to any process; all of them hear of it here and nowhere else."""
        return self.team.highest(stop.signal or 0) or None

    def finished(self) -> bool:
        """Whether steps, epochs or minutes are used up."""
        limit, minutes = self.config.max_minutes, self.progress.seconds / 60
        out_of_time = limit is not None and bool(self.team.highest(minutes >= limit))
        return self.progress.step >= self.config.max_steps or self.feed.empty or out_of_time

    @property
    def out_of_patience(self) -> bool:
        """Whether the last evaluations, as many as the config waits for, have found nothing better."""
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def step(self, taken: Sequence[MicroBatch]) -> None:
        """One step of the optimizer over all of `taken`, as if they were one batch; skipped if it would do harm."""
        number = self.progress.step + 1
        found = self.gradients([one.batch for one in taken])
        loss, norm = found.loss, found.norm.item()
        known = [spike[1:] for spike in self.progress.spikes if spike[0] < taken[0].epoch]
        reason = self.team.told(fault(loss, norm, self.progress.usual, known))
        self.progress.usual = seen(self.progress.usual, loss, norm)
        if reason is None:
            self.apply(number, found)
            self.tell(number, found)
        else:
            self.skip(number, found, taken, reason)

    def apply(self, number: int, found: Gradients) -> None:
        """Change the weights."""
        optimizer = self.parallel.optimizer
        clip_norm = self.config.clip_norm
        if clip_norm is not None and found.norm.item() > clip_norm:
            clip_grads_with_norm_(self.parallel.weights, clip_norm, found.norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        optimizer.step()
        if experts := [one.experts for one in found.passes if one.experts is not None]:
            move_biases(self.parallel.module, mean_load(experts))

    def skip(self, number: int, found: Gradients, taken: Sequence[MicroBatch], reason: str) -> None:
        """Leave weights and optimizer as they are and say so; raises TriglotError where that happens too often.

        It counts as a step: what comes after has the data and the learning rate that it would have had.
        """
        at, loss, norm = self.progress, found.loss, found.norm.item()
        at.step, at.seconds, at.skipped = number, time.perf_counter() - self.began, [*at.skipped, number]
        if math.isfinite(loss) and math.isfinite(norm):
            at.spikes = [*at.spikes, [float(taken[0].epoch), loss, norm]]
        line = {
            "kind": "skipped",
            "step": number,
            "reason": reason,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "batches": [[one.epoch, one.index] for one in taken],
        }
        self.write(line)
        self.reporter.skipped(line)
        if num_recent(at.skipped, number) > self.config.max_skipped:
            last = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
            raise TriglotError(
                f"Step {number} had to be skipped, since {reason} (loss {loss}, gradient norm {norm}), and"
                f" train.max_skipped allows {self.config.max_skipped} of {WINDOW} steps: {last}."
                " A lower train.learning_rate, a longer train.warmup_steps or train.precision = fp32 may help."
            )

    def gradients(self, batches: Sequence[Batch]) -> Gradients:
        """Gradients of the mean loss over all scored tokens of `batches`, of which this process computes its share.

        Processes average theirs, hence the factor of as many as there are; each draws dropout of its own.
        """
        self.parallel.module.train()
        self.parallel.optimizer.zero_grad()
        tokens = max(1, sum(num_targets(batch) for batch in batches))
        missing = -len(batches) % self.team.size  # every process makes as many passes
        own = self.team.dealt([*batches, *[unscored(batches[-1])] * missing])
        passes: list[Totals] = []
        for number, batch in enumerate(own, 1):
            with self.parallel.passing(is_last=number == len(own)):
                with autocast(self.device, self.precision):
                    totals: Totals = self.parallel.module(to_device(batch, self.device))
                (totals.loss * self.team.size / tokens).backward()
            passes.append(totals._replace(loss=totals.loss.detach()))
        passes = self.of_all(passes)
        nll, smoothed = (sum(getattr(one, name).item() for one in passes) for name in ("nll", "smoothed"))
        return Gradients(nll, smoothed, tokens, self.parallel.gradient_norm(), passes)

    def of_all(self, passes: list[Totals]) -> list[Totals]:
        """The passes of all processes in the order of the micro-batches, without those that filled up a last step."""
        if self.team.size == 1:
            return passes
        stacked = [torch.stack(parts).cpu() for parts in zip(*map(_tensors, passes), strict=True)]
        everyones = self.team.gathered(stacked)
        ordered = [[part[number] for part in ones] for number in range(len(passes)) for ones in everyones]
        return [one for one in map(_totals, ordered) if one.tokens > 0]

    def tell(self, number: int, found: Gradients) -> None:
        """Move progress on and report the step; losses are means over the steps since the last logged line."""
        at, now = self.progress, time.perf_counter()
        at.step, at.tokens, at.seconds = number, at.tokens + found.tokens, now - self.began
        new = (found.nll, found.smoothed, found.tokens)
        at.window = [total + value for total, value in zip(at.window, new, strict=True)]
        self.lap_tokens += found.tokens
        differs = self.config.label_smoothing > 0 or self.config.r_drop is not None
        line: dict[str, Any] = {
            "kind": "train",
            "step": number,
            "epoch": at.epoch + at.index / self.feed.length,
            "loss": at.window[0] / at.window[2],
            **({"smoothed": at.window[1] / at.window[2]} if differs else {}),
            "learning_rate": self.parallel.optimizer.param_groups[0]["lr"],
            "grad_norm": found.norm.item(),
            "tokens": at.tokens,
            "tokens_per_second": self.lap_tokens / (now - self.lap),
            "seconds": at.seconds,
        }
        if number % self.config.log_every == 0 or number == self.config.max_steps:
            experts = [one.experts for one in found.passes if one.experts is not None]
            if experts:
                line["experts"] = describe_experts(experts)
            self.write(line)
            at.window, self.lap, self.lap_tokens = [0.0, 0.0, 0.0], now, 0
        self.reporter.step(line)

    def evaluate(self, stop: Stop) -> bool:
        """Score the model and note whether it is the best so far; False where that was done before, or was stopped."""
        at = self.progress
        if at.evaluated == at.step:
            return False
        self.parallel.collect_weights()
        done = self.team.is_first and self.evaluate_here(stop)
        done, progress = self.team.told([done, asdict(at)])
        vars(at).update(progress)
        return bool(done)

    def evaluate_here(self, stop: Stop) -> bool:
        """Evaluate in this process."""
        at, scores = self.progress, self.scores(stop)
        if stop.requested:
            return False
        at.evaluated, at.scores, at.seconds = at.step, scores, time.perf_counter() - self.began
        is_best = self.is_better(scores)
        at.stale = 0 if is_best else at.stale + 1
        if is_best:
            at.best, at.best_score = step_name(at.step), scores[self.config.keep_best]
        line = {"kind": "eval", "step": at.step, **scores, "seconds": at.seconds}
        self.log.write(line)
        self.reporter.evaluated(line, is_best)
        if note := overfitting(at, scores["loss"]):
            line = {"kind": "note", "step": at.step, "note": note}
            self.log.write(line)
            self.reporter.noted(line)
        return True

    def scores(self, stop: Stop) -> dict[str, float]:
        """The validation loss, in nats per token, and what the evaluators find."""
        model = self.parallel.whole.model
        batches = itertools.takewhile(lambda _: not stop.requested, self.valid.epoch(0))
        scored = score_batches(model, batches, device=self.device, precision=self.precision)
        scores = {"loss": scored.mean}
        for evaluator in self.evaluators:
            if not stop.requested:
                with evaluating(model, self.device):
                    scores |= evaluator()
        known = self.config.keep_best in scores or stop.requested
        require(known, "train.keep_best", f"one of {', '.join(scores)}", self.config.keep_best, ConfigError)
        return scores

    def is_better(self, scores: Mapping[str, float]) -> bool:
        """Whether scores beat the best so far: a loss by being lower, all else by being higher; a draw does not."""
        new, old = scores[self.config.keep_best], self.progress.best_score
        if old is None or math.isnan(old):
            return old is None or not math.isnan(new)
        return new < old if self.config.keep_best == "loss" else new > old

    def write(self, line: Line) -> None:
        """Log a line, once."""
        if self.team.is_first:
            self.log.write(line)

    def checkpoint(self) -> None:
        """Save everything, after the metrics up to here are safe."""
        if self.team.is_first:
            self.log.sync()
        self.save(self.progress)
        self.saved = self.progress.step
