"""Functions of single numbers that give each the same bits wherever it stands.

PyTorch computes as many numbers at a time as a processor's vectors hold, and those left over at the end one by one, by
other instructions: an exponential there may differ in its last bit. Ends are also where threads share the work.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

VECTOR = 32
"""A multiple of the numbers that are computed at a time, on any processor."""
GRAIN = 2**15
"""Numbers of which a thread takes no fewer, and no more where another thread is free."""
ALONE = 2**14
"""Numbers that no operation shares among threads: GELU shares fewer than others do."""


def round_up(number: int, to: int) -> int:
    """The first multiple of `to` that is not below `number`."""
    return -(-number // to) * to


def filled_up(x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead whole_vectors"]:
    """`x` itself if its rows are whole vectors, or as much wider, by zeros, as they must be."""
    missing = -x.size(-1) % VECTOR
    return F.pad(x, (0, missing)) if missing else x


def in_whole_vectors(x: Float[Tensor, "*lead whole_vectors"], work: Callable[[Tensor], Any]) -> Tensor:
    """`x`, which must lie in one piece, after `work` has changed all its numbers in place."""
    if x.numel() <= ALONE or x.device.type != "cpu" or torch.get_num_threads() == 1:
        work(x)
        return x
    flat, first = x.view(-1), 0
    for size in _shares(x.numel()):
        work(flat[first : first + size])
        first += size
    return x


def _shares(count: int) -> Iterator[int]:
    """Sizes that threads share evenly: a grain for each as long as there are so many, then a thread at a time."""
    together = GRAIN * torch.get_num_threads()
    while count:
        size = together if count >= together else min(count, ALONE)
        yield size
        count -= size
