from __future__ import annotations

import logging
import warnings

import pytest

from actcache.core.process import captured_warnings

pytestmark = pytest.mark.filterwarnings("default")


def test_warnings_of_libraries_are_captured_once_each_and_not_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with captured_warnings() as captured:
        for _ in range(2):
            logging.getLogger("transformers.somewhere").warning("\x1b[31mold %s\x1b[0m", "format")
            warnings.warn("a column\nis odd", UserWarning, stacklevel=1)
        logging.getLogger("actcache.model.checkpoint").warning("ours")
        logging.getLogger("datasets").info("of no interest")
        logging.getLogger("application").warning("not of a library")
    assert captured.lines == (
        "transformers: old format",
        "test_captured_warnings: a column is odd",
        "ours",
    )
    assert capsys.readouterr().err == ""
    assert [record.message for record in caplog.records] == ["not of a library"]


def test_what_was_captured_is_printed_if_an_error_follows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load() -> None:
        logging.getLogger("datasets.load").warning("a file is odd")
        raise KeyError

    with pytest.raises(KeyError), captured_warnings():
        load()
    assert capsys.readouterr().err == "warning: datasets: a file is odd\n"


def test_logging_and_warnings_are_as_before_afterwards() -> None:
    before = logging.Logger.callHandlers, warnings.showwarning
    with captured_warnings(), captured_warnings():
        pass
    assert (logging.Logger.callHandlers, warnings.showwarning) == before


def test_a_flood_of_warnings_is_cut_and_counted() -> None:
    with captured_warnings() as captured:
        for number in range(150):
            logging.getLogger("transformers").warning("layer %d", number)
        logging.getLogger("transformers").warning("x" * 10_000)
    assert len(captured.lines) == 101
    assert captured.lines[-1] == "51 more warnings of libraries are not shown"
