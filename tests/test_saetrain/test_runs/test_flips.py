"""Any flipped bit of a run's files is found by the next command, or changes nothing that is read.

A resume and an evaluation are checked as far as their files go: what they read of the run, without
training and without rows.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ActcacheError, FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import _check_files as check_of_evaluation
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.launch.setup import _check_files as check_of_resume
from saetrain.runs.checkpoint import differing_file, load_checkpoint, newest_state
from saetrain.runs.record import check_same_cache, read_run
from saetrain.runs.segments import read_used
from saetrain.tracking.jsonl import METRICS, TIMINGS, JsonlTracker, last_line

Options = Callable[..., FitConfig]
UNREAD = ("exit.json", "eval.json", "fit.lock")
"""Files that no command reads."""
KINDS = ("finished", "stopped", "follow")


@pytest.fixture
def make_run(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Path, Cache]]:
    """A function that makes a small run of a kind, and opens its cache."""

    def make(kind: str) -> tuple[Path, Cache]:
        small = {"hookpoint": ("layers.0",), "num_latents": 8, "k": 2, "optimizer": "adam"}
        config = options(
            **small,
            log_every=2,
            save_every=4,
            val_every=4,
            save_best=True,
            out=options().out + kind,
        )
        if kind == "follow":
            config = options(
                **small, follow=True, segment_shards=2, val_fraction=0, out=options().out + kind
            )
        real = saetrain.training.step.train_step

        def step(trainer: Any, rows: Any, number: int) -> None:
            if kind == "stopped" and number == 7:
                raise KeyboardInterrupt
            real(trainer, rows, number)

        with monkeypatch.context() as patch:
            patch.setattr(saetrain.training.step, "train_step", step)
            try:
                fit(config)
            except KeyboardInterrupt:
                assert kind == "stopped"
        if kind == "finished":
            evaluate(config.out)
        return Path(config.out), Cache.open(config.cache)

    return make


def resumed(root: Path, cache: Cache) -> object:
    """Return all that a resumed run takes from its folder."""
    record = read_run(root)
    check_same_cache(record, cache)
    used = read_used(root, record, cache) if record.segment_shards is not None else None

    def fell_back(error: FormatError, _: int) -> None:
        raise error

    check = functools.partial(check_of_resume, root, record)
    loaded = load_checkpoint(root, None, check, fell_back)
    assert loaded is not None
    state, tensors = loaded
    arrays = [{name: t.numpy().tobytes() for name, t in sorted(of.items())} for of in tensors]
    assert state.metrics is not None
    lines = (root / METRICS).read_bytes()[: state.metrics.bytes]
    tracker = JsonlTracker(root, state.step, record.steps, 32)
    tracker.bar.close()
    for file in tracker._files.values():
        file.close()
    timings = last_line(root / TIMINGS)
    assert timings is not None
    return record, used, state, arrays, lines, timings["mean_rows_per_second"]


def evaluated(root: Path, cache: Cache) -> object:
    """Return all that an evaluation takes from a run's folder."""
    record = read_run(root)
    check_same_cache(record, cache)
    if record.segment_shards is not None:
        read_used(root, record, cache)
    state = newest_state(root)
    assert state is not None
    check_of_evaluation(root, record, state)
    for entry, sae in zip(record.saes, state.saes, strict=True):
        if path := differing_file(root / entry.name, sae):
            raise FormatError(f"{path} is not that of the last checkpoint")
    metrics = last_line(root / METRICS, state.step, "saes")
    timings = last_line(root / TIMINGS, state.step)
    if timings is None or metrics is None or timings["step"] != metrics["step"]:
        raise FormatError(f"{root} lost {METRICS} or {TIMINGS}")
    return record, state, metrics, timings["mean_rows_per_second"]


def flips(data: bytes, each: int, random: random.Random) -> list[tuple[int, int]]:
    """Choose one bit in every run of `each` bytes."""
    return [
        (random.randrange(start, min(start + each, len(data))), random.randrange(8))
        for start in range(0, len(data), each)
    ]


def outcome(read: Callable[[Path, Cache], object], root: Path, cache: Cache) -> tuple[object, str]:
    try:
        return read(root, cache), ""
    except ActcacheError as error:
        return None, str(error)


def check_flips(root: Path, cache: Cache, each: Callable[[Path, bytes], int]) -> int:
    """Flip bits of every file in turn; return how many were tried."""
    contents = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    readers = (resumed, evaluated)
    whole = [read(root, cache) for read in readers]
    # The first resume has removed lines after the checkpoint.
    tried, chosen = 0, random.Random(0)
    for path, data in contents.items():
        for at, bit in flips(data, each(path, data), chosen):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            tried += 1
            for read, expected in zip(readers, whole, strict=True):
                for other in (METRICS, TIMINGS):
                    (root / other).write_bytes(contents[root / other])
                path.write_bytes(flipped)
                place = f"{path.name}, byte {at}, bit {bit}: {read.__name__}"
                found, error = outcome(read, root, cache)
                if not error:
                    assert found == expected, place
                elif path.name not in error or path.name in UNREAD:
                    assert path.name == TIMINGS, f"{place}: {error}"
                    assert f"{METRICS} or {TIMINGS}" in error, f"{place}: {error}"
        path.write_bytes(data)
    return tried


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_flipped_bits_is_found_or_harmless(
    make_run: Callable[[str], tuple[Path, Cache]], kind: str
) -> None:
    root, cache = make_run(kind)
    assert check_flips(root, cache, lambda _, data: max(1, len(data) // 8)) > 60


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_of_every_position_are_found_or_harmless(
    make_run: Callable[[str], tuple[Path, Cache]], kind: str
) -> None:
    root, cache = make_run(kind)

    def each(path: Path, data: bytes) -> int:
        return max(1, len(data) // 400) if path.suffix == ".safetensors" else 1

    assert check_flips(root, cache, each) > 4000


def test_evaluate_itself_names_a_flipped_file(
    make_run: Callable[[str], tuple[Path, Cache]],
) -> None:
    root, _ = make_run("finished")
    names = ["run.json", METRICS, "layers.0/cfg.json", "layers.0/sae.safetensors"]
    names += ["checkpoint-000000012.json", "checkpoint-000000012.00000.safetensors"]
    for name in names:
        data = (root / name).read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        (root / name).write_bytes(flipped)
        with pytest.raises(ActcacheError, match=name):
            evaluate(root)
        (root / name).write_bytes(data)
    evaluate(root)
