"""What a training run is asked to do. No torch here: the command line reads this for `--help`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from actcache.errors import ConfigError
from actcache.filesystem.paths import reject_url
from saetrain.config.sae_options import (
    ONE_PASS,
    HookpointOverride,
    SaeOptions,
    _require_positive,
    _require_seed,
)

_NO_OPTION = {"option": False}
"""Metadata of a field that the command line does not have as an option."""


WeightsDtype = Literal["float32", "bfloat16"]


WandbMode = Literal["disabled", "offline", "online"]


@dataclass(frozen=True)
class FitConfig(SaeOptions):
    """One run: SAEs over one stream of a cache.

    The options of `SaeOptions` say what is trained at each hookpoint: one SAE, or those of `saes`.
    """

    cache: str
    """Folder of the cache, or its URL (s3://, gs://, hf:// and others that fsspec reads)."""

    out: str
    """Folder of the run. One that exists is refused without --resume."""

    hookpoint: tuple[str, ...] = ()
    """Hookpoint of the cache, or fnmatch pattern; repeatable. Default: all of them."""

    saes: tuple[SaeOptions, ...] = field(default=(), metadata=_NO_OPTION)
    """SAEs to train at each hookpoint, instead of the one that the options here describe; they are
    then those of the first. On the command line, options that are given several times."""

    hookpoints: dict[str, HookpointOverride] = field(default_factory=dict, metadata=_NO_OPTION)
    """Other k, lr or width for hookpoints, by name or fnmatch pattern; in a file for --config."""

    transcode: bool = False
    """Predict a module's output from its input: for each hookpoint NAME that is chosen, the SAE
    reads NAME:in and predicts NAME, and its decoder begins at zero."""

    skip_connection: bool = False
    """With --transcode: a linear path from input to output beside the latents."""

    crosscode: bool = False
    """Train one SAE on all hookpoints chosen, side by side, instead of one SAE each."""

    batch_size: int = 4096
    """Rows (tokens) in a step."""

    epochs: int = 1
    """Passes over the training rows."""

    max_tokens: int | None = None
    """Rows to train on, rounded down to whole batches, instead of --epochs."""

    grad_acc_steps: int = 1
    """Batches of which one update is made, of their mean gradient. Steps count batches."""

    micro_batch_size: int | None = None
    """Rows that are in the forward and backward pass at once: less memory, the same gradient but
    for rounding. Default: the whole batch. Not for batchtopk, which chooses among all of it."""

    chunk_latents: int | None = None
    """Latents whose pre-activations are formed at once, of all rows: less memory, the same choice
    but for rounding. Default: all; on a CPU, of as many rows as its cache holds. For topk."""

    compile: bool = False
    """Let torch.compile fuse what jumprelu and gated do between their products: a tenth of a step's
    time on a CPU, whose C++ compiler it needs. Rounding differs. The first step waits for it."""

    cuda_graphs: bool = False
    """Record a whole step of all SAEs once, as a CUDA graph, and replay it, so that the host spends
    no time on launching its kernels: for SAEs that are small, or many. The graph keeps the memory
    of a step to itself. It begins once k and penalties no longer change. For signum, adam and adamw
    on CUDA, without --grad-acc-steps and --parallel ddp."""

    autocast: bool = False
    """Products of matrices in bfloat16, weights as they are. On a CPU it needs AVX512-BF16 or AMX,
    and a step then takes about two thirds of the time. Off unless asked for, on any device: it
    rounds the choice of latents."""

    weights_dtype: WeightsDtype = "float32"
    """Type of the weights, of the optimiser's state and of what is saved."""

    dead_after: int | None = None
    """Rows without firing after which a latent counts as dead. Default: 10 million, or one epoch or
    the whole run if that is less. Before that many rows, the share of dead latents is not known."""

    val_fraction: float = 0.05
    """Share of the shards that are held out and never trained on. 0: none."""

    val_every: int | None = None
    """Steps between validations: FVU and L0 on held-out rows, of the weights that would be exported
    (signum's averages), to metrics.jsonl; and at the last step. Default: none."""

    val_rows: int = 16384
    """Held-out rows to validate on, kept in memory; as many from each held-out shard (with
    --follow, of the first segment's)."""

    save_best: bool = False
    """Keep each SAE as it was at the validation with the lowest FVU, in SAE/best-STEP, beside the
    last one. Validations while k falls or the penalty rises count only until one comes after."""

    finetune: str | None = None
    """Begin with the weights of other SAEs: the folder of a run (of ours or sparsify's) with SAEs
    called after hookpoints, of one SAE or its best-STEP, or USER/REPO[@REVISION] of the Hub. Sizes
    and kind come from there."""

    fresh_b_dec: bool = False
    """With --finetune: let b_dec begin as --b-dec-init says all the same."""

    fresh_decoder: bool = False
    """With --finetune: let the decoder begin anew, from the encoder's rows at norm 1 (of a
    transcoder, at 0)."""

    follow: bool = False
    """Train while the harvest is still at work: begin on the shards that are there, in segments,
    and wait for more instead of ending the epoch. The result does not depend on when shards come.
    Steps are counted from the harvest's goal (its --max-tokens) or, where it has none, from
    --max-tokens here. If there are fewer rows than the goal promises (the text ends early, filters
    drop rows), the run ends after the last segment of its last epoch, and says so."""

    segment_shards: int | None = None
    """Shards of a segment with --follow: trained on once all are there, each shuffled by itself; an
    incomplete batch at its end is left out. The first one gives the mean and variance. Default: as
    many as fill the memory for rows and hold 64 batches."""

    buffer_bytes: int | None = None
    """Memory for rows that are mixed and batches that wait, of all hookpoints together, bytes; how
    many rows that is, is part of their order. Default: 4 GiB (or eight batches, if that is more),
    for 2^19 rows at most."""

    pool_rows: int | None = None
    """Rows to mix in memory, instead of --buffer-bytes."""

    verify: Literal["first-read", "always", "never"] = "first-read"
    """When the rows that are read are compared with their checksums. first-read: each shard before
    its first rows are used, and again if its file was touched since; the first epoch then reads
    every byte twice, the first time before the first step for most of them. always: for every
    window of rows in memory, which reads every byte many times. never: sizes and headers only, for
    a cache that `actcache verify` has just passed."""

    data_seed: int | None = None
    """Seed of the order of rows and of the held-out split. Default: the first --seed."""

    device: str = "auto"
    """Torch device, such as cpu or cuda:1. auto: cuda where there is one, else cpu."""

    parallel: Literal["ddp", "modules"] | None = None
    """What the processes share that torchrun starts. modules: the SAEs; each process has some of
    them, and reads whole batches for them. Nothing is exchanged but for checkpoints, and the run is
    the same bytes as with one process, for any number of them (those beyond the SAEs' idle); they
    keep within 1 GiB of rows (or 8 steps) of each other. ddp: each batch; every process has all
    SAEs, and reads its part of the rows. For SAEs that are few or large, but for batchtopk, which
    chooses among all of a batch; the number of processes must divide that of the lanes. The same
    batches, and sums that are rounded otherwise. All processes must see the same --out."""

    save_every: int = 1000
    """Steps between checkpoints; the last step always has one."""

    keep_last: int = 1
    """Checkpoints that stay, the newest ones. With 2 or more, a run whose newest one is damaged
    goes on from the one before."""

    keep_every: int | None = None
    """Make a checkpoint every so many steps, besides, and keep it for good. Default: none."""

    log_every: int = 10
    """Steps that a line of metrics.jsonl covers."""

    histogram_every: int = 10
    """Lines of metrics.jsonl from one histogram of the latents' firing (log10 of the share of rows)
    to the next, each over the rows since the one before; the last line has one, too. 0: none."""

    wandb: WandbMode = "disabled"
    """Log what metrics.jsonl and timings.jsonl say to Weights & Biases, too. offline: to a folder
    below $WANDB_DIR, or ./wandb, which `wandb sync` uploads. What fails there is told, and does not
    stop the run."""

    wandb_project: str | None = None
    """Project there. Default: $WANDB_PROJECT, or W&B's own."""

    wandb_entity: str | None = None
    """User or team there."""

    wandb_group: str | None = None
    """Group of runs there. Default: with --wandb-per-sae, the name of the run's folder."""

    wandb_tags: tuple[str, ...] = ()
    """Tag there; repeatable."""

    wandb_notes: str | None = None
    """Notes there."""

    wandb_per_sae: bool = False
    """A run there for each SAE, instead of one for all."""

    wandb_log_final_artifact: bool = False
    """Upload the saved SAEs at the end, each as an artifact."""

    resume: bool = False
    """Go on from the run's last checkpoint; begin a run that does not exist yet."""

    force_config: bool = False
    """With --resume, go on under other options than the run has had: lr, lr-schedule,
    lr-warmup-steps, lr-decay-steps, lr-end, weight-decay, grad-clip, decoder-norm, k-anneal-steps,
    k-start, auxk-alpha, sparsity, sparsity-warmup-steps, dead-after, epochs and max-tokens (not
    with --follow), micro-batch-size, chunk-latents, compile, cuda-graphs, autocast, val-every,
    val-rows, save-best, log-every. They hold from the last checkpoint on, and run.json tells it.
    What changes the SAEs' names, shapes or optimisers, or the order of rows, is refused, and so is
    another cache."""

    block_cache: str | None = None
    """With a URL: folder for blocks that were fetched. Default: $ACTCACHE_BLOCK_CACHE, or
    actcache/blocks in the user's folder for caches."""

    block_cache_bytes: int | None = None
    """Bytes that it may hold, 0 for none; the blocks that were not used for longest go first. A
    cache that fits is fetched once, a larger one about twice in every epoch.
    Default: $ACTCACHE_BLOCK_CACHE_BYTES, or
    16 GiB."""

    def __post_init__(self) -> None:
        """Refuse numbers and combinations that no run can carry out."""
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
                "saes and other options say what is trained",
                expected="each option of an SAE within saes",
                got=self.sae,
            )
        for f in dataclasses.fields(SaeOptions):
            object.__setattr__(self, f.name, getattr(first, f.name))  # the class is frozen


def require_run(run: FitConfig) -> None:
    """Refuse numbers and combinations that no run can carry out."""
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
        raise ConfigError("--force-config is for a run to go on with", remedy="add --resume")
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
            "--buffer-bytes and --pool-rows say the same",
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
