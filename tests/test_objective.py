"""What holds for the loss of a batch."""

import pytest
import torch
import torch.nn.functional as F

from triglot.config import BlockOptions, ExpertOptions, ModelConfig
from triglot.data.batch import IGNORED, LanguageBatch, PairBatch
from triglot.models.factory import build_model
from triglot.objective import Objective, evaluating, score_batches

VOCAB, SRC_VOCAB = 13, 17
CPU = torch.device("cpu")


def make_model(kind, experts=None, dropout=0.0):
    torch.manual_seed(1)
    options = BlockOptions(experts=experts, norm_order="pre")
    return build_model(
        ModelConfig(
            kind=kind,
            d_model=6,
            num_heads=2,
            num_layers=2,
            d_ff=11,
            max_seq_length=19,
            dropout=dropout,
            vocab_size=VOCAB,
            src_vocab_size=SRC_VOCAB,
            options=options,
        )
    )


def pairs(lengths, padding=0):
    """Pairs of the given (source, target) lengths, with more padding than needed."""
    src_width, tgt_width = (max(each) + padding for each in zip(*lengths, strict=True))
    src, tgt_in = (torch.zeros(len(lengths), width, dtype=torch.long) for width in (src_width, tgt_width))
    tgt_out = torch.full_like(tgt_in, IGNORED)
    for row, (source, target) in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * source + target)
        src[row, :source] = torch.randint(3, SRC_VOCAB, (source,), generator=generator)
        ids = torch.randint(3, VOCAB, (target + 1,), generator=generator)
        tgt_in[row, :target], tgt_out[row, :target] = ids[:-1], ids[1:]
    return PairBatch(src, tgt_in, tgt_out)


def text(rows, length):
    ids = torch.randint(3, VOCAB, (rows, length + 1))
    return LanguageBatch(ids[:, :-1], ids[:, 1:])


def test_the_loss_of_pairs_is_cross_entropy_of_the_models_logits_over_real_tokens():
    model, batch = make_model("encoder_decoder"), pairs([(5, 3), (2, 7)])
    totals = Objective(model)(batch)
    expected = 0.0
    for row in range(2):
        source, target = (batch.src[row] != 0).sum(), (batch.tgt_in[row] != 0).sum()
        look_ahead = torch.ones(target, target, dtype=torch.bool).tril()
        logits = model(batch.src[row : row + 1, :source], batch.tgt_in[row : row + 1, :target], None, look_ahead).logits
        expected += F.cross_entropy(logits[0], batch.tgt_out[row, :target], reduction="sum")
    torch.testing.assert_close(totals.loss, expected)
    assert totals.tokens == 10


def test_padding_changes_neither_loss_nor_gradient():
    grads = []
    for padding in (0, 3):
        model = make_model("encoder_decoder", ExpertOptions(num_experts=3))
        totals = Objective(model)(pairs([(5, 3), (2, 7)], padding))
        totals.loss.backward()
        grads.append([totals.loss.detach(), *(weight.grad for weight in model.parameters())])
    for plain, padded in zip(*grads, strict=True):
        torch.testing.assert_close(plain, padded, rtol=1e-5, atol=2e-6)


def test_packed_documents_cost_what_they_cost_alone():
    model = make_model("decoder_only")
    one, two = text(1, 5), text(1, 7)
    segments = torch.tensor([[1] * 5 + [2] * 7])
    # What follows a document's start stands at another position in the pack, which sinusoids would show.
    model.embedding.added.table.zero_()
    packed = LanguageBatch(torch.cat([one[0], two[0]], 1), torch.cat([one[1], two[1]], 1), segments)
    alone = [Objective(model)(batch).nll for batch in (one, two)]
    torch.testing.assert_close(Objective(model)(packed).nll, sum(alone))


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_micro_batches_divided_by_all_tokens_have_the_gradient_of_one_batch(kind):
    lengths = [(5, 3), (2, 7), (11, 1), (3, 4)]
    whole = pairs(lengths) if kind == "encoder_decoder" else text(4, 7)
    if kind == "encoder_decoder":
        parts = [pairs(lengths[:1]), pairs(lengths[1:])]
    else:
        parts = [LanguageBatch(*(ids[rows] for ids in whole[:2])) for rows in (slice(1), slice(1, 4))]
    gradients = []
    for batches in ([whole], parts):
        model = make_model(kind)
        objective = Objective(model, label_smoothing=0.1)
        totals = [objective(batch) for batch in batches]
        tokens = sum(one.tokens for one in totals)
        for one in totals:
            (one.loss / tokens).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=2e-7)


def test_smoothing_moves_the_loss_and_not_the_reported_nll():
    model, batch = make_model("decoder_only"), text(3, 5)
    plain, smoothed = Objective(model)(batch), Objective(model, label_smoothing=0.2)(batch)
    assert torch.equal(plain.nll, smoothed.nll)
    assert torch.equal(plain.loss, plain.nll)
    logits = model(batch.input_ids).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, batch.targets.flatten(), label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(smoothed.loss, expected)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_r_drop_sees_the_batch_twice_in_training_and_once_in_evaluation(kind):
    batch = pairs([(5, 3), (2, 7)]) if kind == "encoder_decoder" else text(3, 5)
    alike, apart = make_model(kind), make_model(kind, dropout=0.5)
    plain, same = Objective(alike)(batch), Objective(alike, r_drop=5.0)(batch)
    for one, other in zip(plain[:4], same[:4], strict=True):
        torch.testing.assert_close(one, other)  # without dropout the predictions are never apart
    torch.manual_seed(2)
    different = Objective(apart, r_drop=5.0)(batch)
    assert different.loss > different.nll
    assert different.tokens == plain.tokens
    assert torch.equal(Objective(apart, r_drop=5.0).eval()(batch).nll, Objective(apart).eval()(batch).nll)


def test_expert_losses_count_in_training_only_by_their_weights_and_the_batchs_tokens():
    experts = ExpertOptions(num_experts=3, balance_weight=0.5, z_weight=0.25)
    objective, batch = Objective(make_model("decoder_only", experts)), text(3, 5)
    training, evaluation = objective.train()(batch), objective.eval()(batch)
    assert torch.equal(evaluation.loss, evaluation.nll)
    penalty = 0.5 * training.experts.balance + 0.25 * training.experts.z
    torch.testing.assert_close(training.loss, training.nll + 15 * penalty)
    assert not training.experts.balance.requires_grad


def test_statistics_of_experts_are_the_routings_own(check_fields):
    objective, batch = Objective(make_model("decoder_only", ExpertOptions(num_experts=3))), text(3, 5)
    stats = objective(batch).experts
    routing = objective.model.run(batch.input_ids).routing
    assert torch.equal(stats.load, torch.stack([layer.load for layer in routing]))
    assert stats.load.shape == (2, 3)
    check_fields(stats)


def test_a_data_sets_loss_is_sum_by_sum_and_leaves_mode_and_randomness_as_they_were():
    model = make_model("encoder_decoder", dropout=0.5).train()
    batches = [pairs([(5, 3)]), pairs([(2, 7), (11, 13)])]
    before = torch.get_rng_state()
    scored = score_batches(model, batches, device=CPU)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())
    nlls = [Objective(model.eval())(batch).nll for batch in batches]
    assert scored.tokens == 23
    assert scored.mean == pytest.approx(sum(nlls).item() / 23)


def test_evaluation_mode_ends_even_when_what_is_evaluated_fails():
    model = make_model("decoder_only").train()
    with pytest.raises(ZeroDivisionError), evaluating(model, CPU):
        assert model.training or 1 / 0
    assert model.training
    assert torch.is_grad_enabled()
