from __future__ import annotations

import subprocess
import sys

import pytest

import actcache


def test_every_public_name_is_there_whatever_was_imported_before() -> None:
    import actcache.harvester.run
    import actcache.stream.activation_stream
    import actcache.stream.order

    for name in actcache.__all__:
        found = getattr(actcache, name)
        assert isinstance(found, type), name
        assert found.__name__ == name


def test_other_names_are_missing_in_the_usual_way() -> None:
    with pytest.raises(AttributeError, match="module 'actcache' has no attribute 'nothing'"):
        actcache.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import actcache, sys; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout == b"set()\n"
