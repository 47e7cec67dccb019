"""Peers hold the same weights: what the benchmarks compare computes the same."""

import numpy as np
import pytest
import torch

exports = pytest.importorskip("benchmarks.exports")

LOCAL = torch.tensor([[1, 9, 10, 11, 35]])
SOURCE = torch.tensor([[5, 6, 7, 8, 2]])
MARIAN = {"tie_embeddings": True, "output_bias": False}
GPT2 = {
    "norm_order": "pre", "positions": "learned", "activation": "gelu", "tie_embeddings": True, "scale_embeddings": False
}  # fmt: skip
LLAMA = {
    "norm": "rms", "norm_order": "pre", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 2, "bias": False,
    "tie_embeddings": True, "scale_embeddings": False, "norm_eps": 1e-6,
}  # fmt: skip
MODERN = {"norm": "rms", "norm_order": "pre", "positions": "rotary", "bias": False, "output_bias": False}


def make(kind: str, options: dict):
    from triglot.config import BlockOptions
    from triglot.models.decoder_only import DecoderLLM
    from triglot.models.encoder_decoder import Transformer

    torch.manual_seed(1)
    given = BlockOptions(**options)
    model = Transformer(101, 101, 32, 3, 4, 44, 64, options=given) if kind == "pairs" else DecoderLLM(
        101, 32, 4, 3, 44, 64, options=given
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    import triglot

    return model(SOURCE, LOCAL, *triglot.create_masks(SOURCE, LOCAL)).logits


@torch.no_grad()
def test_marian_computes_what_the_transformer_does():
    model = make("pairs", MARIAN)
    theirs = exports.to_marian(model)(input_ids=SOURCE, decoder_input_ids=LOCAL).logits
    torch.testing.assert_close(theirs, logits_of(model), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("options", "export"), [(GPT2, "to_gpt2"), (LLAMA, "to_llama")])
def test_transformers_decoders_compute_what_ours_do(options, export):
    model = make("text", options)
    torch.testing.assert_close(getattr(exports, export)(model)(LOCAL).logits, model(LOCAL).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [MARIAN, MODERN])
def test_ctranslate2_scores_a_translation_as_the_transformer_does(options, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = make("pairs", options)
    exports.to_ctranslate2(model, tmp_path / "model")
    translator = ctranslate2.Translator(str(tmp_path / "model"), compute_type="float32", intra_threads=1)
    written = [[str(token) for token in row] for row in (SOURCE[0].tolist(), LOCAL[0, 1:].tolist())]
    (found,) = translator.score_batch([written[0]], [written[1]])
    expected = logits_of(model).log_softmax(-1)[0].gather(1, torch.tensor([*LOCAL[0, 1:], exports.EOS])[:, None])
    torch.testing.assert_close(torch.tensor(found.log_probs), expected[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [GPT2, LLAMA])
def test_ctranslate2_decoders_compute_what_ours_do(options, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = make("text", options)
    exports.to_ctranslate2(model, tmp_path / "model")
    generator = ctranslate2.Generator(str(tmp_path / "model"), compute_type="float32", intra_threads=1)
    found = torch.tensor(np.array(generator.forward_batch([[str(token) for token in LOCAL[0].tolist()]])))
    torch.testing.assert_close(found, model(LOCAL).logits, rtol=1e-4, atol=1e-4)
