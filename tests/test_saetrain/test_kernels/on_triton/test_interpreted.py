"""The Triton kernels through the interpreter; test_on_gpu runs the same cases natively."""

import pytest

pytest.importorskip("triton")


def test_every_case_passes_through_the_interpreter(run_cases):
    passed = run_cases(TRITON_INTERPRET="1", SAETRAIN_KERNELS="triton", OMP_NUM_THREADS="1")
    assert passed > 350


def test_offsets_past_two_to_the_thirty_one_reach_the_right_numbers(run_cases):
    """Over memory that is nowhere but where it is written, which a GPU has not."""
    assert run_cases("vast_*.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == 11
