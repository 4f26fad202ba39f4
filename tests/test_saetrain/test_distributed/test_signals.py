"""Runs that a signal stops, and their exit.json."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import saetrain.training.step
from actcache.errors import CacheBusyError, RunError
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.signals import RunStopped, StopSignals
from saetrain.launch.run import EXIT, fit
from saetrain.runs.checkpoint import newest_step
from saetrain.runs.record import RUN

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]


class Interrupted(KeyboardInterrupt):
    """Raised by the handlers that are installed before `fit`."""

    exit_code = 143


@pytest.fixture(autouse=True)
def _raising_handlers() -> Iterator[None]:
    """Install handlers that raise, as the command line does."""

    def stop(*_: Any) -> None:
        raise Interrupted

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_status(root: Path | str) -> tuple[int, str, int]:
    status = json.loads((Path(root) / EXIT).read_text())
    assert status.keys() == {"code", "reason", "step"}
    return status["code"], status["reason"], status["step"]


def send_in_step(monkeypatch: pytest.MonkeyPatch, at: int, *numbers: signal.Signals) -> None:
    """Send signals in step `at` (from 0), between the first hookpoint's update and the second's."""
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == at and trainer.entry.hookpoint == "layers.1":
            for sent in numbers:
                os.kill(os.getpid(), sent)
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_the_run_resumes_from_it(
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    whole, stopped = options(out=options().out + "-whole"), options(save_every=100)
    fit(whole)
    with monkeypatch.context() as patch:
        send_in_step(patch, 6, number)
        with pytest.raises(RunStopped, match=f"{number.name}: step 7 is saved; --resume") as caught:
            fit(stopped)
    root = Path(stopped.out)
    assert (caught.value.exit_code, caught.value.step) == (code, 7)
    assert f"fit: {number.name}: saving at the next step" in capfd.readouterr().err
    assert newest_step(root) == 7
    assert exit_status(root) == (code, number.name, 7)
    with pytest.raises(Interrupted):  # the previous handler is restored
        os.kill(os.getpid(), number)
    assert fit(dataclasses.replace(stopped, resume=True)).new_steps == 5
    assert exit_status(root) == (0, "finished", 12)
    assert snapshot(Path(whole.out)) == snapshot(root)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(
    options: Options, monkeypatch: pytest.MonkeyPatch, second: signal.Signals
) -> None:
    config = options(save_every=3)
    send_in_step(monkeypatch, 6, signal.SIGTERM, second)
    with pytest.raises(Interrupted):
        fit(config)
    assert newest_step(Path(config.out)) == 6
    assert exit_status(config.out) == (143, "SIGTERM", 6)


def test_a_signal_in_the_last_step_lets_the_run_finish(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_step(monkeypatch, 11, signal.SIGTERM)
    assert fit(options()).steps == 12
    assert exit_status(options().out) == (0, "finished", 12)


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is done that could be saved, and verifying all shards may take minutes."""
    from actcache.stream.activation_stream import ActivationStream

    def take(stream: ActivationStream) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ActivationStream, "__next__", take)
    with pytest.raises(Interrupted):
        fit(options())
    assert exit_status(options().out) == (143, "SIGTERM", 0)


def test_a_run_that_waits_for_the_harvest_stops_without_another_step(
    make_cache: Callable[..., Path], options: Options, snapshot: Snapshot, tmp_path: Path
) -> None:
    path = make_cache()
    common = {"cache": str(path), "follow": True, "segment_shards": 2, "max_tokens": 320}
    common["val_fraction"] = 0.0
    whole, config = options(**common, out=options().out + "-whole"), options(**common)
    fit(whole)
    late = [path / "shards" / name for name in ("00002.json", "00003.json", "END.json")]
    for receipt in late:
        receipt.rename(tmp_path / receipt.name)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(RunStopped) as caught:
        fit(config)
    timer.join()
    assert exit_status(config.out) == (143, "SIGTERM", caught.value.step)
    assert 0 < caught.value.step < 10
    for receipt in late:
        (tmp_path / receipt.name).rename(receipt)
    fit(dataclasses.replace(config, resume=True))
    assert snapshot(Path(whole.out)) == snapshot(Path(config.out))


HANGS = """
import os, sys, threading, time
from actcache_cli.main import saetrain
from saetrain.training import loop

real, train = os.preadv, loop.train_batch
hangs = False

def preadv(*args):
    if hangs:
        time.sleep(600)
    return real(*args)

def train_batch(groups, batch, step):
    global hangs
    train(groups, batch, step)
    if step == 4:
        hangs = True
        print("hangs", flush=True)

os.preadv, loop.train_batch = preadv, train_batch
sys.argv = ["saetrain", *sys.argv[1:]]
saetrain()
"""


def test_a_signal_while_rows_do_not_come_saves_and_ends_the_command(options: Options) -> None:
    """The disk hangs for ten minutes."""
    config = options()
    words = ["fit", config.cache, "--out", config.out, "--hookpoint", "layers.0", "--k", "2"]
    words += ["--num-latents", "16", "--batch-size", "32", "--epochs", "1000"]
    words += ["--verify", "never", "--pool-rows", "64", "--save-every", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    time.sleep(3)  # until what was read ahead is used up
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "terminated: SIGTERM: step " in stderr
    assert json.loads((Path(config.out) / "exit.json").read_text())["code"] == 143
    assert newest_step(Path(config.out)) is not None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_stopped_while_waiting_for_its_first_segment_writes_exit_json_and_starts_later(
    make_cache: Callable[..., Path],
    options: Options,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    """A launcher swallows the exit code, and the first segment may take hours."""

    class Stopped(KeyboardInterrupt):
        exit_code = code

    def stop(*_: Any) -> None:
        raise Stopped

    signal.signal(number, stop)
    path = make_cache()
    config = options(cache=str(path), follow=True, segment_shards=4, max_tokens=64, resume=True)
    late = path / "shards" / "00003.json"
    late.rename(tmp_path / late.name)
    (path / "shards" / "END.json").rename(tmp_path / "END.json")
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(Stopped):
        fit(config)
    timer.join()
    assert exit_status(config.out) == (code, number.name, 0)
    assert [found.name for found in Path(config.out).iterdir()] == [EXIT]
    (tmp_path / late.name).rename(late)
    (tmp_path / "END.json").rename(path / "shards" / "END.json")
    assert fit(config).steps == 2
    assert exit_status(config.out) == (0, "finished", 2)


def test_a_signal_before_the_folder_check_writes_nothing_among_foreign_files(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr("saetrain.launch.run.find_run", stop)
    root = Path(options().out)
    root.mkdir()
    (root / "notes").write_text("")
    with pytest.raises(Interrupted):
        fit(options())
    assert [found.name for found in root.iterdir()] == ["notes"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop_signals:
        stop_signals.install()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signals.received is signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_within_the_repeat_window_counts_as_the_first_and_a_later_one_as_second() -> None:
    with StopSignals() as stop_signals:
        stop_signals.repeat_window = 0.2
        stop_signals.install()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        stop_signals.install()
        assert stop_signals.received is signal.SIGINT
        time.sleep(0.2)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals() as stop_signals:
        stop_signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        stop_signals.ignore_further()  # as after the last checkpoint
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_fit_outside_the_main_thread_installs_no_handlers(options: Options) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(fit(options())))
    thread.start()
    thread.join()
    assert [summary.steps for summary in found] == [12]


# --- exit.json -----------------------------------------------------------------------------------


def test_exit_json_records_an_error_with_its_code_and_the_saved_step(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(lr=1e25)
    with pytest.raises(RunError):
        fit(config)
    code, reason, step = exit_status(config.out)
    assert (code, step) == (RunError.exit_code, 0)
    assert reason.startswith("NonFiniteError: the loss of layers.0 is not finite")


def test_exit_json_records_an_unexpected_exception_with_code_1(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(trainer: Any, rows: Any, number: int) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(ValueError, match=r"^$"):
            fit(options())
    assert exit_status(options().out) == (1, "ValueError", 0)


def test_a_running_fit_has_removed_the_exit_json_of_the_call_before(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = options(save_every=3), []
    with monkeypatch.context() as patch:
        send_in_step(patch, 6, signal.SIGTERM)
        with pytest.raises(RunStopped):
            fit(config)
    real = saetrain.training.step.train_step

    def look(*arguments: Any) -> None:
        seen.append((Path(config.out) / EXIT).exists())
        real(*arguments)

    monkeypatch.setattr(saetrain.training.step, "train_step", look)
    fit(dataclasses.replace(config, resume=True))
    assert not any(seen)


def test_a_fit_that_is_refused_writes_no_exit_json(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, real = options(), saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == 4:
            with pytest.raises(CacheBusyError):
                fit(dataclasses.replace(config, resume=True))
            assert not (Path(config.out) / EXIT).exists()
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)
    fit(config)
    before = (Path(config.out) / EXIT).read_bytes()
    with pytest.raises(RunError, match="holds a run already"):
        fit(config)
    assert (Path(config.out) / EXIT).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(RunError):
        fit(options(out=str(tmp_path / "other")))
    assert not (tmp_path / "other" / EXIT).exists()
    assert (Path(config.out) / RUN).exists()
