"""What no run can carry out, and no SAE can be: refused before anything is read. No torch here.

Every function raises `ConfigError`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from actcache.errors import ConfigError
from actcache.place import refuse_url

if TYPE_CHECKING:
    from saetrain.config import FitConfig, Override, SaeConfig, SaeOptions

ANNEALED = ("topk", "batchtopk")
"""Activations whose k may fall in a run."""

PENALISED = {"jumprelu": 1e-3, "relu": 3e-2, "gated": 3e-2}
"""Activations that a penalty makes sparse instead of k, and the penalty's weight by default."""


ONE_PASS = ("signum", "adam", "adamw")
"""Optimisers whose steps are `saetrain.optim.one_pass`."""


def require_sae(sae: SaeConfig) -> None:
    """Refuse sizes and combinations that cannot be built."""
    if min(sae.d_in, sae.num_latents, sae.k, sae.width_out, *sae.widths, 1) < 1:
        raise ConfigError("an SAE's sizes must be positive", got=sae)
    if sae.k > sae.num_latents and sae.activation not in PENALISED:
        raise ConfigError(
            "--k is larger than the number of latents",
            expected=f"<= {sae.num_latents}",
            got=sae.k,
            remedy="a smaller --k, or more --num-latents",
        )
    if sae.activation == "groupmax" and sae.num_latents % sae.k:
        raise ConfigError(
            "--activation groupmax takes one latent of each of k equal groups",
            expected=f"a number of latents that --k {sae.k} divides",
            got=sae.num_latents,
            remedy="another --k or --num-latents",
        )
    if sae.multi_topk and sae.activation != "topk":
        raise ConfigError(
            "--multi-topk goes with --activation topk",
            got=sae.activation,
            remedy="leave one of them out",
        )
    rising = (0, *sae.matryoshka, sae.num_latents)
    if any(low >= high for low, high in pairwise(rising)):
        raise ConfigError(
            "--matryoshka takes rising numbers of latents",
            expected=f"1 to {sae.num_latents - 1}, each larger than the one before",
            got=list(sae.matryoshka),
            remedy="another order, or more --num-latents",
        )
    if sae.multi_topk and sae.matryoshka:
        raise ConfigError(
            "--multi-topk and --matryoshka are two ways to train one dictionary at many sizes",
            expected="one of them",
            remedy="leave one of them out",
        )
    if sae.widths and (sum(sae.widths) != sae.d_in or sae.transcode):
        raise ConfigError(
            "a crosscoder reads and predicts all of its hookpoints",
            expected=f"d_in {sum(sae.widths)}, no --transcode",
            got=sae,
        )
    if sae.d_out not in (None, sae.d_in) and not sae.transcode:
        raise ConfigError("an autoencoder's output is as wide as its input", got=sae)
    for name in ("sparsity", "threshold"):
        value = getattr(sae, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{name} is out of range", expected=">= 0", got=value)
    if not 0 < sae.bandwidth < float("inf"):
        raise ConfigError("--bandwidth is out of range", expected="> 0", got=sae.bandwidth)


def require_options(options: SaeOptions) -> None:
    """Refuse numbers that no SAE can have."""
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


def require_override(override: Override) -> None:
    """Refuse widths that are said twice; what else cannot be, `require_options` refuses."""
    if override.expansion_factor is not None and override.num_latents is not None:
        raise ConfigError(
            "expansion-factor and num-latents say the same of a hookpoint",
            expected="one of them",
            got=f"{override.expansion_factor} and {override.num_latents}",
        )


def require_run(run: FitConfig) -> None:
    """Refuse numbers and combinations that no run can carry out."""
    refuse_url(run.out, "--out", "files are published by renaming them")
    if run.follow:
        refuse_url(run.cache, "CACHE with --follow", "a harvest at work is in a folder")
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
