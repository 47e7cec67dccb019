"""The language model is transformers' Llama and GPT-2 under the right options, and refuses what it cannot do."""

import pytest
import torch
from torch import nn

from triglot.config import BlockOptions, ExpertOptions, ModelConfig
from triglot.layers.masks import create_document_mask
from triglot.models.decoder_only import DecoderLLM

VOCAB, D_MODEL, HEADS, KV_HEADS, LAYERS, D_FF, MAX_LEN = 23, 40, 4, 2, 3, 17, 53
BATCH, LENGTH = 5, 7
SHAPE = (VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN)
MODEL = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (BATCH, LENGTH))


def perturbed(model: nn.Module, scale: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_equals_llama_with_the_same_weights(ids, tied, num_kv_heads):
    transformers = pytest.importorskip("transformers")
    theirs = perturbed(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, num_key_value_heads=num_kv_heads, max_position_embeddings=MAX_LEN,
                rms_norm_eps=1e-6, tie_word_embeddings=tied, rope_theta=10_000.0,
            )
        )
    )  # fmt: skip
    options = BlockOptions(
        norm="rms", norm_order="pre", norm_eps=1e-6, positions="rotary", activation="swiglu", bias=False,
        num_kv_heads=num_kv_heads, tie_embeddings=tied, scale_embeddings=False,
    )  # fmt: skip
    ours = DecoderLLM(*SHAPE, options=options).eval()
    state = {
        "embedding.tokens.weight": theirs.model.embed_tokens.weight,
        "final_norm.weight": theirs.model.norm.weight,
        "lm_head.weight": theirs.lm_head.weight,
    }
    for number, layer in enumerate(theirs.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        state |= {
            f"layers.{number}.{name}.weight": weight
            for name, weight in {
                "self_attention.query": attention.q_proj.weight,
                "self_attention.key": attention.k_proj.weight,
                "self_attention.value": attention.v_proj.weight,
                "self_attention.output": attention.o_proj.weight,
                "around_self_attention.norm": layer.input_layernorm.weight,
                "around_feed_forward.norm": layer.post_attention_layernorm.weight,
                "feed_forward.inner": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                "feed_forward.outer": mlp.down_proj.weight,
            }.items()
        }
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **MODEL)
    shifted = ids.roll(-1, 1)
    shifted[:, -1] = -100
    torch.testing.assert_close(ours(ids, shifted).loss, theirs(ids, labels=ids).loss, **MODEL)
    padding = torch.ones_like(ids)
    padding[1, 4:] = 0
    real = padding.bool()
    expected = theirs(ids, attention_mask=padding).logits
    torch.testing.assert_close(ours(ids, mask=real).logits[real], expected[real], **MODEL)


def test_equals_gpt2_with_the_same_weights(ids):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=MAX_LEN, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_inner=D_FF,
        activation_function="gelu", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = perturbed(transformers.GPT2LMHeadModel(config))
    options = BlockOptions(
        norm_order="pre", positions="learned", activation="gelu", tie_embeddings=True, scale_embeddings=False
    )
    ours = DecoderLLM(*SHAPE, options=options).eval()
    state = {
        "embedding.tokens.weight": theirs.transformer.wte.weight,
        "embedding.added.embedding.weight": theirs.transformer.wpe.weight,
        "lm_head.weight": theirs.lm_head.weight,
        "final_norm.weight": theirs.transformer.ln_f.weight,
        "final_norm.bias": theirs.transformer.ln_f.bias,
    }
    for number, block in enumerate(theirs.transformer.h):
        three = ("query", "key", "value")
        parts = {
            "self_attention.output": (block.attn.c_proj.weight.T, block.attn.c_proj.bias),
            "around_self_attention.norm": (block.ln_1.weight, block.ln_1.bias),
            "around_feed_forward.norm": (block.ln_2.weight, block.ln_2.bias),
            "feed_forward.inner": (block.mlp.c_fc.weight.T, block.mlp.c_fc.bias),
            "feed_forward.outer": (block.mlp.c_proj.weight.T, block.mlp.c_proj.bias),
        }
        stacked = zip(three, block.attn.c_attn.weight.T.chunk(3), block.attn.c_attn.bias.chunk(3), strict=True)
        parts |= {f"self_attention.{name}": (weight, bias) for name, weight, bias in stacked}
        for name, (weight, bias) in parts.items():
            state |= {f"layers.{number}.{name}.weight": weight, f"layers.{number}.{name}.bias": bias}
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **MODEL)


def test_equals_torchs_encoder_layer_by_layer(ids):
    """Post-norm, as the document has it: nn.TransformerEncoderLayer under a look-ahead mask."""
    ours = perturbed(DecoderLLM(*SHAPE), 0.1)
    x = ours.embedding(ids).x
    look_ahead = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for layer in ours.layers:
        twin = nn.TransformerEncoderLayer(D_MODEL, HEADS, D_FF, 0.0, batch_first=True)
        attention = layer.self_attention
        with torch.no_grad():
            twin.self_attn.in_proj_weight.copy_(
                torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
            )
            twin.self_attn.in_proj_bias.copy_(
                torch.cat([attention.query.bias, attention.key.bias, attention.value.bias])
            )
        twin.self_attn.out_proj.load_state_dict(attention.output.state_dict())
        twin.linear1.load_state_dict(layer.feed_forward.inner.state_dict())
        twin.linear2.load_state_dict(layer.feed_forward.outer.state_dict())
        twin.norm1.load_state_dict(layer.around_self_attention.norm.state_dict())
        twin.norm2.load_state_dict(layer.around_feed_forward.norm.state_dict())
        x = twin(x, src_mask=look_ahead)
    expected = ours.lm_head(ours.final_norm(x))
    torch.testing.assert_close(ours(ids).logits, expected, **MODEL)


def test_the_loss_is_the_mean_over_targets_that_are_not_ignored(ids, check_fields):
    model = perturbed(DecoderLLM(*SHAPE))
    targets = torch.randint(VOCAB, (BATCH, LENGTH))
    targets[1, 3:], targets[4] = -100, -100
    out = model(ids, targets)
    check_fields(out)
    expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss, expected)
    assert model(ids).loss is None
    assert model(ids, torch.full_like(ids, -100)).loss == 0


def test_expert_losses_are_part_of_the_loss_in_training_only(ids):
    experts = ExpertOptions(num_experts=5, balance_weight=0.25, z_weight=0.125)
    model = DecoderLLM(*SHAPE, dropout=0.0, options=BlockOptions(experts=experts))
    evaluated = model.eval()(ids, ids).loss
    routing = model.run(ids).routing
    assert len(routing) == LAYERS
    balance, z = (sum(getattr(layer, name) for layer in routing) / LAYERS for name in ("balance", "z"))
    torch.testing.assert_close(model.train()(ids, ids).loss, evaluated + 0.25 * balance + 0.125 * z)


def test_run_tells_what_layers_know_only_when_asked(ids, check_fields):
    model = DecoderLLM(*SHAPE, options=BlockOptions(experts=ExpertOptions(num_experts=5, every=2))).eval()
    asked, not_asked = model.run(ids, need_weights=True), model.run(ids)
    check_fields(asked)
    assert [weights.shape for weights in asked.self_weights] == [(BATCH, HEADS, LENGTH, LENGTH)] * LAYERS
    assert all(not weights.triu(1).any() for weights in asked.self_weights)
    assert not_asked.self_weights is None
    assert len(asked.routing) == 1
    torch.testing.assert_close(asked.hidden, not_asked.hidden, **MODEL)
    torch.testing.assert_close(model.head(asked.hidden), model(ids).logits, **MODEL)


def test_documents_side_by_side_are_as_documents_alone_but_for_their_place(ids):
    model = perturbed(DecoderLLM(*SHAPE, options=BlockOptions(positions="rotary")))
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2]]).expand(BATCH, -1)
    packed = model.head(model.run(ids, segments=segments).hidden)
    torch.testing.assert_close(packed[:, :3], model(ids[:, :3]).logits, **MODEL)
    torch.testing.assert_close(packed[:, 3:], model(ids[:, 3:]).logits, **MODEL)
    weights = model.run(ids, segments=segments, need_weights=True).self_weights
    assert not any(layer[~create_document_mask(segments).expand_as(layer)].any() for layer in weights)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_token_sees_so_many_of_the_last_tokens_as_its_window_has(ids, need_weights):
    shape = VOCAB, D_MODEL, HEADS, 1, D_FF, MAX_LEN
    model = perturbed(DecoderLLM(*shape, options=BlockOptions(window=3)))
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 1) % VOCAB
    one, two = (model.run(tokens, need_weights=need_weights).hidden for tokens in (ids, other))
    assert (one - two).abs().amax((0, 2)).gt(1e-4).tolist() == [False, False, True, True, True, False, False]


def test_a_window_that_holds_the_whole_text_changes_no_bit(ids):
    plain, wide = (perturbed(DecoderLLM(*SHAPE, options=BlockOptions(window=window))) for window in (None, LENGTH))
    wide.load_state_dict(plain.state_dict())
    assert torch.equal(wide(ids).logits, plain(ids).logits)
    narrow = DecoderLLM(*SHAPE, options=BlockOptions(window=LENGTH - 1)).eval()
    narrow.load_state_dict(plain.state_dict())
    assert not torch.equal(narrow(ids).logits, plain(ids).logits)


def test_texts_are_read_in_a_window_padded_packed_and_step_by_step_as_each_is_alone(ids):
    model = perturbed(DecoderLLM(*SHAPE, options=BlockOptions(positions="rotary", window=3)))
    whole, lengths = model(ids).logits, torch.tensor([1, 2, 4, 5, 3])
    real = torch.arange(LENGTH) < torch.tensor([7, 2, 5, 4, 1])[:, None]
    torch.testing.assert_close(model(ids, mask=real).logits[real], whole[real], **MODEL)
    segments = torch.tensor([[1, 1, 2, 2, 2, 2, 2]]).expand(BATCH, -1)
    packed = model.head(model.run(ids, segments=segments).hidden)
    torch.testing.assert_close(packed[:, 2:], model(ids[:, 2:]).logits, **MODEL)
    rows = torch.arange(BATCH)
    logits, steps = model.start(ids[:, :5], lengths, 2)
    for step in range(2):
        torch.testing.assert_close(logits, whole[rows, lengths - 1 + step], **MODEL)
        logits = steps.step(ids[rows, lengths + step])


def test_the_causal_mask_is_true_below_the_diagonal():
    mask = DecoderLLM.create_causal_mask(LENGTH)
    assert mask.shape == (1, 1, LENGTH, LENGTH)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().equal(torch.ones(LENGTH, LENGTH, dtype=torch.int).tril())
    assert DecoderLLM.create_causal_mask(LENGTH, device="meta").device.type == "meta"


def test_all_weights_begin_with_the_documents_spread():
    model = DecoderLLM(101, 64, 4, 1, 97, MAX_LEN)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name


def test_dropout_is_in_the_documents_places_unless_told_otherwise():
    def rates(model: DecoderLLM) -> tuple[float, ...]:
        layer = model.layers[0]
        added = model.embedding.added
        embedding = added.dropout if hasattr(added, "dropout") else added
        return (
            embedding.p,
            layer.self_attention.dropout,
            layer.feed_forward.dropout.p,
            layer.around_feed_forward.dropout.p,
        )

    assert rates(DecoderLLM(*SHAPE)) == (0.0, 0.0, 0.1, 0.1)
    assert rates(DecoderLLM(*SHAPE, dropout=0.5)) == (0.0, 0.0, 0.5, 0.5)
    all_four = BlockOptions(embedding_dropout=0.2, attention_dropout=0.3, activation_dropout=0.4)
    assert rates(DecoderLLM(*SHAPE, dropout=0.5, options=all_four)) == (0.2, 0.3, 0.4, 0.5)


def test_a_final_norm_is_always_there_unless_told_otherwise():
    for order in ("pre", "post"):
        assert isinstance(DecoderLLM(*SHAPE, options=BlockOptions(norm_order=order)).final_norm, nn.LayerNorm)
    assert isinstance(DecoderLLM(*SHAPE, options=BlockOptions(final_norm=False)).final_norm, nn.Identity)
    assert isinstance(DecoderLLM(*SHAPE, options=BlockOptions(norm="rms")).final_norm, nn.RMSNorm)


def test_refuses_more_tokens_than_max_len():
    model = DecoderLLM(*SHAPE).eval()
    ids = torch.zeros(1, MAX_LEN + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`length` must be at most max_len \(53\), but is 54 instead\."):
        model(ids)
    model(ids[:, :MAX_LEN])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_refuses_a_mask_that_is_not_bool(ids, dtype, without_shape_checks):
    with pytest.raises(ValueError, match=r"`mask` must be bool, True = .*, but is torch\.\w+ instead\."):
        DecoderLLM(*SHAPE)(ids, mask=torch.ones(ids.shape, dtype=dtype))


def test_refuses_segments_beside_what_they_would_override(ids):
    with pytest.raises(ValueError, match="`mask, segments or cache` must be given alone"):
        DecoderLLM(*SHAPE).run(ids, segments=torch.ones_like(ids), mask=torch.ones_like(ids, dtype=torch.bool))


def test_refuses_to_generate_fewer_than_no_tokens_and_generates_none(ids):
    model = DecoderLLM(*SHAPE)
    with pytest.raises(ValueError, match=r"`max_new_tokens` must be at least 0, but is -1 instead\."):
        model.generate(ids, -1)
    assert torch.equal(model.generate(ids, 0), ids)


def test_refuses_lengths_that_no_prompt_has(ids):
    for lengths in ([0, 1, 2, 3, 4], [8, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"`lengths` must be between 1 and 7, but is \["):
            DecoderLLM(*SHAPE).generate(ids, 1, lengths=torch.tensor(lengths))


def test_is_built_from_a_config_as_from_arguments():
    config = ModelConfig(
        kind="decoder_only", vocab_size=VOCAB, d_model=D_MODEL, num_layers=LAYERS, num_heads=HEADS, d_ff=D_FF,
        max_seq_length=MAX_LEN,
    )  # fmt: skip
    torch.manual_seed(7)
    by_config = DecoderLLM.from_config(config)
    torch.manual_seed(7)
    torch.testing.assert_close(by_config.state_dict(), DecoderLLM(*SHAPE).state_dict())
    assert (by_config.vocab_size, by_config.d_model, by_config.max_len) == (VOCAB, D_MODEL, MAX_LEN)
