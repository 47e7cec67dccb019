"""What training tells, for TensorBoard, too."""

from pathlib import Path

from triglot.checkpoint import Progress
from triglot.errors import ConfigError
from triglot.recipe import flat
from triglot.training.metrics import Line, MetricsLog

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ConfigError(
        "`--tensorboard` must be left out where `pip install 'triglot[tensorboard]'` was not done, but is given"
        f" instead ({error})."
    ) from error


class Board(MetricsLog):
    """The run's metrics.jsonl, and its numbers as event files in `tensorboard` beside it, by kind and name.

    Averaged weights are of no step, and go on a board's curves nowhere.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.writer: SummaryWriter | None = None

    def cut(self, progress: Progress) -> None:
        """Begin an event file that tells a board to forget what others say of the steps after `progress`."""
        super().cut(progress)
        self.writer = SummaryWriter(self.path.parent / "tensorboard", purge_step=progress.step + 1)

    def write(self, line: Line) -> None:
        """Append a line."""
        super().write(line)
        if self.writer is None:
            return
        for name, value in flat(line).items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def sync(self) -> None:
        """Have what is written on disk before a checkpoint says that it is."""
        super().sync()
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """End the event file."""
        if self.writer is not None:
            self.writer.close()
