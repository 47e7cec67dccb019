"""Projections in whole numbers by a kernel (`cpp/linear.cpp`), which rounds rows, multiplies and scales by one call."""

from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from triglot.generation.kernels import LANES, Kernel, address, kernel, threads_for
from triglot.layers.packed import (
    ZERO,
    Packed,
    PackedInt4,
    Precision,
    Rows,
    multiplies_int8,
    multiplies_tiles,
    pack,
    whole_weights,
)
from triglot.layers.vectors import round_up

BESIDE = 4
"""Inputs of an output whose weights lie side by side."""
OUTPUTS, TILE = 2 * LANES, 64
"""Outputs that are multiplied at a time, and inputs that a tile has of each."""


class Int8Weights(NamedTuple):
    """Weights as the kernels read them, up to 127, or 64 where a processor adds products of bytes in 16 bits."""

    whole: Int8[Tensor, "outputs_over_lanes inputs_over_beside lanes beside"]
    starts: Int32[Tensor, " outputs"]
    """What a sum begins with: rows are bytes in which ZERO stands for 0."""
    scales: Float[Tensor, " outputs"]

    @classmethod
    def of(cls, weight: Float[Tensor, "outputs inputs"]) -> "Int8Weights":
        """A multiple of LANES outputs and inputs."""
        most = 127 if multiplies_int8() else 64
        whole, largest = whole_weights(weight, most)
        starts = whole.sum(1, dtype=torch.int32) * -ZERO
        laid = whole.view(len(whole) // LANES, LANES, -1, BESIDE).transpose(1, 2).contiguous()
        return cls(laid, starts, largest / most)


def multiplies_bytes() -> bool:
    """Whether kernels have instructions for such products, and PyTorch uses them."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def may_use_tiles() -> bool:
    """Whether this processor multiplies tiles and lets this process, which has to ask."""
    return multiplies_tiles() and torch.cpu._init_amx()


class KernelInt8:
    """A projection of any size (`layers.packed.Packed`)."""

    least_rows = 1
    precision: Precision = "int8"
    dtype = torch.float32

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None) -> None:
        self.outputs, self.inputs = weight.shape
        self.by_tiles = int(may_use_tiles())
        self.filled_up = round_up(self.outputs, OUTPUTS)
        self.width = round_up(self.inputs, TILE if self.by_tiles else LANES)
        missing = self.filled_up - self.outputs
        self.weights = Int8Weights.of(F.pad(weight, (0, self.width - self.inputs, 0, missing)))
        self.bias = F.pad(weight.new_zeros(self.outputs) if bias is None else bias.float(), (0, missing))
        self.num_bytes, self.vnni = self.weights.whole.nbytes, int(multiplies_int8())

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        return self.narrow(x)

    def narrow(self, x: Rows, activation: Literal["none", "relu"] = "none") -> Float[Tensor, "rows outputs"]:
        """The same, activated."""
        rows, inputs = x.shape
        assert inputs == self.inputs, "a kernel reads so many numbers, whatever there is"
        x = (F.pad(x, (0, self.width - inputs)) if self.width > inputs else x).float().contiguous()
        y = torch.empty(rows, self.filled_up, dtype=torch.float32)
        threads = threads_for(rows, rows * self.num_bytes)
        self._run(address(x), address(y), rows, int(activation == "relu"), threads)
        return y if self.filled_up == self.outputs else y[:, : self.outputs]

    @cached_property
    def _run(self) -> Kernel:
        run = kernel("linear.cpp", "linear", "ppppnppnnn", WIDTH=self.width, VNNI=self.vnni, TILES=self.by_tiles)
        return partial(run, *map(address, (*self.weights, self.bias)), self.filled_up)


def pack_for_kernels(
    weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None, precision: Precision
) -> Packed:
    """`pack`, in whole numbers by a kernel where there can be one."""
    whole = precision == "int8" or (precision == "int4" and not PackedInt4.takes(weight))
    return KernelInt8(weight, bias) if whole and multiplies_bytes() else pack(weight, bias, precision)
