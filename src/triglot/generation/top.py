"""The likeliest tokens of rows, by a kernel that makes logits and never writes them (`cpp/top.cpp`)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.logits import Top
from triglot.decoding.sampling import largest, log_sum_exp
from triglot.generation.int8 import Int8Weights, may_use_tiles, multiplies_bytes
from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.packed import Precision, multiplies_int8
from triglot.layers.vectors import round_up

ROWS, COLUMNS, INPUTS = 32, 128, 32
"""Of what the kernel reads there has to be a multiple of these."""
MOST = 64
"""Tokens of a row, at most, that are worth a list: longer ones take long to be kept in order."""
LEAST, MOST_OF_ALL = -40.0, 60.0
"""Where a row's largest logit is between these, powers of e are numbers, and the sum has all that are e⁻⁴⁰ of it."""
AT_A_TIME = 256
"""Rows whose logits are made where these are not."""
BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "int8": 8}
"""What kernels multiply in."""


def may_multiply(precision: Precision) -> bool:
    """Whether kernels do in this precision."""
    if precision == "bf16":
        return may_use_tiles()
    return precision == "fp32" or (precision == "int8" and multiplies_bytes())


class TopKernel:
    """A projection to the vocabulary, in what this process `may_multiply`."""

    def __init__(
        self, weight: Float[Tensor, "vocab inputs"], bias: Float[Tensor, " vocab"], precision: Precision
    ) -> None:
        self.bits, self.vnni, self.bias = BITS[precision], int(multiplies_int8()), bias.float().contiguous()
        vocab, inputs = weight.shape
        self.width, self.dtype = round_up(inputs, INPUTS), torch.bfloat16 if precision == "bf16" else torch.float32
        weight = F.pad(weight, (0, self.width - inputs))
        self.starts, self.scales = None, None
        if precision == "int8":
            self.weight, self.starts, self.scales = Int8Weights.of(weight)
        else:
            beside = 2 if precision == "bf16" else 1
            laid = weight.to(self.dtype).view(vocab // LANES, LANES, -1, beside)
            self.weight = laid.transpose(1, 2).contiguous()

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
        sizes = {"WIDTH": self.width, "COUNT": count, "BITS": self.bits, "VNNI": self.vnni}
        run = kernel("top.cpp", "top", "ppppppppnnn", **sizes)
        pointers = [
            address(part) for part in (filled, self.weight, self.starts, self.scales, self.bias, values, ids, sums)
        ]
        run(*pointers, len(filled) // ROWS, len(self.bias), threads_for(rows))
        values, ids, normaliser = values[:rows], ids[:rows], sums.log_()[:rows, None]
        far = ((values[:, 0] < LEAST) | (values[:, 0] > MOST_OF_ALL)).nonzero()[:, 0]
        for some in far.split(AT_A_TIME) if len(far) else ():
            again = logits(some).float()
            values[some], ids[some] = largest(again, count)
            normaliser[some] = log_sum_exp(again)
        return Top(values, ids, torch.maximum(normaliser, values[:, :1]))
