"""Harvests that format version 2 left half finished, under `tests/golden/harvests-v2/`.

Today's code must read, verify and finish them in the bytes of their own version. They were made by
the command line from the model and text of `tests/golden/runs-v1/`, whose numbers are exact on any
machine, and from what `write_inputs` derives from these. Then all but the first of five shards
were deleted: that is what a harvest leaves that was killed. `expected.json` holds the XXH3-128 of
every file of the finished harvests.

`python tests/test_actcache/test_harvester/test_earlier_harvests.py` writes them anew, with
whichever version is installed. These are from the last commit of format version 2.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from actcache.filesystem.atomic import digest_file

GOLDEN = Path(__file__).parents[2] / "golden"
BEGUN = GOLDEN / "harvests-v2"
COMMON = (
    "--hookpoint wte --ctx-len 17 --shard-size 8 --batch-size 4 --max-tokens 680 --dtype bfloat16"
)
HARVESTS = {
    "text": "model text.jsonl",
    "windows": "model text.jsonl --pipeline crop --exclude-special",
    "chat": "chat-model talks.jsonl --chat-column talk",
    "ids": "model ids.jsonl --token-column ids",
    "rows": "model rows.jsonl --token-column ids",
    "stream": "model parts --streaming --shuffle-buffer 16",
    "mixture": "model text.jsonl --mix parts --weight 2 --weight 1",
}
TEMPLATE = """
{%- for m in messages -%}
{{ '<|' + m.role + '|>' + m.content + '</s>\\n' }}
{%- endfor -%}
"""
"""The last token of a conversation is not EOS, so that version 2 added one."""


def write_inputs(folder: Path) -> None:
    """Write the models and the texts that the harvests read."""
    shutil.copytree(GOLDEN / "runs-v1" / "model", folder / "model")
    shutil.copytree(folder / "model", folder / "chat-model")
    (folder / "chat-model" / "chat_template.jinja").write_text(TEMPLATE)
    text = (GOLDEN / "runs-v1" / "text.jsonl").read_text()
    (folder / "text.jsonl").write_text(text)
    documents = [json.loads(line)["text"].split() for line in text.splitlines()]
    talks = [
        [{"role": "user", "content": " ".join(d[:9])}, {"role": "it", "content": " ".join(d[9:])}]
        for d in documents
    ]
    ids = [[5 + (3 * i + len(d)) % 290 for i in range(len(d))] for d in documents]
    rows = [(3 * line)[:17] for line in ids]
    for name, key, values in (
        ("talks", "talk", talks),
        ("ids", "ids", ids),
        ("rows", "ids", rows),
    ):
        lines = [json.dumps({key: value}) + "\n" for value in values]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "parts").mkdir()
    for number in range(2):
        part = "".join(text.splitlines(keepends=True)[number::2])
        (folder / "parts" / f"{number}.jsonl").write_text(part)


def line(name: str) -> list[str]:
    return f"harvest {HARVESTS[name]} {COMMON} --out {name}".split()


def digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(root)): digest_file(path).xxh3_128 for path in files}
    return {name: digest for name, digest in found.items() if not name.startswith("logs/")}


@pytest.fixture
def actcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs `actcache` in a folder with the inputs, and returns its exit code."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (script,) = entry_points(group="console_scripts", name="actcache")

    def run(*arguments: str) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["actcache", *arguments])
            with pytest.raises(SystemExit) as ended:
                script.load()()
        return ended.value.code or 0

    return run


@pytest.mark.parametrize("name", HARVESTS)
def test_a_harvest_of_format_version_2_is_finished_in_the_same_bytes(
    name: str, actcache: Callable[..., object]
) -> None:
    root = shutil.copytree(BEGUN / name, Path(name))
    assert actcache("verify", name) == 0
    assert actcache(*line(name)) == 0
    assert digests(root) == json.loads((BEGUN / "expected.json").read_text())[name]
    assert actcache("verify", name) == 0


def test_a_harvest_of_format_version_2_is_extended_in_its_own_version(
    actcache: Callable[..., object],
) -> None:
    shutil.copytree(BEGUN / "text", "text")
    longer = [*line("text"), "--max-tokens", "816", "--extend"]
    assert actcache(*longer) == 0
    assert actcache(*line("text")[:-1], "whole", "--max-tokens", "816") == 0
    manifest = json.loads(Path("text/manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert "seal" in json.loads(Path("text/extensions/00001.json").read_text())
    for number in range(6):
        part = f"activations/wte/{number:05d}.safetensors"
        assert Path("text", part).read_bytes() == Path("whole", part).read_bytes()
    assert actcache("verify", "text") == 0


def test_a_harvest_of_format_version_2_is_not_finished_with_another_tokenizer(
    actcache: Callable[..., object], capfd: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(BEGUN / "text", Path("text"))
    before = digests(root)
    path = Path("model/tokenizer.json")
    parts = json.loads(path.read_text())
    other = {"type": "Replace", "pattern": {"String": "window"}, "content": "door"}
    parts["normalizer"] = other  # the fingerprint of version 2 does not notice it
    path.write_text(json.dumps(parts))
    assert actcache(*line("text")) != 0
    error = capfd.readouterr().err
    assert "other tokens in sequence" in error
    assert "tokenizer" in error
    assert digests(root) == before


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        write_inputs(Path(made))
        expected = {}
        for harvest in HARVESTS:
            command = [str(Path(sys.executable).with_name("actcache")), *line(harvest)]
            subprocess.run(command, check=True, cwd=made)
            root = Path(made) / harvest
            expected[harvest] = digests(root)
            shutil.rmtree(root / "logs")
            (root / "shards" / "END.json").unlink()
            for path in root.rglob("0000[1234].*"):
                path.unlink()
            shutil.rmtree(BEGUN / harvest, ignore_errors=True)
            shutil.copytree(root, BEGUN / harvest)
    (BEGUN / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
