"""Steps by Triton's kernels, recorded and replayed. N tokens, D d_in, M num_latents, K k.

On a GPU by CUDA's graphs. In the interpreter by a tape, on which launches are noted with their
arguments, as a graph has them: a number that the host gave stays what it was.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saetrain.config.sae import SaeConfig, SaeEntry, SaeOptions
from saetrain.kernels import backends, dense
from saetrain.kernels.update import bf16_copy_of
from saetrain.model.losses import make_loss_config
from saetrain.model.sae import build_sae
from saetrain.optim import Schedule
from saetrain.training.cuda_graphs import CudaGraphs, GraphedSteps
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_batch

N, D, M, K, STEPS = 6, 8, 12, 2, 7
KINDS = [  # each is slow to interpret
    ("signum", True, {}),
    ("adam", True, {"activation": "batchtopk"}),
    ("adam", False, {"matryoshka": (5,)}),
]


def make(optimizer, device, autocast, **kind):
    config = SaeConfig(D, M, K, **kind)
    sae = build_sae(config, device=device)
    schedule, loss_config = Schedule("linear", 2, STEPS + 3), make_loss_config(config, 0)
    return SaeTrainer(
        SaeEntry("x", config, 0.01, 0, options=SaeOptions(auxk_alpha=0.1)),
        sae,
        make_optimizer(optimizer, sae, 0.01, 0, STEPS, schedule=schedule),
        2 * N,
        1.0,
        loss_config,
        StepSettings(autocast=autocast),
    )


@pytest.fixture
def recorder(device, tape, monkeypatch):
    if device == "cuda":
        return CudaGraphs(torch.device(device))
    from triton.runtime.interpreter import InterpretedFunction

    made, real = tape.TapeRecorder(), InterpretedFunction.run

    def noted(function, *args, **kwargs):
        # A kernel is given float32; the interpreter lets it have what Python has.
        args = [float(np.float32(a)) if isinstance(a, float) else a for a in args]
        if made.tape is None:
            return real(function, *args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        return made.tape.note(lambda: real(function, *args, **kwargs), tensors)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    monkeypatch.setattr(backends, "host_can_read", lambda _: False)
    monkeypatch.setattr(dense, "by_onednn", lambda *_: False)
    return made


def bits(trainer):
    tensors, numbers = trainer.state()
    tensors = {**tensors, "bad": trainer.guard._first_bad}
    if (copy := bf16_copy_of(trainer.sae.W_enc)) is not None:
        tensors["copy"] = copy
    return {name: t.detach().clone() for name, t in tensors.items()}, numbers


@pytest.mark.parametrize(("optimizer", "autocast", "kind"), KINDS, ids=str)
def test_recorded_steps_have_the_bits_of_steps_that_are_not_recorded(
    optimizer, autocast, kind, device, recorder
):
    """Numbers that lie on the device are the float32 that Triton makes of those it is passed."""
    plain, recorded = (make(optimizer, device, autocast, **kind) for _ in range(2))
    steps = GraphedSteps({"x": [recorded]}, recorder, warm_up=1)
    rows = torch.randn(STEPS, N, D, generator=torch.Generator().manual_seed(0))
    rows[-2, 3, 4] = torch.nan
    for step, x in enumerate(rows.to(device)):
        batch = SimpleNamespace(activations={"x": x})
        train_batch({"x": [plain]}, batch, step)
        steps.make(batch, step)
        (want, numbers), (got, same) = bits(plain), bits(recorded)
        assert numbers == same
        differing = [n for n in want if not torch.equal(want[n].cpu(), got[n].cpu())]
        # Not a number is not equal to itself.
        assert set(differing) <= ({"meter", "vitals.norms"} if step >= STEPS - 2 else set()), step
    assert recorded.guard.first_bad() == STEPS - 2
    assert steps._replay is not None  # since step 2
