"""Ways to compute experts: each token by those that it was dealt to, weighted and summed.

All give what `loop` gives. `segments` is the fast one on a processor; `grouped` on a GPU; `capacity` has shapes that do
not depend on the routing; `few` is for the few tokens of a decoding step.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from triglot.errors import require
from triglot.layers.dropout import dropout
from triglot.layers.feed_forward import Activation, activate, activate_again
from triglot.layers.routing import places_in_queues

Backend = Literal["loop", "segments", "grouped", "capacity", "few"]
Tokens = Float[Tensor, "tokens d_model"]
FEW = 16
"""Choices up to which those are computed one expert after another, as they come."""


class Weights(NamedTuple):
    """The weights of all experts of a layer, and what stands between them."""

    inner: Float[Tensor, "experts inner d_model"]
    outer: Float[Tensor, "experts d_model d_ff"]
    inner_bias: Float[Tensor, "experts inner"] | None
    outer_bias: Float[Tensor, "experts d_model"] | None
    activation: Activation
    dropout: float
    """On activations; 0 in evaluation."""

    def to(self, dtype: torch.dtype) -> "Weights":
        """Its weights in `dtype`."""
        inner_bias, outer_bias = (None if one is None else one.to(dtype) for one in (self.inner_bias, self.outer_bias))
        return Weights(
            self.inner.to(dtype), self.outer.to(dtype), inner_bias, outer_bias, self.activation, self.dropout
        )

    def unbound(self) -> tuple[Any, Any, Any, Any]:
        """Each expert's weights; to take one at a time would cost a gradient of the whole stack each time."""
        none = (None,) * len(self.inner)
        return (
            self.inner.unbind(),
            self.outer.unbind(),
            none if self.inner_bias is None else self.inner_bias.unbind(),
            none if self.outer_bias is None else self.outer_bias.unbind(),
        )


class Assigned(NamedTuple):
    """Which experts compute a token."""

    experts: Int[Tensor, "tokens choices"]
    weights: Float[Tensor, "tokens choices"]
    kept: Bool[Tensor, "tokens choices"]
    most: int | None
    """No expert has more tokens of the batch, if that is known."""


def mix(x: Tokens, assigned: Assigned, stack: Weights, backend: Backend | None = None) -> Tokens:
    """Σ over the kept choices of weight · expert(x), in the type that products have here."""
    on = x.device.type
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) and x.dtype != torch.float64 else x.dtype
    with torch.autocast(on, enabled=False):
        x, stack = x.to(dtype), stack.to(dtype)
        compute = BACKENDS[backend or best(x, assigned, stack)]
        return compute(x, assigned._replace(weights=assigned.weights.to(dtype)), stack)


def best(x: Tokens, assigned: Assigned, stack: Weights) -> Backend:
    """The fastest way that these tensors allow."""
    if torch.compiler.is_compiling():
        if can_group(x, stack) and x.dtype == torch.bfloat16:  # the compiler takes groups of nothing else
            return "grouped"
        return "loop" if assigned.most is None else "capacity"
    if x.device.type == "cpu":
        return "few" if not torch.is_grad_enabled() and assigned.experts.numel() <= FEW else "segments"
    return "grouped" if can_group(x, stack) else "loop"


# One expert after another


def loop(x: Tokens, assigned: Assigned, stack: Weights) -> Tokens:
    """The reference: every expert is applied to its tokens."""
    return _one_by_one(x, assigned, stack, range(len(stack.inner)))


def few(x: Tokens, assigned: Assigned, stack: Weights) -> Tokens:
    """The experts that some token has chosen, without a look at the others."""
    return _one_by_one(x, assigned, stack, assigned.experts[assigned.kept].unique().tolist())


def _one_by_one(x: Tokens, assigned: Assigned, stack: Weights, experts: Iterable[int]) -> Tokens:
    inner, outer, inner_bias, outer_bias = stack.unbound()
    output = torch.zeros_like(x)
    for expert in experts:
        token, choice = ((assigned.experts == expert) & assigned.kept).nonzero(as_tuple=True)
        hidden = activate(F.linear(x[token], inner[expert], inner_bias[expert]), stack.activation)
        hidden = dropout(hidden, stack.dropout, training=True)
        said = F.linear(hidden, outer[expert], outer_bias[expert])
        output = output.index_add(0, token, said * assigned.weights[token, choice, None])
    return output


# Sorted by expert


class Dealt(NamedTuple):
    """The kept choices as rows, those of an expert behind one another, in the order of tokens."""

    token: Int[Tensor, " rows"]
    """Whose choice a row is."""
    row: Int[Tensor, "tokens choices"]
    """Each choice's row; the number of rows where it is not kept."""
    counts: list[int]
    """Rows of each expert."""


def deal(assigned: Assigned, num_experts: int) -> Dealt:
    """Sort the choices."""
    expert = assigned.experts.masked_fill(~assigned.kept, num_experts).flatten()
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts].tolist()
    order = expert.argsort(stable=True)[: sum(counts)]
    row = torch.full_like(expert, len(order))
    row[order] = torch.arange(len(order), device=row.device)
    return Dealt(order // assigned.experts.size(1), row.view_as(assigned.experts), counts)


def segments(x: Tokens, assigned: Assigned, stack: Weights) -> Tokens:
    """Each expert's rows in one go, by a gradient of our own that keeps as little as a dense layer's."""
    dealt = deal(assigned, len(stack.inner))
    weights, width = assigned.weights.masked_fill(~assigned.kept, 0), stack.outer.size(2)
    scale = None
    if stack.dropout:
        scale = dropout(x.new_ones(len(dealt.token), width), stack.dropout, training=True)
    mixed: Tensor = _Segments.apply(x, weights, *stack[:4], dealt, scale, stack.activation)  # type: ignore[no-untyped-call]  # torch's
    return mixed


class _Segments(torch.autograd.Function):
    """An expert's rows, activations and gradients are made where they are used: while they are in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        inner: Tensor,
        outer: Tensor,
        inner_bias: Tensor | None,
        outer_bias: Tensor | None,
        dealt: Dealt,
        scale: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        rows = len(dealt.token)
        hidden = x.new_empty(rows, inner.size(1))
        said = x.new_empty(rows + 1, x.size(1))
        for expert, part in _parts(dealt.counts):
            _product(x.index_select(0, dealt.token[part]), inner[expert].T, inner_bias, expert, hidden[part])
            activated = activate(hidden[part], activation)
            activated = activated if scale is None else activated.mul_(scale[part])
            _product(activated, outer[expert].T, outer_bias, expert, said[part])
        ctx.save_for_backward(x, weights, inner, outer, outer_bias, hidden, scale)
        ctx.dealt, ctx.activation, ctx.inner_biased = dealt, activation, inner_bias is not None
        return _gathered(said, dealt, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, inner, outer, outer_bias, hidden, scale = ctx.saved_tensors
        dealt, rows = ctx.dealt, len(hidden) + 1
        of_inner, of_outer = (torch.zeros_like(stack) for stack in (inner, outer))
        has_bias = ctx.inner_biased, outer_bias is not None
        of_biases = [
            x.new_zeros(len(stack), stack.size(1)) if has else None
            for stack, has in zip((inner, outer), has_bias, strict=True)
        ]
        of_rows, of_weights = x.new_empty(rows, x.size(1)), x.new_zeros(rows)
        row_weights = x.new_zeros(rows).scatter_(0, dealt.row.flatten(), weights.flatten())
        for expert, part in _parts(dealt.counts):
            token = dealt.token[part]
            of_said = grad.index_select(0, token)  # not yet weighted
            activated, gradient = activate_again(hidden[part], ctx.activation)
            of_activated = of_said @ outer[expert]
            if scale is not None:
                activated, of_activated = activated * scale[part], of_activated.mul_(scale[part])
            of_weights[part] = (of_activated * activated).sum(-1)  # what was said is not kept: W a · g = a · Wᵀ g
            if outer_bias is not None:
                of_weights[part] += of_said @ outer_bias[expert]
            of_said *= row_weights[part, None]
            torch.mm(of_said.T, activated, out=of_outer[expert])
            of_hidden = gradient(of_activated.mul_(row_weights[part, None]))
            torch.mm(of_hidden.T, x.index_select(0, token), out=of_inner[expert])
            torch.mm(of_hidden, inner[expert], out=of_rows[part])
            for of_bias, one in zip(of_biases, (of_hidden, of_said), strict=True):
                if of_bias is not None:
                    torch.sum(one, 0, out=of_bias[expert])
        of_weights[-1] = 0
        of_choices = of_weights.index_select(0, dealt.row.flatten()).view_as(weights)
        return _gathered(of_rows, dealt), of_choices, of_inner, of_outer, *of_biases, None, None, None


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, with them."""
    parts, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(first, first + count)))
        first += count
    return parts


def _product(rows: Tensor, matrix: Tensor, biases: Tensor | None, expert: int, out: Tensor) -> None:
    if biases is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(biases[expert], rows, matrix, out=out)


def _gathered(rows: Tensor, dealt: Dealt, weights: Tensor | None = None) -> Tensor:
    """Each token's rows, weighted and summed; the last row stands for what is not kept."""
    rows[-1] = 0  # to be left out by `padding_idx` would take a slower kernel
    return F.embedding_bag(dealt.row, rows, mode="sum", per_sample_weights=weights)


# In one operation


def can_group(x: Tokens, stack: Weights) -> bool:
    """Whether `grouped_mm` takes these: rows of whole 16 bytes, and no fp64."""
    widths = (x.size(1), stack.inner.size(1), stack.outer.size(2))
    return x.dtype != torch.float64 and all(width * x.element_size() % 16 == 0 for width in widths)


def grouped(x: Tokens, assigned: Assigned, stack: Weights) -> Tokens:
    """The same rows by PyTorch's products of groups, without waiting for the counts; biases are added by rows."""
    rule = "another for fp64 and for widths that are not whole 16 bytes"
    value = f"grouped for {x.dtype} and widths {x.size(1)}, {stack.inner.size(1)} and {stack.outer.size(2)}"
    require(can_group(x, stack), "backend", rule, value)
    num_experts, choices = len(stack.inner), assigned.experts.size(1)
    expert, order = assigned.experts.masked_fill(~assigned.kept, num_experts).flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(num_experts, device=x.device), right=True).int()
    own, real = expert.clamp(max=num_experts - 1), expert[:, None] < num_experts
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    rows = x.repeat_interleave(choices, 0)[order].where(real, 0)  # what no group has is not written, nor its gradient
    hidden = _grouped(rows, stack.inner, stack.inner_bias, own, ends)
    hidden = dropout(activate(hidden.where(real, 0), stack.activation), stack.dropout, training=True)
    said = _grouped(hidden, stack.outer, stack.outer_bias, own, ends).where(real, 0)
    weights = assigned.weights.masked_fill(~assigned.kept, 0)
    return (said[inverse].view(len(x), choices, x.size(1)) * weights[..., None]).sum(1)


def _grouped(rows: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor, ends: Tensor) -> Tensor:
    product = _ContiguousGradient.apply(F.grouped_mm(rows, weight.transpose(1, 2), offs=ends))  # type: ignore[no-untyped-call]  # torch's
    return product if bias is None else product + F.one_hot(own, len(bias)).to(bias.dtype) @ bias


class _ContiguousGradient(torch.autograd.Function):
    """Nothing, but `grouped_mm` refuses a gradient that is one number expanded."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def capacity(x: Tokens, assigned: Assigned, stack: Weights) -> Tokens:
    """Every expert has as many places, filled or not, so that no shape depends on the routing."""
    num_experts, places = len(stack.inner), len(x) if assigned.most is None else min(assigned.most, len(x))
    tokens, choices = assigned.experts.shape
    expert = assigned.experts.flatten()
    place = places_in_queues(expert[None], assigned.kept.flatten()[None], num_experts)[0]
    slot = torch.where(place > 0, expert * places + place - 1, num_experts * places)
    filled = x.new_zeros(num_experts * places + 1, x.size(1))
    filled = filled.index_copy(0, slot, x.repeat_interleave(choices, 0))
    hidden = filled[:-1].view(num_experts, places, x.size(1)) @ stack.inner.mT
    hidden = hidden if stack.inner_bias is None else hidden + stack.inner_bias[:, None]
    hidden = dropout(activate(hidden, stack.activation), stack.dropout, training=True)
    said = hidden @ stack.outer.mT
    said = said if stack.outer_bias is None else said + stack.outer_bias[:, None]
    said = F.pad(said.flatten(0, 1), (0, 0, 0, 1))
    weights = assigned.weights.masked_fill(~assigned.kept, 0)
    return (said.index_select(0, slot).view(tokens, choices, x.size(1)) * weights[..., None]).sum(1)


BACKENDS: dict[Backend, Callable[[Tokens, Assigned, Weights], Tokens]] = {
    "loop": loop,
    "segments": segments,
    "grouped": grouped,
    "capacity": capacity,
    "few": few,
}
