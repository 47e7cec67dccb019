"""A mixture of experts is what a plain loop over tokens computes, in training and evaluation, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.initialise import matrices
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.routing import expert_capacity, within_capacity

BATCH, LENGTH, WIDTH, EXPERTS, INNER = 2, 7, 11, 5, 13
MOE = {"atol": 1e-5, "rtol": 1e-5}
every_k = pytest.mark.parametrize("k", [1, 2, 3])
activations = pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


@pytest.fixture
def padding() -> torch.Tensor:
    """True for real tokens: the second row is shorter."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 4:] = False
    return mask


def one_expert(moe: MixtureOfExperts, expert: int, token: torch.Tensor) -> torch.Tensor:
    hidden = moe.inner[expert] @ token
    if moe.inner_bias is not None:
        hidden = hidden + moe.inner_bias[expert]
    match moe.activation:
        case "relu":
            hidden = hidden.clamp(min=0)
        case "gelu":
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        case "swiglu":
            half = len(hidden) // 2
            hidden = hidden[:half] * torch.sigmoid(hidden[:half]) * hidden[half:]
    out = moe.outer[expert] @ hidden
    return out if moe.outer_bias is None else out + moe.outer_bias[expert]


def plain_loop(moe: MixtureOfExperts, x: torch.Tensor, mask=None, capacity=math.inf) -> tuple[torch.Tensor, int]:
    """The output token by token, and how many choices found no place."""
    batch, length, _ = x.shape
    taken, dropped = [0] * moe.num_experts, 0
    sums = [[torch.zeros_like(x[row, position]) for position in range(length)] for row in range(batch)]
    probabilities = moe.router(x).softmax(-1)
    for position in range(length):
        for choice in range(moe.k):
            for row in range(batch):
                if mask is not None and not mask[row, position]:
                    continue
                p = probabilities[row, position]
                chosen = sorted(range(moe.num_experts), key=lambda e, p=p: (-p[e].item(), e))[: moe.k]
                expert = chosen[choice]
                taken[expert] += 1
                if taken[expert] > capacity:
                    dropped += 1
                    continue
                weight = p[expert] if moe.k == 1 else p[expert] / sum(p[e] for e in chosen)
                sums[row][position] = sums[row][position] + weight * one_expert(moe, expert, x[row, position])
    return torch.stack([torch.stack(row) for row in sums]), dropped


@every_k
@activations
@pytest.mark.parametrize("bias", [True, False])
def test_equals_a_plain_loop_over_tokens_gradients_included(k, activation, bias, x, padding):
    moe = MixtureOfExperts(
        WIDTH, EXPERTS, INNER, k, capacity_factor=None, activation=activation, bias=bias, router_bias=bias
    )
    upstream = torch.randn_like(x)
    results = []
    for run in (lambda x: plain_loop(moe, x, padding)[0], lambda x: moe(x, padding)):
        leaf = x.clone().requires_grad_()
        output = run(leaf)
        gradients = torch.autograd.grad((output * upstream).sum(), [leaf, *moe.parameters()], allow_unused=True)
        results.append([output, *(torch.zeros(()) if g is None else g for g in gradients)])
    torch.testing.assert_close(*results, **MOE)


@every_k
def test_what_finds_its_expert_full_is_dropped_and_nothing_else(k, x, padding, check_fields):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, k, capacity_factor=0.5, min_capacity=1).train()
    tokens = int(padding.sum())
    capacity = math.ceil(0.5 * k * tokens / EXPERTS)
    expected, dropped = plain_loop(moe, x, padding, capacity)
    result = moe.run(x, padding)
    check_fields(result)
    torch.testing.assert_close(result.output, expected, **MOE)
    assert dropped > 0
    assert result.routing.dropped.item() == pytest.approx(dropped / (k * tokens))
    assert moe.expert_capacity == capacity


def biased_towards(moe: MixtureOfExperts, order: list[int]) -> MixtureOfExperts:
    """All tokens choose these experts, in this order."""
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.zero_()
        for rank, expert in enumerate(order):
            moe.router.bias[expert] = 10.0 - rank
    return moe


def test_when_all_want_one_expert_exactly_its_capacity_is_kept_and_the_earliest_positions_are(x):
    moe = biased_towards(MixtureOfExperts(WIDTH, EXPERTS, INNER, 1, capacity_factor=1.0, min_capacity=1), [3]).train()
    output, routing = moe.run(x)
    capacity = math.ceil(BATCH * LENGTH / EXPERTS)
    assert moe.expert_capacity == capacity == 3
    assert routing.load.tolist() == [0, 0, 0, 1, 0]
    assert routing.dropped.item() == pytest.approx(1 - capacity / (BATCH * LENGTH))
    kept = output.abs().sum(-1) > 0
    assert kept.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]  # by position, then by row
    assert torch.equal(output[~kept], torch.zeros_like(output[~kept]))


def test_a_token_that_loses_one_choice_keeps_the_partial_sum_of_the_others(x):
    moe = biased_towards(MixtureOfExperts(WIDTH, EXPERTS, INNER, 2, capacity_factor=0.25, min_capacity=1), [1, 4])
    with torch.no_grad():  # one token alone would rather have expert 2 first
        moe.router.weight[2] = x[1, 6] * 20 / x[1, 6].square().sum()
        x[:, :6] -= (x[:, :6] @ x[1, 6])[..., None] * x[1, 6] / x[1, 6].square().sum()
        x[0, 6] = x[0, 0]
    routing = moe.train().run(x).routing
    assert routing.experts[1, 6].tolist() == [2, 1]
    weight = routing.weights[1, 6, 0]
    expected = weight * one_expert(moe, 2, x[1, 6])  # not renormalised to 1
    torch.testing.assert_close(moe(x)[1, 6], expected, **MOE)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_a_later_token_never_takes_an_earlier_ones_place(batch, length, num_experts, capacity, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    k = 2
    experts = torch.rand(batch, length, num_experts, generator=generator).argsort(-1)[..., :k]
    real = torch.rand(batch, length, generator=generator) < (0.7 if padded else 1.1)
    kept = within_capacity(experts, real, num_experts, capacity)
    assert not kept[~real].any()
    for expert in range(num_experts):
        assert (kept & (experts == expert)).sum() == min(capacity, int((real[..., None] & (experts == expert)).sum()))
    shorter = within_capacity(experts[:, :-1], real[:, :-1], num_experts, capacity) if length > 1 else kept[:, :-1]
    assert shorter.equal(kept[:, :-1])


def test_in_training_a_later_token_changes_no_earlier_output(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2, capacity_factor=0.5, min_capacity=1).train()
    other = x.clone()
    other[:, -1] = torch.randn(BATCH, WIDTH)
    torch.testing.assert_close(moe(x)[:, :-1], moe(other)[:, :-1], **MOE)


@pytest.mark.parametrize("factor", [0.01, 1.0, None])
def test_evaluation_drops_nothing_whatever_the_capacity(x, factor):
    torch.manual_seed(1)
    limited = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2, factor).eval()
    assert limited.run(x).routing.dropped == 0
    torch.testing.assert_close(limited(x), plain_loop(limited, x)[0], **MOE)
    assert torch.equal(limited(x), limited(x))
    assert limited.expert_capacity is None


def test_expert_capacity_is_shown_of_the_last_training_call_and_never_read(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2, capacity_factor=1.0).train()
    moe(x)
    assert moe.expert_capacity == math.ceil(2 * BATCH * LENGTH / EXPERTS)
    moe.eval()(x[:, :1])
    assert moe.expert_capacity == math.ceil(2 * BATCH * LENGTH / EXPERTS)
    expected = moe.train().run(x)
    moe.expert_capacity = 0
    torch.testing.assert_close(moe.run(x).output, expected.output)
    unlimited = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2, capacity_factor=None).train()
    assert unlimited.run(x).routing.dropped == 0
    assert unlimited.expert_capacity is None


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "factor", "minimum", "expected"),
    [
        (4096, 2, 8, 1.0, 4, 1024),
        (1, 2, 8, 1.0, 4, 4),
        (1, 2, 8, 1.0, 1, 1),
        (7, 3, 5, 1.25, 4, 6),
        (0, 2, 8, 1.0, 4, 4),
    ],
)
def test_capacity_is_rounded_up_and_never_zero(tokens, k, num_experts, factor, minimum, expected):
    assert expert_capacity(tokens, k, num_experts, factor, minimum) == expected


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_expert_is_the_dense_feed_forward(activation, x):
    dense = PointwiseFeedForward(WIDTH, INNER, activation=activation).eval()
    moe = MixtureOfExperts(WIDTH, 1, INNER, 1, activation=activation).eval()
    moe.load_state_dict({
        "router.weight": torch.randn(1, WIDTH), "router.bias": torch.randn(1),
        "inner": dense.inner.weight[None], "inner_bias": dense.inner.bias[None],
        "outer": dense.outer.weight[None], "outer_bias": dense.outer.bias[None],
    })  # fmt: skip
    torch.testing.assert_close(moe(x), dense(x), atol=2e-6, rtol=0)


def gradients(output: torch.Tensor, *wanted: torch.Tensor) -> list[torch.Tensor]:
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * upstream).sum(), wanted)]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 2)])
def test_identical_experts_are_the_dense_feed_forward_gradients_included(activation, num_experts, k, x):
    dense = PointwiseFeedForward(WIDTH, INNER, 0.0, activation=activation)
    moe = MixtureOfExperts(WIDTH, num_experts, INNER, k, None, activation=activation)
    linears = {"inner": dense.inner, "outer": dense.outer}
    with torch.no_grad():
        for name, linear in linears.items():
            getattr(moe, name).copy_(linear.weight.expand_as(getattr(moe, name)))
            getattr(moe, f"{name}_bias").copy_(linear.bias.expand_as(getattr(moe, f"{name}_bias")))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = [part for linear in linears.values() for part in (linear.weight, linear.bias)]
    expected = gradients(dense(one), one, *weights)
    found = gradients(moe(two), two, moe.inner, moe.inner_bias, moe.outer, moe.outer_bias)
    found[2:] = [part.sum(0) for part in found[2:]]
    torch.testing.assert_close(found, expected, **MOE)


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"), [(torch.float32, None, 1e-5), (torch.float64, "loop", 1e-12)]
)
@pytest.mark.parametrize("router", ["softmax", "softmax_of_chosen", "sigmoid", "expert_choice"])
def test_a_token_is_computed_alike_in_any_batch(router, dtype, backend, tolerance, x, padding):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, router=router, shared=1, backend=backend).to(dtype).eval()
    x = x.to(dtype)
    together = moe.run(x, padding)
    wider = moe.run(F.pad(x, (0, 0, 0, 3), value=7.0), F.pad(padding, (0, 3)))
    order = torch.randperm(BATCH)
    permuted = moe.run(x[order], padding[order])
    split = [moe.run(x[row : row + 1], padding[row : row + 1]) for row in range(BATCH)]
    others = [
        (wider.output[:, :LENGTH], wider.routing.experts[:, :LENGTH]),
        (permuted.output[order.argsort()], permuted.routing.experts[order.argsort()]),
        (torch.cat([one.output for one in split]), torch.cat([one.routing.experts for one in split])),
    ]
    if router != "expert_choice":
        later = x.clone()
        later[:, 4:] = torch.randn_like(later[:, 4:])
        found = moe.run(later, padding)
        assert torch.equal(found.routing.experts[:, :4], together.routing.experts[:, :4])
        torch.testing.assert_close(found.output[:, :4], together.output[:, :4], atol=tolerance, rtol=tolerance)
    for output, experts in others:
        assert torch.equal(experts[padding], together.routing.experts[padding])
        torch.testing.assert_close(output[padding], together.output[padding], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("router", ["softmax", "softmax_of_chosen", "sigmoid", "expert_choice"])
def test_a_shared_expert_is_added_for_every_real_token(router, x, padding):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, router=router, shared=2).eval()
    assert moe.shared.inner.out_features == 2 * INNER
    shared, moe.shared = moe.shared, None
    expected = moe(x, padding) + shared(x) * padding[..., None]
    moe.shared = shared
    torch.testing.assert_close(moe(x, padding), expected)


def test_the_bias_that_chooses_stays_whole_in_a_narrow_model(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, router="sigmoid").eval()
    moe.selection_bias.uniform_(-0.5, 0.5)
    before = moe.selection_bias.clone()
    narrow = moe.to(torch.bfloat16)
    assert narrow.inner.dtype == torch.bfloat16
    assert torch.equal(narrow.selection_bias, before)
    assert narrow.to(torch.float64).selection_bias.dtype == torch.float32


def test_noise_moves_choices_in_training_alone(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, noise=5.0, capacity_factor=None)
    drawn = [moe.train().run(x).routing.experts for _ in range(2)]
    assert not torch.equal(*drawn)
    plain = MixtureOfExperts(WIDTH, EXPERTS, INNER, capacity_factor=None).eval()
    plain.load_state_dict(moe.state_dict())
    assert torch.equal(moe.eval()(x), plain(x))


def test_capacity_over_sequences_is_that_of_each_sequence_alone(x, padding):
    limits = {"capacity_factor": 0.5, "min_capacity": 1}
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, capacity_over="sequence", **limits).train()
    alone = MixtureOfExperts(WIDTH, EXPERTS, INNER, **limits).train()
    alone.load_state_dict(moe.state_dict())
    together = moe.run(x, padding)
    assert together.routing.dropped > 0
    capacities = []
    for row in range(BATCH):
        found = alone.run(x[row : row + 1], padding[row : row + 1])
        capacities.append(alone.expert_capacity)
        assert torch.equal(found.routing.kept[0], together.routing.kept[row])
        torch.testing.assert_close(found.output[0], together.output[row], **MOE)
    assert moe.expert_capacity == max(capacities)


@every_k
def test_balance_is_one_when_all_experts_are_equally_likely_and_equally_chosen(k):
    moe = MixtureOfExperts(EXPERTS, EXPERTS, INNER, k)
    with torch.no_grad():  # token e prefers experts e, e+1 …, all the others as another token does
        moe.router.weight.copy_(
            torch.eye(EXPERTS) + 0.5 * torch.eye(EXPERTS).roll(1, 0) + 0.2 * torch.eye(EXPERTS).roll(2, 0)
        )
        moe.router.bias.zero_()
    routing = moe.run(torch.eye(EXPERTS)[None]).routing
    torch.testing.assert_close(routing.load, torch.full((EXPERTS,), 1 / EXPERTS))
    assert routing.balance.item() == pytest.approx(1.0, abs=1e-6)


@every_k
def test_balance_at_collapse_is_the_experts_number_times_the_routers_mass_on_the_chosen_by_k(k, x):
    order = [4, 0, 2][:k]
    moe = biased_towards(MixtureOfExperts(WIDTH, EXPERTS, INNER, k), order)
    routing = moe.run(x).routing
    mass = moe.router.bias.softmax(-1)[order].sum().item()
    assert routing.balance.item() == pytest.approx(EXPERTS * mass / k, rel=1e-5)
    assert sorted(routing.load.nonzero().flatten().tolist()) == sorted(order)


@every_k
def test_expert_losses_are_what_the_papers_formulas_say_over_real_tokens(k, x, padding):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, k, capacity_factor=0.5, min_capacity=1).train()
    routing = moe.run(x, padding).routing
    logits = moe.router(x[padding])
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(k).indices, EXPERTS).sum(1).float()
    load = chosen.mean(0) / k  # before anything is dropped
    torch.testing.assert_close(routing.load, load)
    torch.testing.assert_close(routing.balance, EXPERTS * (load * probabilities.mean(0)).sum())
    torch.testing.assert_close(routing.z, logits.exp().sum(-1).log().square().mean())
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(routing.entropy, entropy)


@every_k
@pytest.mark.parametrize("loss", ["balance", "z", "output"])
def test_the_router_learns_from_every_loss(k, loss, x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, k)
    result = moe.run(x)
    value = result.output.square().sum() if loss == "output" else getattr(result.routing, loss)
    (gradient,) = torch.autograd.grad(value, [moe.router.weight])
    assert gradient.abs().max() > 1e-4


@every_k
def test_padding_is_routed_nowhere_and_counted_nowhere(k, x, padding):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, k, capacity_factor=0.75, min_capacity=1).train()
    other = torch.where(padding[..., None], x, torch.randn_like(x) * 100)
    one, two = moe.run(x, padding), moe.run(other, padding)
    assert torch.equal(one.output, two.output)
    assert not one.output[~padding].any()
    for name in ("load", "balance", "z", "dropped", "entropy"):
        torch.testing.assert_close(getattr(one.routing, name), getattr(two.routing, name))
    spoilt = moe.run(x.masked_fill(~padding[..., None], torch.nan), padding)
    assert torch.equal(spoilt.output, one.output)
    assert all(
        getattr(spoilt.routing, name).isfinite() for name in ("balance", "importance", "z", "dropped", "entropy")
    )
    wider = F.pad(x, (0, 0, 0, 3)), F.pad(padding, (0, 3))
    torch.testing.assert_close(moe(*wider)[:, :LENGTH], one.output, **MOE)


def test_a_batch_of_padding_alone_is_all_zeros_and_finite(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER).train()
    output, routing = moe.run(x.requires_grad_(), torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    assert not output.any()
    assert all(value.isfinite().all() for value in (routing.load, routing.balance, routing.z, routing.entropy))
    (output.sum() + routing.balance + routing.z).backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_all_dtypes_run_and_the_router_counts_in_full_precision(dtype, training, x, padding):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2).to(dtype).train(training)
    output, routing = moe.run(x.to(dtype), padding)
    assert output.dtype == dtype
    assert {getattr(routing, name).dtype for name in ("weights", "balance", "z", "entropy")} == {torch.float32}
    (output.float().square().sum() + routing.balance + routing.z).backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


def test_autocast_changes_no_routing(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2).eval()
    expected = moe.run(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = moe.run(x)
    assert torch.equal(result.routing.experts, expected.routing.experts)
    assert torch.equal(result.routing.weights, expected.routing.weights)
    torch.testing.assert_close(result.output.float(), expected.output, atol=3e-2, rtol=0)


def test_no_output_depends_on_the_batch_it_is_in(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, 2).eval()
    together = moe.run(x)
    for row in range(BATCH):
        for position in range(LENGTH):
            alone = moe.run(x[row : row + 1, position : position + 1])
            torch.testing.assert_close(alone.output[0, 0], together.output[row, position], **MOE)
            assert torch.equal(alone.routing.experts[0, 0], together.routing.experts[row, position])


def test_work_grows_with_tokens_times_k_not_with_the_number_of_experts(x):
    def flops(num_experts: int, k: int) -> int:
        moe = MixtureOfExperts(WIDTH, num_experts, INNER, k).eval()
        with FlopCounterMode(display=False) as counter:
            moe(x)
        return counter.get_total_flops() - 2 * BATCH * LENGTH * WIDTH * num_experts  # without the router

    assert flops(5, 2) == flops(53, 2) == 2 * BATCH * LENGTH * 2 * (2 * WIDTH * INNER)
    assert flops(53, 3) == 3 * flops(53, 1)


def test_memory_grows_with_tokens_times_k_not_with_the_number_of_experts():
    """What autograd keeps, parameters apart."""
    tokens, width = 61, 97

    def kept(num_experts: int) -> int:
        moe = MixtureOfExperts(width, num_experts, INNER)
        own = {parameter.untyped_storage().data_ptr() for parameter in moe.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = moe(torch.randn(1, tokens, width))
        del output
        return sum(held.values())

    more = kept(101) - kept(5)
    assert more < tokens * width * 4 * 8  # far below the 96 further [tokens, hidden] buffers of one for each expert


def test_each_expert_begins_as_a_linear_layer_of_its_own_would():
    moe = MixtureOfExperts(101, 7, 53)
    assert moe.inner.abs().max().item() == pytest.approx(101**-0.5, rel=1e-3)
    assert moe.outer.abs().max().item() == pytest.approx(53**-0.5, rel=1e-3)
    assert sum(1 for _ in matrices(moe)) == 2 * 7 + 1


def test_dropout_acts_in_training_only(x):
    moe = MixtureOfExperts(WIDTH, EXPERTS, INNER, dropout=0.5)
    assert not torch.equal(moe.train()(x), moe(x))
    assert torch.equal(moe.eval()(x), moe(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 6}, r"`k` must be between 1 and num_experts \(5\), but is 6 instead\."),
        ({"k": 0}, r"`k` must be between 1 and num_experts \(5\), but is 0 instead\."),
        ({"num_experts": 0}, r"`num_experts` must be at least 1, but is 0 instead\."),
        ({"hidden_dim": 0}, r"`hidden_dim` must be at least 1, but is 0 instead\."),
        ({"expert_dim": -7}, r"`expert_dim` must be at least 1, but is -7 instead\."),
        ({"capacity_factor": 0.0}, r"`capacity_factor` must be above 0 and finite, or None, but is 0\.0 instead\."),
        ({"capacity_factor": math.inf}, r"`capacity_factor` must be above 0 and finite, or None, but is inf instead\."),
        ({"shared": -1}, r"`shared` must be at least 0, but is -1 instead\."),
        ({"bias_rate": -1.0}, r"`bias_rate` must be at least 0, but is -1\.0 instead\."),
        ({"min_capacity": 0}, r"`min_capacity` must be at least 1, but is 0 instead\."),
        ({"noise": -1.0}, r"`noise` must be at least 0, but is -1\.0 instead\."),
    ],
)
def test_what_cannot_work_is_refused_in_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExperts(**{"hidden_dim": WIDTH, "num_experts": EXPERTS, "expert_dim": INNER} | arguments)


@pytest.mark.parametrize("name", ["router", "activation", "capacity_over", "backend"])
@pytest.mark.usefixtures("without_shape_checks")
def test_refuses_a_choice_that_it_does_not_have(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but is 'other' instead"):
        MixtureOfExperts(WIDTH, EXPERTS, INNER, **{name: "other"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_refuses_a_mask_that_is_not_bool(x, dtype, without_shape_checks):
    with pytest.raises(ValueError, match=r"`mask` must be bool, True = real token, but is torch\.\w+ instead\."):
        MixtureOfExperts(WIDTH, EXPERTS, INNER)(x, torch.ones(BATCH, LENGTH, dtype=dtype))
