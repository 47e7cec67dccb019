"""What holds for the training loop, whatever it trains."""

import dataclasses
import math
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.checkpoint import Progress
from triglot.config import ModelConfig, TrainConfig
from triglot.data.batch import IGNORED, LanguageBatch
from triglot.distributed.parallel import Parallel
from triglot.distributed.team import Team
from triglot.errors import ConfigError, DataError, TriglotError
from triglot.models.factory import build_model
from triglot.objective import Objective, score_batches
from triglot.training.guard import ENOUGH
from triglot.training.metrics import MetricsLog, Silent, read_metrics
from triglot.training.optim import learning_rate, make_optimizer
from triglot.training.precision import faster_precision, has_bf16
from triglot.training.trainer import Feed, Trainer, stop_requests

VOCAB = 13
CPU = torch.device("cpu")


class Windows:
    """Epochs of random windows; a pure function of the epoch."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def num_batches(self, epoch: int) -> int:
        return self.counts[epoch % len(self.counts)]

    def epoch(self, epoch: int, start: int = 0):
        for index in range(start, self.num_batches(epoch)):
            generator = torch.Generator().manual_seed(1000 * epoch + index)
            ids = torch.randint(VOCAB, (2, 6), generator=generator)
            targets = ids[:, 1:].clone()
            targets[0, : index % 4] = IGNORED  # batches differ in their tokens
            yield LanguageBatch(ids[:, :-1], targets)


def make_model(dropout: float = 0.1) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model(
        ModelConfig(
            kind="decoder_only",
            d_model=6,
            num_heads=2,
            num_layers=1,
            d_ff=11,
            dropout=dropout,
            vocab_size=VOCAB,
            max_seq_length=7,
        )
    )


class Run:
    """A trainer over random windows, and all that it gave out."""

    def __init__(
        self, folder, *, data=None, evaluators=(), reporter=None, dropout=0.1, smoothing=0.0, **config
    ) -> None:
        values = {"max_steps": 7, "warmup_steps": 2, "precision": "fp32", "eval_every": 3, "log_every": 1} | config
        self.config, self.progress, self.saved = TrainConfig(**values), Progress(), []
        self.model = make_model(dropout)
        self.optimizer = make_optimizer(self.model, self.config)
        self.metrics = folder / "metrics.jsonl"
        self.trainer = Trainer(
            self.config,
            Parallel(Team(), Objective(self.model, smoothing), self.optimizer),
            data or Windows(5),
            Windows(2),
            progress=self.progress,
            save=lambda progress: self.saved.append(dataclasses.replace(progress)),
            evaluators=evaluators,
            log=MetricsLog(self.metrics),
            reporter=reporter or Silent(),
            device=CPU,
        )

    def fit(self) -> int | None:
        torch.manual_seed(5)
        return self.trainer.fit()

    def lines(self, kind: str) -> list[dict]:
        return [line for line in read_metrics(self.metrics) if line["kind"] == kind]


class Raising(Silent):
    """Sends the process a signal after a step."""

    def __init__(self, step: int, number: int) -> None:
        self.at, self.number = step, number

    def step(self, line) -> None:
        if line["step"] == self.at:
            signal.raise_signal(self.number)


def test_every_step_is_logged_once_and_evaluation_and_checkpoints_follow_their_interval(tmp_path):
    run = Run(tmp_path)
    assert run.fit() is None
    assert [line["step"] for line in run.lines("train")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in run.lines("eval")] == [3, 6, 7]
    assert [progress.step for progress in run.saved] == [3, 6, 7]
    assert [line["learning_rate"] for line in run.lines("train")] == [learning_rate(n, run.config) for n in range(1, 8)]


def test_a_logged_loss_is_the_token_mean_over_the_steps_since_the_last_line(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    each, sparse = Run(tmp_path / "a"), Run(tmp_path / "b", log_every=3)
    each.fit()
    sparse.fit()
    lines = each.lines("train")
    tokens = [
        line["tokens"] - before for line, before in zip(lines, [0, *(line["tokens"] for line in lines)], strict=False)
    ]
    nats = [line["loss"] * count for line, count in zip(lines, tokens, strict=True)]
    expected = [sum(nats[:3]) / sum(tokens[:3]), sum(nats[3:6]) / sum(tokens[3:6]), nats[6] / tokens[6]]
    assert [line["loss"] for line in sparse.lines("train")] == pytest.approx(expected)


@pytest.mark.parametrize(("config", "told"), [({}, False), ({"label_smoothing": 0.1}, True), ({"r_drop": 1.0}, True)])
def test_the_smoothed_loss_is_told_where_it_is_another_one(tmp_path, config, told):
    run = Run(tmp_path, smoothing=0.1 if config else 0.0, **config)
    run.fit()
    assert {"smoothed" in line for line in run.lines("train")} == {told}
    assert all(line["smoothed"] != line["loss"] for line in run.lines("train") if told)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    batches = list(Windows(3).epoch(0))
    whole = LanguageBatch(*(torch.cat(parts) for parts in zip(*(batch[:2] for batch in batches), strict=True)))
    norms, grads = [], []
    for given_batches in (batches, [whole]):
        run = Run(tmp_path, dropout=0.0, smoothing=0.1)
        found = run.trainer.gradients(given_batches)
        norms.append((found.nll / found.tokens, found.smoothed / found.tokens, found.norm.item()))
        grads.append([weight.grad for weight in run.model.parameters()])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for many, one in zip(*grads, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_logged(tmp_path):
    run = Run(tmp_path, clip_norm=0.01, max_steps=1, dropout=0.0)
    run.fit()
    grads = [weight.grad for weight in run.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, rel=1e-3)
    assert run.lines("train")[0]["grad_norm"] > 0.1


def test_the_validation_loss_is_that_of_the_whole_data_set(tmp_path):
    run = Run(tmp_path)
    run.fit()
    scored = score_batches(run.model, Windows(2).epoch(0), device=CPU)
    assert run.lines("eval")[-1]["loss"] == pytest.approx(scored.mean, rel=1e-6)


def test_evaluating_more_often_changes_no_weight(tmp_path):
    runs = [Run(tmp_path, eval_every=every, evaluators=[lambda: {"bleu": torch.rand(()).item()}]) for every in (1, 7)]
    for run in runs:
        run.fit()
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("metric", "scores", "best"), [("loss", [2.0, 1.0, 1.0], 2), ("bleu", [2.0, 5.0, 3.0], 2)])
def test_the_best_checkpoint_is_the_first_with_the_lowest_loss_or_the_highest_score(tmp_path, metric, scores, best):
    values = iter(scores)
    run = Run(tmp_path, max_steps=3, eval_every=1, keep_best=metric, evaluators=[lambda: {metric: next(values)}])
    run.fit()
    assert run.progress.best == f"step-0000000{best}"
    assert run.progress.best_score == scores[best - 1]


@pytest.mark.parametrize("sign", [1, -1], ids=["loss", "bleu"])
def test_patience_ends_a_run_when_so_many_evaluations_in_a_row_were_not_better(tmp_path, sign):
    values = (sign * score for score in [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, math.nan, 0.0])
    metric = "loss" if sign == 1 else "bleu"
    how = {"keep_best": metric, "evaluators": [lambda: {metric: next(values)}]}
    run = Run(tmp_path, max_steps=8, eval_every=1, patience=3, **how)
    assert run.fit() is None
    assert (run.progress.step, run.progress.best, run.progress.stale) == (7, "step-00000004", 3)
    assert run.saved[-1] == run.progress
    run.fit()
    assert run.progress.step == 7
    run.trainer.config = dataclasses.replace(run.config, patience=4)
    run.fit()
    assert (run.progress.step, run.progress.best, run.progress.stale) == (8, "step-00000008", 0)


def test_a_loss_that_is_never_a_number_is_never_better(tmp_path):
    run = Run(tmp_path, max_steps=8, eval_every=1, patience=2, evaluators=[lambda: {"loss": math.nan}])
    run.fit()
    assert (run.progress.step, run.progress.best) == (3, "step-00000001")


def test_a_metric_that_nobody_computes_cannot_choose(tmp_path):
    with pytest.raises(ConfigError, match=r"`train.keep_best` must be one of loss, but is 'bleu' instead"):
        Run(tmp_path, keep_best="bleu").fit()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run = Run(tmp_path, reporter=Raising(5, number))
    assert run.fit() == number
    assert [progress.step for progress in run.saved] == [3, 5]
    assert run.progress.evaluated == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_interrupts_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_stop_at_an_evaluation_is_saved_unevaluated_and_evaluated_on_going_on(tmp_path):
    run = Run(tmp_path, reporter=Raising(3, signal.SIGINT))
    run.fit()
    assert [(progress.step, progress.evaluated) for progress in run.saved] == [(3, 0)]
    run.fit()
    assert [(progress.step, progress.evaluated) for progress in run.saved[1:]] == [(3, 3), (6, 6), (7, 7)]


class Harm:
    """Spoils the passes over some micro-batches, counted from 0 in a run without accumulation."""

    def __init__(self, run: Run, where: str, factor: float, *passes: int) -> None:
        self.factor, self.passes, self.count = factor, passes, -1
        objective = run.trainer.parallel.whole
        objective.register_forward_pre_hook(self.begin)
        match where:
            case "loss":
                objective.register_forward_hook(self.spoil_totals)
            case "gradient":
                run.model.lm_head.weight.register_hook(self.spoil)
            case "data":  # what an embedding makes of a batch
                run.model.embedding.register_forward_hook(lambda *given: (self.spoil(given[-1][0]), given[-1][1]))

    def begin(self, objective, arguments) -> None:
        self.count += objective.training

    def spoil(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.factor if self.count in self.passes else tensor

    def spoil_totals(self, objective, arguments, totals):
        return totals._replace(**{name: self.spoil(getattr(totals, name)) for name in ("loss", "smoothed", "nll")})


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "data"])
def test_what_is_not_finite_is_skipped_and_logged_with_its_batches(tmp_path, where, factor):
    run = Run(tmp_path, accumulate=2)
    Harm(run, where, factor, 6)  # of the 4th step
    before, told = [], []
    run.trainer.reporter.skipped = told.append
    batches_of = run.trainer.gradients

    def gradients(batches):
        before.append([weight.clone() for weight in run.model.parameters()])
        return batches_of(batches)

    run.trainer.gradients = gradients
    assert run.fit() is None
    (line,) = run.lines("skipped")
    assert told == [line]
    assert (line["step"], line["batches"]) == (4, [[1, 1], [1, 2]])
    assert "not finite" in line["reason"]
    assert line["loss"] is None or math.isfinite(line["loss"])
    assert line["grad_norm"] is None
    assert all(torch.equal(old, new) for old, new in zip(before[3], before[4], strict=True))
    assert not any(torch.equal(old, new) for old, new in zip(before[4], before[5], strict=True))
    assert run.progress.skipped == [4]
    assert run.progress.step == 7
    assert [line["step"] for line in run.lines("train")] == [1, 2, 3, 5, 6, 7]
    assert all(math.isfinite(line["loss"]) for line in (*run.lines("train"), *run.lines("eval")))
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    assert all(value.isfinite().all() for state in run.optimizer.state.values() for value in state.values())


def test_a_skipped_step_is_a_step_of_the_data_and_of_the_schedule_but_not_of_the_optimizer(tmp_path):
    run = Run(tmp_path)
    Harm(run, "loss", math.nan, 2)
    run.fit()
    lines = run.lines("train")
    assert [line["learning_rate"] for line in lines] == [learning_rate(line["step"], run.config) for line in lines]
    assert (run.progress.epoch, run.progress.index) == (1, 2)
    assert {state["step"].item() for state in run.optimizer.state.values()} == {6}


@pytest.mark.parametrize(("where", "reason"), [("loss", "the loss is a spike"), ("gradient", "the gradient norm is a")])
def test_a_spike_is_skipped_once_enough_is_known_and_so_is_the_next(tmp_path, where, reason):
    spikes = (ENOUGH - 2, ENOUGH + 3, ENOUGH + 4)
    run = Run(tmp_path, max_steps=ENOUGH + 7, log_every=1000, eval_every=1000)
    Harm(run, where, 50.0, *spikes)
    run.fit()
    lines = run.lines("skipped")
    assert [line["step"] for line in lines] == [number + 1 for number in spikes[1:]]
    assert all(line["reason"].startswith(reason) for line in lines)
    assert len(run.progress.usual) == ENOUGH + 7


@pytest.mark.parametrize("allowed", [0, 2])
def test_too_many_skipped_steps_end_the_run_with_the_weights_of_the_last_good_checkpoint(tmp_path, allowed):
    run = Run(tmp_path, max_skipped=allowed, eval_every=1)
    Harm(run, "gradient", math.inf, *range(3, 3 + allowed + 1))
    number = 4 + allowed
    rule = (
        rf"Step {number} had to be skipped, since the gradient norm is not finite \(loss .*, gradient norm (inf|nan)\)"
    )
    with pytest.raises(
        TriglotError, match=rf"{rule}, and train.max_skipped allows {allowed} of 128 steps: the last ch"
    ):
        run.fit()
    assert run.saved[-1].step == number - 1
    assert [line["step"] for line in run.lines("skipped")] == list(range(4, number + 1))
    assert all(weight.isfinite().all() for weight in run.model.parameters())


def test_a_run_that_cannot_make_its_first_step_says_that_there_is_no_checkpoint(tmp_path):
    run = Run(tmp_path, max_skipped=0)
    Harm(run, "loss", math.nan, 0)
    with pytest.raises(TriglotError, match="there is no checkpoint yet"):
        run.fit()
    assert run.saved == []


def test_epochs_end_a_run_and_the_last_step_takes_what_is_left(tmp_path):
    run = Run(tmp_path, data=Windows(5, 2), max_epochs=2, accumulate=3, max_steps=100)
    run.fit()
    assert run.progress.step == 3  # 3 + 3 + 1 micro-batches
    assert (run.progress.epoch, run.progress.index) == (2, 0)
    assert run.saved[-1].evaluated == 3


def test_minutes_end_a_run(tmp_path):
    run = Run(tmp_path, max_minutes=1e-9, max_steps=100)
    run.fit()
    assert run.progress.step == 1
    assert run.saved[-1].evaluated == 1


def test_data_without_batches_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least 1, but is 0"):
        Run(tmp_path, data=Windows(0)).fit()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.data()
)
def test_going_on_from_any_position_gives_what_would_have_come(counts, takes, data):
    progress = Progress()
    feed = Feed(Windows(*counts), progress, None)
    cut = data.draw(st.integers(0, len(takes)))
    for take in takes[:cut]:
        feed.take(take)
    again = Feed(Windows(*counts), dataclasses.replace(progress), None)
    for take in takes[cut:]:
        for one, other in zip(feed.take(take), again.take(take), strict=True):
            assert (one.epoch, one.index) == (other.epoch, other.index)
            assert torch.equal(one.batch.input_ids, other.batch.input_ids)
            assert torch.equal(one.batch.targets, other.batch.targets)


def test_choosing_a_precision_changes_nothing():
    objective = Objective(make_model(dropout=0.5))
    weights = [weight.clone() for weight in objective.parameters()]
    state = torch.get_rng_state()
    assert faster_precision(objective, next(Windows(1).epoch(0)), CPU) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in objective.parameters())
    assert all(torch.equal(old, new) for old, new in zip(weights, objective.parameters(), strict=True))


@pytest.mark.parametrize("able", [(), ("avx2", "avx512_f"), ("avx512_bf16",), ("amx_bf16",)])
def test_bf16_is_tried_only_where_the_processor_multiplies_in_it(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able, True))
    assert has_bf16(CPU) == any("bf16" in name for name in able)


def test_bf16_training_keeps_weights_and_optimizer_in_fp32(tmp_path):
    run = Run(tmp_path, precision="bf16")
    run.fit()
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    assert {value.dtype for state in run.optimizer.state.values() for value in state.values()} == {torch.float32}
    assert math.isfinite(run.lines("train")[-1]["loss"])
