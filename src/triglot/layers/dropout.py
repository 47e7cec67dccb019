"""Dropout (Srivastava et al. 2014) whose random numbers cost little on a processor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 256


def keep_mask(like: Tensor, rate: float) -> Tensor:
    """0 where an element is dropped and 1 / (1 − p) where it is kept, p being `rate` rounded to 1/256.

    One 64-bit draw of torch's generator serves eight elements; drawing a number for each takes seven times as long.
    """
    dropped = round(rate * LEVELS)
    draws = torch.empty(-(-like.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    levels = draws.view(torch.uint8)[: like.numel()].view(like.shape).to(like.dtype)
    return levels.ge_(dropped).mul_(LEVELS / (LEVELS - dropped))  # in floats: operations on bool are not vectorised


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """F.dropout; on a processor the rate counts in steps of 1/256, unless it would become 0 or 1 by that."""
    if not training or rate == 0.0:
        return x
    countable = 0 < round(rate * LEVELS) < LEVELS
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not countable:
        return F.dropout(x, rate)
    return x * keep_mask(x, rate)


class Dropout(nn.Dropout):
    """nn.Dropout by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
