"""Time of a training step of each kind of SAE, against the floor of its matrix products.

    python benchmarks/bench_kinds.py [--pairs 11] [--threads 1] [--form transcoder] [--smoke]

The trainer's own step with Adam, weights in float32. Every kind is an autoencoder, a transcoder, a
skip transcoder and a crosscoder of two hookpoints (half as wide, so that all have the same D).
"dead" has 2,000 latents that count as dead, so that AuxK learns from them; elsewhere none is. The
floor is the time of the step's products, at the rate of the encoder's product alone by the faster
of two libraries, which takes its turn among the steps of each form; all else (selection, gathers,
element-wise passes, the optimiser) comes on top. "reference" is the same step with
SAETRAIN_KERNELS=reference: for dense activations, what autograd makes of it. Milliseconds are the
clock's; with --threads 1, on a CPU, the thread's own. Exit status 1 if a step takes over 2.5 times
its floor and `REASONS` has no reason for it; not with --smoke. Letters: N tokens, D d_in, M
num_latents, K k.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import checkout  # noqa: F401  saetrain, from a plain checkout too
import torch
from bench_train_step import rows
from report import machine, print_table
from rivals import entry_of

from saetrain.config.sae import SaeConfig
from saetrain.kernels.dense import Product
from saetrain.model.activations.compiled import missing_compiler
from saetrain.model.losses import OutputSlice, make_loss_config
from saetrain.model.sae import build_sae
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_step

Size = tuple[int, int, int, int]
SIZE, SMOKE = (2048, 576, 4608, 32), (64, 24, 320, 4)
DEAD = {SIZE: 2000, SMOKE: 100}
WARM_UP = 3
GOAL = 2.5
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "Multi-TopK": {"multi_topk": True},
    "3 prefixes": {"matryoshka": True},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu": {"activation": "relu", "sparsity": 0.01},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.01, "threshold": 0.1},
    "gated": {"activation": "gated", "sparsity": 0.01},
}
FORMS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "crosscoder": {},
}
PRODUCTS = {"relu": 5, "jumprelu": 5, "gated": 7}
"""Products of 2·N·D·M operations in a step: relu's and jumprelu's encoder, decoder and their three
gradients; gated decodes its gate too, with one gradient. Sparse kinds: the encoder alone."""
PRODUCT = "product"
COMPILED = ("jumprelu", "gated")
REASONS: dict[str, str] = {
    "Multi-TopK": "4k latents a row are selected, gathered and summed: no products",
    "batchtopk": "up to 4k slots a row are selected, gathered and summed: no products",
}
"""Why steps of a kind take over 2.5 times the floor."""


def main() -> int:
    """Measure every kind in every form, then print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11, help="steps of each kind, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--form", choices=FORMS, action="append", help="measure this form alone")
    parser.add_argument("--smoke", action="store_true", help="a size that takes seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_one = device.type == "cpu" and options.threads == 1
    size = SMOKE if options.smoke else SIZE
    lines, slow = [], []
    for form in options.form or FORMS:
        times = measure(size, form, options.pairs, device, thread_time=on_one)
        product = statistics.median(times.pop(PRODUCT))
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            floor = product * products(size, form, name)
            over, reason = middle / floor, REASONS.get(name.partition(",")[0], "")
            if over > GOAL and "reference" not in name and not reason:
                slow.append(f"{form}, {name}")
            line = [form, name, f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{floor:.0f}"]
            lines.append([*line, f"**{over:.2f}x**", reason if over > GOAL else ""])
    print(f"{machine('triton')}, {options.threads} threads\n")
    header = ["form", "kind", "ms", "quartiles", "floor, ms", "over floor"]
    print_table([*header, f"over {GOAL}, because"], lines)
    for name in slow:
        print(f"over {GOAL} times the floor, without a reason: {name}")
    return 1 if slow and not options.smoke else 0


def products(size: Size, form: str, name: str) -> float:
    """Count the matrix products of a step, in units of the encoder's, 2·N·D·M operations."""
    _, D, M, _ = size
    count = float(PRODUCTS.get(name.partition(",")[0], 1))
    if form == "skip":  # W_skip x, and the gradient of W_skip
        count += 2 * D / M
    if "dead" in name:  # AuxK's encoder, decoder and their three gradients
        count += 5 * DEAD[size] / M
    return count


def measure(
    size: Size, form: str, pairs: int, device: torch.device, *, thread_time: bool
) -> dict[str, list[float]]:
    """Milliseconds of each contender's steps, and of the encoder's product alone."""
    N, D, M, _ = size
    x = rows(N, D * (1 + ("transcode" in FORMS[form])), device)
    steps: dict[str, Callable[[int], None]] = {}
    for name in KINDS:
        steps[name] = maker(size, form, name, x)
        steps[f"{name}, dead"] = maker(size, form, name, x, dead=DEAD[size])
    if form == "autoencoder":
        if missing_compiler(device) is None:
            for name in COMPILED:
                steps[f"{name}, --compile"] = maker(size, form, name, x, compiled=True)
        for name in PRODUCTS:
            steps[f"{name}, reference"] = by_reference(maker(size, form, name, x))
    clock = time.thread_time if thread_time else time.perf_counter

    def milliseconds(run: Callable[[], object]) -> float:
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - began) * 1e3

    batch, W, b = x[:, :D].contiguous(), torch.randn(M, D, device=device), x.new_zeros(M)
    libraries = (partial(Product(W, b, N), batch), partial(torch.nn.functional.linear, batch, W, b))
    times: dict[str, list[float]] = {name: [] for name in (PRODUCT, *steps)}
    for number in range(WARM_UP + pairs):
        times[PRODUCT].append(min(map(milliseconds, libraries)))
        for name, step in steps.items():
            times[name].append(milliseconds(partial(step, number)))
    del steps
    gc.collect()  # the weights of a form, before those of the next one
    return {name: taken[WARM_UP:] for name, taken in times.items()}


def maker(
    size: Size, form: str, name: str, x: torch.Tensor, *, dead: int = 0, compiled: bool = False
) -> Callable[[int], None]:
    """A step of a fresh SAE of a kind and form on rows x, [N, D] or of a transcoder [N, 2 D]."""
    _, D, M, K = size
    kind = KINDS[name] | FORMS[form]
    if kind.get("matryoshka"):
        kind["matryoshka"] = (M // 8, M // 4, M // 2)
    config = SaeConfig(D, M, K, **kind)
    sae = build_sae(config, device=x.device)
    y = sae.split(x)[1]
    parts: tuple[OutputSlice, ...] = ()
    if form == "crosscoder":
        halves = torch.split(y, D // 2, dim=1)
        parts = tuple(OutputSlice(str(n), D // 2, variance(half)) for n, half in enumerate(halves))
    trainer = SaeTrainer(
        entry_of(config, 1e-4),
        sae,
        make_optimizer("adam", sae, 1e-4, 0, 1000),
        1 if dead else 10**9,
        variance(y),
        make_loss_config(config, 0, parts),
        StepSettings(compile=compiled, auxk_alpha=1 / 32),
    )

    def step(number: int) -> None:
        if dead:
            trainer.dead_tracker.rows_since.zero_()
            trainer.dead_tracker.rows_since[:dead] = 1
        train_step(trainer, x, number)

    return step


def variance(rows: torch.Tensor) -> float:
    """Mean of ‖y - mean‖² over rows."""
    return float((rows - rows.mean(0)).pow(2).sum() / len(rows))


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
    raise SystemExit(main())
