"""Options of a training run. Imports no torch: `--help` reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from actcache.core.options import MAIN, hidden, option
from actcache.errors import ConfigError
from actcache.filesystem.paths import reject_url
from saetrain.config.sae_options import (
    ONE_PASS,
    HookpointOverride,
    SaeOptions,
    _require_positive,
    _require_seed,
)

WeightsDtype = Literal["float32", "bfloat16"]


WandbMode = Literal["disabled", "offline", "online"]
Verify = Literal["first-read", "always", "never"]
Parallel = Literal["ddp", "modules"]


@dataclass(frozen=True)
class FitConfig(SaeOptions):
    """One run: SAEs over one stream of a cache.

    The options of `SaeOptions` describe the SAE at each hookpoint, unless `saes` lists several.
    """

    cache: str = option(group=MAIN, on_resume="free")
    """Folder of the cache, or its URL (s3://, gs://, hf:// and others that fsspec reads)."""

    out: str = option(group=MAIN, on_resume="free", metavar="DIR")
    """Folder of the run. One that exists is refused without --resume."""

    hookpoint: tuple[str, ...] = option((), group=MAIN, metavar="NAME")
    """Hookpoint of the cache, or fnmatch pattern; repeatable. Default: all of them."""

    saes: tuple[SaeOptions, ...] = hidden()
    """SAEs to train at each hookpoint, instead of the one that the options here describe; they are
    then those of the first. On the command line, options that are given several times."""

    hookpoints: dict[str, HookpointOverride] = hidden(default_factory=dict, on_resume="forced")
    """Other k, lr or width for hookpoints, by name or fnmatch pattern; in a file for --config."""

    transcode: bool = option(False, group="SAE")
    """Predict a module's output from its input: for each selected hookpoint NAME, the SAE
    reads NAME:in and predicts NAME, and its decoder begins at zero."""

    skip_connection: bool = option(False, group="SAE")
    """With --transcode: a linear path from input to output beside the latents."""

    crosscode: bool = option(False, group="SAE")
    """Train one SAE on all hookpoints chosen, side by side, instead of one SAE each."""

    batch_size: int = option(4096, group=MAIN)
    """Rows (tokens) in a step."""

    epochs: int = option(1, group=MAIN, on_resume="forced")
    """Passes over the training rows."""

    max_tokens: int | None = option(None, group="Data", on_resume="forced")
    """Rows to train on, rounded down to whole batches, instead of --epochs."""

    grad_acc_steps: int = option(1, group="Optimiser")
    """Batches of which one update is made, of their mean gradient. Steps count batches."""

    micro_batch_size: int | None = option(None, group="Precision and memory", on_resume="forced")
    """Rows in one forward and backward pass: less memory, the same gradient up to rounding.
    Default: the whole batch. Not for batchtopk, which selects from the whole batch."""

    chunk_latents: int | None = option(None, group="Precision and memory", on_resume="forced")
    """Latents whose pre-activations are computed at once, for all rows: less memory, the same
    selection up to rounding. Default: all; on a CPU, for as many rows as its cache holds. For
    topk."""

    compile: bool = option(False, group="Precision and memory", on_resume="forced")
    """Fuse the operations of jumprelu and gated between their products with torch.compile: a tenth
    of a step's time on a CPU, whose C++ compiler it needs. Rounding differs. The first step
    includes the compilation."""

    cuda_graphs: bool = option(False, group="Precision and memory", on_resume="forced")
    """Record a whole step of all SAEs once, as a CUDA graph, and replay it, so that the host spends
    no time on launching its kernels: for SAEs that are small, or many. The graph keeps the memory
    of a step to itself. It begins once k and penalties no longer change. For signum, adam and adamw
    on CUDA, without --grad-acc-steps and --parallel ddp."""

    autocast: bool = option(False, group="Precision and memory", on_resume="forced")
    """Products of matrices in bfloat16, weights as they are. On a CPU it needs AVX512-BF16 or AMX,
    and a step then takes about two thirds of the time. Off by default on every device: it
    rounds the choice of latents."""

    weights_dtype: WeightsDtype = option("float32", group="Precision and memory")
    """Type of the weights, of the optimiser's state and of what is saved."""

    dead_after: int | None = option(None, group="SAE", on_resume="forced")
    """Rows without firing after which a latent counts as dead. Default: 10 million, or one epoch or
    the whole run if that is less. Before that many rows, the share of dead latents is not known."""

    val_fraction: float = option(0.05, group="Validation")
    """Share of the shards that are held out and never trained on. 0: none."""

    val_every: int | None = option(None, group="Validation", on_resume="forced")
    """Steps between validations: FVU and L0 on held-out rows, of the weights that would be exported
    (signum's averages), to metrics.jsonl; and at the last step. Default: none."""

    val_rows: int = option(16384, group="Validation", on_resume="forced")
    """Held-out rows to validate on, kept in memory; as many from each held-out shard (with
    --follow, of the first segment's)."""

    save_best: bool = option(False, group="Validation", on_resume="forced")
    """Keep each SAE as it was at the validation with the lowest FVU, in SAE/best-STEP, beside the
    last one. Validations while k falls or the penalty rises count only until one comes after."""

    finetune: str | None = option(None, group="Initialisation", metavar="PATH")
    """Initialise with the weights of other SAEs: the folder of a run (of ours or sparsify's) with
    SAEs named after hookpoints, of one SAE or its best-STEP, or USER/REPO[@REVISION] of the Hub.
    Sizes and kind come from there."""

    fresh_b_dec: bool = option(False, group="Initialisation")
    """With --finetune: initialise b_dec by --b-dec-init all the same."""

    fresh_decoder: bool = option(False, group="Initialisation")
    """With --finetune: initialise the decoder anew, from the encoder's rows at norm 1 (a
    transcoder's at 0)."""

    follow: bool = option(False, group="Data")
    """Train while the harvest still runs: begin with the shards that are there, in segments, and
    wait for more instead of ending the epoch. The result does not depend on when shards come.
    Steps are counted from the harvest's goal (its --max-tokens) or, where it has none, from
    --max-tokens here. If there are fewer rows than the goal promises (the text ends early, filters
    drop rows), the run ends after the last segment of its last epoch, and reports it."""

    segment_shards: int | None = option(None, group="Data")
    """Shards of a segment with --follow: trained on once all are there, each shuffled by itself; an
    incomplete batch at its end is left out. The first one gives the mean and variance. Default: as
    many as fill the memory for rows and hold 64 batches."""

    buffer_bytes: int | None = option(None, group="Data")
    """Memory for the shuffle buffer and prefetched batches, over all hookpoints, bytes. The number
    of rows it holds is part of the order of rows. Default: 4 GiB (or eight batches, if that is
    more), for 2^19 rows at most."""

    pool_rows: int | None = option(None, group="Data")
    """Rows in the shuffle buffer, instead of --buffer-bytes."""

    verify: Literal["first-read", "always", "never"] = option(
        "first-read", group="Data", on_resume="free"
    )
    """When rows are compared with their checksums. first-read: each shard before
    its first rows are used, and again if its file was touched since; the first epoch then reads
    every byte twice, the first time before the first step for most of them. always: for every
    window of rows in memory, which reads every byte many times. never: sizes and headers only, for
    a cache that `actcache verify` has just passed."""

    data_seed: int | None = option(None, group="Data")
    """Seed of the order of rows and of the held-out split. Default: the first --seed."""

    device: str = option("auto", group="Precision and memory", on_resume="free")
    """Torch device, such as cpu or cuda:1. auto: cuda where there is one, else cpu."""

    parallel: Parallel | None = option(None, group="Processes", on_resume="free")
    """How processes under torchrun divide the work. modules: by SAE; each process trains some of
    them, and reads whole batches for them. Processes communicate for checkpoints only, and the run
    is the same bytes as with one process, for any number of them (those beyond the SAEs' idle);
    they keep within 1 GiB of rows (or 8 steps) of each other. ddp: by row; every process has all
    SAEs, and reads its part of each batch. For few or large SAEs; not for batchtopk, which selects
    from the whole batch; the number of processes must divide that of the lanes. The same batches,
    and sums that are rounded otherwise. All processes must see the same --out."""

    save_every: int = option(1000, group="Checkpoints", on_resume="free")
    """Steps between checkpoints; the last step always has one."""

    keep_last: int = option(1, group="Checkpoints", on_resume="free")
    """Number of newest checkpoints to keep. With 2 or more, a run whose newest one is damaged
    resumes from the one before."""

    keep_every: int | None = option(None, group="Checkpoints", on_resume="free")
    """Steps between checkpoints that are kept for good, beside the others. Default: none."""

    log_every: int = option(10, group="Logging", on_resume="forced")
    """Steps that a line of metrics.jsonl covers."""

    histogram_every: int = option(10, group="Logging")
    """Lines of metrics.jsonl from one histogram of the latents' firing (log10 of the share of rows)
    to the next, each over the rows since the one before; the last line has one, too. 0: none."""

    wandb: WandbMode = option("disabled", group="Logging", on_resume="free")
    """Copy metrics.jsonl and timings.jsonl to Weights & Biases. offline: to a folder
    below $WANDB_DIR, or ./wandb, which `wandb sync` uploads. An error there is
    reported and does not stop the run."""

    wandb_project: str | None = option(None, group="Logging", on_resume="free", metavar="NAME")
    """W&B project. Default: $WANDB_PROJECT, or W&B's own."""

    wandb_entity: str | None = option(None, group="Logging", on_resume="free", metavar="NAME")
    """W&B user or team."""

    wandb_group: str | None = option(None, group="Logging", on_resume="free", metavar="NAME")
    """W&B group of runs. Default: with --wandb-per-sae, the name of the run's folder."""

    wandb_tags: tuple[str, ...] = option((), group="Logging", on_resume="free", metavar="TAG")
    """W&B tag; repeatable."""

    wandb_notes: str | None = option(None, group="Logging", on_resume="free")
    """Notes on the W&B run."""

    wandb_per_sae: bool = option(False, group="Logging", on_resume="free")
    """One W&B run for each SAE, instead of one for all."""

    wandb_log_final_artifact: bool = option(False, group="Logging", on_resume="free")
    """Upload the saved SAEs at the end, each as a W&B artifact."""

    resume: bool = option(False, group=MAIN, on_resume="free")
    """Resume from the run's last checkpoint, or begin a run that does not exist yet."""

    force_config: bool = option(False, group="Checkpoints", on_resume="free")
    """With --resume, change options of a run that has begun: {forced} (epochs and max-tokens not
    with --follow). They hold from the last checkpoint on, and run.json records the change. An
    option that changes the SAEs' names, shapes or optimisers, or the order of rows, is refused, and
    so is another cache."""

    block_cache: str | None = option(None, group="Data", on_resume="free", metavar="DIR")
    """With a URL: folder for blocks that were fetched. Default: $ACTCACHE_BLOCK_CACHE, or
    actcache/blocks in the user's folder for caches."""

    block_cache_bytes: int | None = option(None, group="Data", on_resume="free")
    """Bytes that the block cache may hold, 0 for none; the least recently used blocks are removed
    first. A cache that fits is fetched once, a larger one about twice in every epoch.
    Default: $ACTCACHE_BLOCK_CACHE_BYTES, or 16 GiB."""

    def __post_init__(self) -> None:
        """Reject numbers and combinations that no run can use."""
        self._take_first()
        super().__post_init__()
        require_run(self)

    def has_histogram(self, step: int, *, last: bool) -> bool:
        """Whether the line of metrics.jsonl after a step has histograms."""
        lines = self.histogram_every
        return lines > 0 and (last or step % (lines * self.log_every) == 0)

    @property
    def order_seed(self) -> int:
        """Seed of the order of rows and of the held-out split."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def sae(self) -> SaeOptions:
        """The options of one SAE: the first, if there are several."""
        names = [f.name for f in dataclasses.fields(SaeOptions)]
        return SaeOptions(**{name: getattr(self, name) for name in names})

    def of(self, sae: SaeOptions) -> FitConfig:
        """The options of the run with those of one of its SAEs."""
        return dataclasses.replace(self, saes=(), **vars(sae))

    def _take_first(self) -> None:
        """Let the options of one SAE be those of the first of `saes`."""
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


def require_run(run: FitConfig) -> None:
    """Reject numbers and combinations that no run can use."""
    reject_url(run.out, "--out", "files are published by renaming them")
    if run.follow:
        reject_url(run.cache, "CACHE with --follow", "a harvest at work is in a folder")
    _require_positive(
        run,
        "batch_size",
        "epochs",
        "max_tokens",
        "dead_after",
        "val_every",
        "val_rows",
        "segment_shards",
        "buffer_bytes",
        "pool_rows",
        "grad_acc_steps",
        "micro_batch_size",
        "chunk_latents",
        "save_every",
        "keep_last",
        "keep_every",
        "log_every",
    )
    _require_kinds(run)
    _require_graphs(run)
    if run.data_seed is not None:
        _require_seed("--data-seed", run.data_seed)
    if run.histogram_every < 0:
        raise ConfigError("--histogram-every is negative", got=run.histogram_every)
    for name in ("fresh_b_dec", "fresh_decoder"):
        if getattr(run, name) and run.finetune is None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is for --finetune", remedy="add it, or leave this out")
    if run.force_config and not run.resume:
        raise ConfigError("--force-config changes a run that is resumed", remedy="add --resume")
    if run.save_best and run.val_every is None:
        raise ConfigError("--save-best needs validations", remedy="add --val-every N")
    if run.val_every is not None and run.val_fraction == 0:
        raise ConfigError(
            "--val-every needs rows that are held out",
            expected="--val-fraction above 0",
            got=run.val_fraction,
        )
    if run.buffer_bytes is not None and run.pool_rows is not None:
        raise ConfigError(
            "--buffer-bytes and --pool-rows exclude each other",
            expected="one of them",
            got=f"{run.buffer_bytes} and {run.pool_rows}",
        )
    if run.segment_shards is not None and not run.follow:
        raise ConfigError(
            "--segment-shards is for a run with --follow",
            got=run.segment_shards,
            remedy="add --follow, or leave it out",
        )
    if run.segment_shards == 1 and run.val_fraction:
        raise ConfigError(
            "--segment-shards leaves nothing to train on in a segment that is held out",
            expected=">= 2, or --val-fraction 0",
            got=1,
        )


def _require_graphs(run: FitConfig) -> None:
    """Refuse what cannot be recorded as a CUDA graph."""
    if not run.cuda_graphs:
        return
    if run.device.partition(":")[0] not in ("auto", "cuda"):
        raise ConfigError(
            "--cuda-graphs needs a CUDA device",
            expected="--device auto or cuda",
            got=run.device,
            remedy="leave it out",
        )
    for sae in run.saes or (run,):
        if sae.optimizer not in ONE_PASS:
            raise ConfigError(
                "--cuda-graphs records updates of one pass alone",
                expected=f"--optimizer {' | '.join(ONE_PASS)}",
                got=sae.optimizer,
                remedy="leave one of them out",
            )
    if run.grad_acc_steps > 1:
        raise ConfigError(
            "--cuda-graphs records steps that are all alike, with an update in each",
            expected="--grad-acc-steps 1",
            got=run.grad_acc_steps,
            remedy="a larger --batch-size with --micro-batch-size",
        )
    if run.parallel == "ddp":
        raise ConfigError(
            "--cuda-graphs does not record what processes exchange within a step",
            expected="--parallel modules, or one process",
            got="ddp",
            remedy="leave one of them out",
        )


def _require_kinds(run: FitConfig) -> None:
    """Refuse inputs and outputs, and batches, that SAEs of the run cannot have."""
    if run.skip_connection and not run.transcode:
        raise ConfigError(
            "--skip-connection would let an autoencoder copy its input",
            expected="--transcode",
            remedy="add --transcode, or leave it out",
        )
    if run.crosscode and run.transcode:
        raise ConfigError(
            "--crosscode and --transcode are two kinds of SAE",
            expected="one of them",
            remedy="leave one of them out",
        )

    for sae in run.saes or (run,):
        rows = run.micro_batch_size or run.batch_size
        if sae.activation == "batchtopk" and rows < run.batch_size:
            raise ConfigError(
                "--micro-batch-size cuts the batch that --activation batchtopk chooses among",
                expected=f">= --batch-size {run.batch_size}",
                got=run.micro_batch_size,
                remedy="a smaller --batch-size with --grad-acc-steps, or --activation topk",
            )
        if sae.activation != "topk" and run.chunk_latents is not None:
            raise ConfigError(
                "--chunk-latents is for --activation topk",
                got=sae.activation,
                remedy="leave it out; --micro-batch-size saves memory too",
            )
        if sae.activation not in ("jumprelu", "gated") and run.compile:
            raise ConfigError(
                "--compile is for --activation jumprelu and gated: others gain nothing",
                got=sae.activation,
                remedy="leave it out",
            )
        if sae.encoder_scale == "auto" and run.transcode:
            raise ConfigError(
                "--encoder-scale auto has nothing to try: a transcoder's decoder begins at 0",
                expected="a number with --transcode",
                remedy="leave it out",
            )
        if sae.decoder_norm == "fold" and run.transcode:
            raise ConfigError(
                "--decoder-norm fold scales latents by norms, and a transcoder's begin at zero",
                expected="--decoder-norm unit or free with --transcode",
                got="fold",
                remedy="leave it out: a transcoder's decoder rows are free",
            )
