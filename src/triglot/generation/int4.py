"""Projections of few rows by weights of four bits (`cpp/int4.cpp`), as an operation that compiled code calls.

PyTorch's own product of four bits reads a third of what memory gives where vectors are short (AVX2), and its compiler
makes no vectors of halves of bytes there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor, nn

from triglot.generation.int8 import BESIDE, OUTPUTS, multiplies_bytes
from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.packed import GROUP, four_bits, multiplies_int8
from triglot.layers.vectors import round_up

NAME = "aoti_torch_cpu_multiply_int4"
"""As PyTorch calls what stands for the operation in compiled code."""


@torch.library.custom_op(
    "triglot::multiply_int4",
    mutates_args=(),
    schema="(Tensor rows, Tensor weights, Tensor scales, Tensor expert, int outputs, int threads) -> Tensor",
)
def multiply_int4(
    rows: Float[Tensor, "rows inputs"],
    weights: UInt8[Tensor, "experts outputs_over_lanes groups loads bytes"],
    scales: Int32[Tensor, "experts outputs_over_lanes groups lanes"],
    expert: Int[Tensor, "1"],
    outputs: int,
    threads: int,
) -> Float[Tensor, "rows outputs"]:
    """Rows by the weights of one expert, the first of one."""
    rows, y = rows.float().contiguous(), torch.empty(len(rows), outputs)
    pointers = [address(part) for part in (rows, weights, scales, expert, y)]
    _kernel()(*pointers, *rows.shape, outputs, threads)
    return y


@multiply_int4.register_fake
def _(rows: Tensor, *others: Any) -> Tensor:
    *_, outputs, _ = others
    return rows.new_empty(len(rows), outputs)


def _kernel() -> Any:
    return kernel("int4.cpp", "multiply_int4", "pppppnnnn", within=True, VNNI=int(multiplies_int8()))


def called_by_compiled_code() -> dict[Any, list[str]]:
    """What PyTorch's compiler has to know of the operation."""
    _kernel()
    arguments = ", ".join(["AtenTensorHandle"] * 4 + ["int64_t"] * 2 + ["AtenTensorHandle*"])
    return {torch.ops.triglot.multiply_int4.default: [f"AOTITorchError {NAME}({arguments})"]}


class KernelInt4(nn.Module):
    """x Wᵀ + b of few rows, which are rounded to bytes, GROUP numbers together."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    first: Tensor

    def __init__(
        self, weight: Float[Tensor, "*experts outputs inputs"], bias: Float[Tensor, "*experts outputs"] | None
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape[-2:]
        self.filled_up = round_up(self.outputs, OUTPUTS)
        weight = F.pad(weight.detach(), (0, 0, 0, self.filled_up - self.outputs)).view(-1, self.filled_up, self.inputs)
        whole, *scales = four_bits(weight)
        # [experts, vectors, lanes, groups, half, load, beside]
        parts = whole.view(len(weight), -1, LANES, self.inputs // GROUP, 2, GROUP // 2 // BESIDE, BESIDE)
        lower, upper = parts.permute(4, 0, 1, 3, 5, 2, 6)
        self.register_buffer("weight", (lower | upper << 4).flatten(4).contiguous())
        step, middle = (part.view(torch.int16).int() for part in scales)
        both = (step & 0xFFFF | middle << 16).unflatten(1, (-1, LANES)).transpose(2, 3)
        self.register_buffer("scale", both.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("first", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Float[Tensor, "rows 1 inputs"], expert: Int[Tensor, "1"] | None = None) -> Tensor:
        """By the weights, or those of one `expert`, which are read where they stand."""
        threads = threads_for(1, self.outputs * self.inputs)
        of, bias = self.first if expert is None else expert, self.bias
        if bias is not None and expert is not None:
            bias = bias.index_select(0, expert)[0]
        y = multiply_int4(x.flatten(1), self.weight, self.scale, of, self.filled_up, threads)[:, : self.outputs]
        return (y if bias is None else y + bias)[:, None]

    @staticmethod
    def takes(weight: Float[Tensor, "*experts outputs inputs"]) -> bool:
        """Whether there is a product of such weights here."""
        return multiplies_bytes() and weight.size(-1) % GROUP == 0
