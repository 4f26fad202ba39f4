"""The sentence on the bottleneck at the end of a run."""

from __future__ import annotations

import pytest

from saetrain.launch.summary import bottleneck_message
from saetrain.training.run_state import TrainResult


@pytest.mark.parametrize(
    ("shares", "limit"),
    [
        ((0.02, 0.01, 0.0), "Compute was the limit (2% of the time"),
        ((0.2, 0.03, 0.0), "Disk and compute kept pace (20% of the time"),
        ((0.8, 0.03, 0.0), "The disk was the limit (80% of the time"),
        ((0.8, 0.7, 0.0), "The start was the limit (80% of the time"),
        ((0.8, 0.03, 0.6), "The harvest was the limit (80% of the time"),
        ((0.0, 0.0, 0.0), "Compute was the limit (0% of the time"),
    ],
)
def test_the_bottleneck_follows_from_the_shares_of_waiting(
    shares: tuple[float, float, float], limit: str
) -> None:
    text = bottleneck_message(TrainResult(9, 1e6, 2.5e9, *shares), "first-read")
    assert text.startswith(limit)
    assert "at 2.5 GB/s" in text
    assert text.endswith(".")


def test_the_remedy_is_not_an_option_in_use_already() -> None:
    at_the_start = TrainResult(9, 1e6, 1e9, 0.8, 0.7, 0.0)
    assert "--verify never" in bottleneck_message(at_the_start, "first-read")
    assert "--verify never" not in bottleneck_message(at_the_start, "never")
