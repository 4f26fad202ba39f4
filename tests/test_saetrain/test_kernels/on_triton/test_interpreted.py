"""The Triton kernels through the interpreter; test_on_gpu runs the same cases natively."""

import pytest

pytest.importorskip("triton")


def test_every_case_passes_through_the_interpreter(run_cases):
    passed = run_cases(TRITON_INTERPRET="1", SAETRAIN_KERNELS="triton", OMP_NUM_THREADS="1")
    assert passed > 350
