"""Texts by engines that read GGUF files: llama.cpp and OpenVINO GenAI, on two threads.

Their packages are llama-cpp-python, built for the processor it runs on, and openvino-genai with nncf
(docs/performance.md says how to install them); both need gguf.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import exports
from triglot.models.decoder_only import DecoderLLM

THREADS = 2

logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it tells of every tensor

Texts = Callable[[], list[list[int]]]
"""Greedy texts after the prompts, all of one length."""


def llama_cpp(file: Path, prompts: list[list[int]], new: int, flash: bool) -> Texts:
    """llama.cpp's, through its interface in C: each step is one batch of all texts."""
    import llama_cpp as api

    length = len(prompts[0])
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = len(prompts) * (length + new), len(prompts)
    settings.n_threads = settings.n_threads_batch = THREADS
    settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
    context = api.llama_init_from_model(model, settings)
    shape = (len(prompts), api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
    batch = api.llama_batch_init(len(prompts) * length, 0, 1)

    def step(rows: list[list[int]], position: int) -> list[int]:
        """The next token of each row."""
        batch.n_tokens = 0
        for number, row in enumerate(rows):
            for offset, token in enumerate(row):
                at, last = batch.n_tokens, offset == len(row) - 1
                batch.token[at], batch.pos[at], batch.logits[at] = token, position + offset, last
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, number
                batch.n_tokens += 1
        failed = api.llama_decode(context, batch)
        assert not failed, failed
        return np.ctypeslib.as_array(api.llama_get_logits(context), shape).argmax(-1).tolist()

    def texts() -> list[list[int]]:
        api.llama_memory_clear(api.llama_get_memory(context), False)
        steps = [step(prompts, 0)]
        while len(steps) < new:
            steps.append(step([[token] for token in steps[-1]], length + len(steps) - 1))
        return [list(text) for text in zip(*steps, strict=True)]

    return texts


def llama_cpp_file(model: DecoderLLM, folder: Path, precision: str) -> Path:
    """A model in as many bits as ours, in blocks of 32 numbers."""
    whole, fewer = folder / "whole.gguf", folder / "fewer.gguf"
    exports.to_gguf(model, whole)
    exports.quantised(whole, fewer, {"int8": "Q8_0", "int4": "Q4_0"}[precision])
    return fewer


def openvino(folder: Path, prompts: list[list[int]], new: int, backend: str) -> Texts:
    """OpenVINO GenAI's."""
    import openvino_genai as api
    from openvino import Tensor

    tokenizer = api.Tokenizer(folder)
    how: dict[str, Any] = {"ATTENTION_BACKEND": backend, "INFERENCE_NUM_THREADS": THREADS}
    if backend == "PA":
        how["scheduler_config"] = api.SchedulerConfig()  # without it the prompts of earlier calls stay in a cache
    pipeline = api.LLMPipeline(folder / "fewer", tokenizer, "CPU", **how)
    ids = np.array(prompts)
    given = api.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
    settings = api.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
    return lambda: pipeline.generate(given, settings).tokens


def openvino_folder(model: DecoderLLM, folder: Path, precision: str) -> Path:
    """A model of Llama's kind in as many bits as ours: by channel, or in groups of 64 numbers with 8 bits for logits.

    OpenVINO GenAI makes its graph of a GGUF file, and makes none of GPT-2's kind; NNCF is what compresses OpenVINO's
    models elsewhere, too.
    """
    import nncf
    import openvino as api
    import openvino_genai

    exports.to_gguf(model, folder / "whole.gguf", "F16")
    openvino_genai.LLMPipeline(folder / "whole.gguf", "CPU", ATTENTION_BACKEND="SDPA", enable_save_ov_model=True)
    graph = api.Core().read_model(folder / "openvino_model.xml")
    modes = nncf.CompressWeightsMode
    how = {"int8": {"mode": modes.INT8_ASYM}, "int4": {"mode": modes.INT4_SYM, "group_size": 64}}[precision]
    api.save_model(nncf.compress_weights(graph, **how), folder / "fewer" / "openvino_model.xml")
    return folder
