"""Escaping of untrusted text."""

import pytest

from actcache.inspection.printable import printable, visible


@pytest.mark.parametrize("text", ["plain", "größe 日本 ✓", 'quotes " and <tags>'])
def test_printable_text_is_unchanged(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\ud800", "\\ud800"),
        ("\x00\x9b", "\\x00\\x9b"),
    ],
)
def test_unprintable_characters_are_escaped(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_a_long_text_is_cut():
    assert printable("A" * 1000, 10) == "AAAAAAA..."


def test_spaces_and_line_ends_of_a_token_are_visible():
    assert visible(" the\n\t") == "·the⏎⇥"
    assert visible("\x1b[31m") == "\\x1b[31m"
    assert len(visible(" " * 1000)) <= 60
