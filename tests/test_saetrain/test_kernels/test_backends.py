import subprocess
import sys

import pytest
import torch

from saetrain.kernels import select_backend, sparse_decode
from saetrain.kernels.backends import BACKENDS, backend_module


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("SAETRAIN_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_tensor_selects_the_torch_backend():
    assert select_backend(torch.zeros(1)) == "torch"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_variable_forces_a_backend(monkeypatch, backend):
    monkeypatch.setenv("SAETRAIN_KERNELS", backend)
    assert select_backend(torch.zeros(1)) == backend


def test_the_variable_is_read_at_each_call(monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", "reference")
    assert select_backend(torch.zeros(1)) == "reference"
    monkeypatch.setenv("SAETRAIN_KERNELS", "torch")
    assert select_backend(torch.zeros(1)) == "torch"


def test_an_unknown_backend_raises_with_its_name(monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"SAETRAIN_KERNELS='cuda'.*reference, torch, triton"):
        sparse_decode(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("SAETRAIN_KERNELS", "triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        select_backend(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend(torch.zeros(1)) == "triton"


def test_triton_that_is_not_installed_raises(monkeypatch):
    monkeypatch.setattr("saetrain.kernels.backends._has_triton", lambda: False)
    monkeypatch.setenv("SAETRAIN_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton is not installed"):
        select_backend(torch.zeros(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_every_primitive(backend):
    pytest.importorskip("triton")
    ops = backend_module(backend)
    for name in ("gather_sum", "gather_dot", "scatter_outer", "scatter_sum"):
        assert callable(getattr(ops, name))


def test_the_package_works_where_only_torch_is_installed():
    """Check that triton and the rest of saetrain are not imported on the CPU."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from saetrain.kernels import sparse_decode, sparse_encode
W = torch.ones(3, 2, requires_grad=True)
acts, indices = sparse_encode(torch.ones(4, 2), W, torch.zeros(3), None, 2)
sparse_decode(acts, indices, W).sum().backward()
others = [m for m in sys.modules if m.startswith("saetrain.") and "kernels" not in m]
assert not others, others
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
