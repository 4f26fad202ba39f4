"""Calls of torch.cuda that record and replay a CUDA graph, without CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actcache.errors import ConfigError
from saetrain.training.cuda_graphs import CudaGraphs, require_cuda_graphs


def test_work_is_warmed_up_and_recorded_on_one_side_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stubs log the calls of torch.cuda in order."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what: str) -> Iterator[None]:
        calls.append(what)
        yield
        calls.append(f"end of {what}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "current_stream", lambda device: Stream(f"current of {device}"))
    monkeypatch.setattr(cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(cuda, "device", lambda device: within(str(device)))
    monkeypatch.setattr(
        cuda,
        "graph",
        lambda graph, stream, capture_error_mode: within(f"{stream.name}, {capture_error_mode}"),
    )
    recorder = CudaGraphs(torch.device("cuda", 1))
    recorder.run(lambda: calls.append("work"))
    current = "current of cuda:1"
    before, after = f"side waits for {current}", f"{current} waits for side"
    assert calls == [before, "side", "work", "end of side", after]
    calls.clear()
    replay = recorder.record(lambda: calls.append("work"))
    mode = "side, thread_local"
    assert calls == ["cuda:1", mode, "work", f"end of {mode}", "end of cuda:1"]
    calls.clear()
    replay()
    assert calls == ["cuda:1", "replay", "end of cuda:1"]


def test_cuda_graphs_on_another_device_raise_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--cuda-graphs needs a CUDA device(.|\n)*cpu"):
        require_cuda_graphs(torch.device("cpu"))
