"""Work on a CUDA device as a graph: recorded once, replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from actcache.errors import ConfigError

Work = Callable[[], None]


class Recorder(Protocol):
    """What records; `CudaGraphs`, or a test's."""

    def run(self, work: Work) -> None:
        """Do some work now, as it is done before it can be recorded."""

    def record(self, work: Work) -> Work:
        """Record some work, which the device does not do yet; what is returned does it."""


class CudaGraphs:
    """Records work on a CUDA device, on a stream of its own, where it is also warmed up.

    After "whole network capture" in torch's notes on CUDA semantics.

    Args:
        device: whose work it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Work) -> None:
        """Do some work now, after what is under way, and before what follows."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Record some work. Waits for the device, this once."""
        graph = torch.cuda.CUDAGraph()
        # Other threads read rows and allocate pinned memory meanwhile, which is no part of it.
        mode = "thread_local"
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode),
        ):
            work()

        def replay() -> None:
            with torch.cuda.device(self._device):  # which need not be the current one
                graph.replay()

        return replay


def require_cuda_graphs(device: torch.device) -> None:
    """Raise `ConfigError` where there is no CUDA to record its graphs."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ConfigError(
            "--cuda-graphs needs a CUDA device",
            expected="cuda",
            got=str(device),
            remedy="leave it out",
        )
