"""What stands between the products of dense activations, as few kernels, by torch.compile.

A jump or a gate goes over [N, M] numbers about ten times forward and backward, each time through
memory. Compiled, it is two or three times. Whatever N and M are, a function is compiled once in a
process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from os import environ
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


@cache
def compiled(function: F) -> F:
    """`function` compiled, for tensors of any sizes; one for the whole process."""
    made: F = torch.compile(function, dynamic=True)  # type: ignore[assignment]
    return made


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs on a device and does not find, in words; None: nothing."""
    if device.type != "cpu":
        return None if find_spec("triton") else "the package triton"
    named = [environ["CXX"]] if environ.get("CXX") else ["g++", "clang++"]
    return None if any(map(shutil.which, named)) else f"a C++ compiler ({' or '.join(named)})"
