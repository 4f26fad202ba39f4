"""The backend that serves a tensor, selected at call time, and what depends on the device alone."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from saetrain.kernels.sorted_pairs import Bags, SortedPairs

VARIABLE = "SAETRAIN_KERNELS"
BACKENDS = ("reference", "torch", "triton")
_MODULES = {
    "reference": "reference",
    "torch": "on_torch",
    "triton": "on_triton",
    "products": "on_products",  # of gathers and their gradients only; `autoencode` selects it
}
_CHUNK = 4096
"""Numbers that torch sums in one thread, whatever the number of threads."""


class Primitives(Protocol):
    """The functions that `reference`, `on_torch` and `on_triton` define, with the same results.

    The floating arguments of one call share a dtype, which is also the result's, except with
    `MIXES_TYPES`. With `bags`, their
    number B replaces N in the decoder's rows: those of out, and of dY. `pairs` are the sorted pairs
    of `indices`; None: a function that needs them sorts. Unless stated otherwise, acts, values and
    indices are [N, K], dY is [N, D], W is [M, D], and pre_acts are [N, M].
    """

    SKIPS_EMPTY: bool
    """Whether `sort_pairs` may leave out pairs whose act is 0: BatchTopK's slots are 8k a row, and
    k of them hold something."""

    MIXES_TYPES: bool
    """Whether W, dY and x may have another type than acts and g, which then is the result's.
    Gathers of rows in bfloat16 read half the bytes; sums are formed in float32 all the same."""

    def gather_sum(
        self, acts: Tensor, indices: Tensor, W: Tensor, bags: Bags | None = None
    ) -> Tensor:
        """Compute out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D]."""

    def gather_dot(
        self,
        dY: Tensor,
        indices: Tensor,
        W: Tensor,
        pairs: SortedPairs | None = None,
        bags: Bags | None = None,
        acts: Tensor | None = None,
    ) -> Tensor:
        """Compute out[n, k] = <dY[n], W[indices[n, k]]>: [N, K]. `pairs` speed up `on_torch`.

        With `acts`, [N, K], the result is 0 where they are.
        """

    def scatter_outer(
        self,
        acts: Tensor,
        indices: Tensor,
        dY: Tensor,
        num_latents: int,
        pairs: SortedPairs | None = None,
        bags: Bags | None = None,
    ) -> Tensor:
        """Compute out[m] = sum over (n, k) with indices[n, k] = m of acts[n, k] * dY[n]: [M, D]."""

    def scatter_sum(
        self, values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
    ) -> Tensor:
        """Compute out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M]."""

    def weight_gradients(
        self,
        acts: Tensor,
        dY: Tensor,
        g: Tensor,
        x: Tensor,
        indices: Tensor,
        num_latents: int,
        pairs: SortedPairs | None = None,
        dtype: torch.dtype | None = None,
        bags: Bags | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dW_dec [M, E], dW_enc [M, D] and db_enc [M], of `dtype`; None: that of dY.

        acts, g and indices are [N, K], dY is [N, E], x is [N, D].
        """

    def topk(self, pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Select the k largest of each row of [N, M]: values [N, K], indices [N, K] int64."""

    def batch_topk_threshold(self, pre_acts: Tensor, count: int) -> Tensor:
        """Find the count-th largest of all N*M numbers, no dimensions."""

    def group_max(self, pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Select the largest of each of k groups of a row: [N, K], and indices [N, K] int64."""

    def signum_update_(self, y: Tensor, z: Tensor, grad: Tensor, options: Any) -> None:
        """Make one step of schedule-free SignSGD, in place; `options` is an `UpdateOptions`."""

    def adam_update_(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, options: Any) -> None:
        """Make one step of Adam, in place; `options` is an `UpdateOptions`."""


def select_backend(tensor: Tensor, backend: str | None = None) -> str:
    """Return the name of the backend that serves `tensor`: "reference", "torch" or "triton".

    The argument `backend` forces one, else the environment variable SAETRAIN_KERNELS does.
    Without both a CUDA tensor takes "triton" if that is installed, and everything else "torch".

    Raises:
        ValueError: the forced name is no backend, or cannot serve this tensor here.
    """
    forced = os.environ.get(VARIABLE, "") if backend is None else backend
    if not forced:
        return "triton" if tensor.is_cuda and _has_triton() else "torch"
    if forced not in BACKENDS:
        raise ValueError(
            f"{VARIABLE}={forced!r} names no backend of saetrain.kernels: expected one of "
            f"{', '.join(BACKENDS)}; unset it to choose by the tensor's device"
        )
    if forced == "triton" and not _has_triton():
        raise ValueError(
            f"{VARIABLE}=triton, but the package triton is not installed here: install it, "
            f"or unset {VARIABLE}"
        )
    if forced == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{VARIABLE}=triton cannot serve a tensor on {tensor.device}: move it to a CUDA "
            f"device, unset {VARIABLE}, or start the process with TRITON_INTERPRET=1"
        )
    return forced


@cache
def backend_module(backend: str) -> Primitives:
    """Return the module that implements a backend. Triton is imported here, and not before."""
    return cast("Primitives", import_module(f"saetrain.kernels.{_MODULES[backend]}"))


def backend_of(tensor: Tensor, backend: str | None = None) -> Primitives:
    """Return the module that serves `tensor`; see `select_backend`."""
    return backend_module(select_backend(tensor, backend))


def host_can_read(tensor: Tensor) -> bool:
    """Return whether the host can read a tensor's numbers without waiting for a device.

    Callers use `backends.host_can_read`, so that tests can replace it and run a device's branches
    on a CPU.
    """
    return tensor.device.type == "cpu"


def total(values: Tensor) -> Tensor:
    """Sum a vector [N]; the bits do not depend on the number of threads.

    On a CPU torch splits a long sum among threads, so chunks of 4,096 numbers are summed first. On
    a device the sum is one launch.
    """
    if not host_can_read(values):
        return values.sum()
    return torch.stack([chunk.sum() for chunk in torch.split(values, _CHUNK)]).sum()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
