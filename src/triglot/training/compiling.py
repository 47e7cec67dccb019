"""torch.compile, where it pays within a run: on GPUs, a block at a time."""

from typing import Any

import torch
from torch import nn

from triglot.blocks import Block


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Train through compiled blocks from here on; equal blocks share what is compiled.

    A block at a time it takes seconds, not minutes. Evaluation stays as it is: with its caches no two calls are of one
    shape. The environment variable TORCH_COMPILE_DISABLE=1 turns it off. On processors it does not pay.
    """
    for block in model.modules():
        if isinstance(block, Block):
            _compile(block, options)


def _compile(block: Block, options: dict[str, Any]) -> None:
    plain, compiled = block.run, torch.compile(block.run, **options)

    def run(*arguments: Any, **named: Any) -> Any:
        return (compiled if block.training else plain)(*arguments, **named)

    block.run = run  # type: ignore[method-assign]  # of this block alone
