"""One SAE in training, with all that belongs to it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from saetrain.distributed.collectives import world_size
from saetrain.model.decoder_norm import fold
from saetrain.model.input_scaling import InputScaling, input_scaling
from saetrain.model.losses import FVU_ONLY, LossConfig
from saetrain.model.sae import Sae
from saetrain.optim import Optimizer
from saetrain.training.ddp import DdpStep
from saetrain.training.finite_guard import FiniteGuard
from saetrain.training.metrics import DeadLatentTracker, LatentStats, MeanMeter
from saetrain.training.step_settings import StepSettings

if TYPE_CHECKING:
    from saetrain.runs.checkpoint import Best
    from saetrain.runs.record import SaeEntry


V = TypeVar("V")


@dataclass
class SaeTrainer:
    """One SAE in training, with all that belongs to it alone."""

    entry: SaeEntry
    sae: Sae
    optimizer: Optimizer
    dead_tracker: DeadLatentTracker
    meter: MeanMeter
    variance: float
    """Mean of ‖y - mean‖² over the training rows of what is predicted."""
    loss_config: LossConfig = FVU_ONLY
    """What it is trained on besides FVU and AuxK."""
    settings: StepSettings = field(default_factory=StepSettings)
    """How its steps are made."""
    guard: FiniteGuard = field(init=False)
    """Whether its losses have been finite."""
    scaling: InputScaling | None = field(init=False)
    """How its rows are scaled."""
    latent_stats: LatentStats = field(init=False)
    """How often its latents fire, and how long its gradients are."""
    best: Best | None = None
    """With --save-best, the best that it has been."""
    saved_bests: frozenset[int] = frozenset()
    """Steps of the best ones that checkpoints name: they must stay as long as those do."""
    index: int = 0
    """Its place among the SAEs of the run."""
    ddp: DdpStep | None = None
    """With --parallel ddp, the other processes' part of each step."""

    device_step: Tensor | None = None
    """With --cuda-graphs, the number of the step where the device reads it. int64 []"""

    def __post_init__(self) -> None:
        """Watch the losses where they are computed."""
        self.guard = FiniteGuard(self.sae.W_enc.device)
        self.latent_stats = LatentStats(self.sae.num_latents, self.sae.W_enc.device)
        self.scaling = input_scaling(self.entry, self.sae.W_enc.device, self.sae.W_enc.dtype)

    @property
    def schedules_end(self) -> int:
        """Steps after which neither k nor the penalty's weight changes any more."""
        rise = self.loss_config.warmup if self.loss_config.sparsity else 0
        return max(self.settings.k_anneal_steps, rise)

    def count_replayed_step(self, rows: int) -> None:
        """Count, on the host alone, a step of so many rows that the device made by itself."""
        self.latent_stats.count_replayed(rows)
        self.meter.count_replayed()

    def uses_auxk(self, step: int, rows: int, auxk_alpha: float) -> bool:
        """Whether there may be dead latents in a step (from 0), each of so many rows, for AuxK."""
        rows *= 1 if self.ddp is None else world_size()
        return auxk_alpha > 0 and self.dead_tracker.may_be_dead(step * rows)

    def export_weights(self) -> dict[str, Tensor]:
        """The weights as they are saved and judged, and thresholds that are no weights."""
        weights = dict(self.sae.named_buffers()) | self.optimizer.weights_to_export()
        weights = fold(weights) if self.settings.decoder_norm == "fold" else weights
        return weights if self.scaling is None else self.scaling.fold_into(weights)

    def unit_norm(self) -> bool:
        """Whether the saved decoder rows are meant to have norm 1."""
        of_columns = self.scaling is not None and self.scaling.by is None
        return self.settings.decoder_norm != "free" and not of_columns

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and numbers for a checkpoint."""
        tensors = {f"sae.{name}": p for name, p in self.sae.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state_tensors().items()}
        tensors |= {"firing": self.dead_tracker.rows_since, "meter": self.meter.sums}
        for name, p in self.sae.named_parameters():
            if p.grad is not None:  # some batches of an update that is not made yet
                tensors[f"gradient.{name}"] = p.grad
        numbers = {f"optimizer.{k}": v for k, v in self.optimizer.state_numbers().items()}
        watched, counted = self.latent_stats.state()
        tensors |= {f"vitals.{name}": tensor for name, tensor in watched.items()}
        numbers |= {f"vitals.{name}": number for name, number in counted.items()}
        return tensors, numbers | {"meter.steps": self.meter.steps}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put back what `state` gave."""
        self.sae.load_state_dict(_below("sae.", tensors))
        self.optimizer.load_state(_below("optimizer.", tensors), _below("optimizer.", numbers))
        for name, gradient in _below("gradient.", tensors).items():
            parameter = self.sae.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        self.dead_tracker.rows_since.copy_(tensors["firing"])
        self.meter.sums.copy_(tensors["meter"])
        self.meter.steps = int(numbers["meter.steps"])
        self.latent_stats.load_state(_below("vitals.", tensors), _below("vitals.", numbers))


def by_hookpoint(trainers: list[SaeTrainer]) -> dict[str, list[SaeTrainer]]:
    """Those that are fed with the same rows, together."""
    groups: dict[str, list[SaeTrainer]] = {}
    for trainer in trainers:
        groups.setdefault(trainer.entry.hookpoint, []).append(trainer)
    return groups


def _below(prefix: str, items: dict[str, V]) -> dict[str, V]:
    return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}
