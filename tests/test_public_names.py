"""The names of the three systems, their constructors and their call forms, as they were promised."""

import inspect
import subprocess
import sys

import pytest
import torch

import triglot

LAYER = "(d_model, num_heads, d_ff, dropout=0.1)"
STACK = "(vocab_size, d_model, num_layers, num_heads, d_ff, max_seq_length, dropout=0.1)"
CONSTRUCTORS = {
    "PositionalEncoding": "(d_model, max_seq_length=4096, dropout=0.1)",
    "MultiHeadAttention": "(d_model, num_heads, dropout=0.1)",
    "PointwiseFeedForward": "(d_model, d_ff, dropout=0.1)",
    "EncoderLayer": LAYER,
    "DecoderLayer": LAYER,
    "Encoder": STACK,
    "Decoder": STACK,
    "Transformer": "(src_vocab_size, tgt_vocab_size, d_model=512, num_layers=6, num_heads=8, d_ff=2048, "
    "max_seq_length=5000, dropout=0.1)",
    "DecoderLLM": "(vocab_size, d_model=512, n_heads=8, n_layers=6, d_ff=2048, max_len=5000)",
    "DecoderBlock": "(d_model, n_heads, d_ff)",
    "MixtureOfExperts": "(hidden_dim, num_experts, expert_dim, k=2, capacity_factor=1.0)",
    "create_padding_mask": "(seq, pad_id=0)",
    "create_look_ahead_mask": "(seq_length)",
    "create_masks": "(src, tgt)",
    "train_step": "(model, batch, optimizer)",
    "load_document_weights": "(model, state_dict)",
}
CALLS = {
    "PositionalEncoding.forward": "(x)",
    "MultiHeadAttention.forward": "(query, key, value, mask=None)",
    "PointwiseFeedForward.forward": "(x)",
    "EncoderLayer.forward": "(x, mask=None)",
    "DecoderLayer.forward": "(x, enc_output, look_ahead_mask=None, padding_mask=None)",
    "Encoder.forward": "(tokens, mask=None)",
    "Decoder.forward": "(tokens, enc_output, look_ahead_mask=None, padding_mask=None)",
    "Transformer.forward": "(src, tgt, src_mask=None, tgt_mask=None, tgt_padding_mask=None)",
    "Transformer.encode": "(src, src_mask=None)",
    "Transformer.decode": "(tgt, enc_output, look_ahead_mask=None, padding_mask=None)",
    "DecoderLLM.forward": "(input_ids, targets=None)",
    "DecoderLLM.generate": "(input_ids, max_new_tokens=50, temperature=1.0, top_k=None)",
    "DecoderBlock.forward": "(x, mask=None)",
    "MixtureOfExperts.forward": "(x)",
}
KEYWORDS = {
    "create_padding_mask": ["device"],
    "create_look_ahead_mask": ["device"],
    "create_masks": ["pad_id", "device"],
    "DecoderLLM.forward": ["mask"],
    "DecoderLLM.generate": ["lengths", "eos_id", "pad_id", "generator"],
    "DecoderLLM": ["options"],
    "Transformer": ["options"],
    "EncoderLayer": ["options"],
    "DecoderLayer": ["options"],
    "DecoderBlock": ["options"],
    "Encoder": ["options"],
    "Decoder": ["options"],
}
# Optional arguments that come after the document's and may be given by position too.
BESIDES = {"PositionalEncoding.forward": ["positions"], "MixtureOfExperts.forward": ["mask"]}
RETURNS_WEIGHTS = ["MultiHeadAttention", "EncoderLayer", "DecoderLayer", "Encoder", "Decoder", "Transformer"]


def find(path: str):
    found = triglot
    for name in path.split("."):
        found = getattr(found, name)
    return found


def positional(path: str) -> str:
    parameters = [p for p in inspect.signature(find(path)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    shown = [f"{p.name}={p.default}" if p.default is not p.empty else p.name for p in parameters if p.name != "self"]
    return f"({', '.join(entry for entry in shown if entry.split('=')[0] not in BESIDES.get(path, []))})"


@pytest.mark.parametrize(("name", "signature"), [*CONSTRUCTORS.items(), *CALLS.items()])
def test_has_the_documents_signature(name, signature):
    assert positional(name) == signature


@pytest.mark.parametrize("name", KEYWORDS)
def test_has_its_further_arguments_by_keyword_only(name):
    parameters = inspect.signature(find(name)).parameters
    for keyword in KEYWORDS[name]:
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[keyword].default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", RETURNS_WEIGHTS)
def test_returns_weights_unless_told_otherwise(name):
    parameter = inspect.signature(find(name).forward).parameters["need_weights"]
    assert parameter.default is True
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("MultiHeadAttention", ["output", "weights"]),
        ("EncoderLayer", ["x", "weights"]),
        ("DecoderLayer", ["x", "self_weights", "cross_weights"]),
        ("Encoder", ["x", "weights"]),
        ("Decoder", ["x", "self_weights", "cross_weights"]),
        ("Transformer", ["logits", "enc_attention", "dec_self_attention", "dec_enc_attention"]),
        ("DecoderLLM", ["logits", "loss"]),
        ("create_masks", ["src_mask", "tgt_mask", "cross_mask"]),
    ],
)
def test_results_are_named_tuples_with_the_documents_names(call, fields):
    function = find(call) if call.startswith("create") else find(call).forward
    assert list(inspect.signature(function).return_annotation._fields) == fields


def test_parts_have_the_documents_names():
    model = triglot.Transformer(23, 29, 22, 1, 2, 17, 53)
    assert isinstance(model.encoder, triglot.Encoder)
    assert isinstance(model.decoder, triglot.Decoder)
    assert isinstance(model.final_layer, torch.nn.Linear)
    assert triglot.MixtureOfExperts(22, 3, 17).expert_capacity is None
    assert isinstance(triglot.DecoderLLM(23, 22, 2, 1, 17, 53).layers[0], triglot.DecoderBlock)


def test_every_name_that_is_announced_exists_and_no_other():
    for name in triglot.__all__:
        assert getattr(triglot, name) is not None
        assert name in dir(triglot)
    with pytest.raises(AttributeError, match="has no attribute 'Trigloth'"):
        _ = triglot.Trigloth


def test_importing_the_package_imports_no_torch():
    code = "import sys, triglot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
