"""From a config to a model, and what a model amounts to."""

from typing import assert_never

from torch import nn

from triglot.config import ModelConfig
from triglot.layers.moe import MixtureOfExperts
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer


def build_model(config: ModelConfig) -> Transformer | DecoderLLM:
    """The model that `config` describes, weights drawn from torch's global generator."""
    match config.kind:
        case "encoder_decoder":
            return Transformer.from_config(config)
        case "decoder_only":
            return DecoderLLM.from_config(config)
        case _:
            assert_never(config.kind)


def count_parameters(model: nn.Module) -> int:
    """All trainable parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_active_parameters(model: nn.Module) -> int:
    """The parameters that take part in computing one token: of each layer's experts only the k it visits."""
    idle = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            stacks = (module.inner, module.outer, module.inner_bias, module.outer_bias)
            experts = sum(stack.numel() for stack in stacks if stack is not None)
            idle += experts * (module.num_experts - module.k) // module.num_experts
    return count_parameters(model) - idle
