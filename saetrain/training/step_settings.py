"""Settings of an SAE's steps besides its optimiser: annealed k, batch parts, precision."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import DecoderNorm, SaeConfig


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

    def begins_update(self, step: int) -> bool:
        """Return whether this step's batch is the first of its update."""
        return step % self.grad_acc_steps == 0

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


def make_step_settings(options: FitConfig, sizes: SaeConfig) -> StepSettings:
    """Derive the settings of an SAE of these sizes from its options.

    Args:
        options: options of the run, with those of the SAE in them.
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
    )
