"""The processes of a run and what they tell one another; one process alone is a team, too."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from triglot.errors import ConfigError, TriglotError, require

T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"""How long processes wait for one that prepares data or evaluates; that one is dead gloo notices at once."""
GPU_PATIENCE = timedelta(minutes=2)
"""How long GPUs wait for one another within a step: NCCL does not notice that a process is dead."""


@dataclass(frozen=True)
class Team:
    """The processes that train one model. Every process calls a method, or none does."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Who speaks to whom on the processor; None: the processes of the default group."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prepares data, evaluates, reports and writes."""
        return self.rank == 0

    def highest(self, value: int) -> int:
        """The largest of the values that the processes give."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, self.group)
        return int(agreed)

    def told(self, message: Any) -> Any:
        """What the first process says, as JSON has it; the message of the others is not heard."""
        if self.size == 1:
            return message
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        length = torch.tensor(len(text))
        dist.broadcast(length, 0, self.group)
        heard = text if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(heard, 0, self.group)
        return json.loads(bytes(heard.tolist()))

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of each process, of the same shapes everywhere, on the processor."""
        if self.size == 1:
            return [list(tensors)]
        everyones: list[list[Tensor]] = [[] for _ in range(self.size)]
        for tensor in tensors:
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor, self.group)
            for rank, part in enumerate(parts):
                everyones[rank].append(part)
        return everyones

    def together(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes: the first's by name, those of process r by `r/name`."""
        return {
            f"{rank}/{name}" if rank else name: tensor
            for rank, part in enumerate(self.gathered(list(tensors.values())))
            for name, tensor in zip(tensors, part, strict=True)
        }

    def own(self, together: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """This process' part of what `together` gave to as many processes; None if they were more or fewer."""
        if {_rank(name) for name in together} != set(range(self.size)):
            return None
        mine = f"{self.rank}/" if self.rank else ""
        return {name.removeprefix(mine): tensor for name, tensor in together.items() if _rank(name) == self.rank}

    def dealt(self, parts: Sequence[T]) -> Sequence[T]:
        """This process' share: every `size`-th part."""
        return parts[self.rank :: self.size]


def _rank(name: str) -> int:
    rank, slash, _ = name.partition("/")
    return int(rank) if slash else 0


def this_rank() -> int:
    """The number of this process among those that a launcher such as torchrun has started; 0 if it is alone."""
    return int(os.environ.get("RANK", 0)) if _size() > 1 else 0


def local_device(device: torch.device) -> torch.device:
    """The device of this process where each has one of its own."""
    if device.type != "cuda" or _size() == 1:
        return device
    rule = "cuda without a number, since each process takes the GPU of its own"
    require(device.index is None, "device", rule, str(device), ConfigError)
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def device_here(wanted: str | torch.device | None, name: str = "device") -> torch.device:
    """A device that is there; the GPU if nothing is said and there is one. ConfigError calls it `name` otherwise."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=local_device(device)).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"`{name}` must be one that is here, but is {str(wanted)!r} instead ({reason}).") from error
    return device


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """The processes that a launcher has started together; gloo joins processors, NCCL GPUs.

    Raises TriglotError where the processes lose one another, mostly since one has ended before its time.
    """
    if _size() == 1:
        yield Team()
        return
    group = None
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=GPU_PATIENCE)
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), group)
    except RuntimeError as error:
        if "onnection" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise TriglotError(
            "This process of the run has lost another one, which has probably ended, and ends, too"
            f" ({str(error).splitlines()[0]}); --resume goes on from the last checkpoint."
        ) from error
    finally:
        dist.destroy_process_group()
