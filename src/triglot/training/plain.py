"""The founding document's training step: one batch, one step of the optimizer."""

from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer


def train_step(
    model: nn.Module, batch: tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]], optimizer: Optimizer
) -> float:
    """Train `model` on (input_ids, targets), the targets already shifted, and return the loss before the step."""
    input_ids, targets = batch
    model.train()
    optimizer.zero_grad()
    _, loss = model(input_ids, targets)
    loss.backward()
    optimizer.step()
    return float(loss.item())
