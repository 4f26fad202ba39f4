"""That what a kernel forgets to write is seen, on every path."""

import pytest
import torch

from saetrain.kernels import release_gradient
from saetrain.kernels.grad_memory import reuse_memory

LARGE = (1 << 10, 1 << 10)  # bytes that are used again


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, 5),
        lambda: torch.empty((3, 5), dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.ones(3).new_empty(4),
        lambda: reuse_memory(LARGE, torch.ones(1)),
    ],
)
def test_fresh_memory_holds_no_number(make):
    assert bool(make().isnan().all())


def test_fresh_whole_numbers_are_no_latent():
    assert torch.empty(7, dtype=torch.int64).tolist() == [-1] * 7


def test_memory_of_a_gradient_holds_no_number_when_it_is_used_again():
    parameter = torch.nn.Parameter(torch.zeros(LARGE))
    parameter.grad = reuse_memory(LARGE, parameter).fill_(2.0)
    place = parameter.grad.data_ptr()
    release_gradient(parameter)
    again = reuse_memory(LARGE, parameter)
    assert again.data_ptr() == place
    assert bool(again.isnan().all())
