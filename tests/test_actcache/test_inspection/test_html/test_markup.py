"""Escaping of text in markup."""

from xml.etree import ElementTree as ET

import pytest

from actcache.inspection.html.markup import Markup, join, tag

HOSTILE = ["<script>alert(1)</script>", "a & b", '" onload="x', "' x='", "]]>", "\x00\x1b\ud800"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_and_attribute_values_are_escaped(text):
    element = ET.fromstring(tag("p", text, tag("b", text), title=text))
    assert len(element) == 1
    assert list(element.attrib) == ["title"]
    assert set(element.itertext()) == {element.get("title")}


def test_markup_is_joined_without_escaping():
    assert join(Markup("<b></b>"), "<") == "<b></b>&lt;"


def test_attribute_names_follow_html():
    made = tag("p", class_="a", aria_label="b", none=None)
    assert made == '<p class="a" aria-label="b"></p>'
    assert tag("meta", charset="utf-8", name="x") == '<meta charset="utf-8" name="x"/>'
