"""How an SAE is trained, apart from its optimiser: k over the run, parts of batches, precision."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.config.sae_options import DecoderNorm


@dataclass(frozen=True)
class StepSettings:
    """The options of one SAE's steps. Steps count batches, from 0."""

    decoder_norm: DecoderNorm = "unit"
    """See `saetrain.model.decoder_norm`."""
    k_start: int = 0
    """k of the first step, if it changes."""
    k_end: int = 0
    """k of step `k_anneal_steps` and of all after it."""
    k_anneal_steps: int = 0
    """Steps in which k falls; 0: it does not change."""
    grad_clip: float | None = None
    """Largest norm of the gradient."""
    grad_acc_steps: int = 1
    """Batches of an update."""
    micro_batch_size: int | None = None
    """Rows in a forward pass at once; None: the batch."""
    autocast: bool = False
    """Products in bfloat16."""
    chunk_latents: int | None = None
    """Latents whose pre-activations are formed at once; None: all."""
    compile: bool = False
    """Dense activations through torch.compile."""

    def begins_update(self, step: int) -> bool:
        """Whether this step's batch is the first of its update."""
        return step % self.grad_acc_steps == 0

    def ends_update(self, step: int) -> bool:
        """Whether this step's batch is the last of its update."""
        return (step + 1) % self.grad_acc_steps == 0

    def first_step_of_update(self, step: int) -> int:
        """The first batch of the update that this step's batch is of."""
        return step // self.grad_acc_steps * self.grad_acc_steps

    def k(self, step: int) -> int | None:
        """K in a step, the same for all batches of an update; None: what it is. As in sparsify."""
        if self.k_anneal_steps == 0:
            return None
        done = min(1.0, self.first_step_of_update(step) / self.k_anneal_steps)
        return round(self.k_start * (1 - done) + self.k_end * done)

    def changes_k(self, step: int) -> bool:
        """Whether K is another than in the step before."""
        return step > 0 and self.k(step) != self.k(step - 1)


def make_step_settings(options: FitConfig, sizes: SaeConfig) -> StepSettings:
    """What the options of a run mean for an SAE of these sizes.

    Raises:
        ConfigError: --k-start is more than all latents.
    """
    if options.k_start is not None and options.k_start > sizes.num_latents:
        raise ConfigError(
            "--k-start is larger than the number of latents",
            expected=f"<= {sizes.num_latents}",
            got=options.k_start,
        )
    start = options.k_start if options.k_start is not None else 10 * sizes.d_in
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
    )
