"""What a batch costs: the one place where a model meets its data; training minimises it, evaluation reports it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.data.batch import Batch, PairBatch, targets_of, twice
from triglot.layers.masks import create_masks
from triglot.layers.routing import Routing
from triglot.losses import ExpertLosses, expert_losses
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.projected_loss import projected_cross_entropy

Model = Transformer | DecoderLLM


class ExpertStats(NamedTuple):
    """How a forward pass used its experts, layer by layer, detached from the graph."""

    load: Float[Tensor, "layers experts"]
    choices: Float[Tensor, " layers"]
    """How many that is the share of."""
    entropy: Float[Tensor, " layers"]
    dropped: Float[Tensor, " layers"]
    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]


class Totals(NamedTuple):
    """Sums over a batch's scored tokens, in nats; divided by a step's tokens, micro-batches add up to one batch.

    All but losses and capacities of experts, which are each micro-batch's own.
    """

    loss: Float[Tensor, ""]
    """What training minimises: smoothed, plus tokens · weighted expert losses in training mode; differentiable."""
    smoothed: Float[Tensor, ""]
    nll: Float[Tensor, ""]
    tokens: Int[Tensor, ""]
    experts: ExpertStats | None


class Objective(nn.Module):
    """A model with its loss, so that what wraps modules (DDP, FSDP, compile) sees one forward from batch to totals."""

    def __init__(self, model: Model, label_smoothing: float = 0.0, r_drop: float | None = None) -> None:
        super().__init__()
        self.model, self.label_smoothing, self.r_drop = model, label_smoothing, r_drop

    def forward(self, batch: Batch) -> Totals:
        r_drop = self.r_drop if self.training else None
        hidden, routing = run_model(self.model, batch if r_drop is None else twice(batch))
        projection, targets, smoothing = self.model.projection, targets_of(batch), self.label_smoothing
        scored = projected_cross_entropy(hidden, projection, targets, label_smoothing=smoothing, r_drop=r_drop)
        loss, extra = scored.total, expert_losses(routing)
        options = self.model.options.experts
        if self.training and options is not None:
            loss = loss + scored.tokens * extra.weighted(options)
        stats = _describe(routing, extra) if routing else None
        return Totals(loss, scored.total.detach(), scored.nll, scored.tokens, stats)


def _describe(routing: Sequence[Routing], losses: ExpertLosses) -> ExpertStats:
    return ExpertStats(
        load=torch.stack([layer.load for layer in routing]).detach(),
        choices=torch.stack([layer.choices for layer in routing]).detach(),
        entropy=torch.stack([layer.entropy for layer in routing]).detach(),
        dropped=torch.stack([layer.dropped for layer in routing]).detach(),
        balance=losses.balance.detach(),
        z=losses.z.detach(),
    )


class Forwarded(NamedTuple):
    """What the loss is computed from."""

    hidden: Float[Tensor, "batch length d_model"]
    routing: list[Routing]


def run_model(model: Model, batch: Batch) -> Forwarded:
    """The model's hidden states over a batch, under the masks that the batch asks for."""
    if isinstance(batch, PairBatch):
        assert isinstance(model, Transformer)
        src, tgt = (
            ids if real is None else real.int()
            for ids, real in ((batch.src, batch.src_real), (batch.tgt_in, batch.tgt_real))
        )
        masks = create_masks(src, tgt)
        pairs = model.run(batch.src, batch.tgt_in, *masks)
        return Forwarded(pairs.hidden, pairs.routing)
    assert isinstance(model, DecoderLLM)
    text = model.run(batch.input_ids, segments=batch.segments)
    return Forwarded(text.hidden, text.routing)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; the copy overlaps with what else is done where the memory allows it."""
    return type(batch)(*(None if part is None else part.to(device, non_blocking=True) for part in batch))  # type: ignore[arg-type]  # its own fields


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """Matrix products in `precision`; weights, norms, softmax and losses stay in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """The random state is afterwards as before, on the processor and on `device`."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; mode and random state are afterwards as before."""
    mode = module.training
    module.eval()
    try:
        with same_randomness(device), torch.no_grad():
            yield
    finally:
        module.train(mode)


class Scored(NamedTuple):
    """Nats over a data set, and how many tokens they were; the mean is sum by sum, never a mean of means."""

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token; nan where nothing is scored."""
        return self.nll / self.tokens if self.tokens else float("nan")


def score_batches(
    model: Model,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Scored:
    """−log p, unsmoothed, summed over every scored token of `batches`."""
    objective = Objective(model)
    nll, tokens = 0.0, 0
    with evaluating(model, device):
        objective.eval()
        for batch in batches:
            with autocast(device, precision):
                totals = objective(to_device(batch, device))
            nll, tokens = nll + totals.nll.item(), tokens + int(totals.tokens)
    return Scored(nll, tokens)
