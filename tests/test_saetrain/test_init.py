from __future__ import annotations

import subprocess
import sys

import pytest

import saetrain


def test_every_public_name_is_itself_whatever_was_imported_before() -> None:
    import saetrain.evaluation
    import saetrain.formats.sparsify
    import saetrain.launch.run
    import saetrain.model.sae

    for name in saetrain.__all__:
        assert getattr(saetrain, name).__name__ == name
        assert name in dir(saetrain)


def test_other_names_are_missing_in_the_usual_way() -> None:
    with pytest.raises(AttributeError, match="module 'saetrain' has no attribute 'nothing'"):
        saetrain.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import saetrain, sys; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout == b"set()\n"
