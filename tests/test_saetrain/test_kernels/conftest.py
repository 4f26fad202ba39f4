"""The cases that every path of the kernels is held to, and how they are measured.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch

from saetrain.kernels import reference, sparse_decode, sparse_encode

PRIMITIVES = ("gather_sum", "gather_dot", "scatter_outer", "scatter_sum")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# A bfloat16 result is rounded once, by at most 2^-8. Triton's interpreter cuts digits off instead.
ONE_ROUNDING = 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2**-8
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: ONE_ROUNDING}


@dataclass(frozen=True)
class Case:
    name: str
    N: int
    D: int
    M: int
    K: int
    hits: str = "spread"

    def inputs(self, dtype, device):
        generator = torch.Generator().manual_seed(0)
        acts = torch.rand(self.N, self.K, generator=generator)
        acts[torch.rand(self.N, self.K, generator=generator) < 0.3] = 0.0
        if self.hits == "silent":
            acts.zero_()
        floats = {
            "acts": acts,
            "dY": torch.randn(self.N, self.D, generator=generator),
            "W": torch.randn(self.M, self.D, generator=generator),
            "b_enc": torch.randn(self.M, generator=generator)
            - (1000 if self.hits == "silent" else 0),
            "b_dec": torch.randn(self.D, generator=generator),
        }
        floats = {name: tensor.to(device, dtype) for name, tensor in floats.items()}
        return Inputs(indices=self.indices(generator).to(device), **floats)

    def indices(self, generator):
        """[N, K]; "spread" repeats latents within and across rows by chance."""
        indices = torch.randint(self.M, (self.N, self.K), generator=generator)
        if self.hits == "repeated":
            indices[::2] = indices[::2, :1]
        if self.hits == "skewed":
            indices[:, 0] = self.M // 2
        if self.hits == "few":
            indices %= 5
        return indices


@dataclass(frozen=True)
class Inputs:
    acts: torch.Tensor  # [N, K]
    indices: torch.Tensor  # [N, K]
    dY: torch.Tensor  # noqa: N815  [N, D]
    W: torch.Tensor  # [M, D]
    b_enc: torch.Tensor  # [M]
    b_dec: torch.Tensor  # [D]

    def map(self, change):
        names = ("acts", "dY", "W", "b_enc", "b_dec")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def call(self, ops, primitive):
        arguments = {
            "gather_sum": (self.acts, self.indices, self.W),
            "gather_dot": (self.dY, self.indices, self.W),
            "scatter_outer": (self.acts, self.indices, self.dY, self.W.shape[0]),
            "scatter_sum": (self.acts, self.indices, self.W.shape[0]),
        }
        return getattr(ops, primitive)(*arguments[primitive])


CASES = (
    Case("one_of_everything", N=1, D=1, M=1, K=1),
    Case("odd_widths", N=7, D=37, M=19, K=5),
    Case("several_blocks", N=3, D=1030, M=11, K=9),
    Case("k_is_one", N=9, D=20, M=30, K=1),
    Case("repeated_in_a_row", N=8, D=33, M=10, K=4, hits="repeated"),
    Case("one_hot_latent", N=150, D=17, M=23, K=3, hits="skewed"),
    Case("most_latents_unhit", N=20, D=16, M=40, K=6, hits="few"),
    Case("all_acts_zero", N=6, D=24, M=9, K=3, hits="silent"),
)


def pytest_generate_tests(metafunc):
    names = metafunc.fixturenames
    if "case" in names:
        metafunc.parametrize("case", CASES, ids=[case.name for case in CASES])
    if "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=[str(dtype).split(".")[1] for dtype in DTYPES])
    if "primitive" in names:
        metafunc.parametrize("primitive", PRIMITIVES)


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def inputs(case, dtype, device):
    return case.inputs(dtype, device)


@pytest.fixture
def assert_primitive_matches():
    return check_primitive


def check_primitive(ops, primitive, inputs):
    """Hold every row to the reference in float64, relative to the size of what it sums.

    That size is the same sum over absolute values: exactly zero where nothing is summed, and
    there the result must be zero too.
    """
    got = inputs.call(ops, primitive)
    wide = inputs.map(torch.Tensor.double)
    want = wide.call(reference, primitive)
    size = wide.map(torch.abs).call(reference, primitive)
    assert got.dtype == inputs.W.dtype
    assert got.shape == want.shape
    rows = (len(want), -1)
    error = (got.double() - want).reshape(rows).norm(dim=1)
    bound = TOLERANCE[got.dtype] * size.reshape(rows).norm(dim=1)
    assert bool((error <= bound).all()), f"worst excess {(error - bound).max().item():.3g}"


@pytest.fixture
def decode_results(monkeypatch):
    def run(path, inputs):
        """Output and gradients by name, through `path`."""
        monkeypatch.setenv("SAETRAIN_KERNELS", path)
        top_acts, W_dec, b_dec = leaves(inputs.acts, inputs.W, inputs.b_dec)
        out = sparse_decode(top_acts, inputs.indices, W_dec, b_dec)
        out.backward(inputs.dY)
        return {
            "output": out.detach(),
            "top_acts": top_acts.grad,
            "W_dec": W_dec.grad,
            "b_dec": b_dec.grad,
        }

    return run


@pytest.fixture
def encode_results(monkeypatch):
    def run(path, inputs):
        """Activations as a dense [N, M] and gradients by name, through `path`."""
        monkeypatch.setenv("SAETRAIN_KERNELS", path)
        x, W_enc, b_enc, b_dec = leaves(inputs.dY, inputs.W, inputs.b_enc, inputs.b_dec)
        k = min(inputs.acts.shape[1], len(W_enc))
        top_acts, top_indices = sparse_encode(x, W_enc, b_enc, b_dec, k)
        # Slots are in no order, so the dense activations decide what gradient a slot receives.
        dense = torch.zeros(len(x), len(W_enc), dtype=x.dtype, device=x.device)
        dense.scatter_(1, top_indices, top_acts.detach())
        top_acts.backward((top_acts.detach() + 1.0) * (top_indices % 7 - 3))
        return {
            "dense acts": dense,
            "x": x.grad,
            "W_enc": W_enc.grad,
            "b_enc": b_enc.grad,
            "b_dec": b_dec.grad,
        }

    return run


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.fixture
def assert_same_results():
    def check(got, want, tolerance):
        assert got.keys() == want.keys()
        for name, expected in want.items():
            expected = expected.double()
            error = (got[name].double() - expected).norm().item()
            assert error <= tolerance * expected.norm().item(), f"{name} is off by {error:.3g}"

    return check


@pytest.fixture
def nan_in_fresh_memory(monkeypatch):
    """An element that a kernel forgets to write is then NaN, and no test passes with one."""
    empty = torch.empty

    def poisoned(*sizes, **options):
        tensor = empty(*sizes, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def make_case():
    return Case


@pytest.fixture
def make_empty():
    def make(dtype, device="cpu"):
        return Case("no_tokens", N=0, D=5, M=4, K=3).inputs(dtype, device)

    return make


@pytest.fixture
def make_odd():
    def make(dtype, device="cpu"):
        return Case("odd_widths", N=7, D=37, M=19, K=5).inputs(dtype, device)

    return make
