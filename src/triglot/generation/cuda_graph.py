"""Work on a GPU that is recorded once and launched together from then on."""

from collections.abc import Callable

import torch

WARM_UP = 3
"""Times that work is done before it is captured, in which libraries make ready what they need."""


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work as a CUDA graph, which reads and writes the memory that it does; on a processor the work itself."""
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph, stream=beside):
            work()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay
