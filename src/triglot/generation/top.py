"""The likeliest tokens of rows, by a kernel that makes logits and never writes them (`cpp/top.cpp`)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.sampling import largest, log_sum_exp
from triglot.decoding.search import Top
from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.packed import multiplies_tiles
from triglot.layers.vectors import round_up

ROWS, COLUMNS, INPUTS = 32, 128, 32
"""Of what the kernel reads there has to be a multiple of these."""
MOST = 64
"""Tokens of a row, at most, that are worth a list: longer ones take long to be kept in order."""
LEAST, MOST_OF_ALL = -40.0, 60.0
"""Where a row's largest logit is between these, powers of e are numbers, and the sum has all that are e⁻⁴⁰ of it."""
AT_A_TIME = 256
"""Rows whose logits are made where these are not."""


def may_multiply_tiles() -> bool:
    """Whether this processor multiplies tiles, and lets this process, which has to ask for it."""
    return multiplies_tiles() and torch.cpu._init_amx()


class TopKernel:
    """A projection to the vocabulary, in fp32 or, where a process `may_multiply_tiles`, in bf16."""

    def __init__(
        self, weight: Float[Tensor, "vocab inputs"], bias: Float[Tensor, " vocab"], dtype: torch.dtype
    ) -> None:
        self.tiled = dtype == torch.bfloat16
        vocab, inputs = weight.shape
        self.width, self.dtype, self.bias = round_up(inputs, INPUTS), dtype, bias.float().contiguous()
        beside = 2 if self.tiled else 1
        weight = F.pad(weight.to(dtype), (0, self.width - inputs)).view(vocab // LANES, LANES, -1, beside)
        self.weight = weight.transpose(1, 2).contiguous()

    def __call__(
        self,
        hidden: Float[Tensor, "rows inputs"],
        count: int,
        logits: Callable[[Int[Tensor, " some"]], Float[Tensor, "some vocab"]],
    ) -> Top:
        """The `count` likeliest tokens of each row; `logits` of rows that are far from 0 are asked for."""
        (rows, inputs), count = hidden.shape, min(count, len(self.bias))
        filled = F.pad(hidden.to(self.dtype), (0, self.width - inputs, 0, -rows % ROWS)).contiguous()
        values, sums = torch.empty(len(filled), count), torch.empty(len(filled))
        ids = torch.empty(len(filled), count, dtype=torch.long)
        run = kernel("top.cpp", "top", "ppppppnnn", WIDTH=self.width, COUNT=count, TILED=int(self.tiled))
        pointers = [address(part) for part in (filled, self.weight, self.bias, values, ids, sums)]
        run(*pointers, len(filled) // ROWS, len(self.bias), threads_for(rows))
        values, ids, normaliser = values[:rows], ids[:rows], sums.log_()[:rows, None]
        far = ((values[:, 0] < LEAST) | (values[:, 0] > MOST_OF_ALL)).nonzero()[:, 0]
        for some in far.split(AT_A_TIME) if len(far) else ():
            again = logits(some).float()
            values[some], ids[some] = largest(again, count)
            normaliser[some] = log_sum_exp(again)
        return Top(values, ids, torch.maximum(normaliser, values[:, :1]))
