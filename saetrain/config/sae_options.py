"""How one SAE is trained: its options, with the rules that they must keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from actcache.core.options import MAIN, option
from actcache.errors import ConfigError
from saetrain.config.sae import ANNEALED, PENALISED, ActivationName, SaeConfig


@dataclass(frozen=True, kw_only=True)
class SaeOptions:
    """Options of one SAE of a run; those of the stream that feeds all SAEs are in `FitConfig`.

    Each of these options may be given several times, but for those that are flags or lists by
    themselves: a run trains every combination, at every hookpoint. A new field here needs nothing
    else for that.
    """

    expansion_factor: int = option(32, group=MAIN, label="x")
    """Latents as a multiple of the activations' width."""

    num_latents: int | None = option(None, group=MAIN, label="latents")
    """Latents, instead of --expansion-factor."""

    k: int = option(32, group=MAIN)
    """Latents that may be active at once; with batchtopk, on average over a batch. jumprelu, relu
    and gated have none: --sparsity decides."""

    activation: ActivationName = option("topk", group=MAIN)
    """topk: the k largest of a row. batchtopk: the k times rows largest of a batch; a threshold
    after training. groupmax: the largest of each of k groups. jumprelu: those above a learnt
    threshold, with a penalty on their number. relu: those above 0, with a penalty on their sum.
    gated: relu, with magnitudes apart from the choice of latents."""

    sparsity: float | None = option(None, group="SAE", on_resume="forced")
    """Weight of the penalty that makes latents sparse: for jumprelu on their number (default 1e-3),
    for relu and gated on the sum of their activations in roots of the rows' variance (default
    3e-2). Beside the FVU, whatever the scale of the rows."""

    sparsity_warmup_steps: int | None = option(None, group="SAE", on_resume="forced")
    """Steps in which the penalty rises from 0 to --sparsity. Default: a twentieth of the run."""

    threshold: float | None = option(None, group="SAE")
    """jumprelu: where the thresholds begin, in roots of the rows' variance. Default: 0.01."""

    bandwidth: float | None = option(None, group="SAE")
    """jumprelu: width of the window around a threshold that receives a gradient, in the same unit.
    Default: 0.05."""

    multi_topk: bool = option(False, group="SAE")
    """With topk: train on the reconstruction from 4k latents too, at 1/8 of the weight."""

    matryoshka: tuple[int, ...] = option((), group="SAE")
    """Number of first latents that must reconstruct by themselves; repeatable, rising."""

    optimizer: OptimizerName = option("adam", group="Optimiser")
    """adam, adamw. adam8bit: moments in 8 bits, needs bitsandbytes ([quantized]). muon: Muon for
    matrices, Adam for the rest. signum: schedule-free SignSGD, momentum 0.95; half of Adam's
    state."""

    lr: float | None = option(None, group=MAIN, on_resume="forced")
    """Learning rate, the peak where it changes. Default for adam, adamw and adam8bit: 2e-4 /
    sqrt(latents / 2^14), times sqrt(2^17 / steps) in a run of fewer steps than 2^17, at most
    0.24 / sqrt(width of the rows); for signum 5e-3 / sqrt(latents / 2^14); for muon 2e-3."""

    lr_schedule: LrSchedule | None = option(None, group="Schedule", on_resume="forced")
    """Schedule after the warm-up. stable-then-decay: constant, then linear over --lr-decay-steps.
    Default: linear; for signum none, not even a warm-up: being schedule-free, it needs neither."""

    lr_warmup_steps: int | None = option(None, group="Schedule", on_resume="forced", label="warmup")
    """Steps of linear warm-up; for signum only with --lr-schedule. Default: a twentieth of the run,
    at most 1000."""

    lr_decay_steps: int | None = option(None, group="Schedule", on_resume="forced")
    """Steps of the decay that ends the run, with --lr-schedule stable-then-decay. Default: a fifth
    of the run."""

    lr_end: float = option(0.0, group="Schedule", on_resume="forced")
    """Final learning rate, as a share of its peak."""

    weight_decay: float | None = option(None, group="Optimiser", on_resume="forced")
    """Decoupled weight decay of adamw (default 0.01) and of muon's matrices (0.1)."""

    grad_clip: float | None = option(None, group="Optimiser", on_resume="forced")
    """Largest norm of an SAE's gradient, over all its weights; a larger one is scaled down. Not
    for signum, which uses signs only."""

    decoder_norm: DecoderNorm = option("unit", group="SAE", on_resume="forced")
    """unit: decoder rows are scaled to norm 1 before every step (not a transcoder's, which are
    free). fold: they are free, latents are chosen by activation times norm, and the norm is folded
    into the encoder when it is saved: rows of norm 1, the same function. free: rows of any norm,
    saved so."""

    b_dec_init: BDecInit = option("mean", group="Initialisation", label="b-dec")
    """Initial b_dec: the mean of all training rows, the geometric median of the first 2,048, or
    zeros."""

    input_scale: InputScale = option("none", group="Initialisation", label="input")
    """Scale of rows in training, from the statistics of all training rows. rms: their numbers have
    a mean square of 1. unit: their squared norms have a mean of 1. What is saved takes rows as they
    are in the cache: the scale is folded into it."""

    encoder_scale: str = option("1", group="Initialisation", label="encoder")
    """Factor on the encoder's initial weights: a number; or auto: the one with the least error on
    the first 2,048 rows, found by trial and written to run.json."""

    k_anneal_steps: int = option(0, group="SAE", on_resume="forced")
    """Steps in which k falls linearly from --k-start to --k, with topk and batchtopk. The saved
    k is always --k."""

    k_start: int | None = option(None, group="SAE", on_resume="forced")
    """Initial k, with --k-anneal-steps. Default: ten times the activations' width, or all
    latents."""

    auxk_alpha: float = option(1 / 32, group="SAE", on_resume="forced", label="auxk")
    """Weight of AuxK, the loss of the residual as predicted by dead latents. 0: off."""

    seed: int = option(0, group="Initialisation")
    """Seed of the weights; the first one is that of the order of rows and of the held-out split,
    too, unless --data-seed is given."""

    def __post_init__(self) -> None:
        """Reject numbers that no SAE can have."""
        # One spelling of each number: 1 and 1.0 would be two SAEs. The class is frozen.
        object.__setattr__(self, "encoder_scale", scale(self.encoder_scale))
        require_options(self)


@dataclass(frozen=True)
class HookpointOverride:
    """Options that replace the run's own for the SAEs of some hookpoints."""

    k: int | None = None
    """Latents that may be active at once."""
    lr: float | None = None
    """Learning rate."""
    expansion_factor: int | None = None
    """Latents as a multiple of the activations' width."""
    num_latents: int | None = None
    """Latents."""

    def __post_init__(self) -> None:
        """Reject a width that is given twice; `SaeOptions` checks the rest."""
        require_override(self)


OptimizerName = Literal["signum", "adam", "adamw", "adam8bit", "muon"]
LrSchedule = Literal["constant", "linear", "cosine", "stable-then-decay"]
DecoderNorm = Literal["unit", "fold", "free"]


InputScale = Literal["none", "rms", "unit"]
BDecInit = Literal["mean", "geometric-median", "zeros"]


@dataclass(frozen=True)
class SaeEntry:
    """One SAE of a run."""

    hookpoint: str
    """Hookpoint it is trained on; "crosscoder" for a crosscoder."""
    config: SaeConfig
    """Its kind and sizes."""
    lr: float
    """Its peak learning rate."""
    seed: int
    """Seed of its weights."""
    setting: str = ""
    """Name of its options among the run's SAEs of this hookpoint, such as k32-lr1e-3; empty if it
    is the only one."""
    options: SaeOptions = field(default_factory=SaeOptions)
    """Its options, as given by the user."""
    reads: tuple[str, ...] = ()
    """Hookpoints whose rows it reads, side by side; empty: `hookpoint`."""
    predicts: tuple[str, ...] = ()
    """Hookpoints whose rows it predicts; empty: those it reads."""
    scales: tuple[float, ...] = ()
    """With --input-scale, the factor of each hookpoint's rows in training."""
    encoder_scale: float = 1.0
    """Factor of its initial encoder weights."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Hookpoints whose rows it reads."""
        return self.reads or (self.hookpoint,)

    @property
    def targets(self) -> tuple[str, ...]:
        """Hookpoints whose rows it predicts."""
        return self.predicts or self.sources

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Hookpoints whose rows form its batch, in order."""
        return (*self.sources, *self.predicts)

    @property
    def name(self) -> str:
        """Name in the run, which is also its folder: HOOKPOINT or HOOKPOINT/SETTING."""
        return f"{self.hookpoint}/{self.setting}" if self.setting else self.hookpoint


def require_options(options: SaeOptions) -> None:
    """Reject numbers that no SAE can have."""
    _require_positive(options, "expansion_factor", "num_latents", "k", "lr_decay_steps", "k_start")
    if options.lr is not None and not 0 < options.lr < float("inf"):
        raise ConfigError("--lr is out of range", expected="> 0", got=options.lr)
    if not 0 <= options.auxk_alpha < float("inf"):
        raise ConfigError("--auxk-alpha is out of range", expected=">= 0", got=options.auxk_alpha)
    _require_seed("--seed", options.seed)
    if options.lr_warmup_steps is not None and options.lr_warmup_steps < 0:
        raise ConfigError("--lr-warmup-steps is negative", got=options.lr_warmup_steps)
    _require_activation(options)
    _require_recipe(options)


def _require_activation(options: SaeOptions) -> None:
    """Refuse options that an activation lacks; what depends on widths, `SaeConfig` refuses."""
    for name in ("sparsity", "sparsity_warmup_steps"):
        value = getattr(options, name)
        if value is not None and options.activation not in PENALISED:
            raise ConfigError(
                f"--activation {options.activation} is sparse by --k, and has no penalty",
                expected="no --" + name.replace("_", "-"),
                got=value,
                remedy=f"leave it out, or --activation {' | '.join(PENALISED)}",
            )
    for name in ("threshold", "bandwidth"):
        if getattr(options, name) is not None and options.activation != "jumprelu":
            raise ConfigError(
                f"--{name} is for --activation jumprelu",
                got=options.activation,
                remedy="leave one of them out",
            )
    for name in ("sparsity", "threshold", "bandwidth"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"--{name} is out of range", expected=">= 0", got=value)
    if options.sparsity_warmup_steps is not None and options.sparsity_warmup_steps < 0:
        raise ConfigError("--sparsity-warmup-steps is negative", got=options.sparsity_warmup_steps)
    if options.k_anneal_steps and options.activation not in ANNEALED:
        why = "has groups that --k makes" if options.activation == "groupmax" else "has no k"
        raise ConfigError(
            f"--k-anneal-steps lets k fall, and --activation {options.activation} {why}",
            expected=f"--activation {' | '.join(ANNEALED)}",
            got=options.k_anneal_steps,
            remedy="leave --k-anneal-steps out",
        )


def _require_recipe(options: SaeOptions) -> None:
    """Refuse optimisers, schedules and recipes that contradict themselves."""
    if options.lr_decay_steps is not None and options.lr_schedule != "stable-then-decay":
        raise ConfigError(
            "--lr-decay-steps is for --lr-schedule stable-then-decay",
            got=options.lr_schedule,
            remedy="linear and cosine fall from the warm-up on",
        )
    if not 0 <= options.lr_end <= 1:
        raise ConfigError("--lr-end is out of range", expected="0 to 1", got=options.lr_end)
    falls = options.optimizer != "signum" if options.lr_schedule is None else True
    if options.lr_end and (not falls or options.lr_schedule == "constant"):
        raise ConfigError(
            "--lr-end is for a learning rate that falls",
            got=f"--optimizer {options.optimizer}, --lr-schedule {options.lr_schedule}",
            remedy="--lr-schedule linear, cosine or stable-then-decay",
        )
    if options.weight_decay is not None:
        if not 0 <= options.weight_decay < float("inf"):
            raise ConfigError(
                "--weight-decay is out of range", expected=">= 0", got=options.weight_decay
            )
        if options.optimizer not in ("adamw", "muon"):
            raise ConfigError(
                "--weight-decay is for adamw and muon", got=f"--optimizer {options.optimizer}"
            )
    if options.grad_clip is not None:
        if not 0 < options.grad_clip < float("inf"):
            raise ConfigError("--grad-clip is out of range", expected="> 0", got=options.grad_clip)
        if options.optimizer == "signum":
            raise ConfigError(
                "--grad-clip does nothing for signum, which takes signs of gradients",
                remedy="leave it out, or another --optimizer",
            )
    if options.k_anneal_steps < 0:
        raise ConfigError("--k-anneal-steps is negative", got=options.k_anneal_steps)
    if options.k_start is not None:
        if not options.k_anneal_steps:
            raise ConfigError("--k-start is for a run with --k-anneal-steps", got=options.k_start)
        if options.k_start < options.k:
            raise ConfigError(
                "--k-start is smaller than --k", expected=f">= {options.k}", got=options.k_start
            )


def require_override(override: HookpointOverride) -> None:
    """Reject a width that is given twice; `require_options` checks the rest."""
    if override.expansion_factor is not None and override.num_latents is not None:
        raise ConfigError(
            "expansion-factor and num-latents of a hookpoint exclude each other",
            expected="one of them",
            got=f"{override.expansion_factor} and {override.num_latents}",
        )


def scale(text: str) -> str:
    """A number above 0 in the shortest spelling, or auto; raises `ConfigError`."""
    if text == "auto":
        return text
    try:
        scale = float(text)
    except ValueError:
        scale = -1.0
    if not 0 < scale < float("inf"):
        raise ConfigError(
            "--encoder-scale is neither a scale nor auto", expected="auto, or > 0", got=text
        )
    return repr(scale).removesuffix(".0")


def _require_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is too small", expected=">= 1", got=value)


def _require_seed(option: str, seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{option} is out of range", expected="0 to 2**32 - 1", got=seed)


ONE_PASS = ("signum", "adam", "adamw")
"""Optimisers whose steps are `saetrain.optim.fused`."""
