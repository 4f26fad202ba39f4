import pytest
import torch

from saetrain.kernels import release_gradient, sparse_decode
from saetrain.kernels.grad_memory import _LEAST, free_memory, reuse_memory

SHAPE = (_LEAST // 64, 16)  # float32: exactly the least that is kept


def parameter_with_gradient():
    W = torch.nn.Parameter(torch.ones(SHAPE))
    indices = torch.tensor([[3, 5], [3, 900]])
    sparse_decode(torch.ones(2, 2), indices, W).backward(torch.ones(2, 16))
    return W


def test_memory_of_a_released_gradient_is_recycled_for_the_next():
    W = parameter_with_gradient()
    address = W.grad.data_ptr()
    W.grad.fill_(torch.nan)
    release_gradient(W)
    assert W.grad is None
    again = parameter_with_gradient()
    assert again.grad.data_ptr() == address
    assert again.grad.sum() == 4 * 16
    release_gradient(again)


def test_a_gradient_that_is_not_released_is_never_overwritten():
    first, second = parameter_with_gradient(), parameter_with_gradient()
    assert first.grad.data_ptr() != second.grad.data_ptr()
    first.grad = None  # as an optimiser of torch's does: nothing is kept
    third = parameter_with_gradient()
    assert third.grad.data_ptr() != second.grad.data_ptr()


def test_memory_allocated_elsewhere_is_released_and_not_recycled():
    W = torch.nn.Parameter(torch.ones(SHAPE))
    W.grad = torch.ones(SHAPE)
    held = W.grad
    release_gradient(W)
    assert reuse_memory(SHAPE, W).data_ptr() != held.data_ptr()
    assert held.sum() == held.numel()


def test_the_address_of_a_freed_gradient_may_belong_to_another_tensor():
    free_memory()
    for _ in range(8):
        lent = parameter_with_gradient()
        address = lent.grad.data_ptr()
        lent.grad = None
        W = torch.nn.Parameter(torch.ones(SHAPE))
        tried = [torch.ones(SHAPE) for _ in range(8)]
        W.grad = next((grad for grad in tried if grad.data_ptr() == address), tried[0])
        held = W.grad
        release_gradient(W)
        assert reuse_memory(SHAPE, W).data_ptr() != held.data_ptr()
        assert held.sum() == held.numel()


@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
def test_small_memory_is_not_recycled(shape):
    assert reuse_memory(shape, torch.ones(1)).shape == shape


def test_releasing_no_gradient_does_nothing():
    release_gradient(torch.nn.Parameter(torch.ones(2)))
