from __future__ import annotations

import subprocess
import sys

import pytest

import actcache


def test_every_public_name_is_itself_whatever_was_imported_before() -> None:
    import actcache.cache.verify
    import actcache.harvester.run
    import actcache.inspection
    import actcache.stream.activation_stream

    for name in actcache.__all__:
        assert getattr(actcache, name).__name__ == name
        assert name in dir(actcache)


def test_other_names_are_missing_in_the_usual_way() -> None:
    with pytest.raises(AttributeError, match="module 'actcache' has no attribute 'nothing'"):
        actcache.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import actcache, sys; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout == b"set()\n"
