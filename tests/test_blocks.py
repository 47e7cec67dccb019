"""Blocks are torch.nn's blocks when they have the same weights, in every norm order, under every mask."""

import pytest
import torch
from torch import nn

from triglot.blocks import Block, DecoderBlock, DecoderLayer, EncoderLayer, make_feed_forward, options_of_layer
from triglot.config import BlockOptions, ExpertOptions
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.masks import create_look_ahead_mask, create_masks
from triglot.layers.moe import MixtureOfExperts
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer

BATCH, SOURCE, TARGET, HEADS, D_MODEL, D_FF = 2, 7, 5, 3, 33, 17
BLOCK = {"atol": 2e-6, "rtol": 0}

pytestmark = pytest.mark.usefixtures("fused_kernel")  # where weights are not needed


@pytest.fixture
def masks():
    src, tgt = torch.ones(BATCH, SOURCE, dtype=torch.long), torch.ones(BATCH, TARGET, dtype=torch.long)
    src[0, 4:], tgt[1, 3:] = 0, 0
    return create_masks(src, tgt)


def perturbed(module: nn.Module) -> nn.Module:
    """Evaluation mode, and norms and biases that are not all ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    if ours.query.bias is not None:
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def as_torch(ours: Block, order: str, activation: str, bias: bool) -> nn.Module:
    """Torch's layer with the weights of ours."""
    reads_memory = isinstance(ours, DecoderLayer)
    kind = nn.TransformerDecoderLayer if reads_memory else nn.TransformerEncoderLayer
    shape = {"batch_first": True, "norm_first": order == "pre", "activation": activation, "bias": bias}
    theirs = kind(D_MODEL, HEADS, D_FF, dropout=0.0, **shape)
    copy_attention(ours.self_attention, theirs.self_attn)
    theirs.linear1.load_state_dict(ours.feed_forward.inner.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.outer.state_dict())
    norms = [ours.around_self_attention.norm, ours.around_feed_forward.norm]
    if reads_memory:
        copy_attention(ours.cross_attention, theirs.multihead_attn)
        norms.insert(1, ours.around_cross_attention.norm)
    for number, norm in enumerate(norms, 1):
        weights = norm.state_dict() if bias else {"weight": norm.weight}  # without biases torch's norms have none
        getattr(theirs, f"norm{number}").load_state_dict(weights)
    return theirs.train()  # with dropout 0; evaluation mode would take torch's fast path, which drops padding rows


orders = pytest.mark.parametrize("order", ["pre", "post"])
activations = pytest.mark.parametrize("activation", ["relu", "gelu"])
biases = pytest.mark.parametrize("bias", [True, False])


def options_for(order: str, activation: str, bias: bool) -> BlockOptions:
    return BlockOptions(norm_order=order, activation=activation, bias=bias)


def without_norm_biases(block: Block, bias: bool) -> Block:
    if not bias:
        for module in block.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
    return block


@biases
@activations
@orders
def test_encoder_layer_equals_torch(order, activation, bias, masks, check_fields):
    options = options_for(order, activation, bias)
    ours = without_norm_biases(perturbed(EncoderLayer(D_MODEL, HEADS, D_FF, options=options)), bias)
    theirs = as_torch(ours, order, activation, bias)
    x = torch.randn(BATCH, SOURCE, D_MODEL)
    expected = theirs(x, src_key_padding_mask=~masks.src_mask[:, 0, 0])
    result = ours(x, masks.src_mask)
    check_fields(result)
    torch.testing.assert_close(result.x, expected, **BLOCK)
    torch.testing.assert_close(ours(x, masks.src_mask, need_weights=False).x, expected, **BLOCK)


@biases
@activations
@orders
def test_decoder_layer_equals_torch(order, activation, bias, masks, check_fields):
    options = options_for(order, activation, bias)
    ours = without_norm_biases(perturbed(DecoderLayer(D_MODEL, HEADS, D_FF, options=options)), bias)
    theirs = as_torch(ours, order, activation, bias)
    x, memory = torch.randn(BATCH, TARGET, D_MODEL), torch.randn(BATCH, SOURCE, D_MODEL)
    expected = theirs(
        x, memory, tgt_mask=~create_look_ahead_mask(TARGET), memory_key_padding_mask=~masks.cross_mask[:, 0, 0],
        tgt_key_padding_mask=~masks.tgt_mask[:, 0, -1],
    )  # fmt: skip
    result = ours(x, memory, masks.tgt_mask, masks.cross_mask)
    check_fields(result)
    torch.testing.assert_close(result.x, expected, **BLOCK)
    fused = ours(x, memory, masks.tgt_mask, masks.cross_mask, need_weights=False)
    assert fused.self_weights is None
    assert fused.cross_weights is None
    torch.testing.assert_close(fused.x, expected, **BLOCK)


@orders
def test_decoder_block_equals_torchs_encoder_layer_under_a_look_ahead_mask(order):
    ours = perturbed(DecoderBlock(D_MODEL, HEADS, D_FF, options=options_for(order, "relu", True)))
    look_ahead = create_look_ahead_mask(TARGET)
    x = torch.randn(BATCH, TARGET, D_MODEL)
    expected = as_torch(ours, order, "relu", True)(x, src_mask=~look_ahead)
    torch.testing.assert_close(ours(x, look_ahead), expected, **BLOCK)
    torch.testing.assert_close(ours(x, look_ahead[None, None]), expected, **BLOCK)


@orders
def test_gradients_equal_torchs(order, masks):
    ours = perturbed(DecoderLayer(D_MODEL, HEADS, D_FF, options=options_for(order, "relu", True)))
    theirs = as_torch(ours, order, "relu", True)
    x, memory = torch.randn(BATCH, TARGET, D_MODEL), torch.randn(BATCH, SOURCE, D_MODEL)
    gradients = []
    for run in (
        lambda x, memory: theirs(x, memory, memory_key_padding_mask=~masks.cross_mask[:, 0, 0]),
        lambda x, memory: ours(x, memory, None, masks.cross_mask, need_weights=False).x,
    ):
        leaves = x.clone().requires_grad_(), memory.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_dropout_on_residuals_acts_in_training_only():
    options = BlockOptions(attention_dropout=0.0, activation_dropout=0.0)
    block = EncoderLayer(D_MODEL, HEADS, D_FF, 0.5, options=options)
    x = torch.randn(BATCH, TARGET, D_MODEL)
    assert not torch.equal(block(x).x, block(x).x)
    block.eval()
    assert torch.equal(block(x).x, block(x).x)


@pytest.mark.parametrize("place", ["attention_dropout", "activation_dropout"])
def test_dropout_inside_sublayers_has_a_rate_of_its_own(place):
    rates = {"attention_dropout": 0.0, "activation_dropout": 0.0}
    x = torch.randn(BATCH, TARGET, D_MODEL)
    silent = EncoderLayer(D_MODEL, HEADS, D_FF, 0.0, options=BlockOptions(**rates))
    assert torch.equal(silent(x).x, silent(x).x)
    noisy = EncoderLayer(D_MODEL, HEADS, D_FF, 0.0, options=BlockOptions(**rates | {place: 0.5}))
    assert not torch.equal(noisy(x).x, noisy(x).x)


def test_a_rate_left_out_is_the_blocks_own():
    block = EncoderLayer(D_MODEL, HEADS, D_FF, 0.25)
    assert block.self_attention.dropout == block.feed_forward.dropout.p == block.around_feed_forward.dropout.p == 0.25
    assert DecoderBlock(D_MODEL, HEADS, D_FF, dropout=0.25).self_attention.dropout == 0.0  # as in the document


def test_experts_stand_in_every_nth_block():
    options = BlockOptions(activation="gelu", experts=ExpertOptions(num_experts=3, every=2, d_ff=7))
    kinds = [make_feed_forward(D_MODEL, D_FF, 0.0, options_of_layer(options, layer, "decoder")) for layer in range(5)]
    assert [type(kind) for kind in kinds] == [
        PointwiseFeedForward, MixtureOfExperts, PointwiseFeedForward, MixtureOfExperts, PointwiseFeedForward
    ]  # fmt: skip
    assert kinds[1].inner.shape == (3, 7, D_MODEL)
    assert kinds[0].inner.out_features == D_FF


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_experts_stand_on_the_side_they_are_asked_for(side):
    model = Transformer(11, 13, 8, 2, 2, 5, 17, options=BlockOptions(experts=ExpertOptions(num_experts=3, side=side)))
    kinds = {
        name: {type(layer.feed_forward) for layer in stack.layers}
        for name, stack in (("encoder", model.encoder), ("decoder", model.decoder))
    }
    assert kinds.pop(side) == {MixtureOfExperts}
    assert list(kinds.values()) == [{PointwiseFeedForward}]


def test_expert_choice_is_refused_in_a_decoder_with_the_reason():
    options = BlockOptions(experts=ExpertOptions(num_experts=3, router="expert_choice"))
    of_encoders = BlockOptions(experts=ExpertOptions(num_experts=3, router="expert_choice", side="encoder"))
    message = (
        r'`router` must be another, or side "encoder", where there is a decoder: whom experts choose there depends'
    )
    makers = {
        DecoderLLM: (11, 8, 2, 1, 5, 17),
        Transformer: (11, 13, 8, 1, 2, 5, 17),
        DecoderLayer: (8, 2, 5),
        DecoderBlock: (8, 2, 5),
    }
    for make, shape in makers.items():
        with pytest.raises(ValueError, match=message):
            make(*shape, options=options)
    for make in (DecoderLayer, DecoderBlock):  # a layer by itself is a decoder's whatever side its options are for
        with pytest.raises(ValueError, match=message):
            make(*makers[make], options=of_encoders)


def test_expert_choice_in_an_encoder_sees_neither_batch_mates_nor_padding():
    experts = ExpertOptions(num_experts=3, router="expert_choice", side="encoder")
    model = Transformer(23, 29, 16, 2, 2, 11, 17, options=BlockOptions(norm_order="pre", experts=experts)).eval()
    src, tgt = torch.randint(3, 23, (3, 7)), torch.randint(3, 29, (3, 5))
    src[0, 4:], src[2, 6:] = 0, 0
    together = model(src, tgt, *create_masks(src, tgt)).logits
    for row in range(3):
        alone, own = src[row : row + 1, src[row] != 0], tgt[row : row + 1]
        torch.testing.assert_close(model(alone, own, *create_masks(alone, own)).logits[0], together[row])


def test_one_expert_is_the_dense_block():
    dense = perturbed(EncoderLayer(D_MODEL, HEADS, D_FF, options=BlockOptions(activation="gelu")))
    single = BlockOptions(activation="gelu", experts=ExpertOptions(num_experts=1, top_k=1))
    sparse = EncoderLayer(D_MODEL, HEADS, D_FF, options=single).eval()
    state = dense.state_dict() | {"feed_forward.router.weight": torch.randn(1, D_MODEL)}
    for part in ("inner", "outer"):
        state[f"feed_forward.{part}"] = state.pop(f"feed_forward.{part}.weight")[None]
        state[f"feed_forward.{part}_bias"] = state.pop(f"feed_forward.{part}.bias")[None]
    sparse.load_state_dict(state)
    x = torch.randn(BATCH, TARGET, D_MODEL)
    torch.testing.assert_close(sparse(x).x, dense(x).x, **BLOCK)


@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer, DecoderBlock])
def test_padding_is_routed_to_no_expert(kind, masks):
    options = BlockOptions(experts=ExpertOptions(num_experts=3))
    block = kind(D_MODEL, HEADS, D_FF, options=options).eval()
    seen = []
    block.feed_forward.run = lambda h, real: (seen.append(real), MixtureOfExperts.run(block.feed_forward, h, real))[1]
    x, memory = torch.randn(BATCH, TARGET, D_MODEL), torch.randn(BATCH, SOURCE, D_MODEL)
    if kind is DecoderLayer:
        block(x, memory, masks.tgt_mask, masks.cross_mask)
    else:
        block(x, masks.tgt_mask)
    assert seen[0].equal(masks.tgt_mask[:, 0, -1])
