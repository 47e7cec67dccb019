"""Where the founding document's printed code does not do what its text says: one numbered row for each such place.

Each test shows through the public names what the text promises.
"""

import math
import typing

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from triglot import (
    BlockOptions,
    DecoderLLM,
    ExpertOptions,
    MixtureOfExperts,
    MultiHeadAttention,
    PositionalEncoding,
    Transformer,
    create_look_ahead_mask,
    create_masks,
    create_padding_mask,
    train_step,
)
from triglot.data.batch import PairBatch
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate
from triglot.losses import token_cross_entropy
from triglot.objective import Objective

SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN = 23, 29, 22, 2, 11, 17, 53
EXACT = {"atol": 1e-5, "rtol": 0}


def make_transformer(**arguments) -> Transformer:
    return Transformer(SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN, **arguments).eval()


def make_language_model(**arguments) -> DecoderLLM:
    model = DecoderLLM(TGT_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN, **arguments).eval()
    with torch.no_grad():  # distributions that are not all alike
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    src, tgt = torch.randint(3, SRC_VOCAB, (3, 7)), torch.randint(3, TGT_VOCAB, (3, 5))
    src[0, 4:], tgt[1, 3:] = 0, 0
    return src, tgt


def test_row_01_masks_are_bool_and_true_means_may_attend(pairs, without_shape_checks):
    src, tgt = pairs
    src_mask, tgt_mask, cross_mask = create_masks(src, tgt)
    assert {mask.dtype for mask in (src_mask, tgt_mask, cross_mask)} == {torch.bool}
    out = make_transformer()(src, tgt, src_mask, tgt_mask, cross_mask)
    for weights, mask in ((out.enc_attention[0], src_mask), (out.dec_self_attention[0], tgt_mask)):
        assert (weights[mask.expand_as(weights)] > 0).all()
        assert not weights[~mask.expand_as(weights)].any()
    with pytest.raises(ValueError, match=r"`mask` must be bool, True = may attend, but is torch.float32 instead."):
        make_transformer()(src, tgt, src_mask.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_02_a_row_with_nothing_to_attend_to_gives_zeros_in_every_precision(dtype):
    layer = MultiHeadAttention(D_MODEL, HEADS, dropout=0.0).to(dtype)
    x = torch.randn(2, 5, D_MODEL, dtype=dtype, requires_grad=True)
    mask = create_look_ahead_mask(5).tril(-1)  # the first query has none
    output, weights = layer(x, x, x, mask)
    assert not weights[:, :, 0].any()
    assert torch.equal(output[:, 0], layer.output.bias.expand(2, -1))
    output.float().square().sum().backward()
    assert x.grad.isfinite().all()


def test_row_03_rows_of_weights_sum_to_one_in_training_too():
    x = torch.randn(2, 5, D_MODEL)
    weights = MultiHeadAttention(D_MODEL, HEADS, dropout=0.5).train()(x, x, x).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 5))


def test_row_04_odd_widths_work_encodings_grow_and_models_refuse_what_is_too_long():
    assert PositionalEncoding(23, max_seq_length=5)(torch.zeros(2, 11, 23)).shape == (2, 11, 23)
    too_long = torch.ones(1, MAX_LEN + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"at most max_seq_length \(53\), but is 54 instead"):
        make_transformer()(too_long, too_long)
    with pytest.raises(ValueError, match=r"at most max_len \(53\), but is 54 instead"):
        make_language_model()(too_long)


def test_row_05_cached_decoding_of_a_batch_is_what_re_reading_every_prefix_gives_and_rows_end_alone(pairs):
    src, limit = pairs[0], 11
    model = make_transformer()
    with torch.no_grad():  # so that texts differ
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    texts = []
    for row in range(3):
        real, text = src[row : row + 1, src[row] != 0], [1]
        for _ in range(limit):
            logits = model(real, torch.tensor([text]), None, create_look_ahead_mask(len(text))).logits
            text.append(int(logits[0, -1].argmax()))
        texts.append(text[1:])
    eos = next(token for token in texts[0] if token not in texts[1])  # one row ends, another does not
    ended = [text[: text.index(eos) + 1] if eos in text else text for text in texts]
    projections = []
    for layer in model.decoder.layers:
        layer.cross_attention.key.register_forward_hook(lambda *_: projections.append(1))
    steps = model.start(src, create_padding_mask(src), limit)
    begin = torch.ones(3, dtype=torch.long)
    found = generate(steps.step(begin), steps, Sampler(temperature=0.0), limit, eos_ids=[eos])
    assert [text.ids for text in found] == ended
    assert len(projections) == LAYERS  # the source's keys are projected once


def test_row_06_padded_targets_are_neither_attended_to_nor_scored(pairs):
    src, tgt = pairs
    model = make_transformer()
    masks = create_masks(src, tgt)
    out = model(src, tgt, *masks)
    assert not any(weights[1, :, :, 3:].any() for weights in out.dec_self_attention)
    targets = torch.where(tgt == 0, -100, tgt)
    loss = token_cross_entropy(out.logits, targets)
    assert loss.tokens == (tgt != 0).sum()
    wider = nn.functional.pad(tgt, (0, 3))
    padded = model(src, wider, *create_masks(src, wider)).logits
    again = token_cross_entropy(padded, nn.functional.pad(targets, (0, 3), value=-100))
    torch.testing.assert_close(again, loss, **EXACT)


def test_row_07_generate_is_greedy_at_zero_clamps_restores_ends_and_checks_its_limit():
    model = make_language_model().train()
    ids = torch.randint(TGT_VOCAB, (3, 5))
    greedy = model.generate(ids, 7, temperature=0.0)
    assert torch.equal(greedy, model.generate(ids, 7, temperature=0.0, top_k=10**6))
    assert model.generate(ids, 7, top_k=10**6).shape == (3, 12)
    assert model.training
    model.eval()
    text = ids
    for _ in range(7):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, text)
    eos = int(greedy[0, 6])
    ended = model.generate(ids[:1], 7, temperature=0.0, eos_id=eos)
    first = greedy[0, 5:].tolist().index(eos)
    assert torch.equal(ended, greedy[:1, : 5 + first + 1])
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    message = r"`max_new_tokens` must be such that prompt and new tokens fit max_len \(53\), but is 49 instead\."
    with pytest.raises(ValueError, match=message):
        model.generate(ids, MAX_LEN - 5 + 1)
    assert not calls
    assert model.generate(ids, MAX_LEN - 5).size(1) == MAX_LEN


def test_row_07_ragged_prompts_generate_what_each_would_alone():
    model = make_language_model()
    lengths = torch.tensor([5, 2, 3])
    ids = torch.randint(TGT_VOCAB, (3, 5))
    eos = int(model.generate(ids[1:2, :2], 4, temperature=0.0)[0, -1])
    together = model.generate(ids, 7, temperature=0.0, lengths=lengths, eos_id=eos, pad_id=11)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, :length], 7, temperature=0.0, eos_id=eos)[0]
        assert together[row, : len(alone)].equal(alone)
        assert (together[row, len(alone) :] == 11).all()


def test_row_08_the_loss_is_smoothed_and_a_mean_over_real_tokens_whatever_the_micro_batches(pairs):
    tgt_in = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 0, 0, 0], [1, 4, 3, 0, 0]])
    tgt_out = torch.tensor([[5, 6, 7, 8, 2], [9, 2, -100, -100, -100], [4, 3, 2, -100, -100]])
    objective = Objective(make_transformer(), label_smoothing=0.1)
    whole = objective(PairBatch(pairs[0], tgt_in, tgt_out))
    parts = [objective(PairBatch(pairs[0][r : r + 1], tgt_in[r : r + 1], tgt_out[r : r + 1])) for r in range(3)]
    assert whole.tokens == sum(part.tokens for part in parts) == 10
    torch.testing.assert_close(whole.loss / 10, sum(part.loss for part in parts) / 10)
    model = objective.model
    logits = model(pairs[0], tgt_in, *create_masks(pairs[0], tgt_in)).logits
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits.flatten(0, 1), tgt_out.flatten())
    torch.testing.assert_close(whole.loss / whole.tokens, expected)


def test_row_09_the_mixture_runs_and_its_capacity_is_the_documents_formula_over_unmasked_tokens():
    moe = MixtureOfExperts(D_MODEL, 5, D_FF, k=2, capacity_factor=1.25)
    assert moe.expert_capacity is None
    x, mask = torch.randn(3, 7, D_MODEL), torch.ones(3, 7, dtype=torch.bool)
    moe(x)
    assert moe.expert_capacity == math.ceil(1.25 * 2 * 21 / 5)
    mask[0, 3:] = False
    moe(x, mask)
    assert moe.expert_capacity == math.ceil(1.25 * 2 * 17 / 5)


def test_row_10_one_token_is_not_dropped_and_nothing_is_in_evaluation_nor_without_a_factor():
    moe = MixtureOfExperts(D_MODEL, 11, D_FF, k=2, capacity_factor=1.0)
    one = torch.randn(1, 1, D_MODEL)
    assert moe.run(one).routing.dropped == 0
    assert moe(one).any()
    many = torch.randn(3, 7, D_MODEL)
    assert torch.equal(moe(many), moe(many))  # what is dropped is not left to chance
    assert moe.eval().run(many).routing.dropped == 0
    assert MixtureOfExperts(D_MODEL, 11, D_FF, capacity_factor=None).run(many).routing.dropped == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_row_11_balance_is_one_when_perfect_and_the_router_learns(k):
    moe = MixtureOfExperts(7, 7, D_FF, k)
    with torch.no_grad():
        moe.router.weight.copy_(sum((0.5**shift) * torch.eye(7).roll(shift, 0) for shift in range(7)))
        moe.router.bias.zero_()
    routing = moe.run(torch.eye(7)[None]).routing
    assert routing.balance.item() == pytest.approx(1.0, abs=1e-6)
    output, routing = moe.run(torch.randn(2, 5, 7))
    for loss in (output.square().sum(), routing.balance, routing.z):
        (gradient,) = torch.autograd.grad(loss, [moe.router.weight], retain_graph=True)
        assert gradient.abs().max() > 1e-4
    if k == 1:
        assert (routing.weights < 1).all()  # the probability itself


def test_row_12_too_many_choices_are_refused_at_once_and_every_dtype_runs():
    with pytest.raises(ValueError, match=r"`k` must be between 1 and num_experts \(5\), but is 6 instead\."):
        MixtureOfExperts(D_MODEL, 5, D_FF, k=6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert MixtureOfExperts(D_MODEL, 5, D_FF).to(dtype)(torch.randn(2, 3, D_MODEL, dtype=dtype)).dtype == dtype


def test_row_13_padding_is_routed_nowhere_and_its_output_is_zero():
    moe = MixtureOfExperts(D_MODEL, 5, D_FF, min_capacity=1)
    x, mask = torch.randn(2, 7, D_MODEL), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    output, routing = moe.run(x, mask)
    assert not output[~mask].any()
    assert moe.expert_capacity == math.ceil(2 * 10 / 5)
    changed = moe.run(torch.where(mask[..., None], x, 9.0), mask)
    assert torch.equal(changed.output, output)
    torch.testing.assert_close(changed.routing.load, routing.load)


def test_row_14_experts_and_outputs_depend_on_no_later_token_and_no_batch_mate():
    options = BlockOptions(experts=ExpertOptions(num_experts=5, capacity_factor=0.5))
    model = make_language_model(options=options)
    ids = torch.randint(TGT_VOCAB, (3, 7))
    other = ids.clone()
    other[:, 4:], other[1:] = 3, 5
    one, two = model.run(ids), model.run(other)
    torch.testing.assert_close(one.hidden[0, :4], two.hidden[0, :4], **EXACT)
    for here, there in zip(one.routing, two.routing, strict=True):
        assert here.experts[0, :4].equal(there.experts[0, :4])


def test_row_15_shapes_are_part_of_the_types(pairs, check_fields):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    model = make_transformer()
    encoded = model.encode(src, masks.src_mask)
    for result in (masks, encoded, model.decode(tgt, encoded.x, masks.tgt_mask, masks.cross_mask), model(src, tgt)):
        check_fields(result)
        hints = typing.get_type_hints(type(result)).values()
        assert all("Float[" in str(hint) or "Bool[" in str(hint) or "list[" in str(hint) for hint in hints)
    with pytest.raises(AssertionError, match=r"Masks\.src_mask is no"), jaxtyping.jaxtyped("context"):
        check_fields(masks._replace(src_mask=masks.src_mask[0]))


def test_row_16_every_rate_of_dropout_is_an_argument():
    quiet = {"attention_dropout": 0.0, "activation_dropout": 0.0, "embedding_dropout": 0.0}
    ids = torch.randint(TGT_VOCAB, (2, 5))
    for place in (None, *quiet, "dropout"):
        options = BlockOptions(**quiet | ({place: 0.5} if place in quiet else {}))
        model = make_language_model(options=options, dropout=0.5 if place == "dropout" else 0.0).train()
        assert torch.equal(model(ids).logits, model(ids).logits) == (place is None)
        twin = Transformer(
            TGT_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN, 0.5 if place == "dropout" else 0.0,
            options=options,
        )  # fmt: skip
        assert torch.equal(twin(ids, ids).logits, twin(ids, ids).logits) == (place is None)


def test_row_17_another_source_gives_other_logits(pairs):
    src, tgt = pairs
    other = src.clone()
    other[:, 1] = (other[:, 1] + 1) % SRC_VOCAB
    model, masks = make_transformer(), create_masks(src, tgt)
    assert ((model(src, tgt, *masks).logits - model(other, tgt, *masks).logits).abs().amax(-1) > 1e-4).all()


def test_row_18_attention_at_initialisation_is_spread_out_and_embeddings_do_not_drown_positions():
    model = Transformer(101, 101, 512, 1, 8, 2048).eval()
    src = torch.arange(1, 31)[None]
    weights = model.encode(src).weights[0]
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean()
    assert entropy > 0.7 * math.log(30)
    scaled = model.encoder.embedding.tokens.weight * math.sqrt(512)
    assert scaled.std().item() == pytest.approx(1.0, rel=0.05)


def test_row_19_masks_lie_where_their_input_lies(pairs):
    there = [side.to("meta") for side in pairs]
    assert {mask.device.type for mask in create_masks(*there)} == {"meta"}
    assert create_look_ahead_mask(5, device="meta").device.type == "meta"


def test_row_20_train_step_takes_shifted_targets_trains_in_training_mode_and_learns():
    model = make_language_model(dropout=0.0)
    ids = torch.randint(TGT_VOCAB, (3, 7))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = [train_step(model, (ids[:, :-1], ids[:, 1:]), optimizer) for _ in range(30)]
    assert all(isinstance(loss, float) for loss in losses)
    assert model.training
    assert losses[-1] < losses[0] / 2


def test_row_21_another_length_loads_the_same_state():
    longer = DecoderLLM(TGT_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, 101)
    longer.load_state_dict(make_language_model().state_dict())
    ids = torch.randint(TGT_VOCAB, (1, 7))
    assert not any("table" in name or name.endswith("pe") for name in longer.state_dict())
    assert longer.eval()(ids).logits.shape == (1, 7, TGT_VOCAB)


def test_row_22_top_k_of_zero_is_refused_and_ties_keep_exactly_k_by_lower_id():
    model = make_language_model()
    ids = torch.randint(TGT_VOCAB, (64, 3))
    with pytest.raises(ValueError, match=r"`top_k` must be at least 1, or left out, but is 0 instead\."):
        model.generate(ids, 1, top_k=0)
    nn.init.zeros_(model.lm_head.weight)  # all tokens tie
    assert set(model.generate(ids, 1, top_k=3)[:, -1].tolist()) == {0, 1, 2}
    assert set(model.generate(ids, 1, temperature=0.0)[:, -1].tolist()) == {0}


def test_row_23_what_a_mask_hides_of_a_padded_target_are_the_columns():
    [mask] = create_masks(torch.ones(1, 5, dtype=torch.long), torch.tensor([[1, 2, 3, 0, 0]])).tgt_mask
    assert mask[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]


def test_row_24_a_token_that_loses_a_choice_keeps_the_rest_of_its_sum_and_the_loss_is_reported():
    moe = MixtureOfExperts(2, 3, D_FF, k=2, capacity_factor=0.5, min_capacity=1).train()
    with torch.no_grad():  # both tokens choose expert 0 first; the second choices are 1 and 2
        moe.router.weight.copy_(torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]]))
        moe.router.bias.zero_()
    x = torch.eye(2)[None]
    output, routing = moe.run(x)
    assert moe.expert_capacity == 1
    assert routing.experts.tolist() == [[[0, 1], [0, 2]]]
    assert routing.dropped.item() == pytest.approx(1 / 4)
    hidden = nn.functional.gelu(moe.inner[2] @ x[0, 1] + moe.inner_bias[2])
    expected = routing.weights[0, 1, 1] * (moe.outer[2] @ hidden + moe.outer_bias[2])
    torch.testing.assert_close(output[0, 1], expected)
    assert routing.weights[0, 1, 1] < 0.5


def test_row_25_factor_one_drops_some_at_initialisation_says_so_and_none_drops_nothing():
    x = torch.randn(2, 128, 64)
    dropped = MixtureOfExperts(64, 8, D_FF, k=2, capacity_factor=1.0).run(x).routing.dropped
    assert 0 < dropped < 0.3
    assert "drops some even at initialisation" in MixtureOfExperts.__doc__
    assert ExpertOptions(num_experts=8).capacity_factor is None


def test_row_26_biases_of_router_and_experts_are_an_option_on_as_in_the_document():
    document = MixtureOfExperts(D_MODEL, 5, D_FF)
    assert document.router.bias is not None
    assert document.inner_bias is not None
    bare = MixtureOfExperts(D_MODEL, 5, D_FF, bias=False, router_bias=False)
    assert [name for name, _ in bare.named_parameters()] == ["inner", "outer", "router.weight"]
    x = torch.randn(2, 3, D_MODEL)
    assert bare(x).shape == x.shape


def test_every_row_has_a_test():
    numbers = {int(name.split("_")[2]) for name in globals() if name.startswith("test_row_")}
    assert numbers == set(range(1, 27))
