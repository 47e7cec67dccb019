"""A mixture of experts: each token is computed by the few feed-forward networks that a router picks for it.

Shazeer et al. 2017; capacity: Fedus et al. 2021, §2.2; shared experts: Dai et al. 2024, §3.2.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triglot.errors import require
from triglot.layers.activations import Activation, is_gated
from triglot.layers.dropout import Dropout
from triglot.layers.experts import BACKENDS, Assigned, Backend, Weights, mix
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.masks import check_real
from triglot.layers.routing import (
    Choice,
    Router,
    Routing,
    choose,
    describe,
    expert_capacity,
    moved_bias,
    within_capacity,
)

Hidden = Float[Tensor, "batch length d_model"]
Real = Bool[Tensor, "batch length"]


class MoEOutput(NamedTuple):
    """What a layer of experts knows after a forward pass."""

    output: Hidden
    routing: Routing


class Limit(NamedTuple):
    """What capacity leaves of a batch's choices."""

    kept: Bool[Tensor, "batch length choices"]
    most: int
    """Tokens of the batch that an expert has at most."""


class MixtureOfExperts(nn.Module):
    """Σ over the k chosen experts of weight · expert(x), the router in fp32 or more whatever the dtype of the rest.

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
        router: Router = "softmax",
        renormalize: bool | None = None,
        bias_rate: float = 0.001,
        noise: float = 0.0,
        capacity_over: Literal["batch", "sequence"] = "batch",
        min_capacity: int = 4,
        shared: int = 0,
        activation: Activation = "gelu",
        bias: bool = True,
        router_bias: bool = True,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        """`router` and the rest are as in `ExpertOptions`; `backend` None: the fastest for each call."""
        super().__init__()
        for name, number in {"hidden_dim": hidden_dim, "num_experts": num_experts, "expert_dim": expert_dim}.items():
            require(number >= 1, name, "at least 1", number)
        require(1 <= k <= num_experts, "k", f"between 1 and num_experts ({num_experts})", k)
        fits = capacity_factor is None or 0 < capacity_factor < math.inf
        require(fits, "capacity_factor", "above 0 and finite, or None", capacity_factor)
        require(router in get_args(Router), "router", f"one of {', '.join(get_args(Router))}", router)
        require(
            activation in get_args(Activation), "activation", f"one of {', '.join(get_args(Activation))}", activation
        )
        require(capacity_over in ("batch", "sequence"), "capacity_over", "batch or sequence", capacity_over)
        known = backend is None or backend in BACKENDS
        require(known, "backend", f"one of {', '.join(BACKENDS)}, or None", backend)
        require(shared >= 0, "shared", "at least 0", shared)
        require(bias_rate >= 0, "bias_rate", "at least 0", bias_rate)
        require(min_capacity >= 1, "min_capacity", "at least 1", min_capacity)
        require(noise >= 0, "noise", "at least 0", noise)
        self.num_experts, self.k, self.kind = num_experts, k, router
        self.renormalize = k > 1 if renormalize is None else renormalize
        self.bias_rate, self.noise, self.backend = bias_rate, noise, backend
        self.capacity_factor = None if router == "expert_choice" else capacity_factor
        self.capacity_over, self.min_capacity = capacity_over, min_capacity
        self.activation: Activation = activation
        inner_dim = 2 * expert_dim if is_gated(activation) else expert_dim
        self.router = nn.Linear(hidden_dim, num_experts, bias=router_bias)
        self.inner = nn.Parameter(torch.empty(num_experts, inner_dim, hidden_dim))
        self.outer = nn.Parameter(torch.empty(num_experts, hidden_dim, expert_dim))
        self.inner_bias = nn.Parameter(torch.empty(num_experts, inner_dim)) if bias else None
        self.outer_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.selection_bias: Tensor | None
        """Of the sigmoid router: moved between steps by the load, never by a gradient."""
        self.register_buffer("selection_bias", torch.zeros(num_experts) if router == "sigmoid" else None)
        self.shared = None
        if shared:
            width = shared * expert_dim
            self.shared = PointwiseFeedForward(hidden_dim, width, dropout, activation=activation, bias=bias)
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

    def _apply(self, *args: Any, **kwargs: Any) -> "MixtureOfExperts":
        """To another device or type; the bias that chooses stays in fp32, as the router computes."""
        bias = self.selection_bias
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch's
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype != bias.dtype:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def forward(self, x: Hidden, mask: Real | None = None) -> Hidden:
        return self.run(x, mask).output

    def run(self, x: Hidden, mask: Real | None = None) -> MoEOutput:
        """Output and routing; tokens where `mask` is False are padding: no expert, no count, output zero."""
        if mask is not None:
            check_real(mask)
        real = mask if mask is not None else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        logits = self.router_logits(x)
        choice = self.choose(logits, real)
        kept, most = choice.chosen, None
        if self.training and self.capacity_factor is not None:
            kept, most = self.limit(choice.experts, real)
        output = self.mix(x, choice, kept, most)
        if self.shared is not None:
            output = output + self.shared(x).masked_fill(~real[:, :, None], 0)
        return MoEOutput(output, describe(logits, choice, real, kept))

    def router_logits(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead experts"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.router.bias is None else self.router.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.router.weight.to(dtype), bias)

    def choose(self, logits: Float[Tensor, "batch length experts"], real: Real) -> Choice:
        """The router's decision, in training with noise."""
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        return choose(logits, real, self.kind, self.k, self.renormalize, self.selection_bias)

    def limit(self, experts: Int[Tensor, "batch length k"], real: Real) -> Limit:
        """Which choices find a place."""
        assert self.capacity_factor is not None
        factor, least = self.capacity_factor, self.min_capacity
        groups = (real.sum()[None] if self.capacity_over == "batch" else real.sum(1)).tolist()
        places = [expert_capacity(tokens, self.k, self.num_experts, factor, least) for tokens in groups]
        self.expert_capacity = max(places, default=least)
        capacity = places[0] if self.capacity_over == "batch" else torch.tensor(places, device=real.device)
        return Limit(within_capacity(experts, real, self.num_experts, capacity, self.capacity_over), sum(places))

    def mix(self, x: Hidden, choice: Choice, kept: Bool[Tensor, "batch length choices"], most: int | None) -> Hidden:
        """What the chosen experts say, weighted and summed."""
        assigned = Assigned(choice.experts.flatten(0, 1), choice.weights.flatten(0, 1), kept.flatten(0, 1), most)
        return mix(x.flatten(0, 1), assigned, self.stack, self.backend).view(x.shape)

    @property
    def stack(self) -> Weights:
        """The experts' weights."""
        rate = self.dropout.p if self.training else 0.0
        return Weights(self.inner, self.outer, self.inner_bias, self.outer_bias, self.activation, rate)


def move_biases(model: nn.Module, load: Float[Tensor, "layers experts"]) -> None:
    """Move the biases of a model's sigmoid routers, given each expert's load in the step before."""
    layers = (module for module in model.modules() if isinstance(module, MixtureOfExperts))
    for layer, of_layer in zip(layers, load, strict=True):
        if layer.selection_bias is not None:
            moved = moved_bias(layer.selection_bias, of_layer.to(layer.selection_bias.device), layer.bias_rate)
            layer.selection_bias.copy_(moved)
