"""The element-wise operations of dense activations: compiled, or on some rows at a time.

One after another, JumpReLU's and gated's would read or write [N, M] numbers in memory about ten
times, forward and backward. By torch.compile these are two or three times; each function is
compiled once per process, for all N and M. Else, on a CPU, JumpReLU makes all of them on some rows
before the next ones, so that what lies between them stays in the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from os import environ
from typing import TypeVar

import torch
from torch import Tensor

_BYTES = 1 << 22
"""Bytes of each tensor at once, for each thread of a CPU: with less, threads wait more for each
other; with more, each result takes fresh memory, which the system fills with zeros."""

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


def by_rows(function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
    """Apply an element-wise function to tensors [N, M], on a CPU to some of their rows at a time.

    Not differentiable. The results are those of the whole tensors, bit for bit.
    """
    like = given[0]
    if torch.compiler.is_compiling() or like.device.type != "cpu":
        return function(*given)
    rows = 1 + _BYTES * torch.get_num_threads() // max(1, like[:1].nbytes)
    if rows >= len(like):
        return function(*given)
    wholes: tuple[Tensor, ...] = ()
    for begin in range(0, len(like), rows):
        parts = function(*(whole[begin : begin + rows] for whole in given))
        wholes = wholes or tuple(p.new_empty(len(like), *p.shape[1:]) for p in parts)
        for whole, part in zip(wholes, parts, strict=True):
            whole[begin : begin + rows] = part
    return wholes
