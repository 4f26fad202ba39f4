"""The sentence on the bottleneck at the end of a run."""

from __future__ import annotations

import pytest

from saetrain.launch.summary import bottleneck_message
from saetrain.training.run_state import WaitTimes


@pytest.mark.parametrize(
    ("waits", "limit"),
    [
        (WaitTimes(100, 2, 1, 0), "Compute was the limit (2% of the time"),
        (WaitTimes(100, 20, 3, 0), "Disk and compute kept pace (20% of the time"),
        (WaitTimes(100, 80, 3, 0), "The disk was the limit (80% of the time"),
        (WaitTimes(100, 80, 70, 0), "The start was the limit (80% of the time"),
        (WaitTimes(100, 80, 3, 60), "The harvest was the limit (80% of the time"),
        (WaitTimes(0, 0, 0, 0), "Compute was the limit (0% of the time"),
    ],
)
def test_the_bottleneck_follows_from_the_seconds_of_waiting(waits: WaitTimes, limit: str) -> None:
    text = bottleneck_message(waits, 2.5e9, "first-read")
    assert text.startswith(limit)
    assert "at 2.5 GB/s" in text
    assert text.endswith(".")


def test_the_remedy_is_not_an_option_in_use_already() -> None:
    at_the_start = WaitTimes(100, 80, 70, 0)
    assert "--verify never" in bottleneck_message(at_the_start, 1.0, "first-read")
    assert "--verify never" not in bottleneck_message(at_the_start, 1.0, "never")
