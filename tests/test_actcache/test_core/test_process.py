from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from actcache.core.process import choose_device, require_whole_machine
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
    assert choose_device("auto") == torch.device("cuda", 3)


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
