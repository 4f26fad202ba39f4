"""Updates in place compared with the reference. Letters: M num_latents, D d_in."""

import pytest
import torch

from saetrain.kernels import (
    UpdateOptions,
    adam_numbers,
    adam_update_,
    backend_of,
    reference,
    signum_update_,
)
from saetrain.kernels.on_torch import update

SIGNUM = {"lr": 0.01, "mix": 0.3, "momentum": 0.95}
ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
KINDS = [("signum", 2), ("adam", 3)]


def problem(states, shape=(37, 19), dtype=torch.float32, seed=0):
    """Make weights with rows of norm 1, the state, and the gradient; v is not negative."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(states + 1)]
    if len(shape) == 2:
        tensors[0] /= tensors[0].norm(dim=1, keepdim=True)
    if states == 3:
        tensors[2] = tensors[2].square()
    return tensors


def call(kind, ops, tensors, **options):
    function = getattr(ops, f"{kind}_update_")
    scalars = SIGNUM if kind == "signum" else ADAM
    function(*tensors, UpdateOptions(**scalars, **options))


def outputs(shape, dtype=torch.float32):
    return {
        "norms": torch.full(shape[:1], torch.nan, dtype=dtype),
        "squares": torch.full(shape[:1], torch.nan),
        "bf16_copy": torch.full(shape, torch.nan, dtype=torch.bfloat16),
    }


@pytest.fixture(params=[1 << 22, 500], ids=["at once", "in parts"])
def parts(request, monkeypatch):
    monkeypatch.setattr(update, "_BYTES", request.param)


@pytest.mark.parametrize("number", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("kind", "states"), KINDS)
@pytest.mark.usefixtures("parts")
def test_an_update_matches_the_reference(kind, states, unit, number):
    ours, truth = problem(states, dtype=number), problem(states, dtype=torch.float64)
    if kind == "signum":  # a gradient that is 0 moves nothing; others are not near it
        for tensors in (ours, truth):
            tensors[-1][3] = 0
    got, want = outputs((37, 19), number), outputs((37, 19), torch.float64)
    call(kind, update, ours, unit=unit, **got)
    call(kind, reference, truth, unit=unit, **want)
    for mine, theirs in zip(ours[:-1], truth[:-1], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got["squares"], want["squares"])
    assert torch.equal(got["bf16_copy"], ours[0].bfloat16())
    if unit:
        torch.testing.assert_close(got["norms"].double(), want["norms"], rtol=1e-6, atol=0)
        assert torch.allclose(ours[0].norm(dim=1), torch.ones(37, dtype=number))
    else:
        assert got["norms"].isnan().all()


def test_a_step_of_signum_in_parts_is_the_same_bit_for_bit(monkeypatch):
    found = []
    for size in (1 << 22, 300):
        monkeypatch.setattr(update, "_BYTES", size)
        tensors = problem(2)
        call("signum", update, tensors, unit=True)
        found.append(tensors[:-1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("kind", "states"), KINDS)
@pytest.mark.parametrize("ops", [reference, update], ids=["reference", "torch"])
def test_if_ok_is_false_only_the_gradients_norms_are_written(ops, kind, states, unit):
    tensors, found = problem(states), outputs((37, 19))
    tensors[-1][5, 5] = torch.nan
    before = [tensor.clone() for tensor in tensors[:-1]]
    call(kind, ops, tensors, unit=unit, ok=torch.tensor(False), **found)
    assert all(torch.equal(a, b) for a, b in zip(tensors[:-1], before, strict=True))
    assert found["norms"].isnan().all()
    assert found["bf16_copy"].isnan().all()
    assert found["squares"].isnan().sum() == 1


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("kind", "states"), KINDS)
@pytest.mark.parametrize("ops", [reference, update], ids=["reference", "torch"])
@pytest.mark.parametrize("ok", [None, True])
@pytest.mark.usefixtures("parts")
def test_numbers_on_the_device_replace_the_arguments(ops, kind, states, unit, number, ok):
    """Check that the arguments they replace are ignored."""
    ok = None if ok is None else torch.tensor(ok)
    given_numbers = [SIGNUM["lr"], SIGNUM["mix"]]
    if kind == "adam":
        given = (ADAM[name] for name in ("lr", "weight_decay", "beta1", "beta2", "step"))
        given_numbers = adam_numbers(*given)
    wrong = {"lr": 9.0, "mix": 0.9} if kind == "signum" else {"lr": 9.0, "step": 100}
    options = SIGNUM if kind == "signum" else ADAM
    ours, truth = problem(states, dtype=number), problem(states, dtype=number)
    got, want = outputs((37, 19), torch.float32), outputs((37, 19), torch.float32)
    function = getattr(ops, f"{kind}_update_")
    numbers = torch.tensor(given_numbers, dtype=torch.float32)
    given = options | wrong | got
    function(*ours, UpdateOptions(**given, unit=unit, ok=ok, numbers=numbers))
    call(kind, reference, truth, unit=unit, ok=ok, **want)
    near = 2**-5 if number == torch.bfloat16 else 1e-6  # torch's path projects in bfloat16
    for mine, theirs in zip(ours[:-1], truth[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)
    torch.testing.assert_close(got["squares"], want["squares"], rtol=max(near, 1e-5), atol=0)


@pytest.mark.parametrize(("kind", "states"), KINDS)
def test_a_vector_can_be_updated(kind, states):
    ours, truth = problem(states, (23,)), problem(states, (23,), torch.float64)
    call(kind, update, ours, unit=False)
    call(kind, reference, truth, unit=False)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=1e-7)


def test_the_public_functions_select_the_backend_of_the_weights(monkeypatch):
    for name, function, states in (("signum", signum_update_, 2), ("adam", adam_update_, 3)):
        options = SIGNUM if name == "signum" else ADAM
        by_variable, by_argument = problem(states), problem(states)
        monkeypatch.setenv("SAETRAIN_KERNELS", "reference")
        function(*by_variable, UpdateOptions(unit=True, **options))
        monkeypatch.delenv("SAETRAIN_KERNELS")
        forced = backend_of(by_argument[0], "reference")
        function(*by_argument, UpdateOptions(unit=True, **options), forced)
        assert torch.equal(by_variable[0], by_argument[0])


def test_adam_equals_torchs():
    """Compare three steps without projection with torch's AdamW."""
    w, m, v, _ = problem(3)
    m.zero_(), v.zero_()
    parameter = torch.nn.Parameter(w.clone())
    adam = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(1, 4):
        grad = problem(3, seed=step)[-1]
        parameter.grad = grad.clone()
        adam.step()
        adam_update_(w, m, v, grad, UpdateOptions(**ADAM | {"step": step}))
    torch.testing.assert_close(w, parameter.data, rtol=1e-6, atol=1e-7)
