"""Sequences with norms below their tokens."""

import pytest

from actcache.inspection.samples import SequenceView, Token
from actcache_cli.inspect.sequences import draw
from actcache_cli.terminal_plots import width_of


def reading(*tokens):
    numbered = [Token(i, i, text, state, norm) for i, (text, state, norm) in enumerate(tokens)]
    return SequenceView(3, 2, 26, "layers.0", tuple(numbered))


def test_every_norm_is_below_its_token():
    page = draw(
        reading(("The", "left out", None), (" cat", "kept", 12.3456), ("\n", "kept", 100.0)),
        median=10,
        width=80,
        colour=False,
    )
    head, tokens, norms, *_ = page.splitlines()
    assert head == (
        "shard 3, sequence 2 (of the harvest: 26); layers.0 norms 12.35 to 100; "
        "2 rows, 1 left out, 0 padding"
    )
    assert tokens == "The  ·cat   ⏎"
    assert norms == "-    12.35  100"
    assert page.endswith("\n\n")


def test_padding_is_shown_once():
    page = draw(
        reading(("a", "kept", 1.0), ("", "padding", None), ("", "padding", None)),
        1,
        80,
        colour=False,
    )
    assert page.splitlines()[-2:] == ["[2 positions of padding]", ""]
    assert "1 rows, 0 left out, 2 padding" in page


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal_and_hold_every_token(width):
    words = [f" {'日本語' if i % 7 == 0 else 'word'}{i}" for i in range(200)]
    page = draw(reading(*((w, "kept", 5.0) for w in words)), 5, width, colour=False)
    _, *lines = page.splitlines()
    assert max(map(width_of, lines)) <= width
    assert "".join(lines[::2]).count("·") == 200


def test_only_norms_far_from_the_median_are_coloured():
    tokens = [("a", "kept", 10.0), ("b", "kept", 99.0), ("c", "left out", None), ("d", "kept", 1.0)]
    page = draw(reading(*tokens), 10, 80, colour=True)
    assert "\x1b[1;31mb" in page
    assert "\x1b[2mc" in page
    assert "\x1b[36md" in page
    assert "a\x1b" not in page
    assert "\x1b" not in draw(reading(*tokens), 10, 80, colour=False)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 0.0])
def test_non_finite_norms_are_highlighted(norm):
    assert "\x1b[1;31m" in draw(reading(("a", "kept", norm)), 10, 80, colour=True)
    draw(reading(("a", "kept", 1.0)), float("nan"), 80, colour=True)


def test_escape_sequences_in_the_text_are_escaped():
    page = draw(reading(("\x1b[2Jx\u202e", "kept", 1.0)), 1, 80, colour=False)
    assert "\x1b" not in page
    assert "\\x1b[2Jx\\u202e" in page
