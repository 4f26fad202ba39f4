"""Compilation of the element-wise operations of dense activations by torch.compile.

Uncompiled, JumpReLU and gated read or write [N, M] numbers in memory about ten times, forward and
backward; compiled, two or three times. Each function is compiled once per process, for all N and M.
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
    """Compile a function for tensors of any size, once per process."""
    made: F = torch.compile(function, dynamic=True)  # type: ignore[assignment]
    return made


def missing_compiler(device: torch.device) -> str | None:
    """Name what torch.compile lacks on a device (a compiler or triton); None: nothing."""
    if device.type != "cpu":
        return None if find_spec("triton") else "the package triton"
    named = [environ["CXX"]] if environ.get("CXX") else ["g++", "clang++"]
    return None if any(map(shutil.which, named)) else f"a C++ compiler ({' or '.join(named)})"
