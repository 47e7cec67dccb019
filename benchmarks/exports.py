"""The same weights for peers: our models as CTranslate2, transformers and llama.cpp hold them.

Token ids stay what they are: a vocabulary is the numbers themselves, written out.
"""

from pathlib import Path
from typing import Any

from triglot.config import ModelConfig
from triglot.interop import ctranslate2, gguf, marian
from triglot.interop.convert import family_for, with_rates
from triglot.interop.links import theirs_of
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer

PAD, BOS, EOS = 0, 1, 2
IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def config_of(model: Transformer | DecoderLLM) -> ModelConfig:
    """A model's own shape."""
    pairs = isinstance(model, Transformer)
    stack: Any = model.encoder if isinstance(model, Transformer) else model
    size = stack.embedding.tokens.num_embeddings
    return ModelConfig(
        kind="encoder_decoder" if pairs else "decoder_only",
        d_model=stack.d_model,
        num_heads=stack.layers[0].self_attention.num_heads,
        num_layers=len(stack.layers),
        d_ff=stack.layers[0].feed_forward.outer.in_features,
        max_seq_length=stack.max_seq_length,
        vocab_size=size,
        src_vocab_size=size if pairs else 0,
        options=model.options,
    )


def to_ctranslate2(model: Transformer | DecoderLLM, folder: Path) -> None:
    """Write a model in CTranslate2's format, in fp32; it is quantised when it is loaded."""
    words = [str(token) for token in range(config_of(model).vocab_size)]
    ctranslate2.write(model, folder, ctranslate2.Words(words, words, str(BOS), str(EOS), str(PAD)))


def to_transformers(model: Transformer | DecoderLLM) -> Any:
    """transformers' model of the family that has such blocks, ready to decode."""
    import transformers

    config = config_of(model)
    if isinstance(model, Transformer):
        family, values = marian.FAMILY, marian.write(with_rates(config))
        values |= {"decoder_start_token_id": BOS, "forced_eos_token_id": None}
    else:
        family, values = family_for(config)
    kind = getattr(transformers, values["architectures"][0])
    theirs = kind(kind.config_class(**values | IDS))
    links = [link for link in family.links(config) if model.options.output_bias or link.ours[0] != "final_layer.bias"]
    state = {name: value for some in theirs_of(model, links) for name, value in some.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("embed_" in name or name in ("lm_head.weight", "final_logits_bias") for name in missing), missing
    theirs.tie_weights()
    return theirs.eval()


# GGUF

GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
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
    config = config_of(model)
    words = [str(token) for token in range(config.vocab_size)]
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
    if model.options.norm == "rms":
        gguf.write(path, model, config, bits, about)
    else:
        _gpt2_gguf(model, path, config, about)


def _gpt2_gguf(model: DecoderLLM, path: Path, config: ModelConfig, about: dict[str, Any]) -> None:
    from gguf import GGUFValueType, GGUFWriter

    about |= {
        "gpt2.context_length": config.max_seq_length,
        "gpt2.embedding_length": config.d_model,
        "gpt2.feed_forward_length": config.d_ff,
        "gpt2.block_count": config.num_layers,
        "gpt2.attention.head_count": config.num_heads,
        "gpt2.attention.layer_norm_epsilon": config.options.norm_eps,
    }
    family, _ = family_for(config)
    writer = GGUFWriter(path, "gpt2")
    for name, value in about.items():
        kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.get_type(value)
        writer.add_key_value(name, value, kind)
    for some in theirs_of(model, family.links(config)):
        for name, tensor in some.items():
            stem, _, part = name.rpartition(".")
            if stem in GPT2:
                writer.add_tensor(f"{GPT2[stem]}.{part}", tensor.numpy())
                continue
            _, _, number, inner = stem.split(".", 3)
            writer.add_tensor(f"blk.{number}.{GPT2_PARTS[inner]}.{part}", tensor.T.contiguous().numpy())
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
