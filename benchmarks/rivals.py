"""Training steps of ours and of other libraries, from the same start, for comparison.

Each is a pair: `step(x, number)` trains on rows x [N, D] in float32, and `finish()` returns the SAE
that the library would publish, as a function from rows to reconstructions [N, D] and activations of
all latents [N, M]. Each is trained as its own library trains it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import checkout  # noqa: F401  saetrain, from a plain checkout too
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # sparsify needs it on a CPU

from saetrain.config.sae import OptimizerName, SaeConfig, SaeOptions
from saetrain.kernels import Autoencoded, PrefixGroups, Selector
from saetrain.model.sae import Sae
from saetrain.training.cuda_graphs import GraphedSteps, GraphRecorder
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_batch, train_step

Step = Callable[[Tensor, int], None]
Published = Callable[[Tensor], tuple[Tensor, Tensor]]
Contender = tuple[Step, Callable[[], Published]]

_SPARSIFY_LR = {"signum": 5e-3, "adam": 2e-4}
_SPARSIFY_MUON_LR = 2e-3


def sparsify_lr(optimizer: OptimizerName, num_latents: int) -> float:
    """Sparsify's default: base / sqrt(M / 2^14), but for muon."""
    if optimizer == "muon":
        return _SPARSIFY_MUON_LR
    return float(_SPARSIFY_LR[optimizer] / (num_latents / 2**14) ** 0.5)


@dataclass(frozen=True)
class Setting:
    """Settings shared by both sides."""

    d_in: int
    num_latents: int
    k: int
    optimizer: OptimizerName
    steps: int
    """Of the whole run."""
    warmup: int
    """Steps; not for signum."""
    seed: int
    device: torch.device
    lr: float | None = None
    """Learning rate, the peak where there is a schedule; None: sparsify's default."""
    autocast: bool = False
    """Others' products in bfloat16, in their forward pass; ours asks its own recipe."""

    @property
    def rate(self) -> float:
        """The learning rate."""
        return sparsify_lr(self.optimizer, self.num_latents) if self.lr is None else self.lr


def published(sae: Sae) -> Published:
    """An SAE of ours as others would use it."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        output = sae(x)
        return output.reconstruction, _dense(output.top_acts, output.top_indices, sae.num_latents)

    return run


def _dense(top_acts: Tensor, top_indices: Tensor | None, num_latents: int) -> Tensor:
    if top_indices is None:
        return top_acts
    empty = top_acts.new_zeros(len(top_acts), num_latents)
    return empty.scatter_(1, top_indices, top_acts)


def ours(
    setting: Setting,
    mean: Tensor,
    variance: float,
    *,
    autocast: bool = False,
    sae_type: type[Sae] = Sae,
    dead: int = 0,
) -> Contender:
    """Our step. b_dec begins at `mean` [D]; the loss divides by `variance`.

    AuxK is on. With `dead`, so many latents are dead from the third step on; else none is before
    10 million rows.
    """
    trainer = _trainee(setting, mean, variance, autocast, sae_type)

    def step(x: Tensor, number: int) -> None:
        if dead:
            trainer.dead_tracker.dead_after = 2 * len(x)
            trainer.dead_tracker.rows_since.zero_()
            trainer.dead_tracker.rows_since[:dead] = 2 * len(x)
        train_step(trainer, x, number)

    return step, lambda: _exported(trainer)


def ours_together(
    setting: Setting,
    mean: Tensor,
    variance: float,
    *,
    autocast: bool = False,
    saes: int = 1,
    graph: bool = True,
    recorder: GraphRecorder | None = None,
) -> Contender:
    """Steps of several SAEs on the same rows; with `graph` one CUDA graph, see `fit --cuda-graphs`.

    The third step, from 0 without a gap, records it. `finish` gives the first SAE.
    """
    group = [
        _trainee(replace(setting, seed=setting.seed + number), mean, variance, autocast, Sae)
        for number in range(saes)
    ]
    groups = {"rows": group}
    recorded = GraphedSteps(groups, recorder, warm_up=1) if graph else None

    def step(x: Tensor, number: int) -> None:
        batch: Any = SimpleNamespace(activations={"rows": x})
        if recorded is None:
            train_batch(groups, batch, number)
        else:
            recorded.make(batch, number)

    return step, lambda: _exported(group[0])


def _trainee(
    setting: Setting, mean: Tensor, variance: float, autocast: bool, sae_type: type[Sae]
) -> SaeTrainer:
    s = setting
    sae = sae_type(s.d_in, s.num_latents, s.k, seed=s.seed, device=s.device)
    with torch.no_grad():
        sae.b_dec.copy_(mean)
    return SaeTrainer(
        entry_of(SaeConfig(s.d_in, s.num_latents, s.k), s.rate),
        sae,
        make_optimizer(s.optimizer, sae, s.rate, s.warmup, s.steps),
        10_000_000,
        variance,
        settings=StepSettings(autocast=autocast, auxk_alpha=1 / 32),
    )


def _exported(trainer: SaeTrainer) -> Published:
    trainer.sae.load_state_dict(trainer.optimizer.weights_to_export())
    return published(trainer.sae)


def entry_of(sizes: SaeConfig, lr: float) -> Any:
    """Entry of an SAE with the fields that a training step reads, without a run."""
    return SimpleNamespace(
        name="rows",
        hookpoint="rows",
        hookpoints=("rows",),
        config=sizes,
        lr=lr,
        options=SaeOptions(),
        scales=(),
    )


def sparsify(setting: Setting) -> Contender:
    """Sparsify's module in the order of its own trainer; b_dec begins at the first batch's mean."""
    from sparsify import SparseCoder, SparseCoderConfig

    s = setting
    torch.manual_seed(s.seed)
    config = SparseCoderConfig(num_latents=s.num_latents, k=s.k)
    sae = SparseCoder(s.d_in, config, s.device, dtype=torch.float32)
    updates, schedules = _sparsify_optimizers(s, sae)
    since_fired = torch.zeros(s.num_latents, dtype=torch.long, device=s.device)

    def step(x: Tensor, number: int) -> None:
        if number == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(s.device.type, torch.bfloat16, enabled=s.autocast):
            output = sae(x)
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        for update in updates:
            update.step()
            update.zero_grad()
        for schedule in schedules:
            schedule.step()
        since_fired.add_(len(x))
        since_fired[output.latent_indices.flatten()] = 0

    def finish() -> Published:
        if s.optimizer == "signum":
            updates[0].eval()

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            output = sae(x)
            latents = _dense(output.latent_acts, output.latent_indices, s.num_latents)
            return output.sae_out, latents

        return run

    return step, finish


def _sparsify_optimizers(setting: Setting, sae: torch.nn.Module) -> tuple[list[Any], list[Any]]:
    """Optimisers and schedules as sparsify's trainer makes them."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.muon import Muon
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    s, parameters = setting, list(sae.parameters())
    if s.optimizer == "signum":
        update: Any = ScheduleFreeWrapper(SignSGD(parameters, lr=s.rate), momentum=0.95)
        update.train()
        return [update], []
    if s.optimizer == "adam":
        adam = torch.optim.Adam(parameters, lr=s.rate)
        return [adam], [get_linear_schedule_with_warmup(adam, s.warmup, s.steps)]
    matrices = {p for p in parameters if p.ndim >= 2}
    muon = Muon(matrices, lr=s.rate, ddp=False)
    adam = torch.optim.Adam([p for p in parameters if p not in matrices], lr=s.rate)
    return [muon, adam], [
        get_linear_schedule_with_warmup(muon, 0, s.steps),
        get_linear_schedule_with_warmup(adam, s.warmup, s.steps),
    ]


def sae_lens(setting: Setting, first: Sequence[Tensor], kind: str = "TopK") -> Contender:
    """Build an SAE of SAELens in its own trainer, scaled by the norms of the `first` batches.

    The schedule is its tutorial's: constant, and a linear decay to 0 over the last fifth. JumpReLU
    has the quadratic penalty, with the target k, from its warm-up on.

    Args:
        setting: sizes, k and schedule.
        first: batches from which the scale is estimated. Each [N, D]
        kind: TopK, BatchTopK or JumpReLU.
    """
    import sae_lens as library
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    s = setting
    torch.manual_seed(s.seed)
    chosen: dict[str, Any] = {"k": s.k}
    if kind == "JumpReLU":
        chosen = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(s.k)}
        chosen["l0_warm_up_steps"] = s.warmup
    config = getattr(library, f"{kind}TrainingSAEConfig")(
        d_in=s.d_in,
        d_sae=s.num_latents,
        normalize_activations="expected_average_only_in",
        device=str(s.device),
        **chosen,
    )
    sae = getattr(library, f"{kind}TrainingSAE")(config)
    batch = len(first[0])
    options = SAETrainerConfig(
        s.steps * batch,
        train_batch_size_samples=batch,
        lr=s.rate,
        lr_end=s.rate / 10,
        lr_warm_up_steps=s.warmup,
        lr_decay_steps=s.steps // 5,
        device=str(s.device),
        autocast=s.autocast,
    )
    trainer = SAETrainer(options, sae, iter(()))
    trainer.activation_scaler.estimate_scaling_factor(s.d_in, iter(first), len(first))

    def step(x: Tensor, number: int) -> None:
        assert number == trainer.n_training_steps
        trainer.step(x)
        trainer.n_training_steps += 1

    def finish() -> Published:
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        with tempfile.TemporaryDirectory() as folder:  # BatchTopK is saved with a threshold
            sae.save_inference_model(folder)
            saved = library.SAE.load_from_disk(folder, device=str(s.device))

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            latents = saved.encode(x)
            return saved.decode(latents), latents

        return run

    return step, finish


def dense(setting: Setting, mean: Tensor, variance: float) -> Contender:
    """A step as SAELens makes it: top-k acts in a dense [N, M], differentiated by autograd.

    All else, the start and the optimiser included, is ours, so that this is about the step alone.
    """
    on_cuda = setting.device.type == "cuda"
    return ours(setting, mean, variance, autocast=on_cuda, sae_type=_DenseSae)


class _DenseSae(Sae):
    def autoencode(
        self,
        x: Tensor,
        selector: Selector,
        prefix_groups: PrefixGroups | None = None,
        rows: Tensor | None = None,
    ) -> Autoencoded:
        del selector
        assert prefix_groups is None
        assert rows is None
        pre_acts = torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)  # [N, M]
        values, indices = pre_acts.topk(self.k, dim=-1, sorted=False)
        acts = torch.zeros_like(pre_acts).scatter(-1, indices, values)
        out = acts @ self.W_dec + self.b_dec
        return Autoencoded((out,), values.detach(), indices, None)
