"""A mixture of experts: each token is computed by the few feed-forward networks that a router picks for it.

Shazeer et al. 2017; balance loss and capacity: Fedus et al. 2021, §2.2; router z-loss: Zoph et al. 2022, eq. 5.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triglot.errors import require
from triglot.layers.dropout import Dropout
from triglot.layers.feed_forward import Activation, activate, is_gated
from triglot.layers.masks import check_real


class Choice(NamedTuple):
    """A router's decision, in fp32: which experts, with which weights, out of which probabilities."""

    experts: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    probabilities: Float[Tensor, "tokens experts"]


class Routing(NamedTuple):
    """What a layer's routing was like; numbers are over the tokens that are no padding."""

    experts: Int[Tensor, "batch length k"]
    weights: Float[Tensor, "batch length k"]
    load: Float[Tensor, " experts"]
    """Share of all choices that fell on each expert, before any were dropped; sums to 1."""
    balance: Float[Tensor, ""]
    """E · Σ load · mean probability: 1 when all experts are equally likely, for any k; differentiable."""
    z: Float[Tensor, ""]
    """Mean of (log Σ exp logits)²; differentiable."""
    dropped: Float[Tensor, ""]
    """Share of choices that found their expert full."""
    entropy: Float[Tensor, ""]
    """Mean entropy of a token's probabilities, in nats."""


class MoEOutput(NamedTuple):
    """What a layer of experts knows after a forward pass."""

    output: Float[Tensor, "batch length d_model"]
    routing: Routing


def choose(logits: Float[Tensor, "tokens experts"], k: int) -> Choice:
    """Softmax, the k most probable (ties: lower id), renormalised to sum 1; at k = 1 the weight is the probability."""
    probabilities = logits.softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    weights = ordered[:, :k]
    if k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(ids[:, :k], weights, probabilities)


def expert_capacity(num_tokens: int, k: int, num_experts: int, factor: float, minimum: int) -> int:
    """max(minimum, ⌈factor · k · tokens / experts⌉): how many tokens one expert takes."""
    return max(minimum, math.ceil(factor * k * num_tokens / num_experts))


def within_capacity(
    experts: Int[Tensor, "batch length k"], real: Bool[Tensor, "batch length"], num_experts: int, capacity: int
) -> Bool[Tensor, "batch length k"]:
    """Which choices find a place; places go by (position, choice, row): a later token never takes an earlier one's."""
    batch, length, k = experts.shape
    queue = F.one_hot(experts, num_experts) * real[:, :, None, None]
    queue = queue.permute(1, 2, 0, 3).flatten(0, 2)  # [length · k · batch, experts]
    place = (queue.cumsum(0) * queue).sum(-1)
    fits = (place > 0) & (place <= capacity)
    return fits.view(length, k, batch).permute(2, 0, 1)


class MixtureOfExperts(nn.Module):
    """Σ over the k chosen experts of weight · expert(x), the router in fp32 whatever the dtype of the rest.

    With a `capacity_factor` an expert takes only so many tokens of a training batch; the choices that find it full add
    nothing (weights are not renormalised), and factor 1 drops some even at initialisation, since no router is perfectly
    even. In evaluation, and with None, nothing is dropped.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        expert_dim: int,
        k: int = 2,
        capacity_factor: float | None = 1.0,
        *,
        min_capacity: int = 4,
        activation: Activation = "gelu",
        bias: bool = True,
        router_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(num_experts >= 1, "num_experts", "at least 1", num_experts)
        require(1 <= k <= num_experts, "k", f"between 1 and num_experts ({num_experts})", k)
        fits = capacity_factor is None or capacity_factor > 0
        require(fits, "capacity_factor", "above 0, or None", capacity_factor)
        require(min_capacity >= 1, "min_capacity", "at least 1", min_capacity)
        self.num_experts, self.k = num_experts, k
        self.capacity_factor, self.min_capacity = capacity_factor, min_capacity
        self.activation: Activation = activation
        inner_dim = 2 * expert_dim if is_gated(activation) else expert_dim
        self.router = nn.Linear(hidden_dim, num_experts, bias=router_bias)
        self.inner = nn.Parameter(torch.empty(num_experts, inner_dim, hidden_dim))
        self.outer = nn.Parameter(torch.empty(num_experts, hidden_dim, expert_dim))
        self.inner_bias = nn.Parameter(torch.empty(num_experts, inner_dim)) if bias else None
        self.outer_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.dropout = Dropout(dropout)
        self.expert_capacity: int | None = None
        """Places per expert in the last training call; None when nothing was limited. Shown, never read."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as `nn.Linear` would initialise it alone: uniform within ±1/√fan_in."""
        for weight, bias in ((self.inner, self.inner_bias), (self.outer, self.outer_bias)):
            bound = weight.size(2) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        return self.run(x, mask).output

    def run(
        self, x: Float[Tensor, "batch length d_model"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> MoEOutput:
        """Output and routing; tokens where `mask` is False are padding: no expert, no count, output zero."""
        batch, length, _ = x.shape
        if mask is not None:
            check_real(mask)
        real = mask if mask is not None else torch.ones(batch, length, dtype=torch.bool, device=x.device)
        logits = self.router_logits(x.flatten(0, 1))
        choice = choose(logits, self.k)
        experts = choice.experts.view(batch, length, self.k)
        kept = real[:, :, None].expand_as(experts)
        if self.training and self.capacity_factor is not None:
            kept = self.limit(experts, real)
        output = self.mix(x.flatten(0, 1), choice, kept.flatten(0, 1)).view_as(x)
        return MoEOutput(output, describe(logits, choice, real, kept))

    def router_logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        bias = None if self.router.bias is None else self.router.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.router.weight.float(), bias)

    def limit(
        self, experts: Int[Tensor, "batch length k"], real: Bool[Tensor, "batch length"]
    ) -> Bool[Tensor, "batch length k"]:
        assert self.capacity_factor is not None
        tokens = int(real.sum())
        capacity = expert_capacity(tokens, self.k, self.num_experts, self.capacity_factor, self.min_capacity)
        self.expert_capacity = capacity
        return within_capacity(experts, real, self.num_experts, capacity)

    def mix(
        self, x: Float[Tensor, "tokens d_model"], choice: Choice, kept: Bool[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Sort the kept choices by expert, compute each expert's tokens in one go, bring them back, sum by weight."""
        expert = choice.experts.masked_fill(~kept, self.num_experts).flatten()
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts + 1)[: self.num_experts].tolist()
        num_kept = sum(counts)
        computed = self.compute(x[order[:num_kept] // self.k], counts)
        sorted_back = computed.new_zeros(expert.numel(), x.size(1)).index_copy(0, order[:num_kept], computed)
        weighted = sorted_back.view(-1, self.k, x.size(1)) * choice.weights[:, :, None]
        return weighted.sum(1).to(x.dtype)

    def compute(self, x: Float[Tensor, "rows d_model"], counts: list[int]) -> Float[Tensor, "rows d_model"]:
        """Rows sorted by expert, `counts[e]` of them for expert e."""
        # One unbind each: indexing the stack per expert would cost a gradient of the whole stack per expert.
        inner, outer = self.inner.unbind(), self.outer.unbind()
        none = [None] * self.num_experts
        inner_bias = none if self.inner_bias is None else self.inner_bias.unbind()
        outer_bias = none if self.outer_bias is None else self.outer_bias.unbind()
        outputs = []
        for expert, rows in enumerate(x.split(counts)):
            hidden = activate(F.linear(rows, inner[expert], inner_bias[expert]), self.activation)
            outputs.append(F.linear(self.dropout(hidden), outer[expert], outer_bias[expert]))
        return torch.cat(outputs)


def describe(
    logits: Float[Tensor, "tokens experts"],
    choice: Choice,
    real: Bool[Tensor, "batch length"],
    kept: Bool[Tensor, "batch length k"],
) -> Routing:
    """Loads, losses and drops of one call, from the assignments before dropping."""
    batch, length, k = kept.shape
    counts = real.flatten().float()
    num_tokens = counts.sum().clamp(min=1)
    num_experts = logits.size(1)
    chosen = F.one_hot(choice.experts, num_experts).sum(1) * counts[:, None]
    load = chosen.sum(0) / (num_tokens * k)
    mean_probability = (choice.probabilities * counts[:, None]).sum(0) / num_tokens
    entropy = torch.special.entr(choice.probabilities.detach()).sum(-1)
    return Routing(
        experts=choice.experts.view(batch, length, k),
        weights=choice.weights.view(batch, length, k),
        load=load,
        balance=num_experts * (load * mean_probability).sum(),
        z=(logits.logsumexp(-1).square() * counts).sum() / num_tokens,
        dropped=(real[:, :, None] & ~kept).sum() / (num_tokens * k),
        entropy=(entropy * counts).sum() / num_tokens,
    )
