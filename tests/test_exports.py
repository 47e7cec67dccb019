"""Peers hold the same weights: what the benchmarks compare computes the same."""

import numpy as np
import pytest
import torch

engines = pytest.importorskip("benchmarks.engines")
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


def make(kind: str, options: dict, d_ff: int = 44):
    from triglot.config import BlockOptions
    from triglot.models.decoder_only import DecoderLLM
    from triglot.models.encoder_decoder import Transformer

    torch.manual_seed(1)
    given = BlockOptions(**options)
    model = Transformer(101, 101, 32, 3, 4, 44, 64, options=given) if kind == "pairs" else DecoderLLM(
        101, 32, 4, 3, d_ff, 64, options=given
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
    theirs = exports.to_transformers(model)(input_ids=SOURCE, decoder_input_ids=LOCAL).logits
    torch.testing.assert_close(theirs, logits_of(model), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [GPT2, LLAMA])
def test_transformers_decoders_compute_what_ours_do(options):
    model = make("text", options)
    torch.testing.assert_close(exports.to_transformers(model)(LOCAL).logits, model(LOCAL).logits, rtol=1e-4, atol=1e-4)


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


@torch.no_grad()
@pytest.mark.parametrize(("options", "apart"), [(GPT2, 2e-2), (LLAMA, 1e-3)])  # its GELU is read from a table
def test_llama_cpp_computes_what_ours_do(options, apart, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = make("text", options)
    exports.to_gguf(model, tmp_path / "a.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    theirs.eval(LOCAL[0].tolist())
    found = torch.from_numpy(theirs.scores[: LOCAL.size(1)])
    torch.testing.assert_close(found, model(LOCAL).logits[0], rtol=apart, atol=apart)


@torch.no_grad()
def greedy(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, len(prompts[0]) :].tolist()


PROMPTS = [[1, 9, 10, 11, 35], [5, 6, 7, 8, 2], [90, 3, 44, 8, 71]]


@pytest.mark.parametrize("flash", [False, True])
def test_llama_cpp_continues_texts_beside_each_other_as_ours_do(flash, tmp_path):
    pytest.importorskip("llama_cpp")
    model = make("text", LLAMA)
    exports.to_gguf(model, tmp_path / "a.gguf")
    texts = engines.llama_cpp(tmp_path / "a.gguf", PROMPTS, 12, flash)
    assert texts() == texts() == greedy(model, PROMPTS, 12)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_openvino_chooses_what_is_best_or_nearly_so_by_ours(backend, tmp_path):
    for package in ("openvino_genai", "nncf"):
        pytest.importorskip(package)
    model = make("text", LLAMA, d_ff=64)  # whole blocks of 32: it reads no matrices of fp32
    found = engines.openvino(engines.openvino_folder(model, tmp_path, "int8"), PROMPTS, 12, backend)()
    ids = torch.tensor([[*prompt, *text] for prompt, text in zip(PROMPTS, found, strict=True)])
    logits = model(ids).logits[:, len(PROMPTS[0]) - 1 : -1]
    chosen = logits.gather(2, ids[:, len(PROMPTS[0]) :, None])[..., 0]
    assert logits.std() > 0.4
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=0.1)
