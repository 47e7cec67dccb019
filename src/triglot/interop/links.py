"""Which tensors of a checkpoint are which of a model's, both ways."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triglot.checkpoint import weights_of
from triglot.config import ModelConfig
from triglot.errors import CheckpointError
from triglot.interop.tensors import Tensors
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.models.factory import build_model

Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """The same."""
    return x


def transposed(x: Tensor) -> Tensor:
    """Rows and columns exchanged: where others compute x W, and not x Wᵀ."""
    return x.T


class Link(NamedTuple):
    """Tensors of a model that are tensors of a checkpoint: laid one below another, both are the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Change = unchanged
    to_theirs: Change = unchanged

    def theirs_of(self, ours: list[Tensor]) -> dict[str, Tensor]:
        """What a checkpoint has of a model's tensors."""
        whole = self.to_theirs(_below(ours))
        if len(self.theirs) > 1:  # experts lie one behind another in ours
            whole = whole.flatten(0, -2) if whole.dim() > 2 else whole
        return dict(zip(self.theirs, whole.chunk(len(self.theirs)), strict=True))

    def fill(self, ours: list[Tensor], tensors: Tensors) -> None:
        """Give a model's tensors what a checkpoint has of them."""
        if len(ours) == len(self.theirs) == 1 and self.to_ours is unchanged:
            entry = tensors.entries[self.theirs[0]]
            if entry.dtype == ours[0].dtype and ours[0].is_contiguous():
                tensors.read_into(self.theirs[0], ours[0])
                return
        whole = self.to_ours(_below([tensors.read(name) for name in self.theirs]))
        first = 0
        for one in ours:
            rows = one.shape[0] if len(ours) > 1 else len(whole)
            one.copy_(whole[first : first + rows].reshape(one.shape))
            first += rows


def _below(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def same(names: Mapping[str, str], *, ours: str = "", theirs: str = "") -> Iterator[Link]:
    """Weights and biases of modules that only have other names."""
    for own, other in names.items():
        yield Link((ours + own,), (theirs + other,))


class WithoutValues(TorchFunctionMode):
    """Tensors are made as they are asked for, and not filled at random: their values come from a file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func.__name__ in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def made_of(
    config: ModelConfig, links: Iterable[Link], tensors: Tensors, ignored: Callable[[str], bool], dtype: torch.dtype
) -> Transformer | DecoderLLM:
    """The model that `config` describes, with a checkpoint's weights, in evaluation mode.

    Raises CheckpointError listing every tensor that is missing, unknown or of another shape before one is read.
    """
    with WithoutValues():
        model = build_model(config)
    for weight in model.parameters():
        weight.data = torch.empty_like(weight, dtype=dtype)
    own, links = weights_of(model), list(links)
    expected = expected_shapes(own, links)
    found = {name: entry.shape for name, entry in tensors.entries.items() if not ignored(name)}
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    faults += [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if faults:
        raise CheckpointError(f"The weights do not fit the config: {'; '.join(sorted(faults))}.")
    with torch.no_grad():
        for link in links:
            link.fill([own[name] for name in link.ours], tensors)
    return model.eval()


def expected_shapes(own: Mapping[str, Tensor], links: Iterable[Link]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for link in links:
        theirs = link.theirs_of([own[name].to("meta") for name in link.ours])
        shapes |= {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    return shapes


def theirs_of(model: nn.Module, links: Iterable[Link]) -> Iterator[dict[str, Tensor]]:
    """A model's weights as a checkpoint has them, a few at a time."""
    own = weights_of(model)
    for link in links:
        yield link.theirs_of([own[name].detach().cpu() for name in link.ours])
