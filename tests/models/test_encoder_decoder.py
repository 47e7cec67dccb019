"""The encoder–decoder is nn.Transformer with an embedding and a projection, and refuses what it cannot do."""

import math

import pytest
import torch
from torch import nn

from triglot.config import BlockOptions, ModelConfig
from triglot.layers.masks import create_look_ahead_mask, create_masks
from triglot.models.encoder_decoder import Encoder, Transformer

SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN = 23, 29, 33, 2, 3, 17, 53
BATCH, SOURCE, TARGET = 2, 7, 5
SHAPE = (SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN)

pytestmark = pytest.mark.usefixtures("fused_kernel")  # where weights are not needed


@pytest.fixture
def pairs():
    src, tgt = torch.randint(1, SRC_VOCAB, (BATCH, SOURCE)), torch.randint(1, TGT_VOCAB, (BATCH, TARGET))
    src[0, 4:], tgt[1, 3:] = 0, 0
    return src, tgt


def perturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def as_torch(ours: Transformer, order: str, activation: str) -> nn.Transformer:
    theirs = nn.Transformer(
        D_MODEL, HEADS, LAYERS, LAYERS, D_FF, 0.0, activation, batch_first=True, norm_first=order == "pre"
    )
    for ours_side, theirs_side in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        theirs_side.norm.load_state_dict(ours_side.final_norm.state_dict())
        for layer, twin in zip(ours_side.layers, theirs_side.layers, strict=True):
            copy_attention(layer.self_attention, twin.self_attn)
            twin.linear1.load_state_dict(layer.feed_forward.inner.state_dict())
            twin.linear2.load_state_dict(layer.feed_forward.outer.state_dict())
            norms = [layer.around_self_attention, layer.around_feed_forward]
            if ours_side is ours.decoder:
                copy_attention(layer.cross_attention, twin.multihead_attn)
                norms.insert(1, layer.around_cross_attention)
            for number, residual in enumerate(norms, 1):
                getattr(twin, f"norm{number}").load_state_dict(residual.norm.state_dict())
    return theirs  # in training mode with dropout 0: no nested-tensor fast path


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # what torch says of pre-norm
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_equals_torchs_transformer_with_the_same_weights(order, activation, need_weights, pairs, check_fields):
    options = BlockOptions(norm_order=order, activation=activation, final_norm=True)
    ours = perturbed(Transformer(*SHAPE, options=options))
    theirs = as_torch(ours, order, activation)
    src, tgt = pairs
    masks = create_masks(src, tgt)
    expected = ours.head(
        theirs(
            ours.encoder.embedding(src).x, ours.decoder.embedding(tgt).x, tgt_mask=~create_look_ahead_mask(TARGET),
            src_key_padding_mask=src == 0, tgt_key_padding_mask=tgt == 0, memory_key_padding_mask=src == 0,
        )
    )  # fmt: skip
    result = ours(src, tgt, *masks, need_weights=need_weights)
    check_fields(result)
    torch.testing.assert_close(result.logits, expected, atol=1e-5, rtol=0)
    assert all((attention is not None) == need_weights for attention in result[1:])


def test_results_unpack_and_have_the_documents_shapes(pairs, check_fields):
    model = Transformer(*SHAPE)
    src, tgt = pairs
    masks = create_masks(src, tgt)
    logits, enc, dec, cross = model(src, tgt, *masks)
    assert logits.shape == (BATCH, TARGET, TGT_VOCAB)
    assert [weights.shape for weights in enc] == [(BATCH, HEADS, SOURCE, SOURCE)] * LAYERS
    assert [weights.shape for weights in dec] == [(BATCH, HEADS, TARGET, TARGET)] * LAYERS
    assert [weights.shape for weights in cross] == [(BATCH, HEADS, TARGET, SOURCE)] * LAYERS
    check_fields(model.run(src, tgt, *masks, need_weights=True))


def test_encode_and_decode_return_what_encoder_and_decoder_return(pairs, check_fields):
    model = perturbed(Transformer(*SHAPE))
    src, tgt = pairs
    src_mask, tgt_mask, cross_mask = create_masks(src, tgt)
    encoded = model.encode(src, src_mask)
    decoded = model.decode(tgt, encoded.x, tgt_mask, cross_mask)
    check_fields(encoded)
    check_fields(decoded)
    torch.testing.assert_close(encoded, model.encoder(src, src_mask))
    torch.testing.assert_close(decoded, model.decoder(tgt, encoded.x, tgt_mask, cross_mask))
    out = model(src, tgt, src_mask, tgt_mask, cross_mask)
    torch.testing.assert_close(model.final_layer(decoded.x), out.logits)
    torch.testing.assert_close(list(encoded.weights), out.enc_attention)
    torch.testing.assert_close(decoded.cross_weights, out.dec_enc_attention)
    assert model.encode(src, src_mask, need_weights=False).weights is None
    assert model.decode(tgt, encoded.x, need_weights=False)[1:] == (None, None)


def test_without_masks_everything_may_be_attended_to(pairs):
    out = Transformer(*SHAPE)(*pairs)
    for attention in out[1:]:
        assert all(weights.all() for weights in attention)


def test_embeddings_begin_beside_the_sinusoids_and_projections_as_xavier():
    model = Transformer(101, 103, 64, 1, 4, 97, MAX_LEN)
    tokens = torch.arange(101)[None]
    for side in (model.encoder, model.decoder):
        vectors = side.embedding.tokens(tokens) * math.sqrt(64)
        assert vectors.std().item() == pytest.approx(1.0, rel=0.05)
    limit = math.sqrt(6 / (64 + 97))
    assert model.encoder.layers[0].feed_forward.inner.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("side", ["src", "tgt"])
def test_refuses_more_tokens_than_max_seq_length(side):
    model = Transformer(*SHAPE)
    lengths = {"src": SOURCE, "tgt": TARGET} | {side: MAX_LEN + 1}
    tokens = {name: torch.ones(1, length, dtype=torch.long) for name, length in lengths.items()}
    with pytest.raises(ValueError, match=r"`length` must be at most max_seq_length \(53\), but is 54 instead\."):
        model(**tokens)
    model(**{name: ids[:, :MAX_LEN] for name, ids in tokens.items()})


def test_refuses_to_decode_more_tokens_than_max_seq_length_before_it_starts(pairs):
    model = Transformer(*SHAPE).eval()
    message = r"`max_new_tokens` must be at most max_seq_length \(53\), but is 54 instead\."
    with pytest.raises(ValueError, match=message):
        model.start(pairs[0], None, MAX_LEN + 1)
    model.start(pairs[0], None, MAX_LEN)


def test_refuses_to_tie_vocabularies_of_different_size():
    message = r"`tgt_vocab_size` must be src_vocab_size \(23\) with tied embeddings, but is 29 instead\."
    with pytest.raises(ValueError, match=message):
        Transformer(*SHAPE, options=BlockOptions(tie_embeddings=True))


def test_refuses_a_width_its_heads_cannot_share():
    with pytest.raises(ValueError, match=r"`d_model` must be divisible by num_heads \(3\), but is 32 instead\."):
        Transformer(SRC_VOCAB, TGT_VOCAB, 32, LAYERS, HEADS, D_FF, MAX_LEN)


def test_final_norms_come_with_pre_norm_unless_told_otherwise():
    def has_final_norms(**choice) -> set[bool]:
        model = Transformer(*SHAPE, options=BlockOptions(**choice))
        return {isinstance(side.final_norm, nn.LayerNorm) for side in (model.encoder, model.decoder)}

    assert has_final_norms(norm_order="post") == {False}
    assert has_final_norms(norm_order="pre") == {True}
    assert has_final_norms(norm_order="post", final_norm=True) == {True}
    assert has_final_norms(norm_order="pre", final_norm=False) == {False}


def test_the_projection_has_a_bias_unless_told_otherwise():
    assert Transformer(*SHAPE).final_layer.bias is not None
    assert Transformer(*SHAPE, options=BlockOptions(output_bias=False)).final_layer.bias is None


def test_is_built_from_a_config_as_from_arguments():
    config = ModelConfig(
        kind="encoder_decoder", src_vocab_size=SRC_VOCAB, vocab_size=TGT_VOCAB, d_model=D_MODEL, num_layers=LAYERS,
        num_heads=HEADS, d_ff=D_FF, max_seq_length=MAX_LEN,
    )  # fmt: skip
    torch.manual_seed(7)
    by_config = Transformer.from_config(config)
    torch.manual_seed(7)
    torch.testing.assert_close(by_config.state_dict(), Transformer(*SHAPE).state_dict())
    assert by_config.max_seq_length == MAX_LEN


@pytest.mark.parametrize("shared", [True, False])
def test_beams_may_share_a_sources_mask(pairs, shared):
    """`select` follows the rows of the source's mask, also where one mask serves all rows."""
    model = perturbed(Transformer(*SHAPE))
    src = pairs[0]
    mask = (src != 0)[:, None, None]
    if shared:
        src = src[:1].repeat(BATCH, 1)
        mask = mask[:1]
    rows = torch.tensor([1, 0, 1])
    steps = model.start(src, mask, 3)
    tokens = torch.ones(BATCH, dtype=torch.long)
    steps.step(tokens)
    steps.select(rows)
    logits = steps.step(tokens.new_full((3,), 5))
    tgt = torch.tensor([[1, 5]]).expand(3, -1)
    whole = model(
        src[rows], tgt, mask if shared else mask[rows], create_look_ahead_mask(2), mask if shared else mask[rows]
    )
    torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-5, rtol=0)


def test_refuses_to_be_of_no_layers():
    for build in (lambda: Transformer(11, 13, D_MODEL, 0, HEADS), lambda: Encoder(11, D_MODEL, 0, HEADS, D_FF, 17)):
        with pytest.raises(ValueError, match="`the number of layers` must be at least 1, but is 0 instead"):
            build()


def test_refuses_a_window():
    with pytest.raises(ValueError, match=r"`window` must be None where there is an encoder, but is 7 instead\."):
        Transformer(*SHAPE, options=BlockOptions(window=7))
