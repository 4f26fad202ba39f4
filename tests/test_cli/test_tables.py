"""Aligned tables."""

from actcache_cli.tables import table


def test_text_is_left_aligned_and_numbers_are_right_aligned():
    text = table(["name", "rows"], [["layers.9", "12"], ["mlp", "1,234"]])
    assert text.splitlines() == ["name       rows", "layers.9     12", "mlp       1,234"]


def test_negative_numbers_and_dashes_are_right_aligned():
    text = table(["cosine", "next"], [["-0.04", "-"], ["1.00", "12"]])
    assert text.splitlines() == ["cosine  next", " -0.04     -", "  1.00    12"]


def test_a_table_without_rows_has_only_its_header():
    assert table(["a", "b"], []) == "a  b"
