"""One step of an optimiser, in place. Letters: M rows, D columns."""

import math

import pytest
import torch

from saetrain.kernels import UpdateOptions, adam_numbers, on_triton, reference
from saetrain.kernels.on_triton.update import BLOCK

SHAPES = [(1, 1), (5, 7), (3, 96), (2, 1025), (2, BLOCK + 3)]
# Of float32, the dtype that is trained in; bfloat16 is rounded once.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
SIGNUM = {"lr": 1e-2, "mix": 0.3, "momentum": 0.95}
ADAM = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3}


def make(shape, of, device, *, unit=True):
    """A weight, two states and a gradient."""
    generator = torch.Generator().manual_seed(shape[-1])
    w, first, second, grad = (torch.randn(*shape, generator=generator) for _ in range(4))
    if unit:
        w /= w.norm(dim=1, keepdim=True)
    return [t.to(device, of) for t in (w, 0.1 * first + w, second.square(), grad)]


def beside(shape, device):
    """What is written besides, poisoned."""
    nan = torch.full((shape[0],), math.nan, device=device)
    bf16_copy = torch.full(shape, math.nan, dtype=torch.bfloat16, device=device)
    return {"norms": nan.clone(), "squares": nan, "bf16_copy": bf16_copy}


def step(ops, name, tensors, **options):
    if name == "signum":
        w, z, _, grad = tensors
        ops.signum_update_(w, z, grad, UpdateOptions(**SIGNUM, **options))
        return [w, z]
    ops.adam_update_(*tensors, UpdateOptions(**ADAM, **options))
    return tensors[:3]


def close(got, want):
    """By norm; what a bfloat16 shows of a float32 may be rounded the other way."""
    bound = TOLERANCE[got.dtype] * want.double().norm().item()
    return (got.double() - want.double()).norm().item() <= bound


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("ok", [None, True])
def test_a_step_matches_the_reference(optimizer, of, shape, unit, ok, device):
    ok = None if ok is None else torch.tensor(ok, device=device)
    results = []
    for ops in (on_triton, reference):
        options = beside(shape, device)
        tensors = step(ops, optimizer, make(shape, of, device), unit=unit, ok=ok, **options)
        if not unit:
            assert bool(options.pop("norms").isnan().all())
        results.append([*tensors, *options.values()])
    assert all(close(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_under_a_flag_that_is_false_only_the_gradients_squares_are_written(
    optimizer, shape, device
):
    tensors, options = make(shape, torch.float32, device), beside(shape, device)
    before = [tensor.clone() for tensor in tensors]
    tensors[3][0] = math.nan  # as the gradient of a loss that is not finite is
    ok = torch.tensor(False, device=device)
    step(on_triton, optimizer, tensors, unit=True, ok=ok, **options)
    assert all(torch.equal(a, b) for a, b in zip(tensors[:3], before[:3], strict=True))
    assert bool(options["norms"].isnan().all())
    assert bool(options["bf16_copy"].isnan().all())
    assert options["squares"].isnan().tolist() == [True] + [False] * (shape[0] - 1)


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_rows_stay_at_unit_norm_and_a_gradient_along_them_does_nothing(optimizer, device):
    w, z, v, _ = make((4, 30), torch.float32, device)
    z, v = (w.clone(), v) if optimizer == "signum" else (torch.zeros_like(w), v)
    squares = torch.full((4,), math.nan, device=device)
    step(on_triton, optimizer, [w, z, v, 3 * w], unit=True, squares=squares)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(4, device=device))
    assert bool((squares < 1e-10).all())


def on_device(optimizer, device):
    """What changes from step to step, as a recorded step reads it; and wrong values of the same."""
    if optimizer == "signum":
        told, wrong = [SIGNUM["lr"], SIGNUM["mix"]], {"lr": 9.0, "mix": 0.9}
    else:
        given = (ADAM[name] for name in ("lr", "weight_decay", "beta1", "beta2", "step"))
        told, wrong = adam_numbers(*given), {"lr": 9.0, "step": 100}
    return torch.tensor(told, dtype=torch.float32, device=device), wrong


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit", [True, False])
def test_numbers_on_the_device_give_the_bits_of_numbers_that_are_passed(
    optimizer, of, shape, unit, device, monkeypatch
):
    """Rounded to float32 in both cases; what is passed besides is not read."""
    numbers, wrong = on_device(optimizer, device)
    results = []
    for given in (None, numbers):
        if given is not None:
            for name, number in wrong.items():
                monkeypatch.setitem(SIGNUM if optimizer == "signum" else ADAM, name, number)
        options = beside(shape, device)
        tensors = make(shape, of, device)
        tensors = step(on_triton, optimizer, tensors, unit=unit, numbers=given, **options)
        results.append([*tensors, *options.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_float64_takes_the_reference_with_numbers_too(optimizer, device):
    numbers, _ = on_device(optimizer, device)
    same = {"unit": True, "numbers": numbers}
    got = step(on_triton, optimizer, make((3, 8), torch.float64, device), **same)
    want = step(reference, optimizer, make((3, 8), torch.float64, device), **same)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
@pytest.mark.parametrize("shape", [(1,), (2500,), (3, 4, 5)], ids=str)
def test_a_bias_of_any_shape_is_updated_by_elements(optimizer, shape, device):
    got = step(on_triton, optimizer, make(shape, torch.float32, device, unit=False), unit=False)
    want = step(reference, optimizer, make(shape, torch.float32, device, unit=False), unit=False)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_float64_takes_the_reference(optimizer, device):
    got = step(on_triton, optimizer, make((3, 8), torch.float64, device), unit=True)
    want = step(reference, optimizer, make((3, 8), torch.float64, device), unit=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_sign_of_nothing_and_of_nan_is_nothing(device):
    y, z = torch.ones(1, 3, device=device), torch.ones(1, 3, device=device)
    grad = torch.tensor([[0.0, math.nan, -2.0]], device=device)
    options = UpdateOptions(lr=0.5, mix=1.0, momentum=0.9)
    on_triton.signum_update_(y, z, grad, options)
    assert z.tolist() == [[1.0, 1.0, 1.5]]


def test_a_gradient_that_is_not_contiguous_is_taken(device):
    w, m, v, grad = make((6, 40), torch.float32, device)
    before = w.clone()
    options = UpdateOptions(**ADAM, unit=True)
    on_triton.adam_update_(w, m, v, grad.t().contiguous().t(), options)
    want = make((6, 40), torch.float32, device)
    on_triton.adam_update_(*want, options)
    assert torch.equal(w, want[0])
    assert not torch.equal(w, before)
