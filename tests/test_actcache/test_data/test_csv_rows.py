"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from actcache.data.csv_rows import csv_rows
from actcache.data.table_rows import NoColumnError, Row
from actcache.errors import DatasetError


def rows(data: str | bytes, column: str = "text", delimiter: str = ",", size: int = 7) -> list[Row]:
    encoded = data if isinstance(data, bytes) else data.encode()
    pieces = (encoded[i : i + size] for i in range(0, len(encoded), size))
    return list(csv_rows(pieces, column, Path("a.csv"), delimiter))


def values(data: str | bytes, **options: Any) -> list[object]:
    return [row.value for row in rows(data, **options)]


TEXTS = ["plain", "NA", "null", "", "007", "3.10", "True", " spaced ", 'a "quote", and']
TEXTS += ["x" * 200_000, "two\nlines", "two\r\nlines", "naïve 漢字", "\n", "#N/A"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_every_value_is_the_text_that_was_written(delimiter: str, end: str) -> None:
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([["n", "text"], *([n, text] for n, text in enumerate(TEXTS))])
    size = 1 << 16
    assert values(file.getvalue(), delimiter=delimiter, size=size) == TEXTS
    assert values(file.getvalue(), column="n", delimiter=delimiter, size=size) == [
        str(n) for n in range(len(TEXTS))
    ]


def test_blank_lines_are_skipped_and_lines_counted() -> None:
    found = rows('\ntext\n\n"one\n\n1"\n\ntwo\n')
    assert [(row.value, row.line) for row in found] == [("one\n\n1", 4), ("two", 8)]


@pytest.mark.parametrize("data", ["", "\n\n", "n,text\n"])
def test_a_file_without_rows_has_no_documents(data: str) -> None:
    assert rows(data) == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("expected", [",", "\t"])
def test_another_delimiter_is_known_by_the_column_in_the_header(
    expected: str, delimiter: str, end: str
) -> None:
    lines = ["n;text", '1;"a, b"', '2;"c; d\t"";""|"', "3;NA"]
    data = end.join(line.replace(";", delimiter, 1) for line in lines)
    assert values(data, delimiter=expected) == ["a, b", 'c; d\t";"|', "NA"]
    with pytest.raises(NoColumnError):
        rows("a;b\n1;2\n")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('1|"Hello," he said', '"Hello," he said'),
        ('1|"a"b', '"a"b'),
        (r'1|"a \"q\" and \\ b"', 'a "q" and \\ b'),
        ('1|"a \\"q\\" b\nsecond"', 'a "q" b\nsecond'),
        (r'1|"a \"q\" and \n b"', r'"a \"q\" and \n b"'),
        ('1|a "q" b', 'a "q" b'),
        ('1|5" wide', '5" wide'),
    ],
)
@pytest.mark.parametrize("delimiter", ["|", "\t"])
def test_text_after_a_closing_quote_is_kept(delimiter: str, line: str, value: str) -> None:
    line = line.replace("|", delimiter)
    data = f'n|text\n0|"a\nb"\n{line}\n2|c\n'.replace("|", delimiter)
    found = rows(data, delimiter=delimiter)
    assert [row.value for row in found] == ["a\nb", value, "c"]
    assert found[1].differs == (delimiter + '"' in line)
    assert [row.line for row in found] == [2, 4, 5 + value.count("\n")]


def test_a_row_that_ends_early_has_no_value() -> None:
    assert values("n,text\n1\n2,b\n3,c,\n") == [None, "b", "c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("n,text\n1,a\n2,b, and more\n", r"line 3 has more values.*2 values: n, text.*got: +3"),
        ('text\na\n"b\nc\n', r"line 3: a quote is not closed"),
        ('"text\na\n', r"line 1: a quote is not closed"),
        ("text,text\na,b\n", r"2 columns 'text'"),
        ('n,text\n1,"a, b" c\n', r"line 2: text follows a closing quote"),
        ('n,text\n1,"a\nb" c\n', r"line 3: text follows a closing quote"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(data: str, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"(?s)a\.csv.*{message}"):
        rows(data)


def test_a_missing_column_is_refused_with_the_header() -> None:
    with pytest.raises(NoColumnError) as error:
        rows("body,title\n1,2\n")
    assert error.value.names == ("body", "title")


def test_what_is_no_text_is_replaced_and_counted() -> None:
    found = rows(b'n,text\n1,caf\xe9\n\xff,fine\n3,"two\n\xe2\x82 lines"\n4,good\n')
    assert [(row.value, row.replaced) for row in found] == [
        ("caf\ufffd", True),
        ("fine", False),
        ("two\n\ufffd lines", True),
        ("good", False),
    ]


def test_documents_that_pandas_reads_otherwise_are_marked() -> None:
    import pandas as pd

    words = ["n/a", "None", "  ", "nan", "NaN", "-nan", "<NA>", "no", "N/A", "NULL", "#NA", "-NaN"]
    for text in [*TEXTS, *words]:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["text"], [text], ["sentinel"]])
        frame = pd.read_csv(io.StringIO(file.getvalue(), newline=""), dtype={"text": str})
        before = ["" if text != text else text for text in frame["text"]][:-1]
        (row, _) = rows(file.getvalue(), size=1 << 20)
        assert row.differs == (before != [text] or text == "\n")  # quoted, it was read as it is
