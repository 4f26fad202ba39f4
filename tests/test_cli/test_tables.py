"""Aligned tables."""

from actcache_cli.tables import table


def test_words_stand_left_and_numbers_right():
    text = table(["name", "rows"], [["layers.9", "12"], ["mlp", "1,234"]])
    assert text.splitlines() == ["name       rows", "layers.9     12", "mlp       1,234"]


def test_negative_numbers_and_dashes_stand_right():
    text = table(["cosine", "next"], [["-0.04", "-"], ["1.00", "12"]])
    assert text.splitlines() == ["cosine  next", " -0.04     -", "  1.00    12"]


def test_a_table_without_rows_is_its_header():
    assert table(["a", "b"], []) == "a  b"
