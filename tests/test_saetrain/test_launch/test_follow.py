"""`saetrain fit --follow`: the same run whenever shards are published, stopped or not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import actcache.stream.activation_stream
import actcache.stream.segments
import saetrain.runs.segments
import saetrain.training.checkpointing
import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.core.json_codec import read_json, to_json
from actcache.errors import CacheMismatchError, ConfigError, FormatError, RunError
from actcache.filesystem.lock import DirectoryLock
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.checkpoint import newest_step
from saetrain.runs.record import RUN, read_run
from saetrain.runs.segments import SEGMENTS, HarvestWaitNotice

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

EPOCH = 4 + 8 + 4 + 2
"""Steps: shards 0 and 4 are held out, two shards per segment, the last shard is short."""


def stderr_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on stderr, without that on read settings and what training shows."""
    lines = capsys.readouterr().err.splitlines()
    other = ("rows are mixed in memory", "training needs about", "are dead at step", "FVU")
    return [line for line in lines if not any(text in line for text in other)]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (actcache.stream.segments, saetrain.runs.segments):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(actcache.stream.activation_stream, "_TIMEOUT", 0.02)


@pytest.fixture(scope="module")
def whole(make_cache: Callable[..., Path]) -> Path:
    """Make a complete cache of seven shards of 128 rows, the last of 80, not to be changed."""
    return make_cache(shards=7, last_sequences=5)


class Growing:
    """Copy of a cache, of which shards are published one after another."""

    def __init__(self, whole: Path, root: Path) -> None:
        self.root, self._whole = root, whole
        shutil.copytree(whole, root)
        self.hide()

    def hide(self) -> None:
        for path in (self.root / "shards").iterdir():
            path.unlink()

    def publish(self, *names: int | str) -> None:
        for name in names:
            file = "END.json" if name == "END" else f"{name:05d}.json"
            shutil.copy(self._whole / "shards" / file, self.root / "shards" / f".{file}")
            (self.root / "shards" / f".{file}").rename(self.root / "shards" / file)


ALL: tuple[int | str, ...] = (*range(7), "END")


@pytest.fixture
def growing(whole: Path, tmp_path: Path) -> Growing:
    return Growing(whole, tmp_path / "growing")


@pytest.fixture
def following(options: Options, whole: Path) -> Options:
    """Return options with --follow: segments of two shards, a quarter held out."""

    def make(**changes: Any) -> FitConfig:
        base = {"cache": str(whole), "follow": True, "segment_shards": 2, "val_fraction": 0.25}
        return options(**base | changes)

    return make


@pytest.fixture
def beside() -> Iterator[Callable[..., None]]:
    """Publish shards from a thread during the test."""
    threads = []

    def start(work: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def only_changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


class Killed(BaseException):
    """Stands in for a signal."""


def stop_in_step(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == stop_at and trainer.entry.hookpoint == "layers.1":
            raise Killed
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)


# --- a function of cache and options -------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "order"),
    [("signum", ALL), ("adam", (1, 0, 3, 2, 6, 4, 5, "END"))],
    ids=["ascending", "ranks"],
)
def test_a_run_during_the_harvest_equals_one_after_it(
    whole: Path,
    growing: Growing,
    following: Options,
    beside: Callable[..., None],
    snapshot: Snapshot,
    optimizer: str,
    order: tuple[int | str, ...],
) -> None:
    after = following(optimizer=optimizer, epochs=2, out=following().out + "-after")
    assert fit(after).steps == 2 * EPOCH
    config = following(optimizer=optimizer, epochs=2, cache=str(growing.root))

    def harvest() -> None:
        for name in order:
            time.sleep(0.1)
            growing.publish(name)

    beside(harvest)
    summary = fit(config)
    assert (summary.steps, summary.new_steps) == (2 * EPOCH, 2 * EPOCH)
    assert summary.warnings == ()
    assert summary.data_wait > 0
    assert only_changed(snapshot(Path(after.out)), snapshot(Path(config.out))) == []
    assert SEGMENTS in snapshot(Path(config.out))


@pytest.mark.parametrize("stop_at", [1, 4, 17, 18, 25])
def test_a_stopped_run_resumes_to_the_same_bytes_after_the_cache_has_grown(
    growing: Growing,
    following: Options,
    beside: Callable[..., None],
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    """Stopped inside segments, at their ends, in the last one, in the second epoch."""
    after = following(epochs=2, out=following().out + "-after")
    fit(after)
    config = following(epochs=2, cache=str(growing.root))
    there = [0, 1] if stop_at < 3 else [0, 1, 2, 3] if stop_at < 11 else list(range(6))
    growing.publish(*(there if stop_at < 15 else ALL))
    with monkeypatch.context() as patch:
        stop_in_step(patch, stop_at)
        with pytest.raises(Killed):
            fit(config)
    growing.publish(*(name for name in ALL if name not in there))
    summary = fit(dataclasses.replace(config, resume=True))
    assert summary.new_steps == 2 * EPOCH - stop_at // 3 * 3
    assert only_changed(snapshot(Path(after.out)), snapshot(Path(config.out))) == []


@pytest.mark.parametrize("stop_at", [None, 4, 25])
def test_an_extension_made_after_the_start_is_no_part_of_a_run(
    make_cache: Callable[..., Path],
    growing: Growing,
    following: Options,
    beside: Callable[..., None],
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int | None,
) -> None:
    """Made while the run waits, or while it is stopped."""
    after = following(epochs=2, out=following().out + "-after")
    fit(after)
    longer = make_cache(shards=7, last_sequences=5, extended_by=30)
    config = following(epochs=2, cache=str(growing.root))
    growing.publish(0, 1, 2, 3)

    def extend() -> None:
        """Publish the other shards; the seal of the first part is never there to be seen."""
        time.sleep(0.1)
        for folder in ("activations", "extensions", "tokens", "stats", "shards"):
            for source in sorted(path for path in (longer / folder).rglob("*") if path.is_file()):
                target = growing.root / source.relative_to(longer)
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = shutil.copyfile(source, target.with_name(f".{target.name}"))
                partial.rename(target)  # what is there may be being read

    if stop_at is None:
        beside(extend)
        fit(config)
    else:
        if stop_at > 12:
            growing.publish(*ALL)
        with monkeypatch.context() as patch:
            stop_in_step(patch, stop_at)
            with pytest.raises(Killed):
                fit(config)
        extend()
        fit(dataclasses.replace(config, resume=True))
    assert Cache.open(growing.root).complete
    assert len(Cache.open(growing.root).shards) > 7
    assert only_changed(snapshot(Path(after.out)), snapshot(Path(config.out))) == []


def test_a_run_of_one_segment_equals_one_without_segments(
    whole: Path, options: Options, snapshot: Snapshot
) -> None:
    """The rows left over at the end are the same, too."""
    common = {"cache": str(whole), "val_fraction": 0.25, "epochs": 2}
    plain = options(**common, out=options().out + "-plain")
    config = options(**common, follow=True, segment_shards=99)
    fit(plain)
    fit(config)
    changed = only_changed(snapshot(Path(plain.out)), snapshot(Path(config.out)))
    state = [name for name in changed if name.startswith("checkpoint") and name.endswith(".json")]
    assert changed == [*state, SEGMENTS]  # the position holds a segment's number


def test_mean_variance_and_the_record_are_those_of_the_first_segment(
    whole: Path, following: Options
) -> None:
    config = following(lr=1e-30, max_tokens=32, auxk_alpha=0.0)
    fit(config)
    cache, record = Cache.open(whole), read_run(Path(config.out))
    assert (record.segment_shards, record.training_shards, record.held_out) == (2, [1], (0,))
    mean = cache.statistics("layers.0", [1]).mean
    b_dec = load_file(Path(config.out) / "layers.0" / "sae.safetensors")["b_dec"]
    np.testing.assert_allclose(b_dec.numpy(), mean, rtol=1e-6)


def test_a_segment_is_pinned_when_it_is_first_used(growing: Growing, following: Options) -> None:
    growing.publish(*range(6))
    config = following(cache=str(growing.root), max_tokens=12 * 32)
    assert fit(config).steps == 12  # two segments; later ones are not waited for
    cache = Cache.open(growing.root)
    assert read_json(Path(config.out) / SEGMENTS, sealed=True) == {
        "segments": [
            {"first_shard": n, "last_shard": n + 1, "receipts_digest": cache.digest([n, n + 1])}
            for n in (0, 2)
        ],
        "last_shard": None,
    }


def test_more_tokens_than_rows_repeat_the_same_segments(
    following: Options, snapshot: Snapshot
) -> None:
    epochs, tokens = (
        following(epochs=2, out=following().out + "-e"),
        following(max_tokens=2 * EPOCH * 32),
    )
    fit(epochs)
    fit(tokens)
    changed = only_changed(snapshot(Path(epochs.out)), snapshot(Path(tokens.out)))
    assert changed == [f"checkpoint-{2 * EPOCH:09d}.json"]  # the position of an endless stream


def test_by_default_segments_fill_the_shuffle_buffer(options: Options, whole: Path) -> None:
    config = options(cache=str(whole), follow=True, pool_rows=300, batch_size=2, max_tokens=2)
    fit(config)
    assert read_run(Path(config.out)).segment_shards == 3


# --- steps ---------------------------------------------------------------------------------------


def edit(path: Path, **fields: Any) -> None:
    path.write_bytes(to_json(json.loads(path.read_text()) | fields, sealed=True))


def goal(root: Path, sequences: int | None) -> None:
    edit(root / "manifest.json", planned_sequences=sequences)


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_run_ends_with_the_text_and_warns_of_the_planned_steps(
    growing: Growing, following: Options, optimizer: str, snapshot: Snapshot
) -> None:
    goal(growing.root, 8 * 8)
    growing.publish(*ALL)
    edit(growing.root / "shards" / "END.json", reason="text")
    config = following(cache=str(growing.root), optimizer=optimizer, epochs=2)
    summary = fit(config)
    assert (summary.steps, summary.rows) == (2 * EPOCH, 2 * EPOCH * 32)
    assert read_run(Path(config.out)).steps == 2 * (4 + 8 + 4 + 8)
    (warning,) = summary.warnings
    assert "ended after 36 of 48 planned steps" in warning
    assert ("learning rate" in warning) == (optimizer == "adam")
    evaluation = evaluate(Path(config.out))
    assert (evaluation.step, evaluation.steps) == (36, 36)
    before = snapshot(Path(config.out))
    again = fit(dataclasses.replace(config, resume=True))
    assert (again.steps, again.new_steps) == (36, 0)
    assert again.saes == summary.saes
    assert only_changed(before, snapshot(Path(config.out))) == []


def test_a_harvest_without_a_goal_needs_max_tokens_until_it_is_complete(
    growing: Growing, following: Options
) -> None:
    goal(growing.root, None)
    growing.publish(*range(6))
    config = following(cache=str(growing.root))
    with pytest.raises(ConfigError, match=r"no goal(.|\n)*--max-tokens N"):
        fit(config)
    assert not Path(config.out).exists()
    assert fit(dataclasses.replace(config, max_tokens=320, out=config.out + "-10")).steps == 10
    growing.publish(*ALL)
    assert fit(config).steps == EPOCH


def test_a_batch_that_the_first_segment_cannot_fill_is_refused_before_waiting(
    growing: Growing, following: Options
) -> None:
    config = following(cache=str(growing.root), batch_size=129)
    with pytest.raises(ConfigError, match=r">= 129(.|\n)*128 in 1 shards(.|\n)*--segment-shards"):
        fit(config)
    assert not Path(config.out).exists()


def test_a_last_segment_shorter_than_a_batch_is_skipped_and_pinned(
    following: Options, snapshot: Snapshot
) -> None:
    config = following(batch_size=96, epochs=2, log_every=1, save_every=1)
    assert fit(config).steps == 2 * (1 + 2 + 1)
    used = json.loads((Path(config.out) / SEGMENTS).read_text())
    assert (len(used["segments"]), used["last_shard"]) == (4, 6)
    assert fit(dataclasses.replace(config, resume=True)).new_steps == 0


# --- waiting -------------------------------------------------------------------------------------


def test_waiting_prints_one_line_per_segment_and_no_warning_while_the_harvest_runs(
    growing: Growing,
    following: Options,
    beside: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited, notify = threading.Event(), HarvestWaitNotice.__call__

    def note(waiting: HarvestWaitNotice, shard: int) -> None:
        notify(waiting, shard)
        waited.set()

    monkeypatch.setattr(HarvestWaitNotice, "__call__", note)
    lock = DirectoryLock(growing.root)
    lock.acquire()
    config = following(cache=str(growing.root))

    def harvest() -> None:
        waited.wait(60)
        for name in ALL:
            time.sleep(0.1)
            growing.publish(name)
        lock.release()

    beside(harvest)
    fit(config)
    lines = stderr_lines(capsys)
    assert lines[0] == "fit: waiting for shard 0 of the harvest"
    assert len(lines) <= 5
    assert all(line.startswith("fit: waiting for shard ") for line in lines)


def test_a_cache_without_a_running_harvest_gives_one_warning(
    growing: Growing,
    following: Options,
    beside: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    growing.publish(0, 1)
    config = following(cache=str(growing.root))

    def harvest() -> None:
        while newest_step_of(Path(config.out)) is None:
            time.sleep(0.01)
        time.sleep(0.2)
        growing.publish(*ALL)

    beside(harvest)
    assert fit(config).steps == EPOCH
    first, second = stderr_lines(capsys)
    assert first == "fit: waiting for shard 2 of the harvest"
    assert second.startswith(f"warning: no harvest is at work in {growing.root}; run its harvest")


def newest_step_of(root: Path) -> int | None:
    return newest_step(root) if root.is_dir() else None


def test_steps_are_saved_while_a_run_waits_so_that_a_stop_loses_none(
    growing: Growing, following: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = following(out=following().out + "-after", save_every=1000, log_every=1000)
    fit(after)
    config = following(cache=str(growing.root), save_every=1000, log_every=1000)
    for there, done in (((0, 1), 3), ((2, 3), 11)):  # the last batch waits for the next segment
        growing.publish(*there)
        with monkeypatch.context() as patch:
            real = saetrain.training.checkpointing.save

            def save(*arguments: Any, real: Any = real) -> None:
                real(*arguments)
                raise KeyboardInterrupt

            patch.setattr(saetrain.training.checkpointing, "save", save)
            with pytest.raises(KeyboardInterrupt):
                fit(dataclasses.replace(config, resume=True))
        assert newest_step(Path(config.out)) == done
        assert evaluate(Path(config.out)).step == done
    growing.publish(*ALL)
    assert fit(dataclasses.replace(config, resume=True)).new_steps == EPOCH - 11
    (Path(config.out) / "eval.json").unlink()
    assert only_changed(snapshot(Path(after.out)), snapshot(Path(config.out))) == []


def test_a_stop_before_the_first_segment_leaves_only_exit_json(
    growing: Growing, following: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saetrain.runs.segments.time.sleep", stop)
    config = following(cache=str(growing.root))
    with pytest.raises(KeyboardInterrupt):
        fit(config)
    assert [path.name for path in Path(config.out).iterdir()] == ["exit.json"]


def test_a_shard_retracted_after_completion_gives_a_warning_and_is_waited_for(
    growing: Growing,
    following: Options,
    beside: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    growing.publish(*(name for name in ALL if name != 3))
    config = following(cache=str(growing.root))

    def repair() -> None:
        while newest_step_of(Path(config.out)) is None:
            time.sleep(0.01)
        time.sleep(0.1)
        growing.publish(3)

    beside(repair)
    fit(config)
    first, second = stderr_lines(capsys)
    assert first == "fit: waiting for shard 3 of the harvest"
    assert "no harvest is at work" in second


# --- refusals ------------------------------------------------------------------------------------


def test_a_used_segment_with_changed_or_missing_receipts_is_refused_by_its_number(
    growing: Growing, following: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.publish(*ALL)
    config = following(cache=str(growing.root), resume=True)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        with pytest.raises(Killed):
            fit(config)
    later, receipt = (growing.root / "shards" / f"0000{n}.json" for n in (5, 3))
    later.unlink()  # not used yet
    text = receipt.read_text()
    text = text.replace('"xxh3_128": "', '"xxh3_128": "0', 1)
    receipt.write_bytes(to_json(json.loads(text), sealed=True))
    for work in (lambda: fit(config), lambda: evaluate(Path(config.out))):
        with pytest.raises(CacheMismatchError, match=r"segment 1 \(shards 2 to 3\) .* has changed"):
            work()
    receipt.unlink()
    with pytest.raises(CacheMismatchError, match=r"segment 1(.|\n)*without \[3\]"):
        fit(config)
    growing.publish(3, 5)
    assert fit(config).steps == EPOCH


@pytest.mark.parametrize(
    "damage",
    [
        lambda used: b"{",
        lambda used: to_json({"segments": used["segments"]}, sealed=True),
        lambda used: to_json(used | {"segments": used["segments"][1:]}, sealed=True),
        lambda used: to_json(
            used | {"segments": [used["segments"][0] | {"last_shard": -1}, *used["segments"][1:]]},
            sealed=True,
        ),
        lambda used: to_json(
            used | {"segments": [used["segments"][0] | {"last_shard": 2}, *used["segments"][1:]]},
            sealed=True,
        ),
    ],
    ids=["cut", "missing", "shifted", "empty", "long"],
)
def test_a_damaged_record_of_segments_is_refused(
    following: Options, damage: Callable[[Any], bytes]
) -> None:
    config = following(resume=True)
    fit(config)
    path = Path(config.out) / SEGMENTS
    path.write_bytes(damage(json.loads(path.read_text())))
    with pytest.raises(FormatError, match=r"segments\.json"):
        fit(config)


@pytest.mark.parametrize(
    "stream", [{"epoch": 0, "segment": 1, "step": 4}, {"epoch": 0, "step": 9}, {}], ids=str
)
def test_a_checkpoint_at_another_position_is_refused(
    following: Options, monkeypatch: pytest.MonkeyPatch, stream: dict[str, int]
) -> None:
    config = following(resume=True)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 10)
        with pytest.raises(Killed):
            fit(config)
    (path,) = Path(config.out).glob("checkpoint-*.json")
    state = json.loads(path.read_text())
    assert state["stream"] == {"epoch": 0, "segment": 1, "step": 5}
    path.write_bytes(to_json(state | {"stream": stream}, sealed=True))
    with pytest.raises(FormatError, match="checkpoint of another run"):
        fit(config)


def test_a_run_that_lost_its_record_of_segments_is_refused(following: Options) -> None:
    config = following(resume=True)
    fit(config)
    (Path(config.out) / SEGMENTS).unlink()
    with pytest.raises(FormatError, match="checkpoint of another run"):
        fit(config)


def test_follow_cannot_change_on_resume(following: Options) -> None:
    config = following()
    fit(config)
    other = dataclasses.replace(config, follow=False, segment_shards=None, resume=True)
    with pytest.raises(RunError, match=r"--follow: True then, False now"):
        fit(other)
    path = Path(config.out) / RUN
    run = json.loads(path.read_text())
    for shards in (0, None):
        path.write_bytes(to_json(run | {"segment_shards": shards}, sealed=True))
        with pytest.raises(FormatError, match=r"segments that cannot be|segment_shards is out"):
            read_run(Path(config.out))


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_uses_all_shards_held_out_so_far(growing: Growing, following: Options) -> None:
    growing.publish(0, 1)
    config = following(cache=str(growing.root), max_tokens=4 * 32)
    fit(config)
    assert evaluate(Path(config.out)).rows == 128
    growing.publish(*ALL)
    evaluation = evaluate(Path(config.out))
    assert (evaluation.rows, evaluation.step, evaluation.steps) == (256, 4, 4)


# --- the commands --------------------------------------------------------------------------------


@pytest.mark.soak
def test_concurrent_commands_give_the_same_bytes_as_consecutive_ones(
    tiny_model: Path, prose_file: Path, snapshot: Snapshot, fork_server: Any, tmp_path: Path
) -> None:
    """Ctrl-C ends a waiting fit with its exit code, one line, and all steps saved."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    harvest = ["harvest", tiny_model, prose_file, "--out", cache, "--ctx-len", 16, "--batch-size"]
    harvest += [2, "--shard-size", 4, "--hookpoint", "layers.1", "--max-tokens", 16 * 60]
    first = fork_server.start("actcache", *harvest)
    out, err = first.communicate()
    assert first.returncode == 0, err
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for path in sorted((cache / "shards").iterdir())[4:]:
        path.rename(hidden / path.name)
    options = ["--expansion-factor", 2, "--k", 4, "--batch-size", 32, "--val-fraction", 0.2]
    options += ["--follow", "--segment-shards", 4, "--epochs", 2, "--log-every", 1]
    fitting = fork_server.start("saetrain", "fit", cache, "--out", run, *options)
    deadline = time.monotonic() + 120
    while newest_step_of(run) is None and time.monotonic() < deadline and fitting.poll() is None:
        time.sleep(0.05)
    fitting.send_signal(signal.SIGINT)
    _, err = fitting.communicate()
    assert fitting.returncode == 130, err
    waiting = [line for line in err.splitlines() if "waiting" in line]
    assert waiting[0] == "fit: waiting for shard 4 of the harvest"
    assert err.count("no harvest is at work") == 1
    assert newest_step(run) == 4  # 3 shards of 60 rows: 5 steps, the last one waits
    again = fork_server.start("saetrain", "fit", cache, "--out", run, *options, "--resume")
    # It writes the shards without a receipt again.
    harvesting = fork_server.start("actcache", *harvest)
    for process in (again, harvesting):
        out, err = process.communicate()
        assert process.returncode == 0, err
    after = fork_server.start("saetrain", "fit", cache, "--out", tmp_path / "after", *options)
    out, err = after.communicate()
    assert after.returncode == 0, err
    assert only_changed(snapshot(tmp_path / "after"), snapshot(run)) == []
    evaluation = fork_server.start("saetrain", "eval", run)
    out, err = evaluation.communicate()
    assert evaluation.returncode == 0, err
    assert "held-out rows" in out
    assert "unfinished" not in out
