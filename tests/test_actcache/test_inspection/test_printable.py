"""Text that moves no cursor."""

import pytest

from actcache.inspection.printable import printable, visible


@pytest.mark.parametrize("text", ["plain", "größe 日本 ✓", 'quotes " and <tags>'])
def test_what_prints_stays_as_it_is(text):
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
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_a_long_text_is_cut():
    assert printable("A" * 1000, 10) == "AAAAAAA..."


def test_spaces_and_ends_of_lines_of_a_token_can_be_seen():
    assert visible(" the\n\t") == "·the⏎⇥"
    assert visible("\x1b[31m") == "\\x1b[31m"
    assert len(visible(" " * 1000)) <= 60
