"""Optimisers behind one small protocol: step, state as tensors and numbers, weights to export."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from saetrain.config.sae_options import DecoderNorm, OptimizerName
from saetrain.model.decoder_norm import unit_rows
from saetrain.model.sae import Sae
from saetrain.optim.adam import Adam
from saetrain.optim.adam8bit import Adam8bit
from saetrain.optim.conditional import conditional_step
from saetrain.optim.muon import Muon
from saetrain.optim.schedule import Schedule, default_lr, make_schedule, warmup_steps
from saetrain.optim.signum import Signum

__all__ = [
    "Optimizer",
    "Schedule",
    "conditional_step",
    "default_lr",
    "make_optimizer",
    "make_schedule",
    "warmup_steps",
]

_WEIGHT_DECAY = {"adamw": 0.01, "muon": 0.1}
"""Where there is any: torch's default, and sparsify's."""


class Optimizer(Protocol):
    """What the trainer asks of an optimiser. Parameters go by name throughout."""

    @property
    def is_fused(self) -> bool:
        """Whether a step itself projects gradients, keeps rows at norm 1 and measures gradients.

        It then returns their norm. Else whoever calls it does all that.
        """

    def step(self, step: int) -> Tensor | None:
        """Update the parameters from their gradients, and drop these."""

    def masked_step(self, step: int, ok: Tensor) -> Tensor | None:
        """The same where the flag `ok` (bool, on the parameters' device) is true; else nothing."""

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name."""

    def state_numbers(self) -> dict[str, float]:
        """All numbers of the state, by name."""

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put back what `state_tensors` and `state_numbers` gave."""

    def weights_to_export(self) -> dict[str, Tensor]:
        """The weights to evaluate and publish, which may differ from the ones being trained."""


def make_optimizer(
    name: OptimizerName,
    sae: Sae,
    lr: float,
    warmup: int,
    steps: int,
    *,
    schedule: Schedule | None = None,
    weight_decay: float | None = None,
    decoder_norm: DecoderNorm = "unit",
) -> Optimizer:
    """An optimiser over all parameters of an SAE.

    Args:
        name: which.
        sae: whose parameters.
        lr: peak learning rate.
        warmup: steps of warm-up, unless `schedule` says it; signum has none.
        steps: steps of the whole run, likewise.
        schedule: None: none for signum, else linear decay to 0.
        weight_decay: of adamw, and of muon's matrices; None: 0.01 and 0.1.
        decoder_norm: that of the SAE's `StepSettings`.

    Raises:
        ConfigError: a library that it needs is missing, or cannot run on the SAE's device.
    """
    parameters = dict(sae.named_parameters())
    unit = unit_rows(sae, decoder_norm)
    if name == "signum":
        return Signum(parameters, lr, schedule, unit=unit)
    schedule = schedule or Schedule("linear", warmup, steps)
    if name == "adam8bit":
        return Adam8bit(parameters, lr, schedule)
    if weight_decay is None:
        weight_decay = _WEIGHT_DECAY.get(name)
    if name == "muon":
        assert weight_decay is not None
        return Muon(parameters, lr, schedule, weight_decay)
    return Adam(parameters, lr, schedule=schedule, weight_decay=weight_decay, unit=unit)
