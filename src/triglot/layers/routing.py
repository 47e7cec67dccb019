"""Which experts compute a token: routers as pure functions over logits, places in a batch, and what it all came to.

Softmax and top k: Shazeer et al. 2017; balance loss and capacity: Fedus et al. 2021, §2.2; router z-loss: Zoph et al.
2022, eq. 5; sigmoid with a bias instead of a loss: Wang et al. 2024; expert choice: Zhou et al. 2022, §3.
"""

import math
from typing import Literal, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Router = Literal["softmax", "softmax_of_chosen", "sigmoid", "expert_choice"]  # as in `config`
EVEN = 1e-6
"""How far a share may be from an even one and count as even: what rounding leaves."""
Logits = Float[Tensor, "batch length experts"]
Real = Bool[Tensor, "batch length"]


class Choice(NamedTuple):
    """A router's decision: which experts, with which weights, out of which probabilities."""

    experts: Int[Tensor, "batch length choices"]
    weights: Float[Tensor, "batch length choices"]
    chosen: Bool[Tensor, "batch length choices"]
    """False where a token is padding or, with expert choice, where the expert did not want it."""
    probabilities: Float[Tensor, "batch length experts"]


class Routing(NamedTuple):
    """What a layer's routing was like; numbers are over the tokens that are no padding."""

    experts: Int[Tensor, "batch length choices"]
    weights: Float[Tensor, "batch length choices"]
    kept: Bool[Tensor, "batch length choices"]
    """Which choices were computed: those of real tokens that found a place."""
    load: Float[Tensor, " experts"]
    """Share of all choices that fell on each expert, before any were dropped; sums to 1."""
    choices: Float[Tensor, ""]
    """How many these are."""
    balance: Float[Tensor, ""]
    """E · Σ load · mean probability: 1 when all experts are equally likely, for any k; differentiable."""
    importance: Float[Tensor, ""]
    """Squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 7); differentiable."""
    z: Float[Tensor, ""]
    """Mean of (log Σ exp logits)²; differentiable."""
    dropped: Float[Tensor, ""]
    """Share of choices that found their expert full."""
    entropy: Float[Tensor, ""]
    """Mean entropy of a token's probabilities, in nats."""


# Routers


def choose(
    logits: Logits, real: Real, router: Router, k: int, renormalize: bool, bias: Float[Tensor, " experts"] | None
) -> Choice:
    """What `router` decides; a logit that is not a number makes its own token's weights so, and no other's."""
    match router:
        case "softmax":
            return softmax_choice(logits, real, k, renormalize)
        case "softmax_of_chosen":
            return softmax_of_chosen(logits, real, k)
        case "sigmoid":
            return sigmoid_choice(logits, real, k, logits.new_zeros(()) if bias is None else bias)
        case "expert_choice":
            return expert_choice(logits, real, k)
        case _:
            assert_never(router)


def highest(scores: Logits, k: int) -> Int[Tensor, "batch length k"]:
    """The ids of the k highest, highest first; ties: the lower id."""
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def softmax_choice(logits: Logits, real: Real, k: int, renormalize: bool) -> Choice:
    """The k most probable experts, weighted by their probabilities or, renormalised, by these over their sum.

    At k = 1 renormalised weights would be 1 and teach the router nothing.
    """
    probabilities = logits.softmax(-1)
    experts = highest(probabilities, k)
    weights = probabilities.gather(-1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(experts, weights, _of_real(real, k), probabilities)


def softmax_of_chosen(logits: Logits, real: Real, k: int) -> Choice:
    """The k highest logits, weighted by a softmax over these alone: the same as renormalised probabilities."""
    experts = highest(logits, k)
    weights = logits.gather(-1, experts).softmax(-1)
    return Choice(experts, weights, _of_real(real, k), logits.softmax(-1))


def sigmoid_choice(logits: Logits, real: Real, k: int, bias: Float[Tensor, "*experts"]) -> Choice:
    """The k highest of sigmoid + bias; the bias chooses and never weighs.

    Weights are sigmoids, over their sum if k > 1.
    """
    scores = logits.sigmoid()
    experts = highest(scores + bias, k)
    weights = scores.gather(-1, experts)
    if k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(experts, weights, _of_real(real, k), scores / scores.sum(-1, keepdim=True))


def expert_choice(logits: Logits, real: Real, k: int) -> Choice:
    """Each expert takes the ⌈k · tokens / experts⌉ tokens of a sequence that are most probably its own.

    A token has from no experts to all. Whether an expert takes it depends on what stands after it: not for decoders.
    """
    batch, length, num_experts = logits.shape
    probabilities = logits.softmax(-1)
    wish = probabilities.detach().masked_fill(~real[..., None], -1.0)
    rank = wish.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    places = (real.sum(1) * k + num_experts - 1) // num_experts
    chosen = (rank < places[:, None, None]) & real[..., None]
    experts = torch.arange(num_experts, device=logits.device).expand(batch, length, num_experts)
    return Choice(experts, probabilities, chosen, probabilities)


def _of_real(real: Real, k: int) -> Bool[Tensor, "batch length k"]:
    return real[:, :, None].expand(-1, -1, k)


@torch.no_grad()
def moved_bias(
    bias: Float[Tensor, "*layers experts"], load: Float[Tensor, "*layers experts"], rate: float
) -> Float[Tensor, "*layers experts"]:
    """bias + rate · sign(mean load − load): what was chosen too often becomes less so (Wang et al. 2024, alg. 1)."""
    apart = 1 / load.size(-1) - load
    return bias + rate * apart.where(apart.abs() > EVEN, 0).sign()


# Places


def expert_capacity(num_tokens: int, k: int, num_experts: int, factor: float, minimum: int) -> int:
    """max(minimum, ⌈factor · k · tokens / experts⌉): how many tokens one expert takes."""
    return max(minimum, math.ceil(factor * k * num_tokens / num_experts))


def places_in_queues(
    experts: Int[Tensor, "queues choices"], counted: Bool[Tensor, "queues choices"], num_experts: int
) -> Int[Tensor, "queues choices"]:
    """Each counted choice's place among those of its expert, from 1, in their order; 0 for the others."""
    chosen = F.one_hot(experts, num_experts) * counted[..., None]
    return (chosen.cumsum(1) * chosen).sum(-1)


def within_capacity(
    experts: Int[Tensor, "batch length k"],
    real: Real,
    num_experts: int,
    capacity: int | Int[Tensor, " batch"],
    over: Literal["batch", "sequence"] = "batch",
) -> Bool[Tensor, "batch length k"]:
    """Which choices find a place in the batch, or in their own sequence, which then may have a capacity of its own.

    Places go by (position, choice, row): a later token never takes an earlier one's.
    """
    batch, length, k = experts.shape
    queues = experts, _of_real(real, k)
    in_order = [(one.permute(1, 2, 0)[None] if over == "batch" else one).flatten(1) for one in queues]
    place = places_in_queues(in_order[0], in_order[1], num_experts)
    fits = (place > 0) & (place <= (capacity if isinstance(capacity, int) else capacity[:, None]))
    return fits.view(length, k, batch).permute(2, 0, 1) if over == "batch" else fits.view(batch, length, k)


# What it came to


def describe(logits: Logits, choice: Choice, real: Real, kept: Bool[Tensor, "batch length choices"]) -> Routing:
    """Loads, losses and drops of one call, from the assignments before dropping."""
    num_experts = logits.size(-1)
    counts = real.flatten().to(logits.dtype)
    logits = logits.masked_fill(~real[..., None], 0)  # what stands on padding may be no number
    choice = choice._replace(
        weights=choice.weights.masked_fill(~choice.chosen, 0),
        probabilities=choice.probabilities.masked_fill(~real[..., None], 0),
    )
    num_tokens = counts.sum().clamp(min=1)
    probabilities, chosen = choice.probabilities.flatten(0, 1), choice.chosen.flatten()
    num_choices = chosen.sum().clamp(min=1)
    each = choice.experts.flatten()
    load = counts.new_zeros(num_experts).index_add(0, each, chosen.to(counts.dtype)) / num_choices
    weight = counts.new_zeros(num_experts).index_add(0, each, choice.weights.flatten())
    mean_probability = (probabilities * counts[:, None]).sum(0) / num_tokens
    entropy = torch.special.entr(probabilities.detach()).sum(-1)
    return Routing(
        experts=choice.experts,
        weights=choice.weights,
        kept=kept,
        load=load,
        choices=num_choices.to(load.dtype),
        balance=num_experts * (load * mean_probability).sum(),
        importance=weight.var(correction=0) / weight.mean().square().clamp(min=1e-20),
        z=(logits.flatten(0, 1).logsumexp(-1).square() * counts).sum() / num_tokens,
        dropped=(choice.chosen & ~kept).sum() / num_choices,
        entropy=(entropy * counts).sum() / num_tokens,
    )
