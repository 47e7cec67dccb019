"""What holds for every variant of both models, dense or of experts, whatever the weights."""

import pytest
import torch
from torch import nn

from triglot.config import BlockOptions
from triglot.layers.masks import create_look_ahead_mask, create_masks, create_padding_mask
from triglot.losses import token_cross_entropy
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer

SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN = 23, 29, 40, 2, 4, 17, 53
BATCH, SOURCE, TARGET = 3, 7, 5
MODEL = {"atol": 1e-5, "rtol": 0}


def perturbed(model: nn.Module) -> nn.Module:
    """Norms and biases that are not all ones and zeros, and logits that are not all near zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.uniform_(-0.5, 0.5)
    return model.eval()


@pytest.fixture
def translator(options: BlockOptions) -> Transformer:
    src_vocab = TGT_VOCAB if options.tie_embeddings else SRC_VOCAB
    return perturbed(Transformer(src_vocab, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN, options=options))


@pytest.fixture
def language_model(options: BlockOptions) -> DecoderLLM:
    return perturbed(DecoderLLM(TGT_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN, options=options))


@pytest.fixture
def pairs():
    """Sources and targets, ragged, padded with 0."""
    src, tgt = torch.randint(3, SRC_VOCAB, (BATCH, SOURCE)), torch.randint(3, TGT_VOCAB, (BATCH, TARGET))
    src[0, 4:], src[1, 6:], tgt[1, 3:], tgt[2, 2:] = 0, 0, 0, 0
    return src, tgt


@pytest.fixture
def ids():
    return torch.randint(TGT_VOCAB, (BATCH, SOURCE))


def choices(run) -> list[torch.Tensor]:
    return [layer.experts for layer in run.routing]


def test_another_source_gives_other_logits(translator, pairs):
    src, tgt = pairs
    other = src.clone()
    other[:, 2] = (other[:, 2] + 1) % SRC_VOCAB
    masks = create_masks(src, tgt)
    changed = (translator(src, tgt, *masks).logits - translator(other, tgt, *masks).logits).abs()
    assert (changed.amax(-1) > 1e-4).all()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.usefixtures("fused_kernel")
def test_a_later_target_token_changes_no_earlier_logit(translator, pairs, need_weights):
    src, tgt = pairs[0], torch.randint(3, TGT_VOCAB, (BATCH, TARGET))
    other = tgt.clone()
    other[:, 3:] = (other[:, 3:] + 7) % TGT_VOCAB
    masks = create_masks(src, tgt)
    one, two = (translator.run(src, t, *masks, need_weights=need_weights) for t in (tgt, other))
    for here, there in zip(choices(one), choices(two), strict=True):
        assert here[:, :3].equal(there[:, :3]) or here.size(1) == SOURCE
    one, two = translator.head(one.hidden), translator.head(two.hidden)
    tolerance = {"atol": 0, "rtol": 0} if translator.options.experts is None else MODEL
    torch.testing.assert_close(one[:, :3], two[:, :3], **tolerance)
    assert ((one - two)[:, 3:].abs().amax(-1) > 1e-4).all()


def test_a_later_token_changes_no_earlier_logit(language_model, ids):
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 7) % TGT_VOCAB
    one, two = language_model.run(ids), language_model.run(other)
    for here, there in zip(choices(one), choices(two), strict=True):
        assert here[:, :4].equal(there[:, :4])
    one, two = language_model.head(one.hidden), language_model.head(two.hidden)
    tolerance = {"atol": 0, "rtol": 0} if language_model.options.experts is None else MODEL
    torch.testing.assert_close(one[:, :4], two[:, :4], **tolerance)
    assert ((one - two)[:, 4:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.usefixtures("fused_kernel")
def test_a_pair_gives_the_same_alone_and_beside_longer_ones(translator, pairs, need_weights):
    src, tgt = pairs
    together = translator(src, tgt, *create_masks(src, tgt), need_weights=need_weights).logits
    for row in range(BATCH):
        alone_src, alone_tgt = src[row : row + 1, src[row] != 0], tgt[row : row + 1, tgt[row] != 0]
        alone = translator(alone_src, alone_tgt, None, create_look_ahead_mask(alone_tgt.size(1))).logits
        torch.testing.assert_close(together[row, : alone.size(1)], alone[0], **MODEL)


def test_a_text_gives_the_same_alone_and_beside_longer_ones(language_model, ids):
    lengths = torch.tensor([7, 2, 5])
    real = torch.arange(SOURCE) < lengths[:, None]
    together = language_model(ids, mask=real).logits
    unmasked = language_model(ids).logits  # on the right, a look-ahead mask alone hides padding from what is real
    for row, length in enumerate(lengths):
        alone = language_model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, :length], alone, **MODEL)
        torch.testing.assert_close(unmasked[row, :length], alone, **MODEL)


def test_what_stands_on_padding_changes_nothing_of_what_is_real(translator, pairs):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    other_src, other_tgt = torch.where(src == 0, 5, src), torch.where(tgt == 0, 6, tgt)
    one, two = translator(src, tgt, *masks).logits, translator(other_src, other_tgt, *masks).logits
    torch.testing.assert_close(one[tgt != 0], two[tgt != 0], **MODEL)


def test_padding_is_counted_in_no_figure_of_the_experts(translator, language_model, pairs, ids):
    src, tgt = pairs
    masks, real = create_masks(src, tgt), torch.arange(SOURCE) < torch.tensor([7, 2, 5])[:, None]
    segments = real.long()
    runs = [
        (
            translator.run(src, tgt, *masks),
            translator.run(torch.where(src == 0, 5, src), torch.where(tgt == 0, 6, tgt), *masks),
        ),
        (language_model.run(ids, mask=real), language_model.run(torch.where(real, ids, 5), mask=real)),
        (
            language_model.run(ids, segments=segments),
            language_model.run(torch.where(real, ids, 5), segments=segments),
        ),
    ]
    for one, two in runs:
        for here, there in zip(one.routing, two.routing, strict=True):
            for name in ("load", "balance", "z", "dropped", "entropy"):
                torch.testing.assert_close(getattr(here, name), getattr(there, name), **MODEL)


def test_attention_of_every_layer_is_a_distribution_over_what_may_be_attended_to(translator, pairs):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    out = translator.train()(src, tgt, *masks)
    for attention, mask in zip(out[1:], masks, strict=True):
        assert len(attention) == LAYERS
        for weights in attention:
            assert not weights[~mask.expand_as(weights)].any()
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.usefixtures("fused_kernel")
def test_the_fused_path_gives_the_explaining_ones_outputs_and_gradients(translator, pairs):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    results = []
    for need_weights in (True, False):
        translator.zero_grad()
        logits = translator(src, tgt, *masks, need_weights=need_weights).logits
        token_cross_entropy(logits, torch.where(tgt == 0, -100, tgt)).total.backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in translator.named_parameters()
            if parameter.grad is not None
        }
        results.append((logits, gradients))
    torch.testing.assert_close(results[0][0], results[1][0], **MODEL)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fused_kernel")
def test_the_language_models_fused_path_gives_the_explaining_ones_hidden_states(language_model, ids):
    real = torch.arange(SOURCE) < torch.tensor([7, 2, 5])[:, None]
    for mask in (None, real):
        one, two = (language_model.run(ids, mask=mask, need_weights=need) for need in (True, False))
        torch.testing.assert_close(one.hidden, two.hidden, **MODEL)


@pytest.mark.parametrize("fused", [True, False])
def test_translation_step_by_step_gives_the_whole_targets_logits(translator, pairs, fused, request):
    if fused:
        request.getfixturevalue("fused_kernel")
    src = pairs[0]
    tgt = torch.randint(3, TGT_VOCAB, (BATCH, TARGET))
    mask = create_padding_mask(src)
    whole = translator(src, tgt, mask, create_look_ahead_mask(TARGET), mask).logits
    steps = translator.start(src, mask, TARGET)
    for position in range(TARGET):
        torch.testing.assert_close(steps.step(tgt[:, position]), whole[:, position], **MODEL)


def test_translation_goes_on_with_the_rows_that_are_selected(translator, pairs):
    src = pairs[0]
    tgt = torch.randint(3, TGT_VOCAB, (BATCH, TARGET))
    mask = create_padding_mask(src)
    steps = translator.start(src, mask, TARGET)
    selections = {0: [2, 1, 0], 1: [0, 0, 1, 2, 2], 3: [4, 1, 2], 4: [1]}
    for position in range(TARGET):
        if position in selections:
            rows = torch.tensor(selections[position])
            steps.select(rows)
            src, mask, tgt = src[rows], mask[rows], tgt[rows].clone()
            tgt[:, position:] = torch.randint(3, TGT_VOCAB, tgt[:, position:].shape)
        whole = translator(src, tgt, mask, create_look_ahead_mask(TARGET), mask).logits
        torch.testing.assert_close(steps.step(tgt[:, position]), whole[:, position], **MODEL)


@pytest.mark.parametrize("fused", [True, False])
def test_ragged_texts_go_on_step_by_step_as_each_would_alone(language_model, fused, request):
    if fused:
        request.getfixturevalue("fused_kernel")
    lengths, more = torch.tensor([7, 2, 5]), 4
    texts = [torch.randint(TGT_VOCAB, (int(length) + more,)) for length in lengths]
    alone = [language_model(text[None]).logits[0] for text in texts]
    prompts = nn.utils.rnn.pad_sequence([text[:-more] for text in texts], batch_first=True, padding_value=11)
    logits, steps = language_model.start(prompts, lengths, more)
    rows = [0, 1, 2]
    selections = {1: [2, 2, 0, 1], 3: [3, 0]}
    for step in range(more):
        expected = torch.stack([alone[row][lengths[row] - 1 + step] for row in rows])
        torch.testing.assert_close(logits, expected, **MODEL)
        if step in selections:
            steps.select(torch.tensor(selections[step]))
            rows = [rows[place] for place in selections[step]]
        logits = steps.step(torch.stack([texts[row][lengths[row] + step] for row in rows]))


def test_tied_weights_are_one_tensor(translator, language_model, options):
    matrices = [
        translator.encoder.embedding.tokens.weight,
        translator.decoder.embedding.tokens.weight,
        translator.final_layer.weight,
    ]
    assert len({id(matrix) for matrix in matrices}) == (1 if options.tie_embeddings else 3)
    matrices = [language_model.embedding.tokens.weight, language_model.lm_head.weight]
    assert len({id(matrix) for matrix in matrices}) == (1 if options.tie_embeddings else 2)


def test_dropout_acts_in_training_and_not_in_evaluation(translator, language_model, pairs, ids):
    src, tgt = pairs
    assert not torch.equal(translator.train()(src, tgt).logits, translator(src, tgt).logits)
    assert torch.equal(translator.eval()(src, tgt).logits, translator(src, tgt).logits)
    assert not torch.equal(language_model.train()(ids).logits, language_model(ids).logits)
    assert torch.equal(language_model.eval()(ids).logits, language_model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("fused_kernel")
def test_half_precision_runs_forwards_and_backwards(translator, language_model, pairs, ids, dtype):
    src, tgt = pairs
    model = translator.to(dtype).train()
    logits = model(src, tgt, *create_masks(src, tgt), need_weights=False).logits
    assert logits.dtype == dtype
    scored = token_cross_entropy(logits, torch.where(tgt == 0, -100, tgt))
    (scored.total / scored.tokens).backward()
    out = language_model.to(dtype).train()(ids, ids)
    out.loss.backward()
    for parameter in (*model.parameters(), *language_model.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_autocast_runs_forwards_and_backwards_and_decodes(translator, language_model, pairs, ids):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    expected = translator(src, tgt, *masks).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = translator(src, tgt, *masks, need_weights=False).logits
        loss = language_model(ids, ids).loss
        steps = translator.start(src, masks.src_mask, TARGET)
        stepped = torch.stack([steps.step(tgt[:, position]) for position in range(TARGET)], 1)
        language_model.start(ids, torch.tensor([7, 2, 5]), 2)[1].step(ids[:, 0])
    if translator.options.experts is None:  # rounding may choose another expert
        torch.testing.assert_close(logits.float(), expected, atol=0.2, rtol=0)
        torch.testing.assert_close(stepped.float()[tgt != 0], expected[tgt != 0], atol=0.2, rtol=0)
    (logits.float().square().mean() + loss).backward()
    gradients = [p.grad for p in (*translator.parameters(), *language_model.parameters()) if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("fused_kernel")
def test_a_row_of_nothing_but_padding_is_finite_forwards_and_backwards(translator, pairs):
    src, tgt = (side.clone() for side in pairs)
    src[0], tgt[0] = 0, 0
    for need_weights in (True, False):
        translator.zero_grad()
        out = translator.train()(src, tgt, *create_masks(src, tgt), need_weights=need_weights)
        assert out.logits.isfinite().all()
        out.logits.square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in translator.parameters())
    out = translator(src, tgt, *create_masks(src, tgt))
    assert not any(weights[0].any() for attention in out[1:] for weights in attention)


def test_a_state_loads_into_a_model_of_another_length(translator, language_model, options):
    if options.positions == "learned":
        pytest.skip("learned positions have one vector for each place")
    longer = Transformer(
        translator.encoder.embedding.tokens.num_embeddings,
        TGT_VOCAB,
        D_MODEL,
        LAYERS,
        HEADS,
        D_FF,
        101,
        options=options,
    )
    longer.load_state_dict(translator.state_dict())
    DecoderLLM(TGT_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, 101, options=options).load_state_dict(
        language_model.state_dict()
    )


def test_shapes_are_as_the_types_say(translator, language_model, pairs, ids, check_fields):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    for need_weights in (True, False):
        check_fields(translator(src, tgt, *masks, need_weights=need_weights))
        check_fields(translator.run(src, tgt, *masks, need_weights=need_weights))
        check_fields(language_model.run(ids, need_weights=need_weights))
    check_fields(language_model(ids, ids))
