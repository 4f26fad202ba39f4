"""Time of a training step of each kind of SAE, relative to plain TopK.

    python benchmarks/bench_kinds.py [--pairs 11] [--threads 1] [--smoke]

The trainer's own step with Adam, weights in float32, kinds in turns. "reference" is the same step
with SAETRAIN_KERNELS=reference: for dense activations, what autograd makes of it. "dead" has 2,000
latents that count as dead, so that AuxK learns from them; elsewhere none is. Milliseconds are the
clock's; with --threads 1, on a CPU, the thread's own. Letters: N tokens, D d_in, M num_latents,
K k.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import checkout  # noqa: F401  saetrain, from a plain checkout too
import torch
from bench_train_step import rows
from report import machine, print_table
from rivals import entry_of

from saetrain.config.sae import SaeConfig
from saetrain.model.activations.compiled import missing_compiler
from saetrain.model.losses import make_loss_config
from saetrain.model.sae import build_sae
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_step

SIZE, SMOKE = (2048, 576, 4608, 32), (64, 24, 320, 4)
DEAD = {SIZE: 2000, SMOKE: 100}
WARM_UP = 3
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, dead": {},
    "topk, Multi-TopK": {"multi_topk": True},
    "topk, 3 prefixes": {"matryoshka": True},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu": {"activation": "relu", "sparsity": 0.01},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.01, "threshold": 0.1},
    "gated": {"activation": "gated", "sparsity": 0.01},
}
DENSE = ("relu", "jumprelu", "gated")
COMPILED = ("jumprelu", "gated")


def main() -> None:
    """Measure every kind, then print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11, help="steps of each kind, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--smoke", action="store_true", help="a size that takes seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_one = device.type == "cpu" and options.threads == 1
    times = measure(SMOKE if options.smoke else SIZE, options.pairs, device, thread_time=on_one)
    plain = statistics.median(times["topk"])
    lines = []
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        over = f"**{middle / plain:.2f}x**"
        lines.append([name, f"{middle:.0f}", f"{low:.0f} to {high:.0f}", over])
    print(f"{machine('triton')}, {options.threads} threads\n")
    print_table(["kind", "ms", "quartiles", "of topk's"], lines)


def measure(
    size: tuple[int, int, int, int], pairs: int, device: torch.device, *, thread_time: bool
) -> dict[str, list[float]]:
    """Milliseconds of each contender's steps."""
    x = rows(*size[:2], device)
    steps: dict[str, Callable[[int], None]] = {name: maker(size, name, x) for name in KINDS}
    if missing_compiler(device) is None:
        steps |= {f"{name}, --compile": maker(size, name, x, compiled=True) for name in COMPILED}
    steps |= {f"{name}, reference": by_reference(maker(size, name, x)) for name in DENSE}
    clock = time.thread_time if thread_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + pairs):
        for name, step in steps.items():
            began = clock()
            step(number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((clock() - began) * 1e3)
    return {name: taken[WARM_UP:] for name, taken in times.items()}


def maker(
    size: tuple[int, int, int, int], name: str, x: torch.Tensor, *, compiled: bool = False
) -> Callable[[int], None]:
    """A step of a fresh SAE of a kind on rows x [N, D]."""
    _, D, M, K = size
    kind = dict(KINDS[name])
    if kind.get("matryoshka"):
        kind["matryoshka"] = (M // 8, M // 4, M // 2)
    config = SaeConfig(D, M, K, **kind)
    sae = build_sae(config, device=x.device)
    loss_config = make_loss_config(config, 0)
    dead = DEAD[size] if name.endswith("dead") else 0
    trainer = SaeTrainer(
        entry_of(config, 1e-4),
        sae,
        make_optimizer("adam", sae, 1e-4, 0, 1000),
        1 if dead else 10**9,
        float((x - x.mean(0)).pow(2).sum() / len(x)),
        loss_config,
        StepSettings(compile=compiled, auxk_alpha=1 / 32),
    )

    def step(number: int) -> None:
        if dead:
            trainer.dead_tracker.rows_since.zero_()
            trainer.dead_tracker.rows_since[:dead] = 1
        train_step(trainer, x, number)

    return step


def by_reference(step: Callable[[int], None]) -> Callable[[int], None]:
    """The same by the kernels' reference."""

    def run(number: int) -> None:
        os.environ["SAETRAIN_KERNELS"] = "reference"
        try:
            step(number)
        finally:
            del os.environ["SAETRAIN_KERNELS"]

    return run


if __name__ == "__main__":
    main()
