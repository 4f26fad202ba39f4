"""Options of a training run. Imports no torch: `--help` reads them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar

from actcache.core.json_codec import check_fields
from actcache.core.options import MAIN, hidden, option, require_names
from actcache.errors import ConfigError
from actcache.filesystem.paths import reject_url
from saetrain.config.sae import (
    ONE_PASS,
    HookpointOverride,
    InputScale,
    SaeOptions,
    flag,
    require_options,
    require_range,
    scale,
)

WeightsDtype = Literal["float32", "bfloat16"]
Precision = Literal["float32", "tf32", "bfloat16"]
WandbMode = Literal["disabled", "offline", "online"]
Verify = Literal["first-read", "always", "never"]
Parallel = Literal["ddp", "modules"]


@dataclass(frozen=True)
class FitConfig(SaeOptions):
    """Options of one training run: one or more SAEs trained on one stream of rows from a cache.

    The inherited options of `SaeOptions` describe the SAE at each hookpoint, unless `saes` lists
    several.
    """

    cache: str = option(group=MAIN, on_resume="free")
    """Folder of the cache, or its URL (s3://, gs://, hf:// and others that fsspec reads)."""

    out: str = option(group=MAIN, on_resume="free", metavar="DIR")
    """Folder of the run. A run that has made steps is refused without --resume."""

    hookpoint: tuple[str, ...] = option((), group=MAIN, metavar="NAME")
    """Hookpoint to train on, by name or fnmatch pattern; repeatable. Default: all of the cache."""

    saes: tuple[SaeOptions, ...] = hidden()
    """SAEs to train at each hookpoint. If given, the SAE options of this object are those of the
    first. On the command line, options that are given several times."""

    hookpoints: dict[str, HookpointOverride] = hidden(default_factory=dict, on_resume="forced")
    """Overrides of k, lr or width, by hookpoint name or fnmatch pattern; set in a --config file."""

    defaults: int | None = option(None, group=MAIN, omitted=True)
    """Version of the defaults: 1 trains as versions before this option did. Default: 2."""

    transcode: bool = option(False, group="SAE")
    """Train transcoders, which predict a module's output from its input: for each hookpoint NAME,
    read NAME:in and predict NAME. The decoder is initialised to zero."""

    skip_connection: bool = option(False, group="SAE")
    """With --transcode: add a learnt linear map from input to output."""

    crosscode: bool = option(False, group="SAE")
    """Train one crosscoder on the concatenated rows of all selected hookpoints, instead of one SAE
    for each hookpoint."""

    batch_size: int = option(4096, group=MAIN)
    """Rows (tokens) in one step."""

    epochs: int = option(1, group=MAIN, on_resume="forced")
    """Number of passes over the training rows."""

    max_tokens: int | None = option(None, group="Data", on_resume="forced")
    """Number of rows (tokens) to train on, rounded down to whole batches. Overrides --epochs."""

    grad_acc_steps: int = option(1, group="Optimiser")
    """Batches whose mean gradient makes one optimiser update. A step is still one batch."""

    micro_batch_size: int | None = option(None, group="Precision and memory", on_resume="forced")
    """Rows in one forward and backward pass. A smaller number takes less memory; the gradient is
    the same up to rounding. Default: the whole batch. Not with batchtopk, which selects from the
    whole batch."""

    chunk_latents: int | None = option(None, group="Precision and memory", on_resume="forced")
    """With topk: number of latents whose pre-activations are computed at once, for all rows. A
    smaller number takes less memory; the selection is the same up to rounding. Default: all
    latents at once; on a CPU, in blocks of rows that fit its cache."""

    compile: bool = option(False, group="Precision and memory", on_resume="forced")
    """Fuse the elementwise operations of jumprelu and gated with torch.compile. Saves about a tenth
    of a step's time on a CPU, where it needs a C++ compiler. Rounding differs. The first step
    includes the compilation."""

    cuda_graphs: bool = option(False, group="Precision and memory", on_resume="forced")
    """Capture the whole step of all SAEs as one CUDA graph and replay it, which removes the host's
    time to launch kernels. Useful for small or many SAEs. The graph reserves the memory of one
    step. Capture begins once k and penalties are constant. Needs CUDA and signum, adam or adamw,
    without --grad-acc-steps and --parallel ddp."""

    autocast: bool = option(False, group="Precision and memory", on_resume="forced")
    """Another name of --precision bfloat16."""

    precision: Precision | None = option(
        None, group="Precision and memory", on_resume="forced", omitted=True
    )
    """Precision of matrix products; weights, sums and the optimiser's state are in float32.
    bfloat16: on CUDA rows are gathered in it too; on a CPU it needs AVX512-BF16 or AMX, and a step
    then takes about two thirds of the time. Pre-activations are rounded before latents are
    selected. tf32: on CUDA; float32 elsewhere. Default: float32 on a CPU, bfloat16 on CUDA (tf32
    with --defaults 1, and where the GPU lacks bfloat16). A resumed run keeps what it began with."""

    weights_dtype: WeightsDtype = option("float32", group="Precision and memory", listed=False)
    """Dtype of the weights, of the optimiser's state and of the saved SAEs. bfloat16 only in runs
    with the defaults of version 1, for which it was an option: small updates are rounded away."""

    dead_after: int | None = option(None, group="SAE", on_resume="forced")
    """Number of rows without an activation after which a latent counts as dead. Default: 1/32 of
    the run, at least four batches and at most 10 million rows. Until that many rows have been
    trained on, the share of dead latents is not reported."""

    max_norm_ratio: float | None = option(None, group="Data", omitted=True, metavar="R")
    """Leave out rows whose norm is more than R times the median norm of their hookpoint, in
    training and validation. 0: none. Default: none."""

    val_fraction: float = option(0.05, group="Validation")
    """Fraction of the shards that are held out for validation and never trained on. 0: none."""

    val_every: int | None = option(None, group="Validation", on_resume="forced")
    """Steps between validations; the last step always has one. Each writes FVU and L0 on held-out
    rows to metrics.jsonl, for the weights that would be saved (signum: its averaged weights).
    Default: no validation."""

    val_rows: int = option(16384, group="Validation", on_resume="forced")
    """Number of held-out rows to validate on, equally many from each held-out shard (with --follow,
    of the first segment). They are kept in memory."""

    save_best: bool = option(False, group="Validation", on_resume="forced")
    """Also save each SAE at its validation with the lowest FVU, in SAE/best-STEP. A validation
    while k falls or the penalty rises is replaced by the first one after that."""

    finetune: str | None = option(None, group="Initialisation", metavar="PATH")
    """Initialise from trained SAEs: a run's folder (saetrain's or sparsify's) with SAEs named after
    hookpoints, the folder of one SAE or of its best-STEP, or USER/REPO[@REVISION] on the Hugging
    Face Hub. Sizes and kind of SAE are read from there."""

    fresh_b_dec: bool = option(False, group="Initialisation")
    """With --finetune: initialise b_dec by --b-dec-init instead of loading it."""

    fresh_decoder: bool = option(False, group="Initialisation")
    """With --finetune: initialise the decoder with the encoder's rows scaled to norm 1 (transcoder:
    with zeros) instead of loading it."""

    follow: bool = option(False, group="Data")
    """Train while the harvest still runs: train on completed shards in segments, and wait for more
    shards instead of ending the epoch. The result does not depend on when shards are published.
    The number of steps is computed from the harvest's --max-tokens or, if it has none, from
    --max-tokens here. If the harvest yields fewer rows (the text ends early, filters drop rows),
    the run ends after the last segment of its last epoch and reports it."""

    segment_shards: int | None = option(None, group="Data")
    """With --follow: number of shards in a segment. A segment is trained on once all its shards are
    published, and shuffled on its own; an incomplete batch at its end is dropped. The mean and
    variance are those of the first segment. Default: enough to fill the shuffle buffer and hold
    64 batches."""

    buffer_bytes: int | None = option(None, group="Data")
    """Memory for the shuffle buffer and prefetched batches of all hookpoints, in bytes. It
    determines the order of rows. Default: 4 GiB (or eight batches, if that is more), for at most
    2^19 rows."""

    pool_rows: int | None = option(None, group="Data")
    """Number of rows in the shuffle buffer, instead of --buffer-bytes."""

    verify: Verify = option("first-read", group="Data", on_resume="free")
    """When to compare rows with their checksums. first-read: check each shard before its first rows
    are used, and again if its file has changed since; the first epoch then reads every byte twice,
    most of them before the first step. always: check every window of rows that is loaded, which
    reads every byte many times. never: check sizes and headers only, for a cache that
    `actcache verify` has just passed."""

    data_seed: int | None = option(None, group="Data")
    """Random seed of the order of rows and of the held-out split. Default: the first --seed."""

    device: str = option("auto", group="Precision and memory", on_resume="free")
    """Torch device, such as cpu or cuda:1. auto: cuda where there is one, else cpu."""

    parallel: Parallel | None = option(None, group="Processes", on_resume="free")
    """How ranks started by torchrun divide the work. modules: by SAE. Each rank trains some of the
    SAEs on whole batches; ranks communicate for checkpoints only, stay within 1 GiB of rows (or 8
    steps) of each other, and write the same bytes as one process; ranks beyond the number of SAEs
    idle. ddp: by row. Each rank holds all SAEs and reads a slice of each batch, for few or large
    SAEs; the batches are the same, but sums are rounded differently. Not with batchtopk, which
    selects from the whole batch; the world size must divide the number of lanes. All ranks must
    see the same --out."""

    save_every: int = option(1000, group="Checkpoints", on_resume="free")
    """Steps between checkpoints. The last step always has one."""

    keep_last: int = option(1, group="Checkpoints", on_resume="free")
    """Number of newest checkpoints to keep. With 2 or more, a run with a damaged newest checkpoint
    resumes from the previous one."""

    keep_every: int | None = option(None, group="Checkpoints", on_resume="free")
    """Steps between checkpoints that are never deleted, besides --keep-last. Default: none."""

    log_every: int = option(10, group="Logging", on_resume="forced")
    """Steps between lines of metrics.jsonl; each line covers the steps since the previous one."""

    histogram_every: int = option(10, group="Logging")
    """Lines of metrics.jsonl between histograms of the latents' firing frequency (log10 of the
    fraction of rows), each over the rows since the previous one; the last line has one, too.
    0: none."""

    wandb: WandbMode = option("disabled", group="Logging", on_resume="free")
    """Copy metrics.jsonl and timings.jsonl to Weights & Biases (W&B). offline: write to a folder
    below $WANDB_DIR, or ./wandb, which `wandb sync` uploads. A W&B error is reported and does not
    stop the run."""

    wandb_project: str | None = option(None, group="Logging", on_resume="free", metavar="NAME")
    """W&B project. Default: $WANDB_PROJECT, or W&B's default project."""

    wandb_entity: str | None = option(None, group="Logging", on_resume="free", metavar="NAME")
    """W&B user or team. Default: W&B's default entity."""

    wandb_group: str | None = option(None, group="Logging", on_resume="free", metavar="NAME")
    """W&B group of runs. Default: with --wandb-per-sae the name of the run's folder, else none."""

    wandb_tags: tuple[str, ...] = option((), group="Logging", on_resume="free", metavar="TAG")
    """W&B tag; repeatable."""

    wandb_notes: str | None = option(None, group="Logging", on_resume="free")
    """Notes attached to the W&B run."""

    wandb_per_sae: bool = option(False, group="Logging", on_resume="free")
    """Create one W&B run for each SAE, instead of one for all."""

    wandb_log_final_artifact: bool = option(False, group="Logging", on_resume="free")
    """Upload the saved SAEs at the end, each as a W&B artifact."""

    resume: bool = option(False, group=MAIN, on_resume="free")
    """Resume from the last checkpoint in --out, or start a new run if there is none."""

    force_config: bool = option(False, group="Checkpoints", on_resume="free")
    """With --resume: allow changes of {forced} (epochs and max-tokens not with --follow). They take
    effect from the last checkpoint on, and run.json records the change. Refused: options that
    change the SAEs' names, shapes or optimisers or the order of rows, and another cache."""

    block_cache: str | None = option(None, group="Data", on_resume="free", metavar="DIR")
    """With a URL: folder that caches fetched blocks. Default: $ACTCACHE_BLOCK_CACHE, or
    actcache/blocks in the user's cache folder."""

    block_cache_bytes: int | None = option(None, group="Data", on_resume="free")
    """Largest size of the block cache, in bytes; 0: none. The least recently used blocks are
    evicted first. An activation cache that fits is fetched once, a larger one about twice per
    epoch. Default: $ACTCACHE_BLOCK_CACHE_BYTES, or 16 GiB."""

    def __post_init__(self) -> None:
        """Reject invalid values and combinations of options."""
        check_fields(self, encoder_scale=scale)
        self._take_first()
        require_options(self.sae)
        require_run(self)

    def has_histogram(self, step: int, *, last: bool) -> bool:
        """Return whether the line of metrics.jsonl at this step includes histograms."""
        lines = self.histogram_every
        return lines > 0 and (last or step % (lines * self.log_every) == 0)

    @property
    def order_seed(self) -> int:
        """Seed of the order of rows and of the held-out split."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def sae(self) -> SaeOptions:
        """Options of one SAE: the first, if `saes` lists several."""
        names = [f.name for f in dataclasses.fields(SaeOptions)]
        return SaeOptions(**{name: getattr(self, name) for name in names})

    def of(self, sae: SaeOptions) -> FitConfig:
        """Return this configuration reduced to one of its SAEs."""
        if not self.saes and not self.hookpoints:
            return self
        return dataclasses.replace(self, saes=(), **vars(sae))

    def _take_first(self) -> None:
        """Copy the options of the first of `saes` into the fields of this object."""
        if not self.saes:
            return
        first = self.saes[0]
        if self.sae not in (SaeOptions(), first):
            raise ConfigError(
                "saes and options of one SAE are both given",
                expected="each option of an SAE within saes",
                got=self.sae,
            )
        for f in dataclasses.fields(SaeOptions):
            object.__setattr__(self, f.name, getattr(first, f.name))  # the class is frozen


OptionsT = TypeVar("OptionsT", bound=SaeOptions)


@dataclass(frozen=True)
class Defaults:
    """Defaults of one version: options that a run's record holds as None, and formulas.

    A version never changes, so that a run begun with it resumes to the same bits.
    """

    input_scale: InputScale
    auxk_alpha: float
    auxk_by_residual: bool
    """Whether AuxK is divided by the residual's variance, as its authors do, or by the rows'."""
    auxk_scaled_down: bool
    """Whether AuxK is multiplied by the number of dead latents over k_aux, where that is below
    1."""
    auxk_slope: float
    """Slope below 0 of the ReLU that AuxK gives dead latents."""
    dead_after_part: int | None
    """--dead-after is the rows of the run over this; None: one epoch, or the run if shorter."""
    centred_transcoder: bool
    """Whether a transcoder's b_enc is initialised to -W_enc · mean(input), or to 0."""
    log_threshold: bool
    """Whether jumprelu's parameter is the logarithm of its threshold, or the threshold."""
    lr_by_rows: bool
    """Whether default learning rates follow the rows of an update, and muon's the length of the
    run."""
    beta1: float
    beta2: float
    eps: float
    max_norm_ratio: float
    """0: no limit."""
    sparsify_multi_topk: bool
    """Whether cfg.json of a Multi-TopK SAE has multi_topk, with which sparsify reconstructs from 4k
    latents."""
    cuda_precision: Precision


DEFAULTS = {
    1: Defaults(
        input_scale="none",
        auxk_alpha=1 / 32,
        auxk_by_residual=False,
        auxk_scaled_down=True,
        auxk_slope=0.0,
        dead_after_part=None,
        centred_transcoder=False,
        log_threshold=False,
        lr_by_rows=False,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        max_norm_ratio=0.0,
        sparsify_multi_topk=True,
        cuda_precision="tf32",
    ),
    2: Defaults(
        input_scale="rms",
        auxk_alpha=1 / 32,
        auxk_by_residual=True,
        auxk_scaled_down=False,
        auxk_slope=0.1,
        dead_after_part=32,
        centred_transcoder=True,
        log_threshold=True,
        lr_by_rows=True,
        beta1=0.9,
        beta2=0.999,
        eps=1e-12,
        max_norm_ratio=0.0,
        sparsify_multi_topk=False,
        cuda_precision="bfloat16",
    ),
}
"""Every version of the defaults."""
NEWEST_DEFAULTS = max(DEFAULTS)


def defaults_of(options: FitConfig) -> Defaults:
    """Return the defaults of options that `with_defaults` has filled in."""
    assert options.defaults is not None
    return DEFAULTS[options.defaults]


def with_defaults(config: FitConfig, version: int) -> FitConfig:
    """Return the options with those that are unset and have a default of `version` filled in.

    Args:
        config: the options, as given.
        version: version of the defaults where `config` names none.
    """
    version = config.defaults or version
    values = dataclasses.asdict(DEFAULTS[version])
    if config.finetune is not None:  # pretrained weights apply to rows as they are
        values["input_scale"] = "none"
    if config.follow:
        values["max_norm_ratio"] = 0.0

    def fill(options: OptionsT) -> OptionsT:
        filled = copy.copy(options)  # not `replace`: a default needs no check
        for name, value in vars(options).items():
            if value is None and name in values:
                object.__setattr__(filled, name, values[name])
        return filled

    filled = fill(config)
    object.__setattr__(filled, "defaults", version)
    object.__setattr__(filled, "saes", tuple(map(fill, config.saes)))
    return filled


def with_precision(config: FitConfig, precision: Precision) -> FitConfig:
    """Return the options with this precision, whatever --precision and --autocast say."""
    changed = copy.copy(config)
    object.__setattr__(changed, "precision", None)
    object.__setattr__(changed, "autocast", precision == "bfloat16")
    return changed


def require_run(run: FitConfig) -> None:
    """Reject invalid values and combinations of options; raises `ConfigError`."""
    require_names(run, "cache", "out")
    reject_url(run.out, "--out", "files are published by renaming them")
    if run.follow:
        reject_url(run.cache, "CACHE with --follow", "a running harvest writes to a local folder")
    require_range(
        run,
        "1 to 2**31 - 1",
        "batch_size",
        "epochs",
        "val_rows",
        "segment_shards",
        "grad_acc_steps",
        "micro_batch_size",
        "chunk_latents",
        "keep_last",
    )
    require_range(
        run,
        "1 to 2**53",
        "max_tokens",
        "dead_after",
        "val_every",
        "buffer_bytes",
        "pool_rows",
        "save_every",
        "keep_every",
        "log_every",
    )
    _require_kinds(run)
    _require_graphs(run)
    if run.defaults not in (None, *DEFAULTS):
        expected = " | ".join(map(str, DEFAULTS))
        raise ConfigError("--defaults is no version", expected=expected, got=run.defaults)
    if run.max_norm_ratio is not None and not (run.max_norm_ratio == 0 or run.max_norm_ratio >= 2):
        raise ConfigError(
            "--max-norm-ratio is out of range", expected="0, or >= 2", got=run.max_norm_ratio
        )
    if run.follow and run.max_norm_ratio:
        raise ConfigError(
            "--max-norm-ratio is not possible with --follow: its limits are those of all rows",
            remedy="leave --follow out once the harvest has finished, or harvest with "
            "--max-norm-ratio",
        )
    if run.precision not in (None, "bfloat16") and run.autocast:
        raise ConfigError(
            "--autocast is another name of --precision bfloat16",
            expected="one of them",
            got=f"--precision {run.precision} and --autocast",
        )
    require_range(run, "0 to 2**32 - 1", "data_seed")
    require_range(run, "0 to 2**53", "histogram_every", "block_cache_bytes")
    for name in ("fresh_b_dec", "fresh_decoder"):
        if getattr(run, name) and run.finetune is None:
            raise ConfigError(f"{flag(name)} needs --finetune", remedy=f"omit {flag(name)}")
    if run.force_config and not run.resume:
        raise ConfigError("--force-config needs --resume", remedy="add --resume")
    if run.save_best and run.val_every is None:
        raise ConfigError("--save-best needs validations", remedy="add --val-every N")
    if run.val_every is not None and run.val_fraction == 0:
        raise ConfigError(
            "--val-every needs held-out rows",
            expected="--val-fraction above 0",
            got=run.val_fraction,
        )
    if run.buffer_bytes is not None and run.pool_rows is not None:
        raise ConfigError(
            "--buffer-bytes and --pool-rows are mutually exclusive",
            expected="one of them",
            got=f"{run.buffer_bytes} and {run.pool_rows}",
        )
    if run.segment_shards is not None and not run.follow:
        raise ConfigError(
            "--segment-shards needs --follow",
            got=run.segment_shards,
            remedy="add --follow, or omit --segment-shards",
        )
    if run.segment_shards == 1 and run.val_fraction:
        raise ConfigError(
            "--segment-shards 1 leaves no training rows in a segment whose shard is held out",
            expected=">= 2, or --val-fraction 0",
            got=1,
        )


def _require_graphs(run: FitConfig) -> None:
    """Reject options with which a step cannot be captured as a CUDA graph."""
    if not run.cuda_graphs:
        return
    if run.device.partition(":")[0] not in ("auto", "cuda"):
        raise ConfigError(
            "--cuda-graphs needs a CUDA device",
            expected="--device auto or cuda",
            got=run.device,
            remedy="omit --cuda-graphs",
        )
    for sae in run.saes or (run,):
        if sae.optimizer not in ONE_PASS:
            raise ConfigError(
                "--cuda-graphs captures fused optimisers only",
                expected=f"--optimizer {' | '.join(ONE_PASS)}",
                got=sae.optimizer,
                remedy="another --optimizer, or omit --cuda-graphs",
            )
    if run.grad_acc_steps > 1:
        raise ConfigError(
            "--cuda-graphs needs an optimiser update in every step",
            expected="--grad-acc-steps 1",
            got=run.grad_acc_steps,
            remedy="a larger --batch-size with --micro-batch-size",
        )
    if run.parallel == "ddp":
        raise ConfigError(
            "--cuda-graphs cannot capture the collectives of --parallel ddp",
            expected="--parallel modules, or one process",
            got="ddp",
            remedy="omit --cuda-graphs or --parallel",
        )


def _require_kinds(run: FitConfig) -> None:
    """Reject combinations of inputs, outputs, batches and activations that cannot be trained."""
    if run.skip_connection and not run.transcode:
        raise ConfigError(
            "--skip-connection needs --transcode: an autoencoder would copy its input",
            expected="--transcode",
            remedy="add --transcode, or omit --skip-connection",
        )
    if run.crosscode and run.transcode:
        raise ConfigError(
            "--crosscode and --transcode are mutually exclusive",
            expected="one of them",
            remedy="omit one of them",
        )
    for sae in run.saes or (run,):
        rows = run.micro_batch_size or run.batch_size
        if sae.activation == "batchtopk" and rows < run.batch_size:
            raise ConfigError(
                "--micro-batch-size splits the batch from which --activation batchtopk selects",
                expected=f">= --batch-size {run.batch_size}",
                got=run.micro_batch_size,
                remedy="a smaller --batch-size with --grad-acc-steps, or --activation topk",
            )
        if sae.frequency_penalty is not None and (rows < run.batch_size or run.parallel == "ddp"):
            raise ConfigError(
                "--frequency-penalty counts how often a latent fires in a whole batch, of which "
                "--micro-batch-size and --parallel ddp compute parts",
                expected="neither of them",
                got=f"--micro-batch-size {run.micro_batch_size}, --parallel {run.parallel}",
                remedy="a smaller --batch-size, or --parallel modules",
            )
        if sae.target_l0 is not None and run.save_best:
            raise ConfigError(
                "--save-best keeps the lowest FVU, which with --target-l0 is that of an early step "
                "with more active latents",
                expected="one of them",
                remedy="omit --save-best",
            )
        if sae.activation != "topk" and run.chunk_latents is not None:
            raise ConfigError(
                "--chunk-latents needs --activation topk",
                got=sae.activation,
                remedy="omit it; --micro-batch-size saves memory too",
            )
        if sae.activation not in ("jumprelu", "gated") and run.compile:
            raise ConfigError(
                "--compile needs --activation jumprelu or gated: others gain nothing",
                got=sae.activation,
                remedy="omit --compile",
            )
        if sae.encoder_scale == "auto" and run.transcode:
            raise ConfigError(
                "--encoder-scale auto does not work for a transcoder: its decoder begins at 0",
                expected="a number with --transcode",
                remedy="omit --encoder-scale",
            )
        if sae.decoder_norm == "fold" and run.transcode:
            raise ConfigError(
                "--decoder-norm fold does not work for a transcoder: its decoder norms begin at 0",
                expected="--decoder-norm unit or free with --transcode",
                got="fold",
                remedy="omit it: a transcoder's decoder rows are free",
            )
