"""What a training run is asked to do. No torch here: the command line reads this for `--help`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from actcache.errors import ConfigError
from saetrain import checks

_NO_OPTION = {"option": False}
"""Metadata of a field that the command line does not have as an option."""

OptimizerName = Literal["signum", "adam", "adamw", "adam8bit", "muon"]
LrSchedule = Literal["constant", "linear", "cosine", "stable-then-decay"]
DecoderNorm = Literal["unit", "fold", "free"]
WeightsDtype = Literal["float32", "bfloat16"]
InputScale = Literal["none", "rms", "unit"]
BDecInit = Literal["mean", "geometric-median", "zeros"]
WandbMode = Literal["disabled", "offline", "online"]
ActivationName = Literal["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"]


@dataclass(frozen=True)
class SaeConfig:
    """One sparse autoencoder, transcoder or crosscoder: what `cfg.json` says of it."""

    d_in: int
    """Width of what is encoded, D; of a crosscoder, of all its hookpoints together."""
    num_latents: int
    """Latents, M."""
    k: int
    """Latents that may be active at once, K; says nothing where a penalty makes latents sparse."""
    activation: ActivationName = "topk"
    """How latents become active."""
    multi_topk: bool = False
    """Whether the loss of 4k latents is trained on too, at 1/8."""
    matryoshka: tuple[int, ...] = ()
    """Numbers of first latents that must reconstruct alone, rising; M itself goes without saying"""
    transcode: bool = False
    """Whether it predicts other rows than those it reads; b_dec is then not taken from them, and
    decoder rows may have any norm."""
    skip_connection: bool = False
    """Whether it has a linear path from input to output beside its latents."""
    d_out: int | None = None
    """Width of what is predicted; null: d_in."""
    widths: tuple[int, ...] = ()
    """Widths of a crosscoder's hookpoints, in order; none: it is no crosscoder."""
    sparsity: float = 0.0
    """Weight of the penalty: on L0 (jumprelu), or on L1 in roots of the variance (relu, gated)."""
    threshold: float = 0.01
    """Where jumprelu's thresholds begin, in roots of the variance."""
    bandwidth: float = 0.05
    """Width of the window in which jumprelu's thresholds feel a gradient, in the same unit."""

    @property
    def width_out(self) -> int:
        """Width of what is predicted."""
        return self.d_in if self.d_out is None else self.d_out

    def __post_init__(self) -> None:
        """Refuse sizes and combinations that cannot be built."""
        checks.require_sae(self)


@dataclass(frozen=True, kw_only=True)
class SaeOptions:
    """What belongs to one SAE of a run, rather than to the stream that feeds them all.

    Each of these options may be given several times, but for those that are flags or lists by
    themselves: a run trains every combination, at every hookpoint. A new field here needs nothing
    else for that.
    """

    expansion_factor: int = 32
    """Latents as a multiple of the activations' width."""

    num_latents: int | None = None
    """Latents, instead of --expansion-factor."""

    k: int = 32
    """Latents that may be active at once; with batchtopk, on average over a batch. jumprelu, relu
    and gated have none: --sparsity decides."""

    activation: ActivationName = "topk"
    """topk: the k largest of a row. batchtopk: the k times rows largest of a batch; a threshold
    after training. groupmax: the largest of each of k groups. jumprelu: those above a learnt
    threshold, with a penalty on their number. relu: those above 0, with a penalty on their sum.
    gated: relu, with magnitudes apart from the choice of latents."""

    sparsity: float | None = None
    """Weight of the penalty that makes latents sparse: for jumprelu on their number (default 1e-3),
    for relu and gated on the sum of their activations in roots of the rows' variance (default
    3e-2). Beside the FVU, whatever the scale of the rows."""

    sparsity_warmup_steps: int | None = None
    """Steps in which the penalty rises from 0 to --sparsity. Default: a twentieth of the run."""

    threshold: float | None = None
    """jumprelu: where the thresholds begin, in roots of the rows' variance. Default: 0.01."""

    bandwidth: float | None = None
    """jumprelu: width of the window around a threshold in which it feels a gradient, in the same
    unit. Default: 0.05."""

    multi_topk: bool = False
    """With topk: train on the reconstruction from 4k latents too, at 1/8 of the weight."""

    matryoshka: tuple[int, ...] = ()
    """Number of first latents that must reconstruct by themselves; repeatable, rising."""

    optimizer: OptimizerName = "adam"
    """adam, adamw. adam8bit: moments in 8 bits, needs bitsandbytes ([quantized]). muon: Muon for
    matrices, Adam for the rest. signum: schedule-free SignSGD, momentum 0.95; half of Adam's
    state."""

    lr: float | None = None
    """Learning rate, the peak where it changes. Default for adam, adamw and adam8bit: 2e-4 /
    sqrt(latents / 2^14), times sqrt(2^17 / steps) in a run of fewer steps than 2^17, at most
    0.24 / sqrt(width of the rows); for signum 5e-3 / sqrt(latents / 2^14); for muon 2e-3."""

    lr_schedule: LrSchedule | None = None
    """What follows the warm-up. stable-then-decay: constant, then linear over --lr-decay-steps.
    Default: linear; for signum none, not even a warm-up: being schedule-free, it needs neither."""

    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; for signum only with --lr-schedule. Default: a twentieth of the run,
    at most 1000."""

    lr_decay_steps: int | None = None
    """Steps of the decay that ends the run, with --lr-schedule stable-then-decay. Default: a fifth
    of the run."""

    lr_end: float = 0.0
    """What the learning rate falls to, as a share of its peak."""

    weight_decay: float | None = None
    """Decoupled weight decay of adamw (default 0.01) and of muon's matrices (0.1)."""

    grad_clip: float | None = None
    """Largest norm of an SAE's gradient, over all its weights; one that is longer is scaled down.
    Not for signum, which looks at signs alone."""

    decoder_norm: DecoderNorm = "unit"
    """unit: decoder rows are scaled to norm 1 before every step (not a transcoder's, which are
    free). fold: they are free, latents are chosen by activation times norm, and the norm is folded
    into the encoder when it is saved: rows of norm 1, the same function. free: rows of any norm,
    saved so."""

    b_dec_init: BDecInit = "mean"
    """Where b_dec begins: at the mean of all training rows, at the geometric median of the first
    2,048, or at zeros."""

    input_scale: InputScale = "none"
    """Scale of rows in training, from the statistics of all training rows. rms: their numbers have
    a mean square of 1. unit: their squared norms have a mean of 1. What is saved takes rows as they
    are in the cache: the scale is folded into it."""

    encoder_scale: str = "1"
    """What the encoder's weights are multiplied by at the start: a number; or auto: the one with
    the least error on the first 2,048 rows, found by trial and written to run.json."""

    k_anneal_steps: int = 0
    """Steps in which k falls linearly from --k-start to --k, with topk and batchtopk. What is saved
    says --k always."""

    k_start: int | None = None
    """Where k begins, with --k-anneal-steps. Default: ten times the activations' width, or all
    latents."""

    auxk_alpha: float = 1 / 32
    """Weight of AuxK, which lets dead latents predict the residual. 0: off."""

    seed: int = 0
    """Seed of the weights; the first one is that of the order of rows and of the held-out split,
    too, unless --data-seed is given."""

    def __post_init__(self) -> None:
        """Refuse numbers that no SAE can have."""
        # One spelling of each number: 1 and 1.0 would be two SAEs. The class is frozen.
        object.__setattr__(self, "encoder_scale", checks.scale(self.encoder_scale))
        checks.require_options(self)


@dataclass(frozen=True)
class Override:
    """What the SAEs of some hookpoints have instead of what the run's options say."""

    k: int | None = None
    """Latents that may be active at once."""
    lr: float | None = None
    """Learning rate."""
    expansion_factor: int | None = None
    """Latents as a multiple of the activations' width."""
    num_latents: int | None = None
    """Latents."""

    def __post_init__(self) -> None:
        """Refuse widths that are said twice; what else cannot be, `SaeOptions` refuses."""
        checks.require_override(self)


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

    hookpoints: dict[str, Override] = field(default_factory=dict, metadata=_NO_OPTION)
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
        checks.require_run(self)

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
