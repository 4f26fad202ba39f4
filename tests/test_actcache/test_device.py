from __future__ import annotations

import pytest
import torch

from actcache.device import choose_device
from actcache.errors import ConfigError


def test_devices_are_checked_by_use() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=rf"(?s)--device cannot be used.*got: +{name}"):
            choose_device(name)


def test_auto_is_the_rank_of_the_machine_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda", 3)
