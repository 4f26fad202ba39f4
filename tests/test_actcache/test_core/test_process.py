from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actcache.core.process import (
    CUDA_BYTES,
    available_memory,
    choose_device,
    library_memory,
    peak_memory,
    require_whole_machine,
    resident_memory,
    use_device,
)
from actcache.errors import ConfigError
from actcache.model.hooks import input_device


def test_an_unusable_device_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=rf"(?s)--device cannot be used.*got: +{name}"):
            choose_device(name)


def test_auto_chooses_the_gpu_of_the_local_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"(?s)--device cannot be used.*got: +cuda:3"):
        choose_device("auto")  # there are fewer GPUs than processes
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    assert choose_device("auto") == torch.device("cuda", 3)


def test_cuda_without_an_index_is_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda", 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_the_device_in_use_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert use_device("cuda:1") == torch.device("cuda", 1)
    assert use_device("cpu") == torch.device("cpu")
    assert current == [torch.device("cuda", 1)]


def test_mps_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))  # as on a Mac
    with pytest.raises(ConfigError) as refused:
        choose_device("mps")
    assert refused.value.what == (
        "--device mps is not supported: it has no float64 numbers, in which sums are taken"
    )


def test_one_function_sets_the_device_of_a_process() -> None:
    root = Path(__file__).parents[3]
    sources = [p for part in ("actcache", "saetrain", "cli") for p in (root / part).rglob("*.py")]
    setting = [p.name for p in sources if "cuda.set_device" in p.read_text()]
    assert setting == ["process.py"]


def test_the_input_device_is_that_of_the_first_weights_or_of_their_hook() -> None:
    model = torch.nn.Linear(2, 2, device="meta")
    assert input_device(model).type == "meta"
    model._hf_hook = SimpleNamespace(execution_device=None)  # of one device alone
    assert input_device(model).type == "meta"
    model._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert input_device(model) == torch.device("cuda", 1)
    assert input_device(torch.nn.Linear(2, 2)).type == "cpu"


@pytest.mark.parametrize(
    ("environment", "allowed"),
    [
        ({}, True),
        ({"WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, True),  # one on each of two machines
    ],
)
def test_device_map_is_refused_with_several_processes_on_a_machine(
    environment: dict[str, str], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if allowed:
        require_whole_machine()
        return
    with pytest.raises(ConfigError, match=r"(?s)--device-map auto.*got: +[24] processes.*torchrun"):
        require_whole_machine()


def system(root: Path, groups: dict[str, str], **files: str) -> Path:
    texts = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\nSwapFree: 1000 kB\n"}
    texts |= {"proc/self/status": "Name: x\nVmSize: 100 kB\n"} | groups | files
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_available_memory_is_that_of_the_machine_or_of_the_tightest_control_group(
    tmp_path: Path,
) -> None:
    assert available_memory(system(tmp_path / "free", {})) == 6000 * 1024
    second = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": "1000000\n",
        "sys/fs/cgroup/job/memory.current": "700000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 100000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": "5\n",
    }
    assert available_memory(system(tmp_path / "v2", second)) == 400_000
    first = {
        "proc/self/cgroup": "5:memory:/job\n4:cpu:/job\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
    }
    assert available_memory(system(tmp_path / "v1", first)) == 2000


def test_available_memory_respects_the_limit_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200 * 1024, 200 * 1024))
    assert available_memory(system(tmp_path, {})) == 100 * 1024


def test_the_memory_of_the_libraries_is_what_the_process_holds_without_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 50e6 < resident_memory() <= peak_memory()
    monkeypatch.setattr("actcache.core.process.resident_memory", lambda: 900)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert library_memory(cpu) == 900
    assert library_memory(cpu, 300) == 600
    assert library_memory(cpu, 1000) == 0
    assert library_memory(gpu) == 900 + CUDA_BYTES
