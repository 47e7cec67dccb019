"""The same weights for peers: our models as CTranslate2, transformers and GGUF's readers hold them.

Token ids stay what they are: a vocabulary is the numbers themselves, written out.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triglot.blocks import Block
from triglot.config import ModelConfig
from triglot.interop import gguf
from triglot.layers.attention import MultiHeadAttention
from triglot.layers.embedding import Embedding
from triglot.layers.feed_forward import PointwiseFeedForward
from triglot.layers.norm import Residual
from triglot.layers.positions import LearnedPositions, PositionalEncoding
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.stack import Stack

PAD, BOS, EOS = 0, 1, 2


# CTranslate2


def to_ctranslate2(model: Transformer | DecoderLLM, folder: Path) -> None:
    """Write a model in CTranslate2's format, in fp32; it is quantised when it is loaded."""
    from ctranslate2.specs import transformer_spec

    if isinstance(model, Transformer):
        encoder = transformer_spec.TransformerEncoderSpec(*_sizes(model.encoder), **_shape(model.encoder))
        decoder = transformer_spec.TransformerDecoderSpec(*_sizes(model.decoder), **_shape(model.decoder))
        spec: Any = transformer_spec.TransformerSpec(encoder, decoder)
        _fill_stack(encoder, model.encoder)
        _fill_stack(decoder, model.decoder)
        words = _words(model.encoder)
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.config.decoder_start_token, spec.config.add_source_eos = str(BOS), False
    else:
        shape = {**_shape(model), "with_encoder_attention": False}
        decoder = transformer_spec.TransformerDecoderSpec(*_sizes(model), **shape)
        spec = transformer_spec.TransformerDecoderModelSpec(decoder)
        _fill_stack(decoder, model)
        spec.register_vocabulary(_words(model))
    _fill_linear(decoder.projection, [model.projection])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = str(BOS), str(EOS), str(PAD)
    spec.config.layer_norm_epsilon = model.options.norm_eps
    spec.validate()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def _words(stack: Stack) -> list[str]:
    return [str(token) for token in range(stack.embedding.tokens.num_embeddings)]


def _sizes(stack: Stack) -> tuple[int, int]:
    return len(stack.layers), stack.d_model // stack.head_dim


def _shape(stack: Stack) -> dict[str, Any]:
    from ctranslate2.specs.common_spec import Activation

    options = stack.options
    activations = {"relu": Activation.RELU, "gelu": Activation.GELU, "swiglu": Activation.SWISH}
    shape = {
        "pre_norm": options.norm_order == "pre",
        "no_final_norm": isinstance(stack.final_norm, nn.Identity),
        "activation": activations[options.activation],
        "ffn_glu": options.activation == "swiglu",
        "rms_norm": options.norm == "rms",
        "num_heads_kv": options.num_kv_heads,
    }
    if options.positions == "rotary":
        shape |= {"rotary_dim": 0, "rotary_interleave": False, "rotary_base": options.rope_theta}
    return shape


def _fill_stack(spec: Any, stack: Stack) -> None:
    embedding = stack.embedding
    embeddings = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    embeddings.weight = embedding.tokens.weight.detach()
    spec.scale_embeddings = embedding.scale != 1.0
    if (table := position_table(embedding)) is not None:
        spec.position_encodings.encodings = table
    if not isinstance(stack.final_norm, nn.Identity):
        _fill_norm(spec.layer_norm, stack.final_norm)
    for into, block in zip(spec.layer, stack.layers, strict=True):
        _fill_block(into, block)


def _fill_block(spec: Any, block: Any) -> None:
    own: MultiHeadAttention = block.self_attention
    _fill_attention(spec.self_attention, [[own.query, own.key, own.value], [own.output]], block.around_self_attention)
    if hasattr(block, "cross_attention"):
        cross: MultiHeadAttention = block.cross_attention
        parts = [[cross.query], [cross.key, cross.value], [cross.output]]
        _fill_attention(spec.attention, parts, block.around_cross_attention)
    feed: PointwiseFeedForward = block.feed_forward
    if feed.activation == "swiglu":
        gate, up = feed.inner.weight.detach().chunk(2)
        spec.ffn.linear_0.weight, spec.ffn.linear_0_noact.weight = gate.contiguous(), up.contiguous()
    else:
        _fill_linear(spec.ffn.linear_0, [feed.inner])
    _fill_linear(spec.ffn.linear_1, [feed.outer])
    _fill_norm(spec.ffn.layer_norm, block.around_feed_forward.norm)


def _fill_attention(spec: Any, parts: list[list[nn.Linear]], around: Residual) -> None:
    for into, linears in zip(spec.linear, parts, strict=True):
        _fill_linear(into, linears)
    _fill_norm(spec.layer_norm, around.norm)


def _fill_linear(spec: Any, linears: list[nn.Linear]) -> None:
    spec.weight = torch.cat([linear.weight.detach() for linear in linears])
    if linears[0].bias is not None:
        spec.bias = torch.cat([linear.bias.detach() for linear in linears])


def _fill_norm(spec: Any, norm: Any) -> None:
    spec.gamma = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        spec.beta = norm.bias.detach()


def position_table(embedding: Embedding) -> Tensor | None:
    """What is added to the embedding at each position."""
    match embedding.added:
        case PositionalEncoding() as added:
            return added.table.clone()
        case LearnedPositions() as added:
            return added.embedding.weight.detach()
        case _:
            return None


# transformers


def to_marian(model: Transformer) -> Any:
    """transformers' MarianMTModel: post-norm, sinusoids, biases, one matrix for embeddings and projection.

    Marian's sinusoids have all sines before all cosines: the columns of d_model change places, everywhere.
    """
    import transformers

    encoder, decoder = model.encoder, model.decoder
    block: Any = encoder.layers[0]
    config = transformers.MarianConfig(
        vocab_size=encoder.embedding.tokens.num_embeddings,
        d_model=encoder.d_model,
        encoder_layers=len(encoder.layers),
        decoder_layers=len(decoder.layers),
        encoder_attention_heads=block.self_attention.num_heads,
        decoder_attention_heads=block.self_attention.num_heads,
        encoder_ffn_dim=block.feed_forward.inner.out_features,
        decoder_ffn_dim=block.feed_forward.inner.out_features,
        max_position_embeddings=encoder.max_seq_length,
        activation_function=model.options.activation,
        scale_embedding=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
    )
    state = {"final_logits_bias": torch.zeros(1, config.vocab_size)}
    state["model.shared.weight"] = encoder.embedding.tokens.weight
    for side, stack in {"encoder": encoder, "decoder": decoder}.items():
        for number, layer in enumerate(stack.layers):
            assert isinstance(layer, Block)
            state |= {f"model.{side}.layers.{number}.{name}": value for name, value in _marian_block(layer)}
    order = torch.cat([torch.arange(0, encoder.d_model, 2), torch.arange(1, encoder.d_model, 2)])
    state = {name: _reordered(name, value.detach(), order) for name, value in state.items()}
    marian = transformers.MarianMTModel(config)
    missing, unexpected = marian.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("embed_" in name or name == "lm_head.weight" for name in missing), missing
    marian.tie_weights()
    return marian.eval()


def _marian_block(block: Any) -> list[tuple[str, Tensor]]:
    modules = {"self_attn_layer_norm": block.around_self_attention.norm}
    attentions = {"self_attn": block.self_attention}
    if hasattr(block, "cross_attention"):
        attentions["encoder_attn"] = block.cross_attention
        modules["encoder_attn_layer_norm"] = block.around_cross_attention.norm
    for name, attention in attentions.items():
        parts = {"q_proj": attention.query, "k_proj": attention.key, "v_proj": attention.value}
        modules |= {f"{name}.{part}": linear for part, linear in {**parts, "out_proj": attention.output}.items()}
    modules |= {"fc1": block.feed_forward.inner, "fc2": block.feed_forward.outer}
    modules["final_layer_norm"] = block.around_feed_forward.norm
    return [(f"{name}.{part}", value) for name, one in modules.items() for part, value in one.named_parameters()]


def _reordered(name: str, value: Tensor, order: Tensor) -> Tensor:
    """A weight whose rows, columns or both are columns of the residual stream."""
    if name == "final_logits_bias":
        return value
    inner = any(part in name for part in ("q_proj", "k_proj", "v_proj", "fc1"))
    if value.dim() == 2 and (inner or name == "model.shared.weight"):
        return value[:, order]
    return value if inner else value[order]


def to_gpt2(model: DecoderLLM) -> Any:
    """transformers' GPT-2: pre-norm LayerNorm, learned positions, GELU, biases, tied embeddings."""
    import transformers

    table = position_table(model.embedding)
    block: Any = model.layers[0]
    assert table is not None
    config = transformers.GPT2Config(
        vocab_size=model.embedding.tokens.num_embeddings,
        n_positions=len(table),
        n_embd=model.d_model,
        n_layer=len(model.layers),
        n_head=block.self_attention.num_heads,
        n_inner=block.feed_forward.inner.out_features,
        activation_function=model.options.activation,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    state = {"transformer.wte.weight": model.embedding.tokens.weight, "transformer.wpe.weight": table}
    for number, one in enumerate(model.layers):
        for name, parts in _gpt2_block(one).items():
            transposed = "ln_" not in name
            for kind in ("weight", "bias"):
                joined = torch.cat([getattr(part, kind) for part in parts])
                state[f"transformer.h.{number}.{name}.{kind}"] = joined.T if transposed and kind == "weight" else joined
    state |= {f"transformer.ln_f.{name}": value for name, value in model.final_norm.named_parameters()}
    gpt2 = transformers.GPT2LMHeadModel(config)
    missing, unexpected = gpt2.load_state_dict({key: one.detach() for key, one in state.items()}, strict=False)
    assert not unexpected, unexpected
    assert missing in ([], ["lm_head.weight"]), missing
    gpt2.tie_weights()
    return gpt2.eval()


def _gpt2_block(block: Any) -> dict[str, list[nn.Module]]:
    attention, feed = block.self_attention, block.feed_forward
    return {
        "ln_1": [block.around_self_attention.norm],
        "attn.c_attn": [attention.query, attention.key, attention.value],
        "attn.c_proj": [attention.output],
        "ln_2": [block.around_feed_forward.norm],
        "mlp.c_fc": [feed.inner],
        "mlp.c_proj": [feed.outer],
    }


def to_llama(model: DecoderLLM) -> Any:
    """transformers' Llama: pre-norm RMSNorm, rotary, SwiGLU, grouped queries, no biases, tied embeddings."""
    import transformers

    block: Any = model.layers[0]
    config = transformers.LlamaConfig(
        vocab_size=model.embedding.tokens.num_embeddings,
        hidden_size=model.d_model,
        intermediate_size=block.feed_forward.outer.in_features,
        num_hidden_layers=len(model.layers),
        num_attention_heads=block.self_attention.num_heads,
        num_key_value_heads=block.self_attention.num_kv_heads,
        max_position_embeddings=model.max_seq_length,
        rms_norm_eps=model.options.norm_eps,
        rope_theta=model.options.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    state = {"model.embed_tokens.weight": model.embedding.tokens.weight}
    for number, one in enumerate(model.layers):
        state |= {f"model.layers.{number}.{name}": value for name, value in _llama_block(one).items()}
    state |= {f"model.norm.{name}": value for name, value in model.final_norm.named_parameters()}
    llama = transformers.LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict({key: one.detach() for key, one in state.items()}, strict=False)
    assert not unexpected, unexpected
    assert missing in ([], ["lm_head.weight"]), missing
    llama.tie_weights()
    return llama.eval()


def _llama_block(block: Any) -> dict[str, Tensor]:
    attention, feed = block.self_attention, block.feed_forward
    gate, up = feed.inner.weight.chunk(2)
    return {
        "self_attn.q_proj.weight": attention.query.weight,
        "self_attn.k_proj.weight": attention.key.weight,
        "self_attn.v_proj.weight": attention.value.weight,
        "self_attn.o_proj.weight": attention.output.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": feed.outer.weight,
        "input_layernorm.weight": block.around_self_attention.norm.weight,
        "post_attention_layernorm.weight": block.around_feed_forward.norm.weight,
    }


# GGUF

GPT2_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def to_gguf(model: DecoderLLM, path: Path, bits: str = "F32") -> None:
    """Write a model of Llama's kind, or in fp32 one of GPT-2's, for llama.cpp and OpenVINO GenAI.

    llama.cpp's GELU is the one with tanh, looked up in a table of 16 bits.
    """
    words = [str(token) for token in range(model.embedding.tokens.num_embeddings)]
    about: dict[str, Any] = {
        "general.file_type": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * (EOS + 1) + [1] * (len(words) - EOS - 1),
        "tokenizer.ggml.merges": ["1 0"],  # a reader wants some
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
    }
    block: Any = model.layers[0]
    config = ModelConfig(
        kind="decoder_only",
        d_model=model.d_model,
        num_heads=block.self_attention.num_heads,
        num_layers=len(model.layers),
        d_ff=block.feed_forward.outer.in_features,
        max_seq_length=model.max_seq_length,
        vocab_size=len(words),
        options=model.options,
    )
    if model.options.norm == "rms":
        gguf.write(path, model, config, bits, about)
    else:
        _gpt2_gguf(model, path, config, about)


def _gpt2_gguf(model: DecoderLLM, path: Path, config: ModelConfig, about: dict[str, Any]) -> None:
    from gguf import GGUFValueType, GGUFWriter

    table = position_table(model.embedding)
    assert table is not None
    about |= {
        "gpt2.context_length": len(table),
        "gpt2.embedding_length": config.d_model,
        "gpt2.feed_forward_length": config.d_ff,
        "gpt2.block_count": config.num_layers,
        "gpt2.attention.head_count": config.num_heads,
        "gpt2.attention.layer_norm_epsilon": config.options.norm_eps,
    }
    state = {"token_embd.weight": model.embedding.tokens.weight, "position_embd.weight": table}
    for number, block in enumerate(model.layers):
        for name, parts in _gpt2_block(block).items():
            for part in ("weight", "bias"):
                joined = torch.cat([getattr(one, part) for one in parts])
                state[f"blk.{number}.{GPT2_PARTS[name]}.{part}"] = joined
    state |= {f"output_norm.{name}": value for name, value in model.final_norm.named_parameters()}
    writer = GGUFWriter(path, "gpt2")
    for name, value in about.items():
        kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.get_type(value)
        writer.add_key_value(name, value, kind)
    for name, tensor in state.items():
        writer.add_tensor(name, tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(path: Path, into: Path, bits: str) -> None:
    """A GGUF file of fewer bits by llama.cpp: Q8_0, or Q4_0 with eight bits for embeddings and logits, as ours have."""
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[bits]
    how.token_embedding_type = how.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    how.nthread = 2
    failed = llama_cpp.llama_model_quantize(str(path).encode(), str(into).encode(), how)
    assert not failed, path
