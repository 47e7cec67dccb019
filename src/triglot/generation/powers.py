"""What a beam search needs to know of a row's powers, by a kernel that reads them once (`cpp/powers.cpp`)."""

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from triglot.decoding.sampling import BLOCK
from triglot.generation.kernels import address, in_shares, kernel
from triglot.layers.vectors import VECTOR, round_up


def of_blocks_by_kernel(powers: BFloat16[Tensor, "rows whole_blocks"]) -> Float[Tensor, "2 whole_vectors blocks"]:
    """`decoding.sampling.of_blocks`; sums are not rounded to bf16."""
    powers = powers.contiguous()
    rows, columns = powers.shape
    found = torch.ones(2, round_up(rows, VECTOR), columns // BLOCK)
    run, own = kernel("powers.cpp", "of_blocks", "pppnn", SIZE=BLOCK), [address(part) for part in (powers, *found)]
    blocks = columns // BLOCK
    in_shares(rows, lambda first, last: run(*own, first * blocks, last * blocks))
    return found
