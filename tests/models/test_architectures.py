"""Under the right options the models are transformers' architectures, gradients included, step by step as well."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triglot.config import BlockOptions
from triglot.generation.prepared import Prepared
from triglot.generation.steps import Sentences, SentenceSteps, start_texts
from triglot.layers.activations import activate
from triglot.layers.masks import create_look_ahead_mask, create_masks
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.recipe import from_dict

transformers = pytest.importorskip("transformers")

VOCAB, D_MODEL, HEADS, KV_HEADS, LAYERS, D_FF, LONGEST, EXPERTS, EXPERT = 23, 40, 4, 2, 2, 17, 53, 5, 12
BATCH, LENGTH, PROMPT = 3, 31, 20
LLAMA = {
    "norm": "rms", "norm_order": "pre", "norm_eps": 1e-6, "positions": "rotary", "activation": "swiglu", "bias": False,
    "num_kv_heads": KV_HEADS, "scale_embeddings": False,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 13}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
DECODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 7}, {"window": 7}),
    "qwen2": ("Qwen2", {}, {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 6}, {"head_dim": 6, "qk_norm": "head"}),
    "llama-3": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_position": 13}},
    ),
    "qwen2-yarn": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0} | YARN},
        {
            "qkv_bias": True, "rope_theta": 500.0,
            "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position": 13},
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": EXPERTS, "intermediate_size": EXPERT},
        {"experts": {"num_experts": EXPERTS, "d_ff": EXPERT}},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 6, "num_experts": EXPERTS, "moe_intermediate_size": EXPERT, "num_experts_per_tok": 3,
         "norm_topk_prob": True},
        {"head_dim": 6, "qk_norm": "head", "experts": {"num_experts": EXPERTS, "d_ff": EXPERT, "top_k": 3}},
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": EXPERTS, "intermediate_size": EXPERT, "num_experts_per_tok": 2},
        {"qk_norm": "width", "experts": {"num_experts": EXPERTS, "d_ff": EXPERT, "renormalize": False}},
    ),
}  # fmt: skip
BART = {
    "embedding_norm": True, "positions": "learned", "activation": "gelu", "scale_embeddings": False,
    "tie_embeddings": True,
}  # fmt: skip
T5 = {
    "norm": "rms", "norm_order": "pre", "norm_eps": 1e-6, "positions": "relative", "relative_buckets": 8,
    "relative_distance": 11, "bias": False, "output_bias": False, "head_dim": 7, "scale_attention": False,
    "scale_embeddings": False, "tie_embeddings": True,
}  # fmt: skip
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bart": ({}, BART),
    "t5": ({"feed_forward_proj": "relu"}, T5 | {"scale_output": True}),
    "t5-v1.1": (
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, T5 | {"activation": "geglu_tanh"}
    ),
}  # fmt: skip


def perturbed(model: nn.Module, scale: float = 0.2) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if "relative" in name else scale) * torch.randn_like(parameter))
    return model.eval()


def parameters(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def llama_state(theirs: Any) -> dict[str, Tensor]:
    state = parameters("embedding.tokens", theirs.model.embed_tokens) | parameters("final_norm", theirs.model.norm)
    state |= parameters("lm_head", theirs.lm_head)
    for number, layer in enumerate(theirs.model.layers):
        attention, at = layer.self_attn, f"layers.{number}"
        state |= parameters(f"{at}.around_self_attention.norm", layer.input_layernorm)
        state |= parameters(f"{at}.around_feed_forward.norm", layer.post_attention_layernorm)
        for ours, name in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            state |= parameters(f"{at}.self_attention.{ours}", getattr(attention, f"{name}_proj"))
        if hasattr(attention, "q_norm"):
            state |= parameters(f"{at}.self_attention.query_norm", attention.q_norm)
            state |= parameters(f"{at}.self_attention.key_norm", attention.k_norm)
        if hasattr(layer.mlp, "experts"):
            state[f"{at}.feed_forward.router.weight"] = layer.mlp.gate.weight
            state[f"{at}.feed_forward.inner"] = layer.mlp.experts.gate_up_proj
            state[f"{at}.feed_forward.outer"] = layer.mlp.experts.down_proj
        else:
            gate_and_up = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
            state[f"{at}.feed_forward.inner.weight"] = torch.cat(gate_and_up)
            state |= parameters(f"{at}.feed_forward.outer", layer.mlp.down_proj)
    return state


def bart_state(theirs: Any) -> dict[str, Tensor]:
    state = parameters("final_layer", theirs.lm_head) | {"final_layer.bias": theirs.final_logits_bias[0]}
    for side in ("encoder", "decoder"):
        stack = getattr(theirs.model, side)
        state |= parameters(f"{side}.embedding.tokens", theirs.model.shared)
        state |= parameters(f"{side}.embedding.norm", stack.layernorm_embedding)
        state[f"{side}.embedding.added.embedding.weight"] = stack.embed_positions.weight[2:]
        for number, layer in enumerate(stack.layers):
            at = f"{side}.layers.{number}"
            state |= parameters(f"{at}.around_feed_forward.norm", layer.final_layer_norm)
            state |= parameters(f"{at}.feed_forward.inner", layer.fc1) | parameters(
                f"{at}.feed_forward.outer", layer.fc2
            )
            for ours, name in {"self": "self_attn", "cross": "encoder_attn"}.items():
                if (attention := getattr(layer, name, None)) is not None:
                    state |= parameters(f"{at}.around_{ours}_attention.norm", getattr(layer, f"{name}_layer_norm"))
                    for part, letter in {"query": "q", "key": "k", "value": "v", "output": "out"}.items():
                        state |= parameters(f"{at}.{ours}_attention.{part}", getattr(attention, f"{letter}_proj"))
    return state


def t5_state(theirs: Any) -> dict[str, Tensor]:
    state = parameters("final_layer", theirs.lm_head)
    for side in ("encoder", "decoder"):
        stack = getattr(theirs, side)
        state |= parameters(f"{side}.embedding.tokens", theirs.shared)
        state |= parameters(f"{side}.final_norm", stack.final_layer_norm)
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        state |= parameters(f"{side}.relative.table", table)
        for number, block in enumerate(stack.block):
            at, (*attentions, feed) = f"{side}.layers.{number}", block.layer
            state |= parameters(f"{at}.around_feed_forward.norm", feed.layer_norm)
            dense = feed.DenseReluDense
            inner = [dense.wi.weight] if hasattr(dense, "wi") else [dense.wi_0.weight, dense.wi_1.weight]
            state[f"{at}.feed_forward.inner.weight"] = torch.cat(inner)
            state |= parameters(f"{at}.feed_forward.outer", dense.wo)
            for ours, layer in zip(("self", "cross"), attentions, strict=False):
                attention = layer.SelfAttention if ours == "self" else layer.EncDecAttention
                state |= parameters(f"{at}.around_{ours}_attention.norm", layer.layer_norm)
                for part in ("query", "key", "value", "output"):
                    state |= parameters(f"{at}.{ours}_attention.{part}", getattr(attention, part[0]))
    return state


def make_decoder(name: str) -> tuple[Any, DecoderLLM]:
    """Their model and ours, of the same weights."""
    kind, theirs_values, values = DECODERS[name]
    shape = {
        "vocab_size": VOCAB, "hidden_size": D_MODEL, "intermediate_size": D_FF, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": LONGEST,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape | theirs_values)
    theirs = perturbed(getattr(transformers, f"{kind}ForCausalLM")(config))
    options = from_dict(BlockOptions, LLAMA | values)
    ours = DecoderLLM(VOCAB, D_MODEL, HEADS, LAYERS, D_FF, LONGEST, options=options).eval()
    ours.load_state_dict(llama_state(theirs))
    return theirs, ours


def make_pair(name: str) -> tuple[Any, Transformer]:
    theirs_values, values = PAIRS[name]
    if name == "bart":
        sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (
            ("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", D_FF))}  # fmt: skip
        config = transformers.BartConfig(
            vocab_size=VOCAB, d_model=D_MODEL, max_position_embeddings=LONGEST, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, forced_eos_token_id=None, **sizes,
        )  # fmt: skip
        theirs = perturbed(transformers.BartForConditionalGeneration(config))
        theirs.final_logits_bias.normal_()
    else:
        config = transformers.T5Config(
            vocab_size=VOCAB, d_model=D_MODEL, d_kv=7, d_ff=D_FF, num_layers=LAYERS, num_heads=HEADS,
            relative_attention_num_buckets=8, relative_attention_max_distance=11, **theirs_values,
        )  # fmt: skip
        theirs = perturbed(transformers.T5ForConditionalGeneration(config), 0.1)  # nothing is scaled down there:
        theirs.shared.weight.data.mul_(0.2)  # larger scores and logits would leave gradients few digits
    options = from_dict(BlockOptions, values)
    ours = Transformer(VOCAB, VOCAB, D_MODEL, LAYERS, HEADS, D_FF, LONGEST, options=options).eval()
    state = bart_state(theirs) if name == "bart" else t5_state(theirs)
    ours.load_state_dict(state)
    return theirs, ours


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """As close as fp32 brings numbers of this size."""
    torch.testing.assert_close(found, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=0)


def assert_gradients_close(theirs: nn.Module, ours: nn.Module, state: Callable[[Any], dict[str, Tensor]]) -> None:
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    expected = state(theirs)
    for name, parameter in ours.named_parameters():
        if name != "final_layer.bias":  # which BART does not learn
            assert_close(parameter.grad, expected[name].data)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_computes_what_transformers_does(name, ids):
    theirs, ours = make_decoder(name)
    expected = theirs(ids).logits
    out = ours.run(ids)
    assert_close(ours.head(out.hidden), expected)
    assert_close(ours.run(ids, need_weights=True).hidden, out.hidden)
    with torch.no_grad():
        logits, steps = ours.start(ids[:, :PROMPT], torch.full((BATCH,), PROMPT), LENGTH - PROMPT)
        found, fast = start_texts(Prepared(ours), ids[:, :PROMPT].tolist(), LENGTH)
        for place in range(PROMPT, LENGTH):
            assert_close(logits, expected[:, place - 1])
            assert_close(found[:, :VOCAB], expected[:, place - 1])
            logits, found = steps.step(ids[:, place]), fast.step(ids[:, place])


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_gradients_are_those_of_transformers(name, ids):
    theirs, ours = make_decoder(name)
    for model in (theirs, ours):
        nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_gradients_close(theirs, ours, llama_state)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("fused", [True, False])
def test_an_encoder_decoder_computes_what_transformers_does(name, fused, ids, request):
    if fused:
        request.getfixturevalue("fused_kernel")
    theirs, ours = make_pair(name)
    src, tgt = ids, torch.randint(3, VOCAB, (BATCH, LENGTH))
    src[0, 25:], src[2, 4:] = 0, 0
    masks = create_masks(src, tgt)
    expected = theirs(input_ids=src, attention_mask=(src != 0).long(), decoder_input_ids=tgt).logits
    for need_weights in (True, False):
        assert_close(ours(src, tgt, *masks, need_weights=need_weights).logits, expected)
    with torch.no_grad():
        steps = ours.start(src, masks.src_mask, LENGTH)
        prepared, sources = Prepared(ours), [row[row != 0].tolist() for row in src]
        fast = SentenceSteps(prepared, [Sentences(prepared, sources, 1, LENGTH)])
        for place, tokens in enumerate(tgt.T):
            assert_close(steps.step(tokens), expected[:, place])
            assert_close(torch.cat(list(fast.step(tokens)))[:, :VOCAB], expected[:, place])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("fused", [True, False])
def test_an_encoder_decoders_gradients_are_those_of_transformers(name, fused, ids, request):
    if fused:
        request.getfixturevalue("fused_kernel")
    theirs, ours = make_pair(name)
    expected = theirs(input_ids=ids, decoder_input_ids=ids).logits
    found = ours(ids, ids, None, create_look_ahead_mask(LENGTH), need_weights=False).logits
    for logits in (expected, found):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_gradients_close(theirs, ours, bart_state if name == "bart" else t5_state)


@pytest.mark.parametrize(("ours", "theirs"), [("gelu_tanh", "gelu_new"), ("silu", "swish")])
def test_activations_are_those_of_gpt2_and_marian(ours, theirs):
    x = torch.randn(BATCH, LENGTH, D_FF)
    torch.testing.assert_close(activate(x, ours), transformers.activations.ACT2FN[theirs](x))
