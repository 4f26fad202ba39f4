"""The text that several processes of a harvest tokenise together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.core.process import World
from actcache.errors import ModelError
from actcache.harvester import job
from actcache.harvester.resolve import goal_sequences, resolve
from actcache.harvester.run import harvest
from actcache.harvester.shares import share_text

Options = Callable[..., HarvestConfig]

pytestmark = pytest.mark.usefixtures("warm_model")


def folder_of(config: HarvestConfig, world_size: int = 2) -> str | None:
    root, goal = Path(config.out), goal_sequences(config)
    shared = share_text(config, resolve(config), root, World(0, world_size), goal)
    return shared and shared._path(0).parent.name


def test_all_that_decides_the_tokens_is_in_the_name_of_their_folder(options: Options) -> None:
    name = folder_of(options())
    assert name is not None
    assert name.startswith(".text-")
    assert folder_of(options(), 3) == name
    for changes in ({"seed": 1}, {"ctx_len": 32}, {"bos": "never"}, {"pipeline": "crop"}):
        assert folder_of(options(**changes)) != name
    assert folder_of(options(), 1) is None


def test_another_cache_gets_no_tokenised_text(options: Options) -> None:
    harvest(options())
    assert folder_of(options()) is not None
    assert folder_of(options(seed=1)) is None


def test_tokenised_text_is_no_leftover_and_goes_when_the_cache_is_complete(
    options: Options,
) -> None:
    root = Path(harvest(options()).cache)
    block = root / ".text-0123456789abcdef-256" / "00000.ids"
    block.parent.mkdir()
    block.write_bytes(b"of a killed harvest")
    found = verify(root)
    assert found.is_sound
    assert found.leftovers == ()
    (root / "shards" / "END.json").unlink()
    assert harvest(options()).complete
    assert not block.parent.exists()
    block.parent.mkdir()
    block.write_bytes(b"of a harvest that was killed after it had written the seal")
    assert harvest(options()).complete
    assert not block.parent.exists()


def test_a_harvest_that_is_refused_stops_tokenising(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_model", Mock(side_effect=ModelError("too large")))
    with pytest.raises(ModelError, match="too large"):
        job.prepare_job(options(max_tokens=None), World(0, 2))
    assert not [t for t in threading.enumerate() if "_run_ahead" in t.name]
