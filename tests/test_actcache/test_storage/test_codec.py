from __future__ import annotations

import numpy as np
import pytest
import torch

from actcache.storage import CODECS


@pytest.mark.parametrize("name", CODECS)
def test_a_tensor_comes_back_bit_for_bit_with_every_special_value(name: str) -> None:
    values = [0.0, -0.0, 1.5, -2.75, 6e-5, 65504.0, float("inf"), float("-inf"), float("nan")]
    tensor = torch.tensor([values, values[::-1]]).to(getattr(torch, name))
    codec = CODECS[name]
    stored = codec.from_torch(tensor)
    assert stored.dtype == np.dtype(codec.storage)
    assert stored.shape == (2, 9)
    assert stored.flags.c_contiguous
    back = codec.to_torch(stored)
    assert back.dtype == tensor.dtype
    integer = {2: torch.int16, 4: torch.int32}[codec.itemsize]
    assert torch.equal(back.view(integer), tensor.view(integer))


@pytest.mark.parametrize("name", CODECS)
def test_float32_of_what_is_stored_is_torchs_own(name: str) -> None:
    tensor = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    tensor = tensor.to(getattr(torch, name))
    codec = CODECS[name]
    decoded = codec.to_float32(codec.from_torch(tensor))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, tensor.float().numpy())


def test_a_tensor_of_another_type_is_rounded_as_torch_rounds() -> None:
    tensor = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    for name, codec in CODECS.items():
        expected = tensor.to(getattr(torch, name))
        assert torch.equal(codec.to_torch(codec.from_torch(tensor)), expected)


def test_a_tensor_that_is_not_contiguous_is_stored_in_c_order() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    for codec in CODECS.values():
        np.testing.assert_array_equal(
            codec.to_float32(codec.from_torch(tensor)), tensor.detach().numpy()
        )


def test_the_tensor_shares_memory_with_the_stored_rows() -> None:
    for codec in CODECS.values():
        stored = np.zeros((2, 2), dtype=codec.storage)
        tensor = codec.to_torch(stored)
        stored[0, 0] = codec.from_torch(torch.ones(1))[0]
        assert tensor[0, 0].item() == 1.0
