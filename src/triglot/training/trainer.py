"""The training loop."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from triglot.checkpoint import Progress, step_name
from triglot.config import TrainConfig
from triglot.data.batch import Batch, num_targets
from triglot.data.dataset import Dataset
from triglot.errors import ConfigError, DataError, TriglotError, require
from triglot.objective import Objective, Totals, autocast, evaluating, score_batches, to_device
from triglot.training.guard import WINDOW, fault, num_recent
from triglot.training.metrics import MetricsLog, Reporter, describe_experts
from triglot.training.optim import learning_rate

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
def stop_requests() -> Iterator[Stop]:
    """Note Ctrl-C and SIGTERM instead of dying of them; a second one does what it would do without us."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread gets signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        stop.signal = number
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


class Trainer:
    """Trains an objective's model from `progress` on until the config, the data or a signal ends it."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        optimizer: Optimizer,
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
        self.config, self.objective, self.optimizer = config, objective, optimizer
        self.valid, self.evaluators, self.save = valid, evaluators, save
        self.progress, self.log, self.reporter = progress, log, reporter
        self.device, self.precision = device, config.precision
        self.feed = Feed(data, progress, config.max_epochs)
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.began = time.perf_counter() - progress.seconds
        self.lap, self.lap_tokens = time.perf_counter(), 0
        self.saved = progress.step
        """The step of the last checkpoint."""

    def fit(self) -> int | None:
        """Train; returns the signal that stopped it, or None. Either way the last checkpoint is of the last step."""
        with stop_requests() as stop:
            while not stop.requested:
                finished, paused = self.finished(), time.perf_counter()
                if (finished or self.progress.step % self.config.eval_every == 0) and self.evaluate(stop):
                    self.checkpoint()
                    self.lap += time.perf_counter() - paused
                if finished:
                    break
                if not stop.requested:
                    self.step(self.feed.take(self.config.accumulate))
            if self.saved != self.progress.step:
                self.checkpoint()
        return stop.signal

    def finished(self) -> bool:
        """Whether steps, epochs or minutes are used up."""
        limit, minutes = self.config.max_minutes, self.progress.seconds / 60
        out_of_time = limit is not None and minutes >= limit
        return self.progress.step >= self.config.max_steps or self.feed.empty or out_of_time

    def step(self, taken: Sequence[MicroBatch]) -> None:
        """One step of the optimizer over all of `taken`, as if they were one batch; skipped if it would do harm."""
        number = self.progress.step + 1
        found = self.gradients([one.batch for one in taken])
        reason = fault(found.loss, found.norm.item(), self.progress.usual)
        if reason is None:
            self.apply(number, found)
            self.tell(number, found)
        else:
            self.skip(number, found, taken, reason)

    def apply(self, number: int, found: Gradients) -> None:
        """Change the weights."""
        if self.config.clip_norm is not None:
            clip_grads_with_norm_(self.weights, self.config.clip_norm, found.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        self.optimizer.step()

    def skip(self, number: int, found: Gradients, taken: Sequence[MicroBatch], reason: str) -> None:
        """Leave weights and optimizer as they are and say so; raises TriglotError where that happens too often.

        It counts as a step: what comes after has the data and the learning rate that it would have had.
        """
        at, loss, norm = self.progress, found.loss, found.norm.item()
        at.step, at.seconds, at.skipped = number, time.perf_counter() - self.began, [*at.skipped, number]
        line = {
            "kind": "skipped",
            "step": number,
            "reason": reason,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "batches": [[one.epoch, one.index] for one in taken],
        }
        self.log.write(line)
        self.reporter.skipped(line)
        if num_recent(at.skipped, number) > self.config.max_skipped:
            last = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
            raise TriglotError(
                f"Step {number} had to be skipped, since {reason} (loss {loss}, gradient norm {norm}), and"
                f" train.max_skipped allows {self.config.max_skipped} of {WINDOW} steps: {last}."
                " A lower train.learning_rate, a longer train.warmup_steps or train.precision = fp32 may help."
            )

    def gradients(self, batches: Sequence[Batch]) -> Gradients:
        """Gradients of the mean loss over all scored tokens of `batches`."""
        self.objective.train()
        self.optimizer.zero_grad()
        tokens = max(1, sum(num_targets(batch) for batch in batches))
        passes = []
        for batch in batches:
            with autocast(self.device, self.precision):
                totals: Totals = self.objective(to_device(batch, self.device))
            (totals.loss / tokens).backward()
            passes.append(totals._replace(loss=totals.loss.detach()))
        norm = get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        nll, smoothed = (sum(getattr(one, name).item() for one in passes) for name in ("nll", "smoothed"))
        return Gradients(nll, smoothed, tokens, norm, passes)

    def tell(self, number: int, found: Gradients) -> None:
        """Move progress on and report the step; losses are means over the steps since the last logged line."""
        at, now = self.progress, time.perf_counter()
        at.step, at.tokens, at.seconds = number, at.tokens + found.tokens, now - self.began
        new = (found.nll, found.smoothed, found.tokens)
        at.usual = [*at.usual, [found.loss, found.norm.item()]][-WINDOW:]
        at.window = [total + value for total, value in zip(at.window, new, strict=True)]
        self.lap_tokens += found.tokens
        line: dict[str, Any] = {
            "kind": "train",
            "step": number,
            "epoch": at.epoch + at.index / self.feed.length,
            "loss": at.window[0] / at.window[2],
            "smoothed": at.window[1] / at.window[2],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": found.norm.item(),
            "tokens": at.tokens,
            "tokens_per_second": self.lap_tokens / (now - self.lap),
            "seconds": at.seconds,
        }
        if number % self.config.log_every == 0 or number == self.config.max_steps:
            experts = [one.experts for one in found.passes if one.experts is not None]
            if experts:
                line["experts"] = describe_experts(experts)
            self.log.write(line)
            at.window, self.lap, self.lap_tokens = [0.0, 0.0, 0.0], now, 0
        self.reporter.step(line)

    def evaluate(self, stop: Stop) -> bool:
        """Score the model and note whether it is the best so far; False where that was done before, or was stopped."""
        at = self.progress
        if at.evaluated == at.step:
            return False
        scores = self.scores(stop)
        if stop.requested:
            return False
        at.evaluated, at.scores, at.seconds = at.step, scores, time.perf_counter() - self.began
        is_best = self.is_better(scores)
        if is_best:
            at.best, at.best_score = step_name(at.step), scores[self.config.keep_best]
        line = {"kind": "eval", "step": at.step, **scores, "seconds": at.seconds}
        self.log.write(line)
        self.reporter.evaluated(line, is_best)
        return True

    def scores(self, stop: Stop) -> dict[str, float]:
        """The validation loss, in nats per token, and what the evaluators find."""
        model = self.objective.model
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
            return True
        return new < old if self.config.keep_best == "loss" else new > old

    def checkpoint(self) -> None:
        """Save everything, after the metrics up to here are safe."""
        self.log.sync()
        self.save(self.progress)
        self.saved = self.progress.step
