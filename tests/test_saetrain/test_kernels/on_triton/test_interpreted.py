"""The Triton kernels through the interpreter; test_on_gpu runs the same cases natively."""

import pytest

pytest.importorskip("triton")

INTERPRETED = {"TRITON_INTERPRET": "1", "SAETRAIN_KERNELS": "triton", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("files", "least"), [("cases_[a-g]*.py", 18), ("cases_[s-u]*.py", 24)])
def test_a_tenth_of_the_cases_of_each_function_passes_through_the_interpreter(
    run_cases, files, least
):
    assert run_cases(files, every=10, **INTERPRETED) > least


@pytest.mark.soak
def test_every_case_passes_through_the_interpreter(run_cases):
    assert run_cases(**INTERPRETED) > 350


@pytest.mark.soak
def test_offsets_past_two_to_the_thirty_one_reach_the_right_numbers(run_cases):
    """Over memory that is nowhere but where it is written, which a GPU has not."""
    assert run_cases("vast_*.py", **INTERPRETED) == 11


def test_offsets_past_two_to_the_thirty_one_reach_the_right_rows(run_cases):
    assert run_cases("vast_*.py", "-k", "rows", **INTERPRETED) == 3
