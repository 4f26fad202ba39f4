from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.errors import ConfigError
from actcache.storage import ROW_DTYPES, RowDtype, StoredRows, check_overflow

PLAIN = ["bfloat16", "float16", "float32"]
SCALED = {"int8": 127.0, "float8_e4m3": 448.0}


def gaussian(rows: int = 50, width: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ROW_DTYPES)
def row_dtype(request: pytest.FixtureRequest) -> RowDtype:
    return ROW_DTYPES[request.param]


@pytest.fixture(params=SCALED)
def scaled(request: pytest.FixtureRequest) -> RowDtype:
    return ROW_DTYPES[request.param]


@pytest.mark.parametrize("name", PLAIN)
def test_encoding_and_decoding_keeps_every_bit(name: str) -> None:
    values = [0.0, -0.0, 1.5, -2.75, 6e-5, 65504.0, float("inf"), float("-inf"), float("nan")]
    tensor = torch.tensor([values, values[::-1]]).to(getattr(torch, name))
    row_dtype = ROW_DTYPES[name]
    stored = row_dtype.from_torch(tensor)
    assert stored.values.dtype == np.dtype(row_dtype.storage)
    assert stored.values.shape == (2, 9)
    assert stored.values.flags.c_contiguous
    back = row_dtype.to_torch(stored)
    assert back.dtype == tensor.dtype
    integer = {2: torch.int16, 4: torch.int32}[row_dtype.itemsize]
    assert torch.equal(back.view(integer), tensor.view(integer))


def test_to_float32_equals_torchs_conversion(row_dtype: RowDtype) -> None:
    stored = row_dtype.from_torch(gaussian())
    decoded = row_dtype.to_float32(stored)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, row_dtype.to_torch(stored).float().numpy())


@pytest.mark.parametrize("name", PLAIN)
def test_a_tensor_of_another_type_is_rounded_as_torch_rounds(name: str) -> None:
    stored = ROW_DTYPES[name].from_torch(gaussian())
    assert torch.equal(ROW_DTYPES[name].to_torch(stored), gaussian().to(getattr(torch, name)))


def test_a_tensor_that_is_not_contiguous_is_stored_in_c_order(row_dtype: RowDtype) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    stored = row_dtype.from_torch(tensor)
    assert all(part.flags.c_contiguous for part in stored.parts.values())
    decoded = row_dtype.to_float32(stored)
    np.testing.assert_allclose(decoded, tensor.detach().numpy(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", PLAIN)
def test_the_tensor_shares_memory_with_the_stored_rows(name: str) -> None:
    row_dtype = ROW_DTYPES[name]
    stored = row_dtype.empty(2, 2)
    stored.values[:] = 0
    tensor = row_dtype.to_torch(stored)
    stored.values[0, 0] = row_dtype.from_torch(torch.ones(1, 1)).values[0, 0]
    assert tensor[0, 0].item() == 1.0


# Rows of 8 bits.


def test_an_8_bit_row_is_its_scale_and_its_quotients_rounded_half_to_even() -> None:
    """Compare with a NumPy implementation for int8."""
    x = gaussian(200, 33).numpy() * np.logspace(-30, 30, 200, dtype=np.float32)[:, None]
    stored = ROW_DTYPES["int8"].from_torch(torch.from_numpy(x))
    scales = np.abs(x).max(axis=1) / np.float32(127)
    np.testing.assert_array_equal(stored.scales, scales)
    np.testing.assert_array_equal(stored.values, np.rint(x / scales[:, None]))
    assert stored.values.dtype == np.int8
    halves = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert ROW_DTYPES["int8"].from_torch(halves).values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_an_e4m3_row_is_its_scale_and_its_quotients_as_torch_converts_them() -> None:
    x = gaussian(200, 33) * torch.logspace(-30, 30, 200)[:, None]
    stored = ROW_DTYPES["float8_e4m3"].from_torch(x)
    scales = x.abs().amax(1) / 448
    assert torch.equal(torch.from_numpy(stored.scales), scales)
    expected = (x / scales[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(torch.from_numpy(stored.values), expected.view(torch.uint8))


def test_every_code_is_decoded_to_its_value_times_the_scale(scaled: RowDtype) -> None:
    codes = np.arange(256, dtype=np.uint8).view(scaled.storage)
    integer = torch.from_numpy(np.arange(256, dtype=np.uint8))
    is_int8 = scaled.name == "int8"
    exact = integer.view(torch.int8 if is_int8 else torch.float8_e4m3fn).float().numpy()
    for scale in np.float32([1.0, 0.3, 1e-40, 7e35, 0.0]):
        rows = StoredRows({"activations": codes[None], "scales": np.array([scale])})
        for decoded in (scaled.to_float32(rows)[0], scaled.to_torch(rows)[0].numpy()):
            valid = np.isfinite(exact)
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(decoded[valid], (exact * scale)[valid])
            assert decoded.dtype == np.float32


def test_the_error_of_a_row_is_what_its_type_allows(scaled: RowDtype) -> None:
    x = gaussian(500, 64)
    error = (scaled.to_torch(scaled.from_torch(x)) - x).abs() / x.abs().amax(1, keepdim=True)
    # int8: half a step of 1/127. e4m3: 4 significant bits, so half of 32 in 448 at the top.
    assert float(error.max()) <= (0.5 / 127 if scaled.name == "int8" else 16 / 448) * 1.0001


def test_a_row_of_zeros_and_one_that_is_too_small_have_scale_zero(scaled: RowDtype) -> None:
    stored = scaled.from_torch(torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [0.0, 1.0]]))
    assert stored.scales[:2].tolist() == [0.0, 0.0]
    assert not stored.values[:2].view(np.uint8).any()
    assert not scaled.to_torch(stored)[:2].any()
    assert scaled.to_torch(stored)[2].tolist() == [0.0, 1.0]


def test_values_do_not_wrap_with_a_rounded_scale(scaled: RowDtype) -> None:
    tiny = torch.tensor([[1.49 * SCALED[scaled.name] * 2.0**-149, -1e-44]])
    stored = scaled.from_torch(tiny)
    assert stored.scales[0] == np.float32(2.0**-149)
    assert float(scaled.to_torch(stored)[0, 0]) == SCALED[scaled.name] * 2.0**-149


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_non_finite_row_has_the_scale_nan_and_decodes_to_nan(
    bad: float, scaled: RowDtype
) -> None:
    tensor = gaussian(3)
    tensor[1, 2] = bad
    stored = scaled.from_torch(tensor)
    assert stored.scales.view(np.uint32)[1] == 0x7FC00000
    assert not stored.values[1].view(np.uint8).any()
    for decoded in (scaled.to_float32(stored), scaled.to_torch(stored).numpy()):
        assert np.isnan(decoded[1]).all()
        assert np.isfinite(decoded[[0, 2]]).all()


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float64])
def test_8_bit_rows_of_any_type_are_those_of_their_float32(
    given: torch.dtype, scaled: RowDtype
) -> None:
    tensor = gaussian().to(given)
    first, second = scaled.from_torch(tensor), scaled.from_torch(tensor.float())
    for name, part in first.parts.items():
        np.testing.assert_array_equal(part, second.parts[name])


def test_indexing_applies_to_all_components(row_dtype: RowDtype) -> None:
    stored, order = row_dtype.from_torch(gaussian(6)), np.array([4, 0, 2])
    exact = row_dtype.to_float32(stored)
    np.testing.assert_array_equal(row_dtype.to_float32(stored[order]), exact[order])
    np.testing.assert_array_equal(row_dtype.to_float32(stored[1:3]), exact[1:3])
    out = row_dtype.empty(5, 7)
    out[1:4] = stored[order]
    out[np.array([4, 0])] = stored[:2]
    np.testing.assert_array_equal(row_dtype.to_float32(out), exact[[1, 4, 0, 2, 0]])
    stored.take(order, out[2:])
    np.testing.assert_array_equal(row_dtype.to_float32(out[2:]), exact[order])
    assert len(out) == 5
    assert (
        out.nbytes
        == 5 * row_dtype.row_bytes(7)
        == 5 * (7 * row_dtype.itemsize + 4 * (row_dtype.name in SCALED))
    )


def test_no_bit_depends_on_the_number_of_threads() -> None:
    code = """if True:
        import sys, torch, xxhash
        from actcache.storage import ROW_DTYPES
        torch.set_num_threads(int(sys.argv[1]))
        x = torch.randn(600, 576, generator=torch.Generator().manual_seed(0))
        for codec in ROW_DTYPES.values():
            stored = codec.from_torch(x)
            parts = [*stored.parts.values(), codec.to_torch(stored).float().numpy()]
            print(codec.name, [xxhash.xxh3_128_hexdigest(part.tobytes()) for part in parts])
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", code, threads], capture_output=True, check=True, text=True,
            env={"PATH": str(Path(sys.executable).parent)},
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
    assert len(found.pop().splitlines()) == len(ROW_DTYPES)


# float16 overflows.


def test_rows_that_overflow_float16_are_counted_and_refused() -> None:
    tensor = gaussian(6)
    tensor[1, 0], tensor[4, 2], tensor[5, 5] = 65520.0, -1e9, float("inf")
    row_dtype = ROW_DTYPES["float16"]
    with pytest.raises(ConfigError, match=r"(?s)layers\.3 do not fit.*2 rows of 6.*--dtype bf"):
        check_overflow(tensor, row_dtype.from_torch(tensor), row_dtype, "layers.3")
    tensor[1, 0], tensor[4, 2] = 65519.0, -65519.0
    check_overflow(tensor, row_dtype.from_torch(tensor), row_dtype, "layers.3")


def test_only_float16_is_checked_for_overflow(row_dtype: RowDtype) -> None:
    if row_dtype.name != "float16":
        tensor = torch.full((1, 3), 3e38)
        check_overflow(tensor, row_dtype.from_torch(tensor), row_dtype, "layers.3")
    halves = torch.full((1, 3), float("inf"), dtype=torch.float16)
    check_overflow(halves, row_dtype.from_torch(halves), row_dtype, "layers.3")
