"""Which implementation serves a tensor: chosen at call time, by its device."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from saetrain.kernels.prefix_groups import Bags
from saetrain.kernels.sorted_pairs import SortedPairs

VARIABLE = "SAETRAIN_KERNELS"
BACKENDS = ("reference", "torch", "triton")
_MODULES = {"reference": "reference", "torch": "on_torch", "triton": "on_triton"}


class Primitives(Protocol):
    """What `reference`, `on_torch` and `on_triton` all define, with the same results.

    The floating arguments of one call share a dtype, which is also the result's. With `bags`, their
    number B stands for N in the decoder's rows: those of out, and of dY.
    """

    def gather_sum(
        self, acts: Tensor, indices: Tensor, W: Tensor, bags: Bags | None = None
    ) -> Tensor:
        """[N, K], [N, K], [M, D] -> [N, D]."""

    def gather_dot(
        self,
        dY: Tensor,
        indices: Tensor,
        W: Tensor,
        *pairs: SortedPairs,
        bags: Bags | None = None,
    ) -> Tensor:
        """[N, D], [N, K], [M, D] -> [N, K]. Only `on_torch` takes pairs, and gains by them."""

    def scatter_outer(
        self,
        acts: Tensor,
        indices: Tensor,
        dY: Tensor,
        num_latents: int,
        pairs: SortedPairs | None = None,
        bags: Bags | None = None,
    ) -> Tensor:
        """[N, K], [N, K], [N, D] -> [M, D]."""

    def scatter_sum(
        self,
        values: Tensor,
        indices: Tensor,
        num_latents: int,
        pairs: SortedPairs | None = None,
    ) -> Tensor:
        """[N, K], [N, K] -> [M]."""

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
        """[N, K], [N, E], [N, K], [N, D], [N, K] -> dW_dec [M, E], dW_enc [M, D], db_enc [M]."""

    def topk(self, pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[N, M] -> [N, K], [N, K] int64."""

    def batch_topk_threshold(self, pre_acts: Tensor, count: int) -> Tensor:
        """[N, M] -> no dimensions."""

    def group_max(self, pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[N, M] -> [N, K], [N, K] int64."""

    def signum_update_(self, y: Tensor, z: Tensor, grad: Tensor, **options: Any) -> None:
        """In place; see `saetrain.kernels.reference`, so for the options."""

    def adam_update_(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, **options: Any) -> None:
        """In place; see `saetrain.kernels.reference`, so for the options."""


def select_backend(tensor: Tensor, path: str | None = None) -> str:
    """Return "reference", "torch" or "triton": the path that would serve `tensor` now.

    The environment variable SAETRAIN_KERNELS forces one of them, and `path` comes before it.
    Without both a CUDA tensor takes "triton" if that is installed, and everything else "torch".

    Raises:
        ValueError: what is forced names no path, or one that cannot serve this tensor here.
    """
    forced = os.environ.get(VARIABLE, "") if path is None else path
    if not forced:
        return "triton" if tensor.is_cuda and _has_triton() else "torch"
    if forced not in BACKENDS:
        raise ValueError(
            f"{VARIABLE}={forced!r} names no path of saetrain.kernels: expected one of "
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


def backend_module(path: str) -> Primitives:
    """Return the module that implements `path`. Triton is imported here, and not before."""
    return cast("Primitives", import_module(f"saetrain.kernels.{_MODULES[path]}"))


def host_can_read(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor's numbers without waiting for a device.

    Called by this module's name, so that tests can go a device's ways on a CPU.
    """
    return tensor.device.type == "cpu"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
