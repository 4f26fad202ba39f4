"""Replayed steps equal eager steps bit for bit. N rows, D d_in, M num_latents, K k.

Without CUDA, a tape (`tape.py`) replaces its graphs, on the code paths of a device. The tests show
that a replay depends on the host only through the scalars written before it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import saetrain.launch.setup
import saetrain.model.losses
import saetrain.training.cuda_graphs
import saetrain.training.metrics
from actcache.errors import ConfigError, RunError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig, SaeEntry, SaeOptions
from saetrain.kernels import backends, dense
from saetrain.kernels.update import bf16_copy_of
from saetrain.launch.run import fit
from saetrain.model.losses import make_loss_config
from saetrain.model.sae import build_sae
from saetrain.optim import Schedule
from saetrain.runs.record import read_run
from saetrain.training.cuda_graphs import WARM_UP, GraphedSteps, with_cuda_graphs
from saetrain.training.metrics import DeadLatentBound
from saetrain.training.penalty_control import PenaltyController
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, by_hookpoint, make_optimizer
from saetrain.training.step import train_batch

N, D, M, K = 64, 16, 64, 4
STEPS = 14
NEVER = 10**9


@pytest.fixture(params=["torch", "reference"])
def device_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the code paths of a device where those of a CPU differ."""
    monkeypatch.setenv("SAETRAIN_KERNELS", request.param)
    monkeypatch.setattr(backends, "host_can_read", lambda _: False)
    monkeypatch.setattr(dense, "by_onednn", lambda *_: False)
    # Fewer list slots than dead latents.
    monkeypatch.setattr(saetrain.model.losses, "DEAD_LIST_FACTOR", 2)


on_device_paths = pytest.mark.usefixtures("device_paths")


def make(
    optimizer: str = "signum",
    *,
    alpha: float = 0.0,
    dead_after: int = NEVER,
    schedule: Schedule | None = None,
    warmup: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
    hookpoint: str = "layers.0",
    lr: float = 0.01,
    target_l0: float | None = None,
    frequency: float | None = None,
    **kind: Any,
) -> SaeTrainer:
    config = SaeConfig(D, M, K, **kind)
    how = StepSettings(**settings or {}, auxk_alpha=alpha)
    sae = build_sae(config, device=device, dtype=dtype)
    loss_config = make_loss_config(config, warmup, target_l0=target_l0, frequency=frequency)
    schedule = schedule or Schedule("linear", 3, STEPS + 2)
    trainer = SaeTrainer(
        SaeEntry(hookpoint, config, lr, 0),
        sae,
        make_optimizer(
            optimizer,  # type: ignore[arg-type]
            sae,
            lr,
            0,
            STEPS,
            schedule=schedule,
            decoder_norm=how.decoder_norm,
        ),
        dead_after,
        1.5,
        loss_config,
        how,
    )
    if target_l0 is not None:
        controller = PenaltyController(
            loss_config, STEPS, sae.W_enc.device, quadratic=sae.activation.counts
        )
        trainer.meter.controller = controller
    return trainer


def batch_of(rows: Tensor) -> Any:
    return SimpleNamespace(activations={"layers.0": rows, "layers.1": rows.flip(0)})


def bits(trainer: SaeTrainer) -> dict[str, bytes]:
    """Return the bytes of everything that a step may change."""
    tensors, numbers = trainer.state()
    tensors = dict(tensors) | {"first bad": trainer.guard._first_bad}
    if (bf16_copy := bf16_copy_of(trainer.sae.W_enc)) is not None:
        tensors["bf16_copy"] = bf16_copy.view(torch.int16)
    found = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    as_bytes = {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in found.items()}
    return as_bytes | {"numbers": repr(sorted(numbers.items())).encode()}


def in_step(eager: list[SaeTrainer], recorded: list[SaeTrainer], rows: Tensor, tape: Any) -> Any:
    """Compare both after every step; return the recorder and the step of its first recording."""
    recorder, since = tape.TapeRecorder(), None
    both = [steps_of(eager, tape.TapeRecorder(), NEVER), steps_of(recorded, recorder)]
    for step, batch in enumerate(rows[:STEPS]):
        for steps in both:
            steps.make(batch_of(batch), step)
        assert differing(eager, recorded) == [], step
        if since is None and recorder.recorded:
            since = step
    return recorder, since


def differing(some: list[SaeTrainer], others: list[SaeTrainer]) -> list[str]:
    pairs = [(bits(a), bits(b)) for a, b in zip(some, others, strict=True)]
    assert all(a.keys() == b.keys() for a, b in pairs)
    return [n for a, b in pairs for n in a if a[n] != b[n]]


def steps_of(trainers: list[SaeTrainer], recorder: Any, warm_up: int = WARM_UP) -> GraphedSteps:
    return GraphedSteps(by_hookpoint(trainers), recorder, warm_up)


KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.1, "threshold": 0.3, "bandwidth": 0.5},
    "gated": {"activation": "gated", "sparsity": 0.1},
    "towards an L0": {
        "activation": "jumprelu",
        "sparsity": 0.1,
        "threshold": 0.3,
        "bandwidth": 0.5,
        "target_l0": 6.0,
        "frequency": 1.0,
    },
    "auxk": {"alpha": 0.1, "dead_after": 2 * N},
    "auxk by residual": {
        "alpha": 0.1,
        "dead_after": 2 * N,
        "settings": {"auxk_by_residual": True},
    },
    "multi-topk": {"multi_topk": True},
    "matryoshka": {"matryoshka": (8, 24)},
    "folded": {"settings": {"decoder_norm": "fold"}},
    "in parts, clipped": {"settings": {"micro_batch_size": 24, "grad_clip": 0.1}},
    "chunks": {"settings": {"chunk_latents": 24}},
    "bfloat16 products": {"settings": {"autocast": True}},
    "bfloat16 weights": {"dtype": torch.bfloat16},
}


@on_device_paths
@pytest.mark.parametrize("optimizer", ["signum", "adam", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_eager_steps_bit_for_bit(
    batches: Callable[[torch.dtype], Tensor], tape: Any, kind: str, optimizer: str
) -> None:
    """The learning rate rises and falls; a recorded constant would not."""
    if optimizer == "signum" and "clipped" in kind:
        pytest.skip("clipping has no effect on signs")
    eager, recorded = ([make(optimizer, **KINDS[kind])] for _ in range(2))
    recorder, _ = in_step(eager, recorded, batches(torch.bfloat16), tape)
    first = 2 if "auxk" in kind else 1  # the step changes once latents may be dead
    assert (recorder.recorded, recorder.replayed) == (1, STEPS - first - WARM_UP)
    assert recorded[0].guard.first_bad() is None
    if "auxk" in kind:
        assert int(recorded[0].dead_tracker.dead().sum()) > 0
        assert recorded[0].meter.pop_means()["auxk"] > 0
    assert eager[0].latent_stats.pop_grad_norm() == recorded[0].latent_stats.pop_grad_norm()
    assert eager[0].latent_stats.pop_density() == recorded[0].latent_stats.pop_density()


@on_device_paths
def test_a_signum_step_with_graphs_equals_one_without_bit_for_bit(
    batches: Callable[[torch.dtype], Tensor], tape: Any
) -> None:
    """In float32 on the torch backend. Adam's learning rate is rounded to float32 once more."""
    plain, recorded = make(alpha=0.1, dead_after=2 * N), make(alpha=0.1, dead_after=2 * N)
    steps = steps_of([recorded], tape.TapeRecorder())
    for step, rows in enumerate(batches(torch.float32)[:STEPS]):
        train_batch({"layers.0": [plain]}, batch_of(rows), step)
        steps.make(batch_of(rows), step)
    ours, theirs = recorded.sae.state_dict(), plain.sae.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert differing([plain], [recorded]) == []


@on_device_paths
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_an_adam_step_with_graphs_equals_one_without_up_to_rounding(
    batches: Callable[[torch.dtype], Tensor], tape: Any, optimizer: str
) -> None:
    plain, recorded = make(optimizer, dtype=torch.float64), make(optimizer, dtype=torch.float64)
    steps = steps_of([recorded], tape.TapeRecorder())
    for step, rows in enumerate(batches(torch.float64)[:STEPS]):
        train_batch({"layers.0": [plain]}, batch_of(rows), step)
        steps.make(batch_of(rows), step)
    ours, theirs = recorded.state()[0], plain.state()[0]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert recorded.state()[1] == plain.state()[1]


SABOTAGE = {
    "signum": ("numbers", "signum", {}),
    "adam": ("numbers", "adam", {}),
    "rotation among dead latents": (
        "clock",
        "signum",
        {"alpha": 1.0, "dead_after": 1, "lr": 1e-4},
    ),
}


@on_device_paths
@pytest.mark.parametrize("what", SABOTAGE)
def test_the_tape_detects_a_scalar_fixed_by_the_host(
    batches: Callable[[torch.dtype], Tensor],
    tape: Any,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scalar that does not come from device memory keeps its recorded value."""
    number, optimizer, kind = SABOTAGE[what]
    pairs = [[make(optimizer, **kind)] for _ in range(2)]
    both = [steps_of(pairs[0], tape.TapeRecorder(), NEVER), steps_of(pairs[1], tape.TapeRecorder())]
    if number == "numbers":
        kind = type(pairs[0][0].optimizer)
        real = kind.UPDATE

        def without_numbers(*tensors: Any) -> None:
            *given, options, ops = tensors
            real(*given, dataclasses.replace(options, numbers=None), ops)

        monkeypatch.setattr(kind, "UPDATE", staticmethod(without_numbers))
    else:
        for (trainer,) in pairs:
            trainer.device_step = None
    found = {}
    for step, rows in enumerate(batches(torch.float32)[:STEPS]):
        for steps in both:
            steps.make(batch_of(rows), step)
        found[step] = differing(*pairs)
    first = WARM_UP + 1  # the recorded step itself is right
    assert [step for step in found if not found[step]] == list(range(first + 1))


@on_device_paths
def test_recording_a_synchronisation_raises_an_error(
    batches: Callable[[torch.dtype], Tensor], tape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saetrain.model.losses, "DEAD_LIST_FACTOR", 8)
    trainer = make(alpha=0.1, dead_after=1)
    steps = steps_of([trainer], tape.TapeRecorder())
    monkeypatch.setattr(backends, "host_can_read", lambda _: True)  # the host counts dead latents
    rows = batches(torch.float32)
    for step in range(1 + WARM_UP):
        steps.make(batch_of(rows[step]), step)
    with pytest.raises(AssertionError, match="wait for the device"):
        steps.make(batch_of(rows[step + 1]), step + 1)


def test_a_step_that_cannot_be_recorded_raises_an_error_with_a_remedy(
    batches: Callable[[torch.dtype], Tensor], tape: Any
) -> None:
    class Broken(tape.TapeRecorder):  # type: ignore[misc, name-defined]
        def record(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nat line 1")

    steps, rows = steps_of([make()], Broken(), warm_up=1), batches(torch.float32)
    for step in range(2):
        steps.make(batch_of(rows[step]), step)
    with pytest.raises(RunError, match=r"step 2 (.|\n)*is capturing\n(.|\n)*without --cuda-graphs"):
        steps.make(batch_of(rows[2]), 2)


@on_device_paths
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_nothing_is_recorded_while_k_is_annealed(
    batches: Callable[[torch.dtype], Tensor], tape: Any, activation: str
) -> None:
    anneals = {"k_start": 9, "k_end": K, "k_anneal_steps": 5}
    eager, recorded = ([make(activation=activation, settings=anneals)] for _ in range(2))
    _, since = in_step(eager, recorded, batches(torch.float32), tape)
    assert since == 5 + 1 + WARM_UP
    assert recorded[0].sae.k == K


@on_device_paths
def test_the_step_is_recorded_again_once_latents_may_be_dead(
    batches: Callable[[torch.dtype], Tensor], tape: Any
) -> None:
    eager, recorded = ([make("adam", alpha=0.1, dead_after=7 * N)] for _ in range(2))
    recorder, since = in_step(eager, recorded, batches(torch.float32), tape)
    assert (recorder.recorded, since) == (2, 1 + WARM_UP)
    assert recorded[0].dead_tracker.dead().any()


def make_centred(optimizer: str, rows: Tensor) -> SaeTrainer:
    """Make an SAE with a latent that fires in no step from 0 to 20."""
    trainer = make(optimizer, alpha=0.1, dead_after=8 * N, lr=1e-3)
    with torch.no_grad():
        trainer.sae.b_dec.copy_(rows.mean(dim=(0, 1)))
    return trainer


def watch_dead_bound(monkeypatch: pytest.MonkeyPatch, trainer: SaeTrainer, steps: int) -> None:
    """Bound the rows of dead latents by copies that take some steps, as on CUDA."""

    def copy(number: Tensor) -> Callable[[], int | None]:
        value, asked = int(number), [0]

        def read() -> int | None:
            asked[0] += 1
            return value if asked[0] >= steps else None

        return read

    monkeypatch.setattr(saetrain.training.metrics, "copy_to_host", copy)
    trainer.dead_bound = DeadLatentBound(trainer.dead_tracker)


@on_device_paths
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_bound_for_dead_latents_that_lags_changes_no_result(
    batches: Callable[[torch.dtype], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    delay: int,
) -> None:
    """On device paths AuxK runs with an empty list; without it, weights and metrics are equal."""
    rows = batches(torch.float32)
    always, known = (make_centred(optimizer, rows) for _ in range(2))
    watch_dead_bound(monkeypatch, known, delay)
    left_out = 0
    for step in range(40):
        dead = bool(known.dead_tracker.dead().any())
        for trainer in (always, known):
            train_batch(by_hookpoint([trainer]), batch_of(rows[step]), step)
        assert always.uses_auxk(step, N) == (step >= 8)
        left_out += always.uses_auxk(step, N) and not known.uses_auxk(step, N)
        assert known.uses_auxk(step, N) or not dead
        for name, tensor in always.state()[0].items():
            assert torch.equal(tensor, known.state()[0][name]), (step, name)
    assert left_out > 0


@on_device_paths
def test_auxk_leaves_the_recorded_step_when_no_latent_has_been_dead_for_some_time(
    batches: Callable[[torch.dtype], Tensor], tape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saetrain.training.cuda_graphs, "_HOLD", 3)
    rows, acting = batches(torch.float32), []
    eager, recorded = ([make_centred("adam", rows)] for _ in range(2))
    watch_dead_bound(monkeypatch, recorded[0], 1)
    recorder = tape.TapeRecorder()
    both = [steps_of(eager, tape.TapeRecorder(), NEVER), steps_of(recorded, recorder)]
    for step in range(40):
        for steps in both:
            steps.make(batch_of(rows[step]), step)
        assert differing(eager, recorded) == [], step
        acting.append(recorded[0].uses_auxk(step, N))
    changes = sum(a != b for a, b in pairwise(acting))
    assert recorder.recorded == changes + 1
    assert changes == 2


@on_device_paths
def test_nothing_is_recorded_while_the_penalty_warms_up(
    batches: Callable[[torch.dtype], Tensor], tape: Any
) -> None:
    eager, recorded = ([make("adam", warmup=4, **KINDS["jumprelu"])] for _ in range(2))
    _, since = in_step(eager, recorded, batches(torch.float32), tape)
    assert since == 4 + 1 + WARM_UP


GRID: list[dict[str, Any]] = [
    {"optimizer": "signum", "alpha": 0.1, "dead_after": 2 * N},
    {"optimizer": "adam", "lr": 0.003, "activation": "batchtopk", "warmup": 3},
    {"optimizer": "adamw", "hookpoint": "layers.1", "settings": {"micro_batch_size": 16}},
]


@on_device_paths
def test_all_saes_of_a_process_are_recorded_together_after_the_longest_schedule(
    batches: Callable[[torch.dtype], Tensor], tape: Any
) -> None:
    eager, recorded = ([make(**one) for one in GRID] for _ in range(2))
    for trainers in (eager, recorded):
        settings = StepSettings(k_start=8, k_end=K, k_anneal_steps=3)
        trainers[1].settings = settings
    recorder, _ = in_step(eager, recorded, batches(torch.bfloat16), tape)
    assert (recorder.recorded, recorder.replayed) == (1, STEPS - 4 - WARM_UP)


@on_device_paths
@pytest.mark.parametrize("stop", [2, 9])
def test_a_run_stopped_before_or_after_its_recording_resumes_bit_for_bit(
    batches: Callable[[torch.dtype], Tensor], tape: Any, stop: int
) -> None:
    whole, begun, resumed = ([make(**one) for one in GRID] for _ in range(3))
    rows, recorder = batches(torch.float32), tape.TapeRecorder()
    steps = steps_of(whole, tape.TapeRecorder())
    for step in range(STEPS):
        steps.make(batch_of(rows[step]), step)
    steps = steps_of(begun, tape.TapeRecorder())
    for step in range(stop):
        steps.make(batch_of(rows[step]), step)
    for old, new in zip(begun, resumed, strict=True):
        tensors, numbers = old.state()
        new.load_state({n: t.detach().clone() for n, t in tensors.items()}, dict(numbers))
    steps = steps_of(resumed, recorder)
    for step in range(stop, STEPS):
        steps.make(batch_of(rows[step]), step)
    assert recorder.replayed > 0
    assert differing(whole, resumed) == []


@on_device_paths
@pytest.mark.parametrize(
    ("kind", "optimizer", "value"),
    [
        ("topk", "signum", math.nan),
        ("topk", "adam", math.inf),
        ("bfloat16 products", "signum", math.nan),
        ("bfloat16 products", "adam", math.nan),
        ("in parts, clipped", "adam", math.nan),
        ("in parts, clipped", "adam", 1e17),  # finite loss, but the gradient's norm is not
    ],
)
def test_from_a_bad_batch_on_replays_change_nothing_and_the_guard_has_its_step(
    batches: Callable[[torch.dtype], Tensor], tape: Any, kind: str, optimizer: str, value: float
) -> None:
    trainer, recorder = make(optimizer, **KINDS[kind]), tape.TapeRecorder()
    steps, rows = steps_of([trainer], recorder), batches(torch.float32).clone()
    rows[9, 7, 2] = value
    for step in range(9):
        steps.make(batch_of(rows[step]), step)
    assert recorder.replayed > 2
    kept = {n: b for n, b in bits(trainer).items() if n.startswith(("sae.", "optim", "bf16_copy"))}
    for step in range(9, STEPS):
        steps.make(batch_of(rows[step]), step)
        now = bits(trainer)
        assert [n for n in kept if kept[n] != now[n]] == []
    assert trainer.guard.first_bad() == 9


@on_device_paths
@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_the_bf16_copy_is_current_after_replays_and_after_other_writes(
    batches: Callable[[torch.dtype], Tensor], tape: Any, optimizer: str
) -> None:
    """Replays write the encoder's bfloat16 copy but do not advance its weight's version.

    After another write to the weight, the copy is refreshed before the next replay.
    """
    eager, recorded = ([make(optimizer, settings={"autocast": True})] for _ in range(2))
    both = [steps_of(eager, tape.TapeRecorder(), NEVER), steps_of(recorded, tape.TapeRecorder())]
    outputs: list[list[Tensor]] = [[], []]
    for step, rows in enumerate(batches(torch.float32)[:STEPS]):
        for steps, (trainer,), found in zip(both, (eager, recorded), outputs, strict=True):
            steps.make(batch_of(rows), step)
            W_enc = trainer.sae.W_enc
            bf16_copy = bf16_copy_of(W_enc)
            assert bf16_copy is not None
            assert torch.equal(bf16_copy, W_enc.bfloat16())
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                found.append(trainer.sae(rows).reconstruction)
            if step in (7, 10):
                with torch.no_grad():
                    W_enc.mul_(1.5)
        assert differing(eager, recorded) == [], step
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert len({tuple(found.flatten().tolist()) for found in outputs[1]}) == STEPS


@on_device_paths
def test_a_batch_of_another_size_is_trained_eagerly(
    batches: Callable[[torch.dtype], Tensor], tape: Any
) -> None:
    eager, recorded = ([make("adam")] for _ in range(2))
    recorder = tape.TapeRecorder()
    both = [steps_of(eager, tape.TapeRecorder(), NEVER), steps_of(recorded, recorder)]
    for step, rows in enumerate(batches(torch.float32)[:STEPS]):
        some = rows[:40] if step in (8, 11) else rows
        for steps in both:
            steps.make(batch_of(some), step)
        assert differing(eager, recorded) == [], step
    assert recorder.replayed == STEPS - 1 - WARM_UP - 2


def test_a_process_without_saes_records_nothing() -> None:
    assert with_cuda_graphs({}) is train_batch


def test_a_run_without_a_cuda_device_raises_an_error_before_it_is_created(
    options: Callable[..., FitConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = options(device="auto", cuda_graphs=True)
    with pytest.raises(ConfigError, match=r"--cuda-graphs needs a CUDA device(.|\n)*cpu"):
        fit(config)
    assert not Path(config.out).exists()


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch, device_paths: None, tape: Any) -> list[Any]:
    """Replace CUDA graphs by tapes; return the list of recorders that are created."""
    del device_paths
    made: list[Any] = []

    def recorder(_: torch.device) -> Any:
        made.append(tape.TapeRecorder())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(saetrain.training.cuda_graphs, "CudaGraphs", recorder)
    monkeypatch.setattr(saetrain.launch.setup, "require_cuda_graphs", lambda _: None)
    return made


@pytest.mark.parametrize("device_paths", ["torch"], indirect=True)  # steps are compared by both
def test_a_run_with_graphs_writes_the_same_files_also_after_a_resume(
    options: Callable[..., FitConfig],
    snapshot: Callable[[Path], dict[str, bytes]],
    taped: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two SAEs at each of two hookpoints, validated and logged between replays."""
    several = tuple(
        SaeOptions(num_latents=48, k=k, optimizer="signum", lr=0.01, auxk_alpha=0.1) for k in (2, 3)
    )
    common = {f.name: getattr(SaeOptions(), f.name) for f in dataclasses.fields(SaeOptions)}
    how: dict[str, Any] = {
        "val_every": 4,
        "save_best": True,
        "val_fraction": 0.25,
        "epochs": 2,
        "keep_every": 12,
    }
    how |= common | {"saes": several, "device": "auto", "log_every": 2}
    plain = options(**how, out=str(tmp_path / "plain"))
    fit(plain)
    assert taped == []
    recorded = options(**how, cuda_graphs=True, out=str(tmp_path / "recorded"))
    fit(recorded)
    (recorder,) = taped
    assert recorder.recorded == 1
    assert recorder.replayed > 8
    expected = snapshot(tmp_path / "plain")
    assert snapshot(tmp_path / "recorded") == expected

    class Killed(BaseException):
        pass

    real = GraphedSteps.make
    for at in (5, 11):  # during warm-up and during replays; checkpoints are every three steps

        def make_step(self: GraphedSteps, batch: Any, step: int, at: int = at) -> None:
            if step == at:
                raise Killed
            real(self, batch, step)

        stopped = options(**how, cuda_graphs=True, out=str(tmp_path / f"stopped-{at}"))
        with monkeypatch.context() as patch:
            patch.setattr(GraphedSteps, "make", make_step)
            with pytest.raises(Killed):
                fit(stopped)
        fit(dataclasses.replace(stopped, resume=True))
        assert taped[-1].replayed > 0
        assert snapshot(tmp_path / f"stopped-{at}") == expected
    # A checkpoint of replayed steps resumes without graphs.
    for path in Path(stopped.out).glob("checkpoint-*24*"):
        path.unlink()
    shutil.copytree(stopped.out, tmp_path / "without")
    without = dataclasses.replace(
        stopped, cuda_graphs=False, resume=True, out=str(tmp_path / "without")
    )
    with pytest.raises(RunError, match=r"--cuda-graphs: True then, False now(.|\n)*--force-config"):
        fit(without)
    assert fit(dataclasses.replace(without, force_config=True)).new_steps > 0
    assert "--cuda-graphs" in read_run(Path(without.out)).history[0].changes[0]
    assert snapshot(tmp_path / "without") == expected


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """Return a function after whose call synchronising with the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["signum", "adam", "adamw"])
@pytest.mark.parametrize("kind", [*KINDS, "compiled"])
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_on_a_gpu_replayed_steps_equal_eager_steps_and_never_wait(
    batches: Callable[[torch.dtype], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    no_waiting: Callable[[], None],
    kind: str,
    optimizer: str,
    path: str,
) -> None:
    if optimizer == "signum" and "clipped" in kind:
        pytest.skip("clipping has no effect on signs")
    monkeypatch.setenv("SAETRAIN_KERNELS", path)
    compiled = {"settings": {"compile": True}, **KINDS["jumprelu"]}
    how = {**KINDS, "compiled": compiled}[kind]
    eager, recorded = ([make(optimizer, device="cuda", **how)] for _ in range(2))
    both = [steps_of(eager, None, NEVER), steps_of(recorded, None)]
    rows = batches(torch.bfloat16).pin_memory()
    for step in range(STEPS):
        for steps in both:
            steps.make(batch_of(rows[step]), step)
        if step == WARM_UP + 1:  # recording synchronises once
            torch.cuda.synchronize()
            no_waiting()
    torch.cuda.set_sync_debug_mode("default")
    assert both[1]._replay is not None
    assert differing(eager, recorded) == []


@pytest.mark.gpu
def test_on_a_gpu_a_grid_is_one_graph_and_a_bad_batch_changes_nothing(
    batches: Callable[[torch.dtype], Tensor], no_waiting: Callable[[], None]
) -> None:
    trainers = [make(**one, device="cuda") for one in GRID]
    steps, rows = steps_of(trainers, None), batches(torch.float32).clone()
    rows[9, 7, 2] = math.nan
    rows = rows.cuda()
    for step in range(9):
        steps.make(batch_of(rows[step]), step)
    assert steps._replay is not None
    kept = [{n: b for n, b in bits(t).items() if n.startswith(("sae.", "opt"))} for t in trainers]
    no_waiting()
    for step in range(9, STEPS):
        steps.make(batch_of(rows[step]), step)
    torch.cuda.set_sync_debug_mode("default")
    for trainer, before in zip(trainers, kept, strict=True):
        now = bits(trainer)
        assert [n for n in before if before[n] != now[n]] == []
        assert trainer.guard.first_bad() == 9


@pytest.mark.gpu
def test_on_a_gpu_a_run_with_graphs_writes_the_files_of_one_without(
    options: Callable[..., FitConfig], snapshot: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    """Rows come from the device shuffle buffer, whose threads run meanwhile."""
    found = []
    for graphs in (False, True):
        out = str(tmp_path / str(graphs))
        fit(options(cuda_graphs=graphs, device="cuda", epochs=3, val_every=5, out=out))
        found.append(snapshot(Path(out)))
    assert found[0] == found[1]
