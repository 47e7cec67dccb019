"""Engines over random weights, large enough for texts that differ and end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

WINDOW = 37


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """Makes an engine of a kind, with its context WINDOW."""
    from triglot.config import RunConfig
    from triglot.generation.engine import Engine
    from triglot.models.factory import build_model
    from triglot.recipe import from_dict
    from triglot.tokenizer import SpecialIds, Tokenizer, Tokenizers

    def make(
        kind: str,
        tags: tuple[str, ...] = (),
        options: dict[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        precision: Any = "fp32",
        compiled: bool | None = None,
        in_training: bool = False,
        d_model: int = 20,
        d_ff: int = 31,
        **data: Any,
    ) -> Engine:
        tokenizer = tokenizer or Tokenizer.train("byte", [], tags=tags)
        size, pairs = tokenizer.vocab_size, kind == "encoder_decoder"
        files = {"source": "a", "target": "b"} if pairs else {"files": ["a"]}
        values = {
            "model": {
                "kind": kind, "d_model": d_model, "num_heads": 2, "num_layers": 1, "d_ff": d_ff,
                "max_seq_length": WINDOW, "vocab_size": size, "src_vocab_size": size,
                "options": options or {"norm_order": "pre"},
            },
            "data": {"kind": "pairs" if pairs else "text", **files, **data},
            "train": {"context": 5},
            "generation": {"max_new_tokens": 11},
        }  # fmt: skip
        config = from_dict(RunConfig, values)
        torch.manual_seed(1)
        model = build_model(config.model).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6 if weight.dim() > 1 else 1)
            for name, buffer in model.named_buffers():
                if name.endswith("selection_bias"):
                    buffer.uniform_(-0.5, 0.5)
            bias = torch.zeros(size)
            bias[SpecialIds().eos] = 3.0 if pairs else 1.5
            bias[3 + len(tags) :] = torch.randn(size - 3 - len(tags)) / 2
            model.projection.bias = torch.nn.Parameter(bias)
        how = {"precision": precision, "compiled": compiled, "in_training": in_training}
        return Engine(model, config, Tokenizers(tokenizer, tokenizer), **how)

    return make


@pytest.fixture(scope="module")
def translator(make: Callable[..., Any]) -> Any:
    return make("encoder_decoder")


@pytest.fixture(scope="module")
def writer(make: Callable[..., Any]) -> Any:
    return make("decoder_only")
