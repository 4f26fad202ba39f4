"""Where cases run, and launches of kernels that are inspected instead of made.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saetrain.kernels import UpdateOptions
from saetrain.kernels.sorted_pairs import Bags

OLD_NUMPY = ("-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
"""What triton 3.2's interpreter needs of NumPy, which does it until 2.3."""


@pytest.fixture
def device():
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


EVERY = "TRITON_CASES_EVERY"
"""Variable: of each parametrised function run one case in so many."""


def pytest_collection_modifyitems(config, items):
    every, functions, chosen = int(os.environ.get(EVERY, "1")), {}, []
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for number, cases in enumerate(functions.values()):
        first = number % min(every, len(cases))  # not of all functions the first
        chosen += cases[first::every]
    if every > 1:
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture
def run_cases():
    def run(files="cases_*.py", *arguments, every=1, **environment):
        """Run these in a process of its own and return how many cases passed.

        Whether kernels are interpreted is settled when Triton decorates them.
        """
        here = Path(__file__).parent
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OLD_NUMPY]
        environment[EVERY] = str(every)
        done = subprocess.run(
            [*command, *arguments, *map(str, sorted(here.glob(files)))],
            cwd=here.parents[3],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        passed = re.search(r"(\d+) passed", output)
        assert passed, output
        assert "skipped" not in output, output
        return int(passed[1])

    return run


class Launch(NamedTuple):
    """What Triton compiles a kernel for: two equal ones share what was compiled."""

    kernel: object
    signature: tuple
    constants: tuple
    divisible: tuple
    options: tuple


@pytest.fixture
def launches(monkeypatch):
    """A set that every launch goes into, instead of to a device: for tensors of device "meta"."""
    from triton.runtime.jit import JITFunction

    seen = set()

    def note(kernel, *args, grid, warmup, **kwargs):
        assert not warmup
        assert grid[0] < 2**31
        assert all(side < 2**16 for side in grid[1:])
        given = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: kwargs.pop(name) for name in list(kwargs) if name == "num_warps"}
        seen.add(specialised(kernel, given | kwargs, options))

    monkeypatch.setattr(JITFunction, "run", note)
    return seen


TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def specialised(kernel, given, options):
    """By Triton's rules: None and the number 1 are constants, and so is what is annotated.

    Whether a number is divisible by 16 counts, unless the kernel excludes it.
    """
    signature, constants, divisible = [], [], []
    for place, parameter in enumerate(kernel.params):
        value, free = given[parameter.name], parameter.do_not_specialize
        kind = None
        if isinstance(value, torch.Tensor):
            kind = "*" + TYPES[value.dtype]
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind = "fp32"
        elif isinstance(value, int) and not parameter.is_constexpr and (free or value != 1):
            kind = "i32" if value < 2**31 else "i64"
        if kind is None:
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor) or (kind[0] == "i" and value % 16 == 0 and not free):
            divisible.append(place)
        signature.append((parameter.name, kind or "constexpr"))
    every = (signature, constants, divisible, options.items())
    return Launch(kernel, *(tuple(each) for each in every))


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that is made, and the most of one."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        views = any(out.alias_info for out in operator._schema.returns)
        for tensor in [] if views else tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                size = tensor.numel() * tensor.itemsize
                self.total += size
                self.largest = max(self.largest, size)
        return result


@pytest.fixture
def allocations():
    return Allocations


class Step(NamedTuple):
    """All that the kernels of a step are given."""

    acts: torch.Tensor  # [N, K]
    g: torch.Tensor  # [N, K]
    indices: torch.Tensor  # [N, K]
    x: torch.Tensor  # [N, D]
    dY: torch.Tensor  # noqa: N815  [N, D]
    W: torch.Tensor  # [M, D]
    pre_acts: torch.Tensor  # [N, M]
    vector: torch.Tensor  # [M]
    ok: torch.Tensor  # []

    def run(self, ops):
        """Call every function of the path once."""
        M, k = len(self.W), self.acts.shape[1]
        ops.topk(self.pre_acts, k)
        ops.batch_topk_threshold(self.pre_acts, self.acts.numel())
        ops.group_max(self.pre_acts, k)
        ops.gather_sum(self.acts, self.indices, self.W)
        ops.gather_dot(self.dY, self.indices, self.W)
        ops.scatter_outer(self.acts, self.indices, self.dY, M)
        ops.scatter_sum(self.acts, self.indices, M)
        ops.weight_gradients(self.acts, self.dY, self.g, self.x, self.indices, M)
        self.by_bags(ops)
        self.update(ops)

    def by_bags(self, ops):
        """Two pieces a token."""
        acts, indices, dY, M = self.acts, self.indices, self.dY.repeat(2, 1), len(self.W)
        offsets = torch.empty(len(dY) + 1, dtype=torch.int64, device=dY.device)
        bags = Bags(indices, offsets)
        ops.gather_sum(acts, indices, self.W, bags)
        ops.gather_dot(dY, indices, self.W, bags=bags)
        ops.weight_gradients(acts, dY, self.g, self.x, indices, M, bags=bags)

    def update(self, ops):
        """Both optimisers, of both matrices and a bias."""
        state = [torch.empty_like(self.W, dtype=torch.float32) for _ in range(4)]
        bf16_copy = torch.empty_like(self.W, dtype=torch.bfloat16)
        squares = torch.empty(len(self.W), dtype=torch.float32, device=self.W.device)
        bias = [self.vector.float() for _ in range(4)]
        signum = {"lr": 1e-3, "mix": 0.1, "momentum": 0.95, "ok": self.ok}
        adam = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        for unit in (True, False):
            more = {"unit": unit, "squares": squares, "bf16_copy": bf16_copy}
            options = UpdateOptions(**signum, **more, norms=squares.clone())
            ops.signum_update_(*state[:3], options)
            ops.adam_update_(*state, UpdateOptions(**adam, **more, step=2, ok=self.ok))
            # As a step is recorded.
            numbers = torch.empty(5, device=self.W.device)
            options = UpdateOptions(**signum, **more, norms=squares, numbers=numbers)
            ops.signum_update_(*state[:3], options)
            options = UpdateOptions(**adam, **more, step=2, ok=self.ok, numbers=numbers)
            ops.adam_update_(*state, options)
        ops.signum_update_(*bias[:3], UpdateOptions(**signum))
        ops.adam_update_(*bias, UpdateOptions(**adam, step=2))


@pytest.fixture
def make_step():
    def make(N, D, M, K, dtype, device="meta"):
        def new(*shape, of=dtype):
            return torch.empty(*shape, dtype=of, device=device)

        acts, indices = new(N, K), new(N, K, of=torch.int64)
        ok = new((), of=torch.bool)
        return Step(
            acts, new(N, K), indices, new(N, D), new(N, D), new(M, D), new(N, M), new(M), ok
        )

    return make
