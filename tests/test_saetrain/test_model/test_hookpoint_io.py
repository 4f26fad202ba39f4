from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.cache.reader import Cache
from actcache.errors import HookpointError
from saetrain.config.fit_config import FitConfig
from saetrain.model.hookpoint_io import assign_hookpoints


def test_a_hookpoint_may_have_the_name_of_another_library(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = Cache.open(make_cache())

    def chosen(*names: str) -> list[str]:
        config = FitConfig(str(cache.root), out=str(tmp_path), hookpoint=names)
        return [roles.name for roles in assign_hookpoints(config, cache)]

    assert chosen("blocks.1.hook_resid_post") == ["layers.1"]
    assert chosen("transformer.h.1", "blocks.*.hook_resid_post") == ["layers.0", "layers.1"]
    with pytest.raises(HookpointError, match=r"(?s)'blocks\.2\.hook_resid_post'.*layers\.0 \| lay"):
        chosen("blocks.2.hook_resid_post")
