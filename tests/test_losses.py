"""Losses are sums over what is scored, whatever the padding, and torch's formula of smoothing."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triglot import projected_loss
from triglot.config import ExpertOptions
from triglot.layers.moe import MixtureOfExperts
from triglot.losses import IGNORED, expert_losses, token_cross_entropy
from triglot.projected_loss import projected_cross_entropy

BATCH, LENGTH, VOCAB = 2, 5, 11


@pytest.fixture
def scored():
    logits, targets = torch.randn(BATCH, LENGTH, VOCAB), torch.randint(VOCAB, (BATCH, LENGTH))
    targets[1, 3:] = IGNORED
    return logits, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_is_the_formula_token_by_token(scored, smoothing, check_fields):
    logits, targets = scored
    total, nll, count = 0.0, 0.0, 0
    for row in range(BATCH):
        for position in range(LENGTH):
            target = int(targets[row, position])
            if target == IGNORED:
                continue
            normaliser = math.log(sum(math.exp(v) for v in logits[row, position].tolist()))
            log_p = [v - normaliser for v in logits[row, position].tolist()]
            nll -= log_p[target]
            total -= (1 - smoothing) * log_p[target] + smoothing * sum(log_p) / VOCAB
            count += 1
    loss = token_cross_entropy(logits, targets, label_smoothing=smoothing)
    check_fields(loss)
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert loss.nll.item() == pytest.approx(nll, rel=1e-5)
    assert loss.tokens.item() == count == BATCH * LENGTH - 2


def test_equals_torchs_own_mean(scored):
    logits, targets = scored
    for smoothing in (0.0, 0.1):
        loss = token_cross_entropy(logits, targets, label_smoothing=smoothing)
        expected = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss.total / loss.tokens, expected)


def test_only_the_total_has_a_gradient_and_ignored_targets_send_none(scored):
    logits, targets = scored
    logits.requires_grad_()
    loss = token_cross_entropy(logits, targets, label_smoothing=0.1)
    assert not loss.nll.requires_grad
    loss.total.backward()
    assert not logits.grad[targets == IGNORED].any()
    assert (logits.grad[targets != IGNORED].abs().sum(-1) > 0).all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=5), st.integers(0, 2**31))
def test_sums_over_rows_add_up_to_the_batch(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), LENGTH, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (len(lengths), LENGTH), generator=generator)
    for row, length in enumerate(lengths):
        targets[row, length:] = IGNORED
    together = token_cross_entropy(logits, targets, label_smoothing=0.1)
    alone = [
        token_cross_entropy(logits[row, :n], targets[row, :n], label_smoothing=0.1) for row, n in enumerate(lengths)
    ]
    for name in together._fields:
        parts = torch.stack([getattr(loss, name) for loss in alone]).sum()
        torch.testing.assert_close(getattr(together, name), parts, atol=1e-4, rtol=1e-5)


def test_nothing_scored_is_zero_and_not_nan(scored):
    logits, targets = scored
    loss = token_cross_entropy(logits.requires_grad_(), torch.full_like(targets, IGNORED), label_smoothing=0.1)
    assert loss == (0, 0, 0)
    loss.total.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_full_precision(scored, dtype):
    logits, targets = scored
    halved = logits.to(dtype)
    loss = token_cross_entropy(halved, targets)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, token_cross_entropy(halved.float(), targets).total)


def test_expert_losses_are_means_over_layers_in_units_that_depth_does_not_change(check_fields):
    x = torch.randn(BATCH, LENGTH, 13)
    routing = [MixtureOfExperts(13, num_experts, 7).run(x).routing for num_experts in (3, 5, 7)]
    losses = expert_losses(routing)
    check_fields(losses)
    for name in losses._fields:
        expected = sum(getattr(layer, name).item() for layer in routing) / 3
        assert getattr(losses, name).item() == pytest.approx(expected)
    torch.testing.assert_close(expert_losses(routing * 4), losses)
    assert expert_losses([]) == (0, 0, 0)
    options = ExpertOptions(num_experts=3, balance_weight=0.5, importance_weight=0.25, z_weight=2.0)
    expected = 0.5 * losses.balance + 0.25 * losses.importance + 2 * losses.z
    torch.testing.assert_close(losses.weighted(options), expected)


# Fused with the projection


@pytest.fixture
def projected():
    torch.manual_seed(3)
    hidden, targets = torch.randn(3, 7, 13), torch.randint(VOCAB, (3, 7))
    targets[1, 3:] = IGNORED
    targets[2] = IGNORED
    return hidden, targets


def both(hidden, targets, projection, smoothing):
    """Ours and the plain one: losses, and gradients of everything for an upstream gradient that is not 1."""
    results = []
    for fused in (True, False):
        x, layer = hidden.detach().requires_grad_(), copy.deepcopy(projection)
        if fused:
            loss = projected_cross_entropy(x, layer, targets, label_smoothing=smoothing)
        else:
            loss = token_cross_entropy(layer(x), targets, label_smoothing=smoothing)
        (loss.total * 0.37).backward()
        results.append([*loss, x.grad, *(weight.grad for weight in layer.parameters())])
    return results


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 20])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_with_the_projection_it_is_the_same_gradients_included(projected, chunk, smoothing, bias, monkeypatch):
    monkeypatch.setattr(projected_loss, "CHUNK", (chunk, chunk))
    for ours, plain in zip(*both(*projected, nn.Linear(13, VOCAB, bias=bias), smoothing), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_fused_in_double_precision_it_is_the_same_to_the_last_digits(projected):
    hidden, targets = projected
    projection = nn.Linear(13, VOCAB).double()
    ours, plain = both(hidden.double(), targets, projection, 0.1)
    for one, other in zip(ours[3:], plain[3:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)  # the softmax is in fp32 on both sides


@pytest.mark.skipif(not hasattr(nn.functional, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_fused_it_is_torchs_own(projected):
    hidden, targets = projected
    layer = nn.Linear(13, VOCAB, bias=False)
    ours = projected_cross_entropy(hidden, layer, targets)
    theirs = nn.functional.linear_cross_entropy(
        hidden.flatten(0, 1), layer.weight, targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(ours.total, theirs)


def test_fused_under_autocast_it_is_near_full_precision(projected):
    hidden, targets = projected
    layer = nn.Linear(13, VOCAB)
    with torch.autocast("cpu", torch.bfloat16):
        x = hidden.detach().requires_grad_()
        loss = projected_cross_entropy(x, layer, targets, label_smoothing=0.1)
    loss.total.backward()
    y = hidden.detach().requires_grad_()
    plain = token_cross_entropy(layer(y), targets, label_smoothing=0.1)
    plain.total.backward()
    torch.testing.assert_close(loss.total, plain.total, rtol=1e-2, atol=0)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-2)
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_fused_without_gradients_it_is_the_same_and_nothing_scored_is_zero(projected):
    hidden, targets = projected
    layer = nn.Linear(13, VOCAB)
    with torch.no_grad():
        ours, plain = projected_cross_entropy(hidden, layer, targets), token_cross_entropy(layer(hidden), targets)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)
    none = projected_cross_entropy(hidden.requires_grad_(), layer, torch.full_like(targets, IGNORED))
    none.total.backward()
    assert (none.total.item(), none.tokens.item()) == (0.0, 0)
    assert not hidden.grad.any()


# R-Drop


def plain_r_drop(hidden, targets, projection, smoothing, weight):
    """The losses of both copies and torch's own divergences, as the paper writes them, halved."""
    log_p, log_q = projection(hidden).log_softmax(-1).chunk(2)
    losses_of_both = [token_cross_entropy(one, targets, label_smoothing=smoothing) for one in (log_p, log_q)]
    scored = targets != IGNORED
    there, back = (
        nn.functional.kl_div(of[scored], to[scored], reduction="sum", log_target=True)
        for of, to in ((log_q, log_p), (log_p, log_q))
    )
    total = sum(one.total for one in losses_of_both) / 2 + weight / 4 * (there + back)
    return total, sum(one.nll for one in losses_of_both) / 2


@pytest.mark.parametrize("chunk", [1, 6 * VOCAB, 1 << 20])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_r_drop_is_its_formula_gradients_included(projected, chunk, smoothing, monkeypatch):
    monkeypatch.setattr(projected_loss, "CHUNK", (chunk, chunk))
    targets, layer = projected[1], nn.Linear(13, VOCAB)
    hidden = torch.randn(6, 7, 13)
    results = []
    for fused in (True, False):
        x, projection = hidden.clone().requires_grad_(), copy.deepcopy(layer)
        if fused:
            total, nll, tokens = projected_cross_entropy(x, projection, targets, label_smoothing=smoothing, r_drop=5.0)
            assert tokens == (targets != IGNORED).sum()
        else:
            total, nll = plain_r_drop(x, targets, projection, smoothing, 5.0)
        (total * 0.37).backward()
        results.append([total, nll, x.grad, *(weight.grad for weight in projection.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_r_drop_of_equal_copies_is_the_loss_of_one(projected):
    hidden, targets = projected
    layer = nn.Linear(13, VOCAB)
    one = projected_cross_entropy(hidden, layer, targets, label_smoothing=0.1)
    two = projected_cross_entropy(torch.cat([hidden, hidden]), layer, targets, label_smoothing=0.1, r_drop=5.0)
    for ours, alone in zip(two, one, strict=True):
        torch.testing.assert_close(ours, alone)
