"""One SAE of a run: its architecture, its options, and the rules that both must keep.

`SaeConfig` is what `cfg.json` holds, `SaeOptions` how the SAE is trained, `SaeEntry` both with the
hookpoints and the name that the run gives it.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from actcache.core.json_codec import check_fields, truncated_repr
from actcache.core.options import MAIN, option
from actcache.errors import ConfigError, FormatError
from actcache.format.manifest import Hookpoint


@dataclass(frozen=True)
class SaeConfig:
    """Architecture of an SAE, transcoder or crosscoder: the contents of `cfg.json`."""

    d_in: int
    """Width of the input, D; for a crosscoder, the sum over its hookpoints."""
    num_latents: int
    """Number of latents, M."""
    k: int
    """Number of latents that may be active at once, K; unused with jumprelu, relu and gated."""
    activation: ActivationName = "topk"
    """Activation function of the latents."""
    multi_topk: bool = False
    """Whether to add the loss of the reconstruction from 4k latents, with weight 1/8."""
    matryoshka: tuple[int, ...] = ()
    """Sizes of the nested dictionaries that must reconstruct alone, ascending; M is implied."""
    transcode: bool = False
    """Whether the target differs from the input. b_dec is then not subtracted from the input, and
    decoder rows may have any norm."""
    skip_connection: bool = False
    """Whether a linear map from input to output is added to the reconstruction."""
    d_out: int | None = None
    """Width of the output; null: d_in."""
    widths: tuple[int, ...] = ()
    """Widths of a crosscoder's hookpoints, in order; empty for other SAEs."""
    sparsity: float = 0.0
    """Weight of the penalty: on L0 (jumprelu), or on L1 in units of the rows' standard deviation
    (relu, gated)."""
    threshold: float = 0.01
    """Initial threshold of jumprelu, in units of the rows' standard deviation."""
    bandwidth: float = 0.05
    """Width of the window around jumprelu's threshold in which it has a gradient, same unit."""

    @property
    def width_out(self) -> int:
        """Width of the output: `d_out`, or `d_in` if that is None."""
        return self.d_in if self.d_out is None else self.d_out

    def __post_init__(self) -> None:
        """Reject invalid sizes and combinations."""
        check_fields(self)
        require_sae(self)


MAX_SIZE = 2**31 - 1
"""Largest width or number of latents: kernels index with 32 bits."""
LARGEST = 1e30
"""Bound on factors: squares of larger ones overflow float32 in any loss."""

ActivationName = Literal["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"]


def require_sae(sae: SaeConfig) -> None:
    """Reject invalid sizes and combinations; raises `ConfigError`."""
    sizes = (sae.d_in, sae.num_latents, sae.k, sae.width_out, *sae.widths)
    if not all(1 <= size <= MAX_SIZE for size in sizes):
        raise ConfigError("an SAE's sizes are out of range", expected=f"1 to {MAX_SIZE}", got=sae)
    if sae.k > sae.num_latents and sae.activation not in PENALISED:
        raise ConfigError(
            "--k is larger than the number of latents",
            expected=f"<= {sae.num_latents}",
            got=sae.k,
            remedy="a smaller --k, or more --num-latents",
        )
    if sae.activation == "groupmax" and sae.num_latents % sae.k:
        raise ConfigError(
            "--activation groupmax selects one latent from each of k equal groups",
            expected=f"a number of latents divisible by --k {sae.k}",
            got=sae.num_latents,
            remedy="another --k or --num-latents",
        )
    if sae.multi_topk and sae.activation != "topk":
        raise ConfigError(
            "--multi-topk needs --activation topk",
            got=sae.activation,
            remedy="omit one of them",
        )
    if any(low >= high for low, high in pairwise((0, *sae.matryoshka, sae.num_latents))):
        raise ConfigError(
            "--matryoshka takes ascending numbers of latents",
            expected=f"1 to {sae.num_latents - 1}, each larger than the previous",
            got=list(sae.matryoshka),
            remedy="another order, or more --num-latents",
        )
    if sae.multi_topk and sae.matryoshka:
        raise ConfigError(
            "--multi-topk and --matryoshka are mutually exclusive",
            expected="one of them",
            remedy="omit one of them",
        )
    if sae.widths and (sum(sae.widths) != sae.d_in or sae.transcode):
        raise ConfigError(
            "a crosscoder reads and predicts all of its hookpoints",
            expected=f"d_in {sum(sae.widths)}, no --transcode",
            got=sae,
        )
    if sae.d_out not in (None, sae.d_in) and not sae.transcode:
        raise ConfigError("an autoencoder's output must be as wide as its input", got=sae)
    require_range(sae, "0 to 1e30", "sparsity", "threshold")
    require_range(sae, "> 0, at most 1e30", "bandwidth")


_RANGES: dict[str, Callable[[float], bool]] = {
    "1 to 2**31 - 1": lambda x: 1 <= x < 2**31,
    "1 to 2**53": lambda x: 1 <= x <= 2**53,
    "0 to 2**53": lambda x: 0 <= x <= 2**53,
    ">= 0": lambda x: 0 <= x < math.inf,
    "> 0": lambda x: 0 < x < math.inf,
    "0 to 1e30": lambda x: 0 <= x <= LARGEST,
    "> 0, at most 1e30": lambda x: 0 < x <= LARGEST,
    "0 to 1e6": lambda x: 0 <= x <= 1e6,
    "1e-30 to 1e30": lambda x: 1e-30 <= x <= 1e30,
    "0 to 1": lambda x: 0 <= x <= 1,
    "0 to 1, without 1": lambda x: 0 <= x < 1,
    "> 0, at most 1": lambda x: 0 < x <= 1,
    "0 to 2**32 - 1": lambda x: 0 <= x < 2**32,
}


def require_range(options: object, expected: str, *names: str) -> None:
    """Reject options outside a range, one of the keys of `_RANGES`. None is accepted."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not _RANGES[expected](value):
            raise ConfigError(f"{flag(name)} is out of range", expected=expected, got=value)


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


PENALISED = {"jumprelu": 1e-3, "relu": 3e-2, "gated": 3e-2}
"""Activations made sparse by a penalty instead of k, with the penalty's default weight."""

ANNEALED = ("topk", "batchtopk")
"""Activations that support --k-anneal-steps."""


@dataclass(frozen=True, kw_only=True)
class SaeOptions:
    """Options of one SAE of a run. Options shared by all SAEs of a run are in `FitConfig`.

    Each option that is neither a flag nor a list may be given several times on the command line;
    the run trains every combination at every hookpoint. This holds for new fields, too.
    """

    expansion_factor: int = option(32, group=MAIN, label="x")
    """Number of latents, as a multiple of the activations' width."""

    num_latents: int | None = option(None, group=MAIN, label="latents")
    """Number of latents, instead of --expansion-factor."""

    k: int = option(32, group=MAIN)
    """Number of latents that may be active at once; with batchtopk, on average over a batch. Unused
    by jumprelu, relu and gated, which have --sparsity."""

    activation: ActivationName = option("topk", group=MAIN)
    """Which latents are active. topk: the k largest of a row. batchtopk: the k x rows largest of a
    batch; after training, those above a threshold. groupmax: the largest of each of k groups.
    jumprelu: those above a learnt threshold, with a penalty on L0. relu: those above 0, with a
    penalty on L1. gated: relu, with a separate gate that selects latents."""

    sparsity: float | None = option(None, group="SAE", on_resume="forced")
    """Weight of the sparsity penalty, added to the FVU: for jumprelu on L0 (default 1e-3), for relu
    and gated on L1 in units of the rows' standard deviation (default 3e-2). It does not depend on
    the scale of the rows."""

    target_l0: float | None = option(None, group="SAE", label="l0", omitted=True)
    """With jumprelu, relu and gated: mean number of active latents, towards which the penalty is
    steered, instead of --sparsity. For jumprelu the penalty is then quadratic in L0. Not with
    signum and --save-best."""

    frequency_penalty: float | None = option(None, group="SAE", label="frequency", omitted=True)
    """With jumprelu and --target-l0: weight of a penalty on latents that fire often, as a multiple
    of the weight of the penalty on L0. The penalty is quadratic in the share of a batch's rows on
    which a latent fires, and from a tenth of the rows on larger than that on L0. Try 1. Default:
    none."""

    sparsity_warmup_steps: int | None = option(None, group="SAE", on_resume="forced")
    """Steps over which the penalty rises linearly from 0 to its weight. Default: 1/20 of the
    run."""

    threshold: float | None = option(None, group="SAE")
    """With jumprelu: initial threshold, in units of the rows' standard deviation. Default: 0.01."""

    bandwidth: float | None = option(None, group="SAE")
    """With jumprelu: width of the window around a threshold in which it has a gradient, in units of
    the rows' standard deviation. Default: 0.05."""

    multi_topk: bool = option(False, group="SAE")
    """With topk: add the loss of the reconstruction from 4k latents, with weight 1/8."""

    matryoshka: tuple[int, ...] = option((), group="SAE")
    """Size of a nested dictionary (the first latents) that must reconstruct alone; repeatable, in
    ascending order. Default: none."""

    optimizer: OptimizerName = option("adam", group="Optimiser")
    """Optimiser. adam8bit: Adam with moments in 8 bits; needs bitsandbytes ([quantized]). muon:
    Muon for matrices, Adam for other weights. signum: schedule-free SignSGD with momentum 0.95,
    with half of Adam's state."""

    lr: float | None = option(None, group=MAIN, on_resume="forced")
    """Peak learning rate. Default for adam, adamw and adam8bit: 2e-4 / sqrt(latents / 2^14), times
    sqrt(2^17 / updates) in a run of fewer than 2^17 updates, at most 0.18 / sqrt(width of the
    rows); for muon: 1.6e-2 x sqrt(137 / updates), 2e-3 to 1.6e-2; both times (rows / 2048)^(1/4)
    with fewer than 2,048 rows an update; for signum: 5e-3 / sqrt(latents / 2^14)."""

    lr_schedule: LrSchedule | None = option(None, group="Schedule", on_resume="forced")
    """Learning rate schedule after the warm-up. stable-then-decay: constant, then linear decay over
    --lr-decay-steps. Default: linear; for signum constant without warm-up, as it is
    schedule-free."""

    lr_warmup_steps: int | None = option(None, group="Schedule", on_resume="forced", label="warmup")
    """Steps of linear learning rate warm-up; for signum only with --lr-schedule. Default: 1/20 of
    the run, at most 1000."""

    lr_decay_steps: int | None = option(None, group="Schedule", on_resume="forced")
    """With --lr-schedule stable-then-decay: steps of the final decay. Default: 1/5 of the run."""

    lr_end: float = option(0.0, group="Schedule", on_resume="forced")
    """Final learning rate, as a fraction of the peak."""

    weight_decay: float | None = option(None, group="Optimiser", on_resume="forced")
    """Decoupled weight decay of adamw (default: 0.01) and of muon's matrices (default: 0.1)."""

    beta1: float | None = option(None, group="Optimiser", on_resume="forced", omitted=True)
    """Decay of the first moment of adam, adamw, adam8bit, and of muon's Adam. Default: 0.9."""

    beta2: float | None = option(None, group="Optimiser", on_resume="forced", omitted=True)
    """Decay of the second moment of the same optimisers. Default: 0.999."""

    eps: float | None = option(None, group="Optimiser", on_resume="forced", omitted=True)
    """Number added to the root of the second moment of the same optimisers. Default: 1e-12."""

    grad_clip: float | None = option(None, group="Optimiser", on_resume="forced")
    """Maximum norm of an SAE's gradient over all its weights; a larger one is scaled down. Not for
    signum, which uses signs only. Default: no clipping."""

    decoder_norm: DecoderNorm = option("unit", group="SAE", on_resume="forced")
    """Norm of decoder rows. unit: scale rows to norm 1 before every step (except a transcoder's,
    which are unconstrained). fold: unconstrained; latents are selected by activation times norm,
    and saving folds the norm into the encoder, so that saved rows have norm 1 and the function is
    the same. free: unconstrained, and saved as they are."""

    b_dec_init: BDecInit = option("mean", group="Initialisation", label="b-dec")
    """Initial b_dec: the mean of all training rows, the geometric median of the first 2,048 rows,
    or zeros."""

    input_scale: InputScale | None = option(None, group="Initialisation", label="input")
    """Scaling of rows in training, computed from the statistics of all training rows. rms: elements
    have mean square 1. unit: rows have mean squared norm 1. The scale is folded into the saved
    weights, so a saved SAE takes rows as they are in the cache. Default: rms; with --finetune
    none."""

    encoder_scale: str = option("1", group="Initialisation", label="encoder")
    """Factor on the encoder's initial weights. auto: the factor with the least error on the first
    2,048 rows, found by search and written to run.json."""

    k_anneal_steps: int = option(0, group="SAE", on_resume="forced")
    """With topk and batchtopk: steps over which k falls linearly from --k-start to --k. The saved k
    is always --k. 0: off."""

    k_start: int | None = option(None, group="SAE", on_resume="forced")
    """With --k-anneal-steps: initial k. Default: ten times the activations' width, or all latents
    if there are fewer."""

    auxk_alpha: float | None = option(None, group="SAE", on_resume="forced", label="auxk")
    """Weight of the AuxK loss, in which dead latents predict the residual; its error is divided by
    the residual's variance. 0: off. Default: 1/32."""

    seed: int = option(0, group="Initialisation")
    """Random seed of the initial weights. The first one also seeds the order of rows and the
    held-out split, unless --data-seed is given."""

    def __post_init__(self) -> None:
        """Reject invalid values and combinations."""
        check_fields(self, encoder_scale=scale)  # normalised: "1" and "1.0" would be two SAEs
        require_options(self)


@dataclass(frozen=True)
class HookpointOverride:
    """Options that replace those of the run for the SAEs of matching hookpoints."""

    k: int | None = None
    """Number of latents that may be active at once."""
    lr: float | None = None
    """Learning rate."""
    expansion_factor: int | None = None
    """Number of latents, as a multiple of the activations' width."""
    num_latents: int | None = None
    """Number of latents."""

    def __post_init__(self) -> None:
        """Reject values out of range, and a width that is given twice."""
        check_fields(self)
        require_range(self, "1 to 2**31 - 1", "k", "expansion_factor", "num_latents")
        require_range(self, "1e-30 to 1e30", "lr")
        if self.expansion_factor is not None and self.num_latents is not None:
            raise ConfigError(
                "expansion-factor and num-latents of a hookpoint are mutually exclusive",
                expected="one of them",
                got=f"{self.expansion_factor} and {self.num_latents}",
            )


OptimizerName = Literal["signum", "adam", "adamw", "adam8bit", "muon"]
LrSchedule = Literal["constant", "linear", "cosine", "stable-then-decay"]
DecoderNorm = Literal["unit", "fold", "free"]
InputScale = Literal["none", "rms", "unit"]
BDecInit = Literal["mean", "geometric-median", "zeros"]


@dataclass(frozen=True)
class SaeEntry:
    """One SAE of a run."""

    hookpoint: str
    """Hookpoint it is trained on; of a crosscoder, its name."""
    config: SaeConfig
    """Its sizes."""
    lr: float
    """Its peak learning rate."""
    seed: int
    """Seed of its weights."""
    setting: str = ""
    """Difference from the run's other SAEs of its hookpoint, such as k32-lr1e-3; empty where
    there are no others."""
    options: SaeOptions = field(default_factory=SaeOptions)
    """Its options, as given."""
    reads: tuple[str, ...] = ()
    """Hookpoints whose rows it reads, side by side; none: the one it is called after."""
    predicts: tuple[str, ...] = ()
    """Hookpoints whose rows it predicts; none: those it reads."""
    scales: tuple[float, ...] = ()
    """With --input-scale, what the rows of each of its hookpoints are multiplied by in training."""
    encoder_scale: float = 1.0
    """What its encoder's weights were multiplied by at the start."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Hookpoints it reads."""
        return self.reads or (self.hookpoint,)

    @property
    def targets(self) -> tuple[str, ...]:
        """Hookpoints it predicts."""
        return self.predicts or self.sources

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Hookpoints whose rows it is given, in order."""
        return (*self.sources, *self.predicts)

    @property
    def name(self) -> str:
        """Its name in the run, and its folder: HOOKPOINT, or HOOKPOINT/SETTING."""
        return f"{self.hookpoint}/{self.setting}" if self.setting else self.hookpoint


def hookpoints_of(entries: Iterable[SaeEntry]) -> list[str]:
    """List the hookpoints of all SAEs in order, without duplicates."""
    return list(dict.fromkeys([name for entry in entries for name in entry.hookpoints]))


_SETTING = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
"""Name of a folder: no separator, and not '..'."""
_MOST_SETTING = 200
_RESERVED = re.compile(r"best-[0-9]+|.*\.(json|jsonl|safetensors|lock)")
"""Names of a run's other files and folders."""


def require_entry(entry: SaeEntry) -> None:
    """Raise `FormatError` for names that are no folder of a run, or numbers out of range."""
    setting = entry.setting
    if setting and (not _SETTING.fullmatch(setting) or len(setting) > _MOST_SETTING):
        raise FormatError("not a setting's name", expected=_SETTING.pattern, got=repr(setting))
    for name in (entry.hookpoint, setting):
        if _RESERVED.fullmatch(name):
            raise FormatError("an SAE has the name of another file of a run", got=repr(name))
    scales = (*entry.scales, entry.encoder_scale)
    if not (0 <= entry.lr < math.inf and all(0 < scale < math.inf for scale in scales)):
        got = f"lr {entry.lr}, scales {scales}"
        raise FormatError("numbers of an SAE out of range", expected="above 0", got=got)
    if len(entry.scales) not in (0, len(entry.hookpoints)):
        expected = f"none or {len(entry.hookpoints)}"
        raise FormatError("scales of other hookpoints", expected=expected, got=len(entry.scales))
    if not 0 <= entry.seed < 2**32:
        raise FormatError("a seed out of range", expected="0 to 2**32 - 1", got=entry.seed)
    for name in (entry.hookpoint, *entry.reads, *entry.predicts):
        Hookpoint(name, 1)


def require_options(options: SaeOptions) -> None:
    """Reject invalid values and combinations; raises `ConfigError`."""
    require_range(options, "1 to 2**31 - 1", "expansion_factor", "num_latents", "k", "k_start")
    require_range(options, "1 to 2**53", "lr_decay_steps")
    steps = ("lr_warmup_steps", "sparsity_warmup_steps", "k_anneal_steps")
    require_range(options, "0 to 2**53", *steps)
    require_range(options, ">= 0", "sparsity", "threshold", "bandwidth")
    require_range(options, ">= 0", "auxk_alpha")
    require_range(options, "0 to 1e6", "weight_decay")
    require_range(options, "1e-30 to 1e30", "lr")
    require_range(options, "> 0", "grad_clip", "target_l0")
    require_range(options, "0 to 1e30", "frequency_penalty")
    require_range(options, "0 to 1, without 1", "beta1", "beta2")
    require_range(options, "> 0, at most 1", "eps")
    require_range(options, "0 to 1", "lr_end")
    require_range(options, "0 to 2**32 - 1", "seed")
    _require_activation(options)
    _require_recipe(options)


def _require_activation(options: SaeOptions) -> None:
    """Reject options that the activation does not have. `SaeConfig` checks widths."""
    for name in ("sparsity", "sparsity_warmup_steps", "target_l0"):
        value = getattr(options, name)
        if value is not None and options.activation not in PENALISED:
            raise ConfigError(
                f"--activation {options.activation} is made sparse by --k and has no penalty",
                expected=f"no {flag(name)}",
                got=value,
                remedy=f"omit it, or --activation {' | '.join(PENALISED)}",
            )
    for name in ("threshold", "bandwidth", "frequency_penalty"):
        if getattr(options, name) is not None and options.activation != "jumprelu":
            raise ConfigError(
                f"{flag(name)} needs --activation jumprelu",
                got=options.activation,
                remedy="omit one of them",
            )
    if options.target_l0 is not None and options.sparsity is not None:
        raise ConfigError(
            "--sparsity and --target-l0 are mutually exclusive",
            expected="one of them",
            got=f"{options.sparsity} and {options.target_l0}",
        )
    if options.target_l0 is not None and options.optimizer == "signum":
        raise ConfigError(
            "--target-l0 steers the L0 of the weights in training, but signum saves their average",
            expected="another --optimizer",
            got="signum",
            remedy="--optimizer adam, or --sparsity instead of --target-l0",
        )
    if options.frequency_penalty is not None and options.target_l0 is None:
        raise ConfigError("--frequency-penalty needs --target-l0", remedy="add --target-l0 N")
    if options.k_anneal_steps and options.activation not in ANNEALED:
        why = "divides latents into k groups" if options.activation == "groupmax" else "has no k"
        raise ConfigError(
            f"--k-anneal-steps decreases k, but --activation {options.activation} {why}",
            expected=f"--activation {' | '.join(ANNEALED)}",
            got=options.k_anneal_steps,
            remedy="omit --k-anneal-steps",
        )


def _require_recipe(options: SaeOptions) -> None:
    """Reject contradictory options of the optimiser and the schedules."""
    if options.lr_decay_steps is not None and options.lr_schedule != "stable-then-decay":
        raise ConfigError(
            "--lr-decay-steps needs --lr-schedule stable-then-decay",
            got=options.lr_schedule,
            remedy="linear and cosine decay from the end of the warm-up",
        )
    falls = options.optimizer != "signum" if options.lr_schedule is None else True
    if options.lr_end and (not falls or options.lr_schedule == "constant"):
        raise ConfigError(
            "--lr-end needs a learning rate that decays",
            got=f"--optimizer {options.optimizer}, --lr-schedule {options.lr_schedule}",
            remedy="--lr-schedule linear, cosine or stable-then-decay",
        )
    if options.weight_decay is not None and options.optimizer not in ("adamw", "muon"):
        got = f"--optimizer {options.optimizer}"
        raise ConfigError("--weight-decay needs adamw or muon", got=got)
    if options.grad_clip is not None and options.optimizer == "signum":
        raise ConfigError(
            "--grad-clip has no effect on signum, which takes signs of gradients",
            remedy="omit it, or another --optimizer",
        )
    for name in ("beta1", "beta2", "eps"):
        if getattr(options, name) is not None and options.optimizer == "signum":
            raise ConfigError(
                f"{flag(name)} is an option of Adam, which signum does not use",
                expected="--optimizer adam | adamw | adam8bit | muon",
                got=getattr(options, name),
                remedy="omit it",
            )
    if options.k_start is not None:
        if not options.k_anneal_steps:
            raise ConfigError("--k-start needs --k-anneal-steps", got=options.k_start)
        if options.k_start < options.k:
            raise ConfigError(
                "--k-start is smaller than --k", expected=f">= {options.k}", got=options.k_start
            )


def scale(given: str | float) -> str:
    """Normalise an encoder scale: 'auto', or a positive number in its shortest spelling.

    Raises:
        ConfigError: the value is neither.
    """
    if isinstance(given, str) and given == "auto":
        return given
    try:
        is_number = isinstance(given, str | numbers.Real) and not isinstance(given, bool)
        scale = float(given) if is_number else -1.0
    except (ValueError, OverflowError):
        scale = -1.0
    if not 0 < scale < float("inf"):
        raise ConfigError(
            "--encoder-scale is neither a number nor auto",
            expected="auto, or > 0",
            got=truncated_repr(given),
        )
    return repr(scale).removesuffix(".0")


ONE_PASS = ("signum", "adam", "adamw")
"""Optimisers implemented in `saetrain.optim.fused`."""
