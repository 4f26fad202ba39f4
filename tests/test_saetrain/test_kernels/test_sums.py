from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from saetrain.kernels import backends, total


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 4096, 4097, 300_001])
@pytest.mark.usefixtures("threads")
def test_total_has_the_same_bits_for_any_number_of_threads(count: int, kind: torch.dtype) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(2), dtype=kind)
    sums = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        sums.append(total(values))
    assert len({float(s) for s in sums}) == 1
    torch.testing.assert_close(sums[0], values.double().sum().to(kind), rtol=1e-4, atol=1e-2)


def test_every_term_of_total_has_gradient_one() -> None:
    values = torch.zeros(5000, requires_grad=True)
    total(values).backward()
    assert torch.equal(values.grad, torch.ones(5000))


def test_on_a_device_total_is_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "host_can_read", lambda _: False)
    values = torch.rand(100_000)
    assert torch.equal(total(values), values.sum())
