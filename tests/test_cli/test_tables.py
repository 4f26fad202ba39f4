"""Aligned tables."""

from actcache_cli.tables import table


def test_words_stand_left_and_numbers_right():
    text = table(["name", "rows"], [["layers.9", "12"], ["mlp", "1,234"]])
    assert text.splitlines() == ["name       rows", "layers.9     12", "mlp       1,234"]


def test_a_table_without_rows_is_its_header():
    assert table(["a", "b"], []) == "a  b"
