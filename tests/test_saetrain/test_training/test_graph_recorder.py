"""What records work, as far as it can be told where there is no CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actcache.errors import ConfigError
from saetrain.training.cuda_graphs import CudaGraphs, require_cuda_graphs


def test_work_is_warmed_up_and_recorded_on_one_stream_beside_that_which_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch.cuda is asked for, in order; it is not there."""
    asked: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def wait_stream(self, other: Stream) -> None:
            asked.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what: str) -> Iterator[None]:
        asked.append(what)
        yield
        asked.append(f"end of {what}")

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "current_stream", lambda device: Stream(f"that of {device}"))
    monkeypatch.setattr(cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(cuda, "device", lambda device: within(str(device)))
    monkeypatch.setattr(
        cuda,
        "graph",
        lambda graph, stream, capture_error_mode: within(f"{stream.name}, {capture_error_mode}"),
    )
    recorder = CudaGraphs(torch.device("cuda", 1))
    recorder.run(lambda: asked.append("work"))
    there = "that of cuda:1"
    before, after = f"side waits for {there}", f"{there} waits for side"
    assert asked == [before, "side", "work", "end of side", after]
    asked.clear()
    replay = recorder.record(lambda: asked.append("work"))
    mode = "side, thread_local"
    assert asked == ["cuda:1", mode, "work", f"end of {mode}", "end of cuda:1"]
    asked.clear()
    replay()
    assert asked == ["cuda:1", "replay", "end of cuda:1"]


def test_only_a_cuda_device_records() -> None:
    with pytest.raises(ConfigError, match=r"--cuda-graphs needs a CUDA device(.|\n)*cpu"):
        require_cuda_graphs(torch.device("cpu"))
