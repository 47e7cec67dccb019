"""Routers choose as their papers say; places go by position; what a routing is said to be like, it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot import config
from triglot.layers.routing import (
    Router,
    choose,
    describe,
    expert_choice,
    moved_bias,
    sigmoid_choice,
    softmax_choice,
    softmax_of_chosen,
    within_capacity,
)

BATCH, LENGTH, EXPERTS = 3, 7, 5
ROUTERS = ["softmax", "softmax_of_chosen", "sigmoid", "expert_choice"]
every_router = pytest.mark.parametrize("router", ROUTERS)
every_k = pytest.mark.parametrize("k", [1, 2, 4])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, EXPERTS)


@pytest.fixture
def real() -> torch.Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 4:] = False
    return mask


@every_k
def test_renormalised_probabilities_are_a_softmax_over_the_chosen(k, logits, real):
    one, other = softmax_choice(logits, real, k, renormalize=True), softmax_of_chosen(logits, real, k)
    assert torch.equal(one.experts, other.experts)
    torch.testing.assert_close(one.weights, other.weights)


@every_k
def test_softmax_weights_are_those_of_torchs_top_k(k, logits, real):
    choice = softmax_choice(logits, real, k, renormalize=False)
    values, ids = logits.softmax(-1).topk(k)
    assert torch.equal(choice.experts, ids)
    torch.testing.assert_close(choice.weights, values)


@every_k
def test_the_sigmoids_bias_chooses_and_never_weighs(k, logits, real):
    plain = sigmoid_choice(logits, real, k, torch.zeros(EXPERTS))
    bias = torch.zeros(EXPERTS)
    bias[3] = 2  # above any sigmoid: always chosen
    forced = sigmoid_choice(logits, real, k, bias)
    assert (forced.experts == 3).any(-1).all()
    assert torch.equal(plain.experts, logits.sigmoid().topk(k).indices)
    scores = logits.sigmoid().gather(-1, forced.experts)
    expected = scores if k == 1 else scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(forced.weights, expected)


@every_k
def test_each_expert_takes_its_most_probable_tokens_of_a_sequence(k, logits, real):
    choice = expert_choice(logits, real, k)
    for row in range(BATCH):
        tokens = int(real[row].sum())
        places = -(-k * tokens // EXPERTS)
        for expert in range(EXPERTS):
            taken = choice.chosen[row, :, expert].nonzero()[:, 0].tolist()
            wanted = logits[row, :tokens].softmax(-1)[:, expert].topk(min(places, tokens)).indices
            assert sorted(wanted.tolist()) == taken
    assert not choice.chosen[~real].any()


@every_router
@every_k
def test_no_choice_depends_on_other_rows_nor_on_padding(router, k, logits, real):
    together = choose(logits, real, router, k, True, None)
    order = torch.tensor([2, 0, 1])
    permuted = choose(logits[order], real[order], router, k, True, None)
    wider = choose(
        torch.nn.functional.pad(logits, (0, 0, 0, 2), value=9.0),
        torch.nn.functional.pad(real, (0, 2)),
        router,
        k,
        True,
        None,
    )
    for part, other, padded in zip(together[:3], permuted[:3], wider[:3], strict=True):
        torch.testing.assert_close(part[order], other)
        torch.testing.assert_close(part[real], padded[:, :LENGTH][real])


@pytest.mark.parametrize("router", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_no_choice_depends_on_later_tokens(router, logits, real):
    other = logits.clone()
    other[:, -1] = torch.randn(BATCH, EXPERTS)
    for one, two in zip(*(choose(x, real, router, 2, True, None) for x in (logits, other)), strict=True):
        assert torch.equal(one[:, :-1], two[:, :-1])


@pytest.mark.parametrize("router", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_ties_go_to_the_lower_id_and_exactly_k_are_chosen(router):
    logits = torch.tensor([[[0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    choice = choose(logits, torch.ones(1, 2, dtype=torch.bool), router, 2, True, None)
    assert choice.experts.tolist() == [[[1, 2], [0, 1]]]
    torch.testing.assert_close(choice.weights, torch.full((1, 2, 2), 0.5))


def test_ties_between_tokens_go_to_the_earlier_one():
    choice = expert_choice(torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), 1)
    assert choice.chosen[0].tolist() == [[True, True], [True, True], [False, False], [False, False]]


@every_router
def test_logits_that_are_no_numbers_spoil_their_own_token_alone(router, logits, real):
    clean = choose(logits, real, router, 2, True, None)
    logits[0, 3] = torch.nan
    choice = choose(logits, real, router, 2, True, None)
    assert ((choice.experts >= 0) & (choice.experts < EXPERTS)).all()
    assert choice.weights[0, 3].isnan().all()
    if router != "expert_choice":  # there, it may take another's place
        others = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        others[0, 3] = False
        torch.testing.assert_close(choice.weights[others], clean.weights[others])


@every_router
@every_k
def test_what_a_routing_was_like_is_counted_over_real_tokens(router, k, logits, real):
    choice = choose(logits, real, router, k, k > 1, None)
    routing = describe(logits, choice, real, choice.chosen)
    counts, weights = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    for row in range(BATCH):
        for position in range(LENGTH):
            for place in range(choice.experts.size(2)):
                if choice.chosen[row, position, place]:
                    counts[choice.experts[row, position, place]] += 1
                    weights[choice.experts[row, position, place]] += choice.weights[row, position, place]
    torch.testing.assert_close(routing.load, counts / counts.sum())
    mean = choice.probabilities[real].mean(0)
    torch.testing.assert_close(routing.balance, EXPERTS * (routing.load * mean).sum())
    torch.testing.assert_close(routing.importance, weights.var(correction=0) / weights.mean() ** 2)
    torch.testing.assert_close(routing.z, logits[real].exp().sum(-1).log().square().mean())
    assert routing.dropped == 0


def test_equal_weights_for_all_have_no_importance_loss_and_uneven_ones_learn_from_it():
    even = torch.zeros(1, EXPERTS, EXPERTS)
    even[0].fill_diagonal_(1.0)
    real = torch.ones(1, EXPERTS, dtype=torch.bool)
    assert describe(even, softmax_choice(even, real, 1, False), real, real[..., None]).importance.item() < 1e-10
    logits = torch.randn(1, LENGTH, EXPERTS, requires_grad=True)
    real = torch.ones(1, LENGTH, dtype=torch.bool)
    describe(logits, choice := softmax_choice(logits, real, 2, True), real, choice.chosen).importance.backward()
    assert logits.grad.abs().max() > 1e-4


def test_recipes_and_layers_know_the_same_routers():
    assert config.Router == Router


def test_the_bias_falls_for_the_overloaded_rises_for_the_others_and_stands_still_at_balance():
    bias, load = torch.tensor([0.5, 0.0, -0.5, 0.1]), torch.tensor([0.4, 0.1, 0.25, 0.25])
    torch.testing.assert_close(moved_bias(bias, load, 0.01), torch.tensor([0.49, 0.01, -0.5, 0.1]))


def test_the_bias_brings_the_load_of_a_lopsided_router_to_balance():
    generator = torch.Generator().manual_seed(0)
    lopsided, bias, loads = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]), torch.zeros(EXPERTS), []
    for _ in range(600):
        logits = torch.randn(1, 512, EXPERTS, generator=generator) + lopsided
        real = torch.ones(1, 512, dtype=torch.bool)
        choice = sigmoid_choice(logits, real, 2, bias)
        load = describe(logits, choice, real, choice.chosen).load
        bias = moved_bias(bias, load, 0.005)
        loads.append(load.max().item() * EXPERTS)
    assert loads[0] > 1.8
    assert max(loads[-20:]) < 1.25


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_places_in_each_sequence_are_those_of_a_batch_of_it_alone(batch, length, num_experts, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(batch, length, num_experts, generator=generator).argsort(-1)[..., :2]
    real = torch.rand(batch, length, generator=generator) < 0.8
    together = within_capacity(experts, real, num_experts, capacity, "sequence")
    places = torch.full((batch,), capacity)
    assert torch.equal(together, within_capacity(experts, real, num_experts, places, "sequence"))
    for row in range(batch):
        one = slice(row, row + 1)
        assert torch.equal(together[one], within_capacity(experts[one], real[one], num_experts, capacity))
