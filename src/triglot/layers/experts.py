"""Ways to compute experts: each token by those that it was dealt to, weighted and summed.

All give what `loop` gives. `segments` is the fast one on a processor; `grouped` on a GPU; `capacity` has shapes that do
not depend on the routing; `few` is for the few tokens of a decoding step.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from triglot.errors import require
from triglot.layers.activations import Activation, activate, activate_again, is_gated, parts_of
from triglot.layers.dropout import dropout
from triglot.layers.routing import places_in_queues

Backend = Literal["loop", "segments", "grouped", "capacity", "few"]
Tokens = Float[Tensor, "tokens d_model"]
FEW = 16
"""Choices up to which those are computed one expert after another, as they come."""

ALONE = 32
"""Rows an expert has on average from which on its operations are worth a thread of their own."""


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
        counts, halves = dealt.counts, inner.size(1) // outer.size(2)
        hidden = x.new_empty(halves, len(dealt.token), outer.size(2))  # each part in one piece, which is faster to read
        said = x.new_empty(len(dealt.token) + 1, x.size(1))
        tokens, hiddens, saids, scales = (_by_expert(one, counts) for one in (dealt.token, hidden, said, scale))
        inners = inner.unflatten(1, (halves, -1))
        biases = None if inner_bias is None else inner_bias.unflatten(1, (halves, -1))

        def work(expert: int) -> None:
            rows = x.index_select(0, tokens[expert])
            parts = hiddens[expert].unbind()
            for part, into in enumerate(parts):
                _product(rows, inners[expert, part].T, None if biases is None else biases[expert, part], into)
            activated, _ = activate_again(parts, activation)
            activated = activated if scale is None else activated.mul_(scales[expert])
            _product(activated, outer[expert].T, None if outer_bias is None else outer_bias[expert], saids[expert])

        for_each(counts, work)
        ctx.save_for_backward(x, weights, inner, outer, outer_bias, hidden, scale)
        ctx.dealt, ctx.activation, ctx.inner_biased = dealt, activation, inner_bias is not None
        return _gathered(said, dealt, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, inner, outer, outer_bias, hidden, scale = ctx.saved_tensors
        dealt, activation, counts = ctx.dealt, ctx.activation, ctx.dealt.counts
        of_inner, of_outer = (torch.empty_like(stack) for stack in (inner, outer))
        of_inner_bias, of_outer_bias = (
            x.new_empty(len(stack), stack.size(1)) if has else None
            for stack, has in ((inner, ctx.inner_biased), (outer, outer_bias is not None))
        )
        of_all = [one for one in (of_inner, of_outer, of_inner_bias, of_outer_bias) if one is not None]
        rows = len(dealt.token) + 1
        of_rows, of_weights, row_weights = x.new_empty(rows, x.size(1)), x.new_zeros(rows), x.new_zeros(rows, 1)
        row_weights.view(-1).scatter_(0, dealt.row.flatten(), weights.flatten())
        tokens, hiddens, scales, rows_of, weights_of, bys = (
            _by_expert(one, counts) for one in (dealt.token, hidden, scale, of_rows, of_weights, row_weights)
        )

        def work(expert: int) -> None:
            of_said = grad.index_select(0, tokens[expert])  # not yet weighted
            activated, gradient = activate_again(hiddens[expert].unbind(), activation)
            of_activated = of_said @ outer[expert]
            if scale is not None:
                activated, of_activated = activated * scales[expert], of_activated.mul_(scales[expert])
            # What was said is not kept: W a · g = a · Wᵀ g.
            torch.sum(of_activated * activated, -1, out=weights_of[expert])
            if outer_bias is not None:
                weights_of[expert] += of_said @ outer_bias[expert]
            of_said *= bys[expert]
            torch.mm(of_said.T, activated, out=of_outer[expert])
            of_activated *= bys[expert]
            of_hidden = x.new_empty(counts[expert], inner.size(1)) if is_gated(activation) else of_activated
            gradient(of_activated, parts_of(of_hidden, activation))
            torch.mm(of_hidden.T, x.index_select(0, tokens[expert]), out=of_inner[expert])
            torch.mm(of_hidden, inner[expert], out=rows_of[expert])
            for of_bias, one in ((of_inner_bias, of_hidden), (of_outer_bias, of_said)):
                if of_bias is not None:
                    torch.sum(one, 0, out=of_bias[expert])

        for_each(counts, work)
        for expert, count in enumerate(counts):
            for one in of_all if count == 0 else ():
                one[expert] = 0
        of_weights[-1] = 0
        of_choices = of_weights.index_select(0, dealt.row.flatten()).view_as(weights)
        of_x = _gathered(of_rows, dealt)
        return of_x, of_choices, of_inner, of_outer, of_inner_bias, of_outer_bias, None, None, None


def _by_expert(x: Tensor | None, counts: list[int]) -> Any:
    """Each expert's rows; a tensor of three dimensions has them in the second."""
    if x is None:
        return [None] * len(counts)
    dim = 1 if x.dim() == 3 else 0
    return list(x.split([*counts, x.size(dim) - sum(counts)], dim))


def for_each(counts: list[int], work: Callable[[int], None]) -> None:
    """Do the work of each expert that has rows.

    Where there are enough of them each thread does it for experts of its own, from beginning to end: that is less to
    wait for, and more that stays in a core's own cache, than all threads on one operation after another.
    """
    busy, threads = [expert for expert, count in enumerate(counts) if count], torch.get_num_threads()
    if threads == 1 or len(busy) < 2 * threads or sum(counts) < ALONE * len(busy):
        for expert in busy:
            work(expert)
        return
    shares, rows = [list[int]() for _ in range(threads)], [0] * threads
    for expert in sorted(busy, key=counts.__getitem__, reverse=True):
        least = rows.index(min(rows))
        shares[least].append(expert)
        rows[least] += counts[expert]
    inference = torch.is_inference_mode_enabled()

    def share(experts: list[int]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for expert in experts:
                work(expert)

    list(_threads(os.getpid(), threads).map(share, shares))


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001  # threads do not outlive a fork
    """Threads whose operations use no others."""
    before, all_there = torch.get_num_threads(), Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "experts", torch.set_num_threads, (1,))
    for _ in range(count):
        pool.submit(all_there.wait)
    all_there.wait()
    torch.set_num_threads(before)  # which else would be 1 in any thread that begins later
    return pool


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)


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
