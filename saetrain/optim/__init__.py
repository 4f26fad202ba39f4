"""Optimisers behind the protocol `Optimizer`, and learning-rate schedules.

`adam` and `signum` implement fused updates (base class in `fused`), `muon` and `adam8bit` wrap
optimisers of other packages (base class in `torch_optimizers`), and `schedule` computes learning
rates.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from saetrain.config.sae import DecoderNorm, OptimizerName
from saetrain.model.sae import Sae
from saetrain.model.weight_scales import unit_rows
from saetrain.optim.adam import Adam
from saetrain.optim.adam8bit import Adam8bit
from saetrain.optim.fused import conditional_step
from saetrain.optim.layout import StateLayout
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
"""Default weight decay of the optimisers that have one: torch's, and sparsify's."""


class Optimizer(Protocol):
    """Interface of an optimiser. Its state is keyed by parameter names."""

    @property
    def is_fused(self) -> bool:
        """True if a step projects gradients, keeps rows at norm 1 and returns the gradient's norm.

        If not, the caller does these.
        """

    def step(self, step: int) -> Tensor | None:
        """Update the parameters from their gradients, and drop the gradients."""

    def masked_step(self, step: int, ok: Tensor) -> Tensor | None:
        """Update as `step` does if the flag `ok` (bool, on the parameters' device) is true."""

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0)."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state, by name."""

    def state_numbers(self) -> dict[str, float]:
        """Return all numbers of the state, by name."""

    def state_layout(self) -> StateLayout:
        """Return what a saved state must hold after an update; see `saetrain.optim.layout`."""

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load the results of `state_tensors` and `state_numbers`, of the layout's shapes."""

    def weights_to_export(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and save, which may differ from the trained ones."""


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
    """Build an optimiser over all parameters of an SAE.

    Args:
        name: name of the optimiser on the command line.
        sae: the SAE.
        lr: peak learning rate.
        warmup: steps of warm-up, without a `schedule`; signum has none.
        steps: total steps of the run, without a `schedule`.
        schedule: learning rate over the run; None: constant for signum, else linear decay to 0.
        weight_decay: for adamw, and for muon's matrices; None: 0.01 and 0.1.
        decoder_norm: as in the SAE's `StepSettings`.

    Raises:
        ConfigError: a required library is missing, or cannot run on the SAE's device.
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
