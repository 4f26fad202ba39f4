"""Program that the tests start on every rank: runs, one after another.

`processes.py JOBS.json`: a list of jobs, each the options of a run
and what the test changes about it:

- float64: weights of that type;
- copy: [step, folder]: once that checkpoint is final, the run is copied to the folder;
- unreadable: [rank, step], whose batch that rank cannot read;
- damaged: a file, in which rank 0 flips a bit before the run;
- signal: [rank, step], in which that rank receives SIGTERM;
- fails: an error or a stop is expected; every rank writes its text to OUT.error.RANK.

Every rank that finishes writes its new steps, its warnings and whether it opened Weights & Biases
to OUT.result.RANK.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import saetrain.distributed.coordinator
import saetrain.distributed.process_group
import saetrain.launch.run
import saetrain.runs.checkpoint
import saetrain.training.loop
import saetrain.training.sae_trainer
from actcache.errors import ActcacheError, CorruptShardError
from actcache.stream.activation_stream import Batch
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeOptions
from saetrain.distributed.signals import RunStopped
from saetrain.model.sae import Sae, build_sae

RANK = os.environ.get("RANK", "0")


def run_job(job: dict[str, Any]) -> None:
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in job["options"].items()}
    options["saes"] = tuple(SaeOptions(**sae) for sae in options.get("saes", ()))
    saetrain.training.sae_trainer.build_sae = double if job.get("float64") else build_sae
    saetrain.distributed.coordinator.finalize_checkpoint = (
        partial(finalize, job["copy"]) if "copy" in job else REAL_FINALIZE
    )
    saetrain.distributed.coordinator.next = partial(next_batch, *job.get("unreadable", (-1, -1)))
    saetrain.training.loop.train_batch = partial(train_batch, *job.get("signal", (-1, -1)))
    opened: list[str] = []
    saetrain.training.loop.open_wandb = lambda *_: opened.append("opened")
    if "damaged" in job and RANK == "0":
        flip(Path(job["damaged"]))
    config = FitConfig(**options)
    if "fails" not in job:
        summary = saetrain.launch.run.fit(config)
        result = {"new_steps": summary.new_steps, "warnings": summary.warnings, "wandb": opened}
        result |= {"held_out": summary.held_out, "findings": len(summary.findings)}
        Path(f"{config.out}.result.{RANK}").write_text(json.dumps(result))
        return
    try:
        saetrain.launch.run.fit(config)
    except (ActcacheError, RunStopped) as error:
        text = f"{type(error).__name__} {error.exit_code}: {error}"
        Path(f"{config.out}.error.{RANK}").write_text(text)
    else:
        raise AssertionError(f"the job did not fail: {job}")


def double(*arguments: Any, **options: Any) -> Sae:
    return build_sae(*arguments, **options | {"dtype": torch.float64})


REAL_FINALIZE = saetrain.runs.checkpoint.finalize_checkpoint


def finalize(copy: tuple[int, str], root: Path, step: int, *rest: Any) -> None:
    REAL_FINALIZE(root, step, *rest)
    if step == copy[0]:
        shutil.copytree(root, copy[1])


REAL_TRAIN_BATCH = saetrain.training.loop.train_batch


def train_batch(rank: int, at: int, groups: Any, batch: Any, step: int) -> None:
    REAL_TRAIN_BATCH(groups, batch, step)
    if step == at and str(rank) == RANK:
        os.kill(os.getpid(), signal.SIGTERM)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def next_batch(rank: int, step: int, stream: Any, end: None) -> Any:
    batch = next(stream, end)
    if isinstance(batch, Batch) and batch.step == step and str(rank) == RANK:
        raise CorruptShardError("shard 1 has changed")
    return batch


def run_all(jobs: Path) -> None:
    # A rank that fails does not exit, so the others would wait 5 heartbeats for its end.
    saetrain.distributed.process_group.HEARTBEAT_SECONDS = 0.05
    for job in json.loads(jobs.read_text()):
        run_job(job)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
