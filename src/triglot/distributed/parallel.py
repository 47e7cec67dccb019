"""A module and its optimizer as one process or several train them: alone, replicated (DDP) or sharded (FSDP2).

DDP is described by Li et al. 2020, FSDP by Zhao et al. 2023. Both average gradients over the processes: a loss that is
to be summed is to be scaled by their number, as `Trainer.gradients` does.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar, assert_never

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from triglot.distributed.team import Team

M = TypeVar("M", bound=nn.Module)


class Parallel(Generic[M]):
    """One process alone, which is also what the others are measured by."""

    def __init__(self, team: Team, module: M, optimizer: Optimizer) -> None:
        self.team = team
        self.module: nn.Module = module
        """What is called and trained."""
        self.optimizer = optimizer
        """Of the weights of `module`."""
        self.whole, self.whole_optimizer = module, optimizer
        """What the first process evaluates and saves."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    @contextmanager
    def passing(self, is_last: bool) -> Iterator[None]:  # noqa: ARG002 every pass is alike
        """Around a forward and backward pass: gradients of all processes are averaged after a step's last one."""
        yield

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients as one vector."""
        return get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])

    def collect_weights(self) -> None:
        """Bring `whole` up to date."""

    def collect_optimizer(self) -> None:
        """Bring `whole_optimizer` up to date."""


class Replicated(Parallel[M]):
    """Every process has all of it."""

    def __init__(self, team: Team, module: M, optimizer: Optimizer) -> None:
        super().__init__(team, module, optimizer)
        self.module = DistributedDataParallel(module)

    @contextmanager
    def passing(self, is_last: bool) -> Iterator[None]:
        """Gradients are averaged in the last pass alone."""
        assert isinstance(self.module, DistributedDataParallel)
        if is_last:
            yield
        else:
            with self.module.no_sync():
                yield


class Sharded(Parallel[M]):
    """Every process has a part of each weight, gradient and optimizer state, and borrows a layer's weights to use it.

    The first keeps all weights besides, to evaluate and save them, and all optimizer state on the processor.
    """

    def __init__(
        self, team: Team, module: M, optimizer: Optimizer, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> None:
        super().__init__(team, module, optimizer)
        self.module = _shard(copy.deepcopy(module), team)
        self.optimizer = make_optimizer(self.module)
        for mine, all_of_it in self._pairs():
            state = optimizer.state[all_of_it]
            self.optimizer.state[mine] = {name: _part(value, mine) for name, value in state.items()}
        if not team.is_first:
            optimizer.state.clear()
            for weight in module.parameters():
                weight.data = weight.new_empty(0)

    @contextmanager
    def passing(self, is_last: bool) -> Iterator[None]:  # noqa: ARG002 every pass is alike
        """Gradients are averaged in every pass, since whole ones are what no process is to hold."""
        with warnings.catch_warnings():  # that a layer's output is a view does no harm where nothing is done in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield

    def gradient_norm(self) -> Tensor:
        """The norm of all processes' parts."""
        return _full(super().gradient_norm())

    @torch.no_grad()
    def collect_weights(self) -> None:
        """Fill `whole` in the first process."""
        for mine, all_of_it in zip(self.module.parameters(), self.whole.parameters(), strict=True):
            weight = _full(mine)
            if self.team.is_first:
                all_of_it.copy_(weight)
        for buffer, of_whole in zip(self.module.buffers(), self.whole.buffers(), strict=True):
            of_whole.copy_(buffer)

    @torch.no_grad()
    def collect_optimizer(self) -> None:
        """Fill the state of `whole_optimizer` in the first process."""
        for mine, all_of_it in self._pairs():
            state = {name: _full(value) for name, value in self.optimizer.state[mine].items()}
            if self.team.is_first:
                self.whole_optimizer.state[all_of_it] = {name: value.cpu() for name, value in state.items()}

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        groups = zip(self.optimizer.param_groups, self.whole_optimizer.param_groups, strict=True)
        for mine, all_of_it in groups:
            yield from zip(mine["params"], all_of_it["params"], strict=True)


def _shard(module: M, team: Team) -> M:
    """Shard each layer of each list of layers, and what is left as one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(module.parameters()).device.type, (team.size,))
    for layers in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
            register_fsdp_forward_method(layer, "run")
    fully_shard(module, mesh=mesh)
    return module


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process' part of a tensor, cut as `like` is; a number is everyone's."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    if tensor.dim() == 0:
        return tensor.to(like.device, copy=True)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parallel(
    kind: Literal["ddp", "fsdp"],
    team: Team,
    module: M,
    optimizer: Optimizer,
    make_optimizer: Callable[[nn.Module], Optimizer],
) -> Parallel[M]:
    """A module and its optimizer, as the team trains them; the same on every process before."""
    if team.size == 1:
        return Parallel(team, module, optimizer)
    match kind:
        case "ddp":
            return Replicated(team, module, optimizer)
        case "fsdp":
            return Sharded(team, module, optimizer, make_optimizer)
        case _:
            assert_never(kind)
