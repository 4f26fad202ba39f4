"""Settings of all tests of harvests."""

import pytest

from actcache.data import shared_sequences


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let processes that a test runs one after another wait for each other's text."""
    monkeypatch.setattr(shared_sequences, "PATIENCE", 0.05)
