from __future__ import annotations

import os
import select
import stat
import threading
from pathlib import Path

import pytest

from actcache.errors import ConfigError
from actcache.filesystem.output import require_output, write_output


def test_a_new_or_plain_file_is_replaced_whole(tmp_path: Path) -> None:
    for data in (b"first", b"second"):
        write_output(tmp_path / "folder" / "page", data, "--html")
        assert (tmp_path / "folder" / "page").read_bytes() == data
    assert os.listdir(tmp_path / "folder") == ["page"]  # noqa: PTH208


def test_a_link_and_a_folder_are_refused_and_stay(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "dangling", "folder"):
        with pytest.raises(ConfigError, match=rf"--html .*{name}(.|\n)*remedy"):
            write_output(tmp_path / name, b"page", "--html")
        with pytest.raises(ConfigError):
            require_output(tmp_path / name, "--html")
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "folder", "link", "victim"]  # noqa: PTH208


@pytest.mark.parametrize("marks", [["manifest.json", "shards/00000.json"], ["run.json"]])
def test_a_place_within_a_cache_or_run_is_refused(
    marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mark in marks:
        (tmp_path / "ours" / mark).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ours" / mark).write_text("{}")
    (tmp_path / "link").symlink_to("ours")
    monkeypatch.chdir(tmp_path / "ours")
    for place in (*marks, "page", tmp_path / "ours" / "logs" / "page", tmp_path / "link" / "page"):
        with pytest.raises(ConfigError, match="within the cache or run"):
            write_output(Path(place), b"page", "--html")
    assert (tmp_path / "ours" / marks[0]).read_text() == "{}"
    write_output(tmp_path / "page", b"page", "--html")


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="a pipe that another program reads"):
        write_output(pipe, b"page", "--html")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    data = bytes(range(256)) * 1000  # more than a pipe holds

    def read() -> None:
        select.select([reader], [], [])  # until there is a writer: before, the pipe is at its end
        got.append(file.read())

    with os.fdopen(reader, "rb") as file:
        thread = threading.Thread(target=read)
        thread.start()
        write_output(pipe, data, "--html")
        thread.join()
    assert got == [data]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_descriptors_and_devices_are_written_to(capfd: pytest.CaptureFixture[str]) -> None:
    write_output(Path("/dev/null"), b"page", "--html")
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)
    write_output(Path("/dev/stdout"), b"page", "--html")
    reader, writer = os.pipe()
    write_output(Path(f"/dev/fd/{writer}"), b"piped", "--html")
    os.close(writer)
    assert os.read(reader, 10) == b"piped"
    os.close(reader)
    with pytest.raises(ConfigError, match="an open descriptor"):
        write_output(Path("/dev/fd/987654"), b"page", "--html")
    assert capfd.readouterr().out == "page"
