"""Whether losses are finite, known to the device that must not go on if they are not."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteGuard:
    """Whether all losses have been finite so far, kept on the device until it is asked.

    After the first that was not, no update is made any more: the weights stay those before it.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def check(self, value: Tensor, step: int | Tensor) -> Tensor:
        """Whether `value`, of step `step` (from 0), and all before it are finite.

        Args:
            value: on the device, no dimensions.
            step: its step; or int64 on the device, no dimensions.

        Returns:
            bool, on the device, no dimensions.
        """
        newly_bad = (self._first_bad < 0) & ~value.isfinite()
        self._first_bad.copy_(torch.where(newly_bad, step, self._first_bad))
        return self._first_bad < 0

    def first_bad(self) -> int | None:
        """The first step (from 0) that was not finite, if any. Waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step
