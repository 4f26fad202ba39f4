"""One SAE in training: model, optimiser, metrics and settings, their memory and checkpoint state.

Letters: D d_in, E width of the output, M num_latents.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from actcache.errors import ConfigError
from saetrain.config.fit_config import DEFAULTS, Defaults, FitConfig, Precision, defaults_of
from saetrain.config.sae import PENALISED, DecoderNorm, OptimizerName, SaeConfig
from saetrain.distributed.collectives import world_size
from saetrain.model.activations import to_saved
from saetrain.model.losses import FVU_ONLY, LossConfig, TargetStats
from saetrain.model.sae import Sae, build_sae
from saetrain.model.weight_scales import InputScaling, fold, input_scaling
from saetrain.optim import Adam, Adam8bit, AdamConstants, Muon, Optimizer, Schedule, Signum
from saetrain.training.ddp import DdpStep
from saetrain.training.metrics import (
    MEANS,
    DeadLatentBound,
    DeadLatentTracker,
    LatentStats,
    MeanMeter,
    ResidualShare,
    decoder_norm_range,
    decoder_norms,
)

if TYPE_CHECKING:
    from saetrain.config.sae import SaeEntry
    from saetrain.runs.checkpoint import Best


_WEIGHT_DECAY = {"adamw": 0.01, "muon": 0.1}
"""Default weight decay of the optimisers that have one: torch's, and sparsify's."""
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class StepSettings:
    """Settings of one SAE's steps. A step is one batch; steps are counted from 0."""

    decoder_norm: DecoderNorm = "unit"
    """See `saetrain.model.weight_scales`."""
    k_start: int = 0
    """k of the first step, if k is annealed."""
    k_end: int = 0
    """k from step `k_anneal_steps` on."""
    k_anneal_steps: int = 0
    """Steps over which k is annealed; 0: k is constant."""
    grad_clip: float | None = None
    """Largest norm of the gradient; None: no clipping."""
    grad_acc_steps: int = 1
    """Batches whose gradients are accumulated for one update."""
    micro_batch_size: int | None = None
    """Rows of one forward pass; None: the whole batch."""
    autocast: bool = False
    """Matrix products in bfloat16."""
    chunk_latents: int | None = None
    """Latents whose pre-activations are computed at once; None: all."""
    compile: bool = False
    """Run dense activations through torch.compile."""
    auxk_alpha: float = 0.0
    """Weight of AuxK; 0: AuxK is off."""
    auxk_by_residual: bool = False
    """Divide AuxK by the variance of the residual, not by that of the target."""

    def ends_update(self, step: int) -> bool:
        """Return whether this step's batch is the last of its update."""
        return (step + 1) % self.grad_acc_steps == 0

    def first_step_of_update(self, step: int) -> int:
        """Return the first step of the update that this step belongs to."""
        return step // self.grad_acc_steps * self.grad_acc_steps

    def k(self, step: int) -> int | None:
        """Return k as sparsify anneals it, constant within an update; None: not annealed."""
        if self.k_anneal_steps == 0:
            return None
        done = min(1.0, self.first_step_of_update(step) / self.k_anneal_steps)
        return round(self.k_start * (1 - done) + self.k_end * done)

    def changes_k(self, step: int) -> bool:
        """Return whether k differs from that of the step before."""
        return step > 0 and self.k(step) != self.k(step - 1)


def precision_on(
    device: torch.device, options: FitConfig, defaults: Defaults, recorded: Precision | None = None
) -> Precision:
    """Determine the precision of products: as given, as at the start of the run, or the device's.

    Args:
        device: device of the run.
        options: options of the run, as given.
        defaults: defaults of the run.
        recorded: precision that the record of a resumed run holds.
    """
    given = options.precision or ("bfloat16" if options.autocast else recorded)
    if given is not None:
        return given
    if device.type != "cuda":
        return "float32"
    if defaults.cuda_precision != "bfloat16" or torch.cuda.is_bf16_supported(False):
        return defaults.cuda_precision
    return "tf32"


def use_precision(precision: Precision, device: torch.device) -> None:
    """Let products of float32 matrices on CUDA take TF32, or forbid it, in this process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def make_step_settings(options: FitConfig, sizes: SaeConfig) -> StepSettings:
    """Derive the settings of an SAE of these sizes from its options.

    Args:
        options: options of the run, with those of the SAE in them, and its defaults.
        sizes: configuration of the SAE.

    Raises:
        ConfigError: --k-start is larger than the number of latents.
    """
    if options.k_start is not None and options.k_start > sizes.num_latents:
        raise ConfigError(
            "--k-start is larger than the number of latents",
            expected=f"<= {sizes.num_latents}",
            got=options.k_start,
        )
    start = options.k_start if options.k_start is not None else 10 * sizes.d_in
    assert options.auxk_alpha is not None, "with_defaults fills it in"
    return StepSettings(
        decoder_norm=options.decoder_norm,
        k_start=max(sizes.k, min(sizes.num_latents, start)),
        k_end=sizes.k,
        k_anneal_steps=options.k_anneal_steps,
        grad_clip=options.grad_clip,
        grad_acc_steps=options.grad_acc_steps,
        micro_batch_size=options.micro_batch_size,
        autocast=options.autocast,
        chunk_latents=options.chunk_latents,
        compile=options.compile,
        auxk_alpha=options.auxk_alpha,
        auxk_by_residual=defaults_of(options).auxk_by_residual,
    )


def initial_sae(
    entry: SaeEntry, targets: TargetStats, options: FitConfig, device: torch.device
) -> Sae:
    """Build an SAE with initial weights, except for what `training.init` fits to rows."""
    dtype, defaults = getattr(torch, options.weights_dtype), defaults_of(options)
    sae = build_sae(
        entry.config,
        unit=targets.unit,
        seed=entry.seed,
        device=device,
        dtype=dtype,
        log_threshold=defaults.log_threshold,
    )
    with torch.no_grad():
        if options.b_dec_init != "zeros":
            sae.b_dec.copy_(torch.from_numpy(targets.mean))
        if entry.encoder_scale != 1:
            sae.W_enc.mul_(entry.encoder_scale)
        if sae.transcode and defaults.centred_transcoder:
            sae.centre_encoder(torch.from_numpy(targets.source_mean))
    return sae


def adam_constants(options: FitConfig) -> AdamConstants:
    """Return betas and eps from an SAE's options and defaults."""
    beta1, beta2, eps = options.beta1, options.beta2, options.eps
    assert beta1 is not None
    assert beta2 is not None
    assert eps is not None
    return AdamConstants(beta1, beta2, eps)


def make_optimizer(
    name: OptimizerName,
    sae: Sae,
    lr: float,
    warmup: int,
    steps: int,
    *,
    schedule: Schedule | None = None,
    weight_decay: float | None = None,
    adam: AdamConstants | None = None,
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
        adam: betas and eps of Adam; None: torch's.
        decoder_norm: as in the SAE's `StepSettings`.

    Raises:
        ConfigError: a required library is missing, or cannot run on the SAE's device.
    """
    parameters = dict(sae.named_parameters())
    unit = "W_dec" if decoder_norm == "unit" and not sae.transcode else None
    if name == "signum":
        return Signum(parameters, lr, schedule, unit=unit)
    schedule = schedule or Schedule("linear", warmup, steps)
    if name == "adam8bit":
        return Adam8bit(parameters, lr, schedule, adam)
    if weight_decay is None:
        weight_decay = _WEIGHT_DECAY.get(name)
    if name == "muon":
        assert weight_decay is not None
        return Muon(parameters, lr, schedule, weight_decay, adam)
    return Adam(parameters, lr, schedule, constants=adam, weight_decay=weight_decay, unit=unit)


class LastingBytes(NamedTuple):
    """Bytes of one SAE that do not depend on the rows of a step."""

    weights: int
    """Parameters, with the bfloat16 copies that --autocast keeps."""
    optimizer_state: int
    gradients: int


def lasting_bytes(entry: SaeEntry, options: FitConfig, device: str = "cpu") -> LastingBytes:
    """Compute the bytes of weights, optimizer state and gradients of one SAE."""
    shapes, item = parameter_shapes(entry.config), getattr(torch, options.weights_dtype).itemsize
    parameters = sum(map(math.prod, shapes)) * item
    state = sum([state_bytes(entry.options.optimizer, shape, item) for shape in shapes])
    return LastingBytes(
        weights=parameters + bf16_copy_bytes(entry, options, device),
        optimizer_state=state + norm_bytes(entry, item),
        gradients=parameters,
    )


def parameter_shapes(sizes: SaeConfig) -> list[tuple[int, ...]]:
    """Return the shapes of an SAE's parameters, which `Sae` and its activation create."""
    D, M = sizes.d_in, sizes.num_latents
    E = D if sizes.d_out is None else sizes.d_out
    shapes: list[tuple[int, ...]] = [(M, D), (M,), (M, E), (E,)]  # W_enc, b_enc, W_dec, b_dec
    shapes += [(E, D)] * sizes.skip_connection
    return shapes + [(M,)] * _OF_LATENTS.get(sizes.activation, 0)


_OF_LATENTS = {"jumprelu": 1, "gated": 2}
"""Parameters of an activation that has some, each with one number for each latent."""


def state_bytes(optimizer: OptimizerName, shape: tuple[int, ...], item: int) -> int:
    """Return the bytes of the optimizer state of one parameter, without step counters.

    Args:
        optimizer: name of the optimizer.
        shape: shape of the parameter.
        item: bytes of one element.
    """
    numbers = math.prod(shape)
    if optimizer == "signum":  # z
        return numbers * item
    if optimizer == "muon" and len(shape) == 2:  # momentum
        return numbers * item
    if optimizer == "adam8bit":  # two moments; in float32 where the parameter is small
        scales = -(-numbers // 256) * _FLOAT
        return 2 * (numbers * _FLOAT if numbers < 4096 else numbers + scales)
    return 2 * numbers * item  # two moments


def norm_bytes(entry: SaeEntry, item: int) -> int:
    """Return the bytes of the row norms that signum keeps with --decoder-norm unit."""
    unit = entry.options.decoder_norm == "unit" and not entry.config.transcode
    kept = unit and entry.options.optimizer == "signum"
    return entry.config.num_latents * max(item, _FLOAT) * kept


def bf16_copy_bytes(entry: SaeEntry, options: FitConfig, device: str = "cpu") -> int:
    """Return the bytes of the bfloat16 copies of weights that a step keeps with --autocast.

    On CUDA, whose kernels gather rows of the decoder in bfloat16, of both weights; else of the
    encoder.
    """
    dense, folded = entry.config.activation in PENALISED, entry.options.decoder_norm == "fold"
    kept = options.autocast and options.weights_dtype == "float32" and not dense and not folded
    columns = entry.config.d_in + (entry.config.width_out if device == "cuda" else 0)
    return 2 * entry.config.num_latents * columns * kept


V = TypeVar("V")


class FiniteGuard:
    """Flag on the device, false from the first value on that is not finite, and its step.

    Later updates are masked by it, so that the weights stay those before that value.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._in_gradient = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def check(self, value: Tensor, step: int | Tensor) -> Tensor:
        """Compute whether `value`, of step `step` (from 0), and all before it are finite.

        Args:
            value: on the device, no dimensions.
            step: its step; or int64 on the device, no dimensions.

        Returns:
            bool, on the device, no dimensions.
        """
        newly_bad = (self._first_bad < 0) & ~value.isfinite()
        self._first_bad.copy_(torch.where(newly_bad, step, self._first_bad))
        return self._first_bad < 0

    @torch.no_grad()
    def check_gradient(self, value: Tensor, step: int | Tensor) -> Tensor:
        """Do the same for a value of the gradient, after the loss of the step was checked."""
        self._in_gradient |= (self._first_bad < 0) & ~value.isfinite()
        return self.check(value, step)

    def is_in_gradient(self) -> bool:
        """Return whether the first value that was not finite was the gradient's, not the loss."""
        return bool(self._in_gradient)

    def first_bad(self) -> int | None:
        """Return the first step (from 0) that was not finite, if any. Waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step


@dataclass
class SaeTrainer:
    """One SAE in training. `saetrain.training.step` updates it."""

    entry: SaeEntry
    sae: Sae
    optimizer: Optimizer
    dead_after: int
    """Rows without an activation after which a latent counts as dead."""
    variance: float
    """Mean of ‖y - mean‖² of the target over the training rows; the FVU divides by it."""
    loss_config: LossConfig = FVU_ONLY
    """Loss terms besides FVU and AuxK."""
    settings: StepSettings = field(default_factory=StepSettings)
    """Options of its steps."""
    guard: FiniteGuard = field(init=False)
    """Flag on the device: have all losses been finite?"""
    dead_tracker: DeadLatentTracker = field(init=False)
    dead_bound: DeadLatentBound | None = field(init=False, default=None)
    """On CUDA, the host's bound for dead latents; None: AuxK counts them in each step."""
    meter: MeanMeter = field(init=False)
    """Means of its losses."""
    latent_stats: LatentStats = field(init=False)
    """Densities of its latents and norms of its gradients."""
    best: Best | None = None
    """With --save-best, the step, FVU and file of the best SAE so far."""
    saved_bests: frozenset[int] = frozenset()
    """Steps of the best SAEs that checkpoints on disk name: these folders must stay."""
    index: int = 0
    """Its index among the SAEs of the run."""
    ddp: DdpStep | None = None
    """With --parallel ddp, the collectives of each step."""
    defaults: Defaults = DEFAULTS[1]
    """Formulas of the version of the defaults with which the run was started."""

    device_step: Tensor | None = None
    """With --cuda-graphs, the step number in device memory. int64 []"""

    def __post_init__(self) -> None:
        """Allocate the metrics on the device of the weights."""
        W, M = self.sae.W_enc, self.sae.num_latents
        self.guard = FiniteGuard(W.device)
        since, active = (torch.zeros(M, dtype=torch.int64, device=W.device) for _ in range(2))
        self.dead_tracker = DeadLatentTracker(since, self.dead_after)
        if W.device.type == "cuda":
            self.dead_bound = DeadLatentBound(self.dead_tracker)
        names = (*MEANS, *self.loss_config.names)
        sums = torch.zeros(len(names), dtype=torch.float64, device=W.device)
        self.meter = MeanMeter(names, sums)
        if self.settings.auxk_by_residual:  # without AuxK too: --force-config may switch it on
            hookpoints = max(1, len(self.loss_config.parts))
            shares = torch.zeros(hookpoints + 1, dtype=torch.float64, device=W.device)
            self.meter.residual = ResidualShare(shares)
        norms = torch.zeros((), dtype=torch.float64, device=W.device)
        self.latent_stats = LatentStats(active, norms)

    @functools.cached_property
    def scaling(self) -> InputScaling | None:
        """Factors by which its rows are multiplied; None: 1."""
        W = self.sae.W_enc
        return input_scaling(self.entry, W.device, W.dtype)

    @property
    def schedules_end(self) -> int:
        """Step from which on k and the weight of the sparsity penalty are constant."""
        rise = self.loss_config.warmup if self.loss_config.sparsity else 0
        return max(self.settings.k_anneal_steps, rise)

    def count_replayed_step(self, rows: int) -> None:
        """Advance the host's counters for a step of `rows` rows that a CUDA graph replayed."""
        self.latent_stats.count_replayed(rows)
        self.meter.count_replayed()

    def uses_auxk(self, step: int, rows: int) -> bool:
        """Return whether AuxK applies in step `step` (from 0) of `rows` rows a process.

        It does once latents may be dead, and on CUDA unless `dead_bound` excludes it.
        """
        rows *= 1 if self.ddp is None else world_size()
        due = self.settings.auxk_alpha > 0 and self.dead_tracker.may_be_dead(step * rows)
        return due and (self.dead_bound is None or self.dead_bound.may_be_dead)

    def advance_dead_bound(self, rows: int, hold: int = 0) -> None:
        """Advance `dead_bound` to the next step, of `rows` rows a process."""
        if self.dead_bound is not None and self.settings.auxk_alpha > 0:
            self.dead_bound.advance(rows * (1 if self.ddp is None else world_size()), hold)

    def unscaled_weights(self) -> dict[str, Tensor]:
        """Return the weights for rows as they are in the cache, and the activation's buffers."""
        weights = dict(self.sae.named_buffers()) | self.optimizer.weights_to_export()
        return self._unscaled(weights)

    def export_weights(self) -> dict[str, Tensor]:
        """Return `unscaled_weights` under the names of saved SAEs."""
        return to_saved(self.unscaled_weights())

    def unit_norm(self) -> bool:
        """Return whether the saved decoder rows have norm 1."""
        scales_columns = self.scaling is not None and self.scaling.by is None
        return self.settings.decoder_norm != "free" and not scales_columns

    def pop_metrics(self, step: int, rows: int, histogram: bool) -> dict[str, Any]:
        """Return this SAE's object for metrics.jsonl and reset the means.

        Args:
            step: steps done.
            rows: rows trained on.
            histogram: include the histogram of densities.
        """
        metrics: dict[str, Any] = {
            **self.meter.pop_means(),
            "dead_percent": self.dead_tracker.dead_percent(rows),
            "dead_after": self.dead_after,
            "lr": self.optimizer.learning_rate(self.settings.first_step_of_update(step - 1)),
            "k": self.sae.k or None,  # None with a sparsity penalty
            **decoder_norm_range(self.sae.W_dec),
        }
        if self.meter.controller is not None:
            metrics[self.meter.controller.name] = float(self.meter.controller.value())
        if self.loss_config.parts:
            saved = self._unscaled(dict(self.sae.named_parameters()))
            metrics |= decoder_norms(saved["W_dec"], self.loss_config.parts)
        metrics |= self.latent_stats.pop_grad_norm()
        return metrics | (self.latent_stats.pop_density() if histogram else {})

    def _unscaled(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fold decoder norms and input scales into weights, as they are saved."""
        weights = fold(weights) if self.settings.decoder_norm == "fold" else weights
        return weights if self.scaling is None else self.scaling.fold_into(weights)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors and numbers for a checkpoint."""
        tensors = {f"sae.{name}": p for name, p in self.sae.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state_tensors().items()}
        tensors |= {"firing": self.dead_tracker.rows_since, "meter": self.meter.sums}
        if self.meter.residual is not None:
            tensors["residual"] = self.meter.residual.sums
        if self.meter.controller is not None:
            tensors["controller"] = self.meter.controller.state
        for name, p in self.sae.named_parameters():
            if p.grad is not None:  # accumulated batches of an update that is not complete
                tensors[f"gradient.{name}"] = p.grad
        numbers = {f"optimizer.{k}": v for k, v in self.optimizer.state_numbers().items()}
        stats, counters = self.latent_stats.state()
        tensors |= {f"vitals.{name}": tensor for name, tensor in stats.items()}
        numbers |= {f"vitals.{name}": number for name, number in counters.items()}
        return tensors, numbers | {"meter.steps": self.meter.steps}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load the result of `state`."""
        self.sae.load_state_dict(_below("sae.", tensors))
        self.optimizer.load_state(_below("optimizer.", tensors), _below("optimizer.", numbers))
        for name, gradient in _below("gradient.", tensors).items():
            parameter = self.sae.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        self.dead_tracker.rows_since.copy_(tensors["firing"])
        self.meter.sums.copy_(tensors["meter"])
        self.meter.steps = int(numbers["meter.steps"])
        if self.meter.residual is not None:
            self.meter.residual.sums.copy_(tensors["residual"])
        if self.meter.controller is not None:
            self.meter.controller.state.copy_(tensors["controller"])
        self.latent_stats.load_state(_below("vitals.", tensors), _below("vitals.", numbers))


def by_hookpoint(trainers: list[SaeTrainer]) -> dict[str, list[SaeTrainer]]:
    """Group SAEs by hookpoint: those of a group are trained on the same rows."""
    groups: dict[str, list[SaeTrainer]] = {}
    for trainer in trainers:
        groups.setdefault(trainer.entry.hookpoint, []).append(trainer)
    return groups


def _below(prefix: str, items: dict[str, V]) -> dict[str, V]:
    return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}
