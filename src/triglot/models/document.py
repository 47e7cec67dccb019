"""Weights trained with the founding document's own code, under its names, into these models."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from triglot.errors import CheckpointError

_NAMES = (
    (r"\btoken_embedding\.", "embedding.tokens."),
    (r"\bembedding\.weight$", "embedding.tokens.weight"),
    (r"\bdecoder_layers\.", "layers."),
    (r"\bself_attn\.", "self_attention."),
    (r"\bencoder_attention\.", "cross_attention."),
    (r"\b[Ww]_q\.", "query."),
    (r"\b[Ww]_k\.", "key."),
    (r"\b[Ww]_v\.", "value."),
    (r"\b[Ww]_o\.", "output."),
    (r"\bfeed_forward\.linear1\.", "feed_forward.inner."),
    (r"\bfeed_forward\.linear2\.", "feed_forward.outer."),
    (r"\bnorm1\.", "around_self_attention.norm."),
    (r"(^decoder\.layers\.\d+\.)norm2\.", r"\1around_cross_attention.norm."),
    (r"\bnorm[23]\.", "around_feed_forward.norm."),
    (r"^ln_f\.", "final_norm."),
)
"""The document's names and ours, applied in this order; whatever matches none is called the same."""

_EXPERT = re.compile(r"^experts\.(\d+)\.([02])\.(weight|bias)$")


def load_document_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load what the document's `Transformer`, `DecoderLLM` or `MixtureOfExperts` saved; every tensor must have a place.

    The position tables that it saved too are left out: they are computed.
    """
    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state_dict.items():
        expert = _EXPERT.match(name)
        if expert:
            layer = "inner" if expert[2] == "0" else "outer"
            stack = layer if expert[3] == "weight" else f"{layer}_bias"
            stacks.setdefault(stack, {})[int(expert[1])] = tensor
        elif not name.endswith("pos_encoding.pe"):
            ours[translate_name(name)] = tensor
    try:
        for stack, experts in stacks.items():
            ours[stack] = torch.stack([experts[number] for number in sorted(experts)])
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise CheckpointError(f"These are no weights of the document's {type(model).__name__}: {error}") from error


def translate_name(name: str) -> str:
    """Our name of a tensor that the document calls `name`."""
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name
