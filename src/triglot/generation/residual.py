"""Residual connections and norms of a prepared model (`prepared.py`)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triglot.generation.kernels import LANES, address, kernel, threads_for
from triglot.layers.norm import Residual
from triglot.layers.rms_norm import inverse_rms

Hidden = Float[Tensor, "rows d_model"]
Sublayer = Callable[[Hidden], Hidden]


class Stream(NamedTuple):
    """Rows between sublayers."""

    full: Hidden
    """In fp32."""
    read: Hidden
    """The same as the next sublayer's products read it: in bf16 where all do, if a kernel has rounded it."""


class PreparedResidual:
    """A residual connection and its norm; a sublayer's output may come in bf16."""

    def __init__(self, residual: Residual) -> None:
        self.pre, self.norm = residual.pre, residual.norm
        self.plain = norm_of(residual.norm)
        self.kernel: NormKernel | None = None

    def compile(self, dtype: torch.dtype) -> None:
        """Have a kernel add, normalise and round to `dtype`, if it is one for this norm."""
        norm = self.norm
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.weight.numel() % LANES == 0:
            self.kernel = NormKernel(norm, dtype)

    def __call__(self, x: Stream, sublayer: Sublayer) -> Stream:
        if self.pre:
            normed = self.plain(x.full) if self.kernel is None else self.kernel.read_alone(x.full)
            full = sublayer(normed).float().add_(x.full)
            return Stream(full, full)
        if self.kernel is not None:
            return self.kernel(x.full, sublayer(x.read))
        full = self.plain(sublayer(x.read).float().add_(x.full))
        return Stream(full, full)


def norm_of(module: nn.Module) -> Sublayer:
    """What a norm does to rows."""
    match module:
        case nn.LayerNorm():
            return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
        case nn.RMSNorm():
            weight, eps = module.weight.detach(), torch.tensor(module.eps)
            return lambda x: (x * inverse_rms(x, eps)).mul_(weight)
        case _:
            return lambda x: x


class NormKernel:
    """The norm of x + added, in fp32 and in `dtype`, by `cpp/norms.cpp`."""

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm, dtype: torch.dtype) -> None:
        self.rms, bias = isinstance(norm, nn.RMSNorm), getattr(norm, "bias", None)
        self.weight, self.bias = norm.weight.detach(), None if bias is None else bias.detach()
        self.eps, self.dtype = norm.eps, dtype

    def __call__(self, x: Hidden, added: Float[Tensor, "rows d_model"]) -> Stream:
        full = torch.empty_like(x, memory_format=torch.contiguous_format)
        if self.dtype == x.dtype:
            self._run(x, added, full, None)
            return Stream(full, full)
        read = torch.empty_like(full, dtype=self.dtype)
        self._run(x, added, full, read)
        return Stream(full, read)

    def read_alone(self, x: Hidden) -> Float[Tensor, "rows d_model"]:
        """The norm of x in `dtype`."""
        read = torch.empty_like(x, dtype=self.dtype, memory_format=torch.contiguous_format)
        self._run(x, None, *((read, None) if self.dtype == x.dtype else (None, read)))
        return read

    def _run(self, x: Hidden, added: Tensor | None, full: Tensor | None, read: Tensor | None) -> None:
        x, added = x.contiguous(), None if added is None else added.contiguous()
        type_added = torch.float32 if added is None else added.dtype
        given = {"WIDTH": x.size(1), "Added": type_added, "Read": self.dtype, "RMS": int(self.rms)}
        run = kernel("norms.cpp", "normalise", "ppppfppnn", **given)
        rows = [address(part) for part in (x, added, self.weight, self.bias)]
        run(*rows, self.eps, address(full), address(read), x.size(0), threads_for(x.size(0)))
