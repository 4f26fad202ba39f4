"""The fixture that fills allocated memory, so that tests detect unwritten results."""

import pytest
import torch

from saetrain.kernels import grad_memory, release_gradient

LARGE = (1 << 10, 1 << 10)  # enough bytes to be recycled


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, 5),
        lambda: torch.empty((3, 5), dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.ones(3).new_empty(4),
        lambda: grad_memory.reuse_memory(LARGE, torch.ones(1)),
    ],
)
def test_allocated_floats_are_nan(make):
    assert bool(make().isnan().all())


def test_allocated_integers_are_no_valid_index():
    assert torch.empty(7, dtype=torch.int64).tolist() == [-1] * 7


def test_recycled_memory_of_a_gradient_is_nan():
    parameter = torch.nn.Parameter(torch.zeros(LARGE))
    parameter.grad = grad_memory.reuse_memory(LARGE, parameter).fill_(2.0)
    address = parameter.grad.data_ptr()
    release_gradient(parameter)
    again = grad_memory.reuse_memory(LARGE, parameter)
    assert again.data_ptr() == address
    assert bool(again.isnan().all())
