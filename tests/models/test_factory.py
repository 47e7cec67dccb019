"""A config becomes the model it describes, and what a model amounts to is counted without double counting."""

import pytest
import torch

from triglot.config import BlockOptions, ExpertOptions, ModelConfig
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.factory import build_model, count_active_parameters, count_parameters

SHAPE = {
    "d_model": 22,
    "num_heads": 2,
    "num_layers": 2,
    "d_ff": 17,
    "max_seq_length": 19,
    "vocab_size": 31,
    "src_vocab_size": 31,
}


def build(kind: str, **options) -> Transformer | DecoderLLM:
    return build_model(ModelConfig(kind=kind, **SHAPE, options=BlockOptions(**options)))


@pytest.mark.parametrize(("kind", "model"), [("encoder_decoder", Transformer), ("decoder_only", DecoderLLM)])
def test_a_kind_names_its_model(kind, model):
    assert type(build(kind)) is model


@pytest.mark.parametrize(("kind", "tied"), [("encoder_decoder", 2), ("decoder_only", 1)])
def test_tied_matrices_are_counted_once(kind, tied):
    matrix = SHAPE["vocab_size"] * SHAPE["d_model"]
    assert count_parameters(build(kind)) - count_parameters(build(kind, tie_embeddings=True)) == tied * matrix


def test_frozen_weights_are_not_counted():
    model = build("decoder_only")
    before = count_parameters(model)
    model.embedding.tokens.weight.requires_grad_(False)
    assert before - count_parameters(model) == model.embedding.tokens.weight.numel()


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_all_parameters_of_a_dense_model_are_active(kind):
    model = build(kind)
    assert count_active_parameters(model) == count_parameters(model)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_active_are_the_weights_whose_gradient_one_token_touches(kind, top_k):
    model = build(kind, experts=ExpertOptions(num_experts=5, top_k=top_k)).eval()
    token = torch.tensor([[1]])
    out = model(token, token).logits if kind == "encoder_decoder" else model(token).logits
    out.square().sum().backward()
    touched = 0
    for name, weight in model.named_parameters():
        if weight.dim() == 3 or (weight.dim() == 2 and name.endswith("_bias")):  # a stack of experts
            touched += sum(expert.numel() for expert in weight.grad if expert.any())
        else:
            touched += weight.numel()
    assert touched == count_active_parameters(model)
