"""Projections whose weights are packed once, to be multiplied with few rows many times: what decoding is made of.

Each gives every row the bits that it gives the row in any company, given at least `least_rows` of them: in fp32 a
product's bits depend on how many rows there are when those are few; sums of whole numbers are exact.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, assert_never, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int8, UInt8
from torch import Tensor, nn

from triglot.errors import require
from triglot.layers.linear import has_onednn

Precision = Literal["fp32", "bf16", "int8", "int4"]
Rows = Float[Tensor, "rows inputs"]
ZERO = 128
"""What stands for 0 in a quantised row."""
# Tensors, since a small operation with one of Python's numbers takes twice as long.
_MOST, _ROUND, _ROUND_FROM_ZERO = torch.tensor(127.0), torch.tensor(1.5 * 2**23), torch.tensor(1.5 * 2**23 + ZERO)
"""Added to 1.5 · 2²³ a number is rounded, half to even, and stands in the last bits: sooner than by a cast."""
GROUP = 32
"""Weights that share a scale where they have four bits."""
SMALL = 2**17
"""Weights below which rows cost more to be quantised than they save."""
LEAST_SIZE = 16
"""Rows and outputs from which on a product of floats gives each row its own bits, wherever it stands."""
INPUTS = 384
"""Numbers up to which MKL and oneDNN were seen to take a sum in one order, whatever the number of rows."""
ROWS = 32
"""Rows that are multiplied at a time where oneDNN's sums are longer."""
LEAST = 1e-30
"""What a row of zeros is divided by."""


class QuantisedRows(NamedTuple):
    """Rows as whole numbers from 1 to 255: x ≈ (whole − 128) · largest / 127, each row with a scale of its own."""

    whole: UInt8[Tensor, "rows inputs"]
    largest: Float[Tensor, "rows 1"]


def quantise_rows(x: Rows) -> QuantisedRows:
    """Each row divided by its largest magnitude, which becomes 127."""
    scaled, largest = scale_rows(x)
    return QuantisedRows(scaled.add_(_ROUND_FROM_ZERO).view(torch.int32).to(torch.uint8), largest)


def scale_rows(x: Rows) -> tuple[Rows, Float[Tensor, "rows 1"]]:
    """The same before they are rounded: from −127 to 127, with each row's largest magnitude."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(LEAST)
    return x * (_MOST / largest), largest


def whole_weights(
    weight: Float[Tensor, "outputs inputs"], most: int
) -> tuple[Int8[Tensor, "outputs inputs"], Float[Tensor, " outputs"]]:
    """Whole numbers from −`most` to `most`, and the magnitude of each output that has become `most`."""
    largest = weight.float().abs().amax(1).clamp_min(LEAST)
    return (weight * (most / largest)[:, None]).round().to(torch.int8), largest


class FourBits(NamedTuple):
    """Numbers from 0 to 15, each GROUP of inputs with a step and a middle: w ≈ (whole − 8) · step + middle."""

    whole: UInt8[Tensor, "*experts outputs inputs"]
    step: BFloat16[Tensor, "*experts outputs groups"]
    middle: BFloat16[Tensor, "*experts outputs groups"]


def four_bits(weight: Float[Tensor, "*experts outputs inputs"]) -> FourBits:
    """The least of a group becomes 0, its largest 15."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(LEAST)
    whole = ((groups - low) / step).round().to(torch.uint8).flatten(-2)
    return FourBits(whole, step[..., 0].bfloat16(), (low + 8 * step)[..., 0].bfloat16())


def prepack_for_fbgemm(whole: Int8[Tensor, "outputs inputs"], scale: Float[Tensor, " outputs"]) -> torch.ScriptObject:
    """Weights as FBGEMM wants them."""
    with warnings.catch_warnings():  # PyTorch wants to be rid of tensors that are quantised; its products want one
        warnings.simplefilter("ignore")
        middles = torch.zeros(len(whole), dtype=torch.long)
        quantised = torch._make_per_channel_quantized_tensor(whole, scale.double(), middles, 0)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantised, None)
    return packed


def multiply_by_fbgemm(scaled: Rows, packed: torch.ScriptObject) -> Float[Tensor, "rows outputs"]:
    """Sums of products of these rows, which are rounded, half to even, times the scale of each output."""
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(scaled, 1.0, ZERO, packed)
    return y


@runtime_checkable
class Packed(Protocol):
    """x Wᵀ + b in fp32, with weights that are ready for it."""

    least_rows: int
    """From so many rows on, a row's bits do not depend on the others."""
    num_bytes: int
    """What one product reads of weights."""
    precision: Precision
    """What it multiplies in."""
    dtype: torch.dtype
    """What it takes rows in; others are cast."""

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]: ...
    def narrow(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        """The same in the type in which it comes."""
        ...


Pack = Callable[[Tensor, Tensor | None, Precision], Packed]
"""Makes a projection of a weight and a bias."""


class _InFull:
    """Products that come in fp32."""

    dtype = torch.float32

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        raise NotImplementedError

    def narrow(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        """The same."""
        return self(x)


class PackedFloat:
    """Weights in fp32 or bf16; those of bf16 as oneDNN wants them, where it is here.

    Libraries take long sums by parts, and which parts depends on how many rows there are. So sums of fp32 are taken by
    parts of ours, and rows of long sums of bf16 are multiplied so many at a time.
    """

    least_rows = LEAST_SIZE

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None, dtype: torch.dtype) -> None:
        self.outputs, missing = len(weight), max(0, LEAST_SIZE - len(weight))
        weight = F.pad(weight.to(dtype), (0, 0, 0, missing))
        self.bias = None if bias is None else F.pad(bias.to(dtype), (0, missing))
        self.num_bytes, self.dtype = weight.nbytes, dtype
        self.precision: Precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.packed = dtype == torch.bfloat16 and weight.device.type == "cpu" and has_onednn()
        if self.packed:
            self.at_a_time = ROWS if weight.size(1) > INPUTS else None
            self.parts = [torch.ops.mkldnn._reorder_linear_weight(weight, None)]
        else:
            size = INPUTS if dtype == torch.float32 else weight.size(1)  # bf16 would be rounded after each part
            self.parts = [part.contiguous() for part in weight.split(size, 1)]

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        return self.narrow(x).float()

    def narrow(self, x: Rows, activation: Literal["none", "relu", "sigmoid"] = "none") -> Float[Tensor, "rows outputs"]:
        """The same in the weights' own type, activated."""
        x = x.to(self.dtype)
        y = self._by_onednn(x, activation) if self.packed else self._by_parts(x, activation)
        return y if y.size(1) == self.outputs else y[:, : self.outputs]

    def with_bias(self, bias: Float[Tensor, " outputs"]) -> "PackedFloat":
        """The same weights with another bias."""
        other = copy.copy(self)
        other.bias = F.pad(bias.to(self.dtype), (0, max(0, LEAST_SIZE - self.outputs)))
        return other

    def _by_onednn(self, x: Rows, activation: str) -> Float[Tensor, "rows filled"]:
        if self.at_a_time is not None and len(x) > self.at_a_time:
            filled = F.pad(x, (0, 0, 0, -len(x) % LEAST_SIZE))
            return torch.cat([self._by_onednn(some, activation) for some in filled.split(self.at_a_time)])[: len(x)]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.parts[0], self.bias, activation, [], "")
        return y

    def _by_parts(self, x: Rows, activation: str) -> Float[Tensor, "rows filled"]:
        first, *others = self.parts
        if others:
            of_first, *of_others = x.split(first.size(1), 1)
            y = F.linear(of_first, first, self.bias)
            for some, weight in zip(of_others, others, strict=True):
                y.addmm_(some, weight.T)
        else:
            y = F.linear(x, first, self.bias)
        return y if activation == "none" else getattr(torch, activation)(y)


class PackedInt8(_InFull):
    """Weights as whole numbers from −127 to 127, with a scale for each output, times rows quantised as they come.

    They are held twice: for the products of many rows, and for one, which is multiplied to the same bits in two thirds
    of the time: as they are, or, on a processor that multiplies tiles (AMX), by FBGEMM, since there the former takes
    twice as long.
    """

    least_rows = 1
    precision: Precision = "int8"

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None) -> None:
        whole, largest = whole_weights(weight, 127)
        self.scale = largest / 127**2
        self.bias = None if bias is None else bias.float()
        self.num_bytes = whole.nbytes
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(whole, None)
        by_fbgemm = multiplies_tiles() and has_fbgemm()
        self.for_one_row = prepack_for_fbgemm(whole, self.scale) if by_fbgemm else whole.T

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        if len(x) == 1:
            y, largest = self.by_one_row(x)
        else:
            whole, largest = quantise_rows(x)
            y = self.product(whole)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest, out=y)

    def by_one_row(self, x: Rows) -> tuple[Tensor, Tensor]:
        """What is still to be multiplied by the row's largest, and that."""
        scaled, largest = scale_rows(x)
        if isinstance(self.for_one_row, torch.ScriptObject):
            return multiply_by_fbgemm(scaled, self.for_one_row), largest
        whole = scaled.add_(_ROUND).view(torch.int32).to(torch.int8)
        return torch._int_mm(whole, self.for_one_row) * self.scale, largest

    def product(self, whole: UInt8[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """What is still to be multiplied by each row's largest, without the bias."""
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, ZERO, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y


class PackedInt7(_InFull):
    """Weights as whole numbers from −64 to 64, for processors that add products of bytes in pairs, in 16 bits.

    255 · 64 · 2 still fits; with weights up to 127 a sum would be cut off (FBGEMM and oneDNN say so of AVX2).
    """

    least_rows = 1
    precision: Precision = "int8"

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None) -> None:
        whole, largest = whole_weights(weight, 64)
        self.scale = largest / (64 * 127)
        self.bias = None if bias is None else bias.float()
        self.num_bytes = whole.nbytes
        self.packed = prepack_for_fbgemm(whole, self.scale)

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        scaled, largest = scale_rows(x)
        y = multiply_by_fbgemm(scaled, self.packed)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest, out=y)


class PackedInt4(_InFull):
    """Weights as numbers from 0 to 15, each GROUP of inputs with a scale and a middle of its own; rows are bf16."""

    least_rows = 1
    precision: Precision = "int4"
    dtype = torch.bfloat16

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None) -> None:
        whole, step, middle = four_bits(weight)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(whole.int(), 1)
        self.scales = torch.stack([step, middle], 2).transpose(0, 1).contiguous()
        self.bias = None if bias is None else bias.float()
        self.num_bytes = self.packed.nbytes + self.scales.nbytes

    def __call__(self, x: Rows) -> Float[Tensor, "rows outputs"]:
        y = torch._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self.packed, GROUP, self.scales).float()
        return y if self.bias is None else y.add_(self.bias)

    @staticmethod
    def takes(weight: Float[Tensor, "outputs inputs"]) -> bool:
        """Whether the sizes are those that the product is for."""
        return weight.size(0) % 16 == 0 and weight.size(1) % GROUP == 0


class Packer:
    """Packs the projections of one model, in one precision, and knows what all of them need."""

    def __init__(self, precision: Precision, make: Pack | None = None) -> None:
        self.precision, self.make = precision, make or pack
        self.least_rows = 1
        """From so many rows on, no row's bits depend on the others."""
        self.num_bytes = 0
        """What one product with each of them reads of weights."""
        self.used = set[Precision]()
        """What they multiply in: those that are too small for whole numbers in more."""

    def __call__(self, weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None) -> Packed:
        """A projection."""
        made = self.make(weight, bias, self.precision)
        self.least_rows = max(self.least_rows, made.least_rows)
        self.num_bytes += made.num_bytes
        self.used.add(made.precision)
        return made

    def beside(self, linears: Sequence[nn.Linear], scale: float = 1.0) -> Packed:
        """Projections of the same rows as one, their outputs side by side, those of the first times `scale`."""
        scales = [scale] + [1.0] * (len(linears) - 1)
        weight = torch.cat([linear.weight.detach().float() * by for linear, by in zip(linears, scales, strict=True)])
        biases = [None if linear.bias is None else linear.bias.detach().float() for linear in linears]
        if all(bias is None for bias in biases):
            return self(weight, None)
        given = [
            bias if bias is not None else weight.new_zeros(linear.out_features)
            for bias, linear in zip(biases, linears, strict=True)
        ]
        return self(weight, torch.cat([bias * by for bias, by in zip(given, scales, strict=True)]))


def pack(
    weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None, precision: Precision
) -> Packed:
    """A projection in `precision`; small ones are not worth their quantised rows."""
    match precision:
        case "fp32":
            return PackedFloat(weight, bias, torch.float32)
        case "bf16":
            return PackedFloat(weight, bias, torch.bfloat16)
        case "int8" if weight.numel() < SMALL:
            return PackedFloat(weight, bias, torch.bfloat16 if multiplies_bf16() else torch.float32)
        case "int8":
            return pack_int8(weight, bias)
        case "int4" if PackedInt4.takes(weight):
            return PackedInt4(weight, bias)
        case "int4":
            return pack(weight, bias, "int8")
        case _:
            assert_never(precision)


def pack_int8(
    weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> PackedInt8 | PackedInt7:
    """A projection in whole numbers, of as many bits as this processor multiplies without loss."""
    if multiplies_int8():
        return PackedInt8(weight, bias)
    require(has_fbgemm(), "precision", "fp32 or bf16 on a processor for which PyTorch has no FBGEMM", "int8")
    return PackedInt7(weight, bias)


def has_fbgemm() -> bool:
    """Whether PyTorch was built with the products of whole numbers that processors of x86 have."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def multiplies_int8() -> bool:
    """Whether this processor has instructions that sum products of four bytes in 32 bits, and PyTorch uses them."""
    return torch.cpu._is_vnni_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bf16, and PyTorch uses them."""
    return multiplies_tiles() or (
        torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def multiplies_tiles() -> bool:
    """Whether this processor has instructions for products of whole tiles (AMX), and PyTorch uses them."""
    return torch.cpu._is_amx_tile_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
