"""A sealed file covers all of its own bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit
from saetrain.runs.record import FORMAT_VERSION, RUN, read_run
from saetrain.runs.seal import read_sealed, require_seal, seal_json

OBJECT: dict[str, Any] = {"format_version": 2, "text": "héllo", "numbers": [1, 0.5, 1e-30, None]}


def test_what_was_sealed_is_read_back_without_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(seal_json(OBJECT))
    assert read_sealed(path) == (OBJECT, True)
    path.write_bytes(seal_json(json.loads(path.read_text())))  # sealed anew
    assert read_sealed(path) == (OBJECT, True)
    path.write_text(json.dumps(OBJECT | {"seal": None}))
    assert read_sealed(path) == (OBJECT, False)


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    data = seal_json(OBJECT)
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(FormatError, match=r"file\.json"):
                require_seal(path, read_sealed(path)[1], 2)


@pytest.mark.parametrize(
    "text",
    ["[]", "0", '{"seal": 3}', '{"seal": {}}', '{"a": 1e999, "seal": "x"}', "[" * 99999, "\xff"],
    ids=range(7),
)
def test_contents_that_were_never_sealed_are_no_seal_or_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"file\.json"):
        require_seal(path, read_sealed(path)[1], 2)


def test_a_record_of_the_first_format_has_no_seal_and_a_later_one_must(
    options: Callable[..., FitConfig],
) -> None:
    config = options()
    fit(config)
    root = Path(config.out)
    record, text = read_run(root), (root / RUN).read_text()
    assert record.format_version == FORMAT_VERSION == 2
    unsealed = json.loads(text)
    del unsealed["seal"]
    first = unsealed | {"format_version": 1}
    for damaged in (json.dumps(unsealed).encode(), seal_json(first)):
        (root / RUN).write_bytes(damaged)
        with pytest.raises(FormatError, match=r"run\.json is damaged"):
            read_run(root)
    (root / RUN).write_text(json.dumps(first))
    assert read_run(root).format_version == 1
