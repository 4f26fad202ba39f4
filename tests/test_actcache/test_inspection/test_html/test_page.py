"""The HTML page: well-formed, self-contained, and safe for untrusted text."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.inspection import (
    CacheSummary,
    SequenceView,
    read_sequences,
    render_page,
    shard_facts,
    summarize,
)
from actcache.inspection.harvest_speed import RankSpeed
from actcache.inspection.samples import Token
from actcache.inspection.shards import BadRows, BadShard, Excluded

HOSTILE = "\"'><script src=//x>alert(1)</script><img onerror=x src=y>&\x1b[2J\x00\ud800\u202e"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path]) -> Cache:
    return Cache.open(make_cache(shards=3, hookpoints={"layers.0": 16, "layers.1": 24}))


@pytest.fixture(scope="module")
def summary(cache: Cache) -> CacheSummary:
    """Summary with content in every section."""
    near = BadShard(1, 128, {"layers.0": 2}, {"layers.1": 40})
    speed = RankSpeed(0, ("a",), 3, 4.5, 1000.0, 5e6, 1.5, 2.0, 1, 0)
    return dataclasses.replace(
        summarize(cache),
        afflictions=BadRows(2, 40, 1, (near,)),
        speed=(speed, dataclasses.replace(speed, rank=1)),
    )


@pytest.fixture(scope="module")
def hostile(summary: CacheSummary, cache: Cache) -> tuple[CacheSummary, list[SequenceView]]:
    """Summary and sequences with markup in every text."""
    (near,) = summary.afflictions.worst
    changed = dataclasses.replace(
        summary,
        **{
            field.name: HOSTILE
            for field in dataclasses.fields(summary)
            if isinstance(getattr(summary, field.name), str)
        },
        hookpoints=tuple(
            dataclasses.replace(h, hookpoint=f"{HOSTILE}{i}", dtype=HOSTILE)
            for i, h in enumerate(summary.hookpoints)
        ),
        excluded=(Excluded(HOSTILE, 5, 0.1),),
        afflictions=BadRows(1, 0, 1, (dataclasses.replace(near, non_finite={HOSTILE: 1}),)),
        speed=tuple(dataclasses.replace(s, hosts=(HOSTILE,)) for s in summary.speed),
    )
    tokens = (Token(0, 5, HOSTILE, "kept", 1.0), Token(1, 6, HOSTILE, "left out", None))
    return changed, [SequenceView(0, 0, 0, f"{HOSTILE}0", tokens)]


def parsed(page: str) -> ET.Element:
    assert page.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(page)


def require_self_contained(page: str) -> None:
    root = parsed(page)
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "img", "link", "iframe", "object", "base", "a", "use", "form"}
    for element in root.iter():
        names = {name.lower() for name in element.attrib}
        assert not names & {"src", "href", "xlink:href", "srcset", "action", "data"}
        assert not any(name.startswith("on") for name in names)
        values = [v for name, v in element.attrib.items() if name not in {"title", "aria-label"}]
        assert not re.search(r"https?:|//|url\(|javascript:", " ".join(values), re.IGNORECASE)
    style = root.findtext("head/style") or ""
    assert not re.search(r"https?:|url\(|@import|@font-face", style)
    policy = [m for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].get("content") == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_is_well_formed_and_self_contained(cache: Cache, summary: CacheSummary) -> None:
    views = list(islice(read_sequences(cache, "layers.0", None), 2))
    page = render_page(summary, views, shard_facts(cache, 1))
    require_self_contained(page)
    titles = [h2.text for h2 in parsed(page).iter("h2")]
    assert titles == [
        "Positions left out",
        "Hookpoints",
        "Norms and dimensions",
        "How alike the means are",
        "Non-finite and near overflow",
        "Speed of the harvest",
        "Files of shard 1",
        "Text",
    ]


def test_every_plot_has_a_title_for_screen_readers(summary: CacheSummary) -> None:
    plots = list(parsed(render_page(summary)).iter("svg"))
    assert len(plots) == 2 * 3 + 3  # two plots and a spark a hookpoint; cosines, shards, ranks
    for plot in plots:
        assert plot.get("role") == "img"
        assert plot[0].tag == "title"
        assert plot[0].text


def test_text_from_the_cache_never_becomes_markup(
    hostile: tuple[CacheSummary, list[SequenceView]],
) -> None:
    page = render_page(*hostile)
    require_self_contained(page)
    text = "".join(parsed(page).itertext())
    assert text.count("<script src=//x>") >= 10
    assert "\x1b" not in page
    assert page.encode()  # no lone surrogate


def test_the_norms_of_tokens_are_on_the_page(cache: Cache, summary: CacheSummary) -> None:
    (view,) = islice(read_sequences(cache, "layers.1", None), 1)
    spans = [
        span
        for span in parsed(render_page(summary, [view])).iter("span")
        if "position" in span.get("title", "") and "id" in span.get("title", "")
    ]
    assert len(spans) == 17
    assert spans[0].get("class") == "out"
    assert spans[0].get("title") == f"left out, position 0, id {view.tokens[0].id}"
    assert spans[3].get("title", "").startswith(f"norm {view.tokens[3].norm:.4g}, position 3")


def test_padding_is_shown_once_and_long_sequences_are_cut(summary: CacheSummary) -> None:
    kept = [Token(i, 1, "x", "kept", 3.0) for i in range(5000)]
    padding = [Token(5000 + i, 0, "", "padding", None) for i in range(70)]
    page = render_page(summary, [SequenceView(0, 0, 0, "layers.0", (*kept, *padding))])
    assert "[70 positions of padding]" in page
    assert "[the first 4,096 of 5,070]" in page
    assert page.count('position 4095, id 1"') == 1
    assert 'position 4096, id 1"' not in page


def test_a_page_of_thousands_of_hookpoints_is_bounded(summary: CacheSummary) -> None:
    many = tuple(
        dataclasses.replace(summary.hookpoints[0], hookpoint=f"layers.{i}") for i in range(3000)
    )
    cosines = tuple(tuple(1.0 for _ in range(256)) for _ in range(256))
    page = render_page(dataclasses.replace(summary, hookpoints=many, mean_cosines=cosines))
    assert len(page) < 5 << 20
    assert "and 2,500 more hookpoints" in page
    assert "2936 more are in the table" in page


def test_a_cache_without_finite_rows_has_a_page(make_cache: Callable[..., Path]) -> None:
    def broken(_: str, __: int, count: int, width: int) -> np.ndarray:
        return np.full((count, width), np.nan, dtype=np.float32)

    root = make_cache(shards=1, skip_positions=0, hookpoints={"layers.0": 4}, rows=broken)
    page = render_page(summarize(Cache.open(root)))
    require_self_contained(page)
    for word in ("None: every position is a row", "No finite rows", "136 non-finite rows"):
        assert word in page


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Open a file in Chromium and return the resulting markup."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    profile = tmp_path_factory.mktemp("profile")
    fixed = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    fixed += [f"--user-data-dir={profile}", "--enable-logging=stderr"]
    fixed += ["--allow-file-access-from-files", "--virtual-time-budget=5000"]

    def open_(path: Path) -> str:
        done = subprocess.run(
            [*fixed, path.as_uri()], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert not errors
        return done.stdout

    yield open_
    shutil.rmtree(profile, ignore_errors=True)


def test_a_browser_shows_hostile_text_as_text(
    browser: Callable[..., str], hostile: tuple[CacheSummary, list[SequenceView]], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(*hostile), encoding="utf-8")
    shown = browser(page)
    assert "&lt;script src=//x&gt;" in shown
    assert not re.search(r"<(script|img|iframe)\b", shown)
    assert shown.count("<svg") == page.read_text().count("<svg") > 5


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_a_browser_window_of_any_width(
    width: int, browser: Callable[..., str], cache: Cache, summary: CacheSummary, tmp_path: Path
) -> None:
    views: list[Any] = list(islice(read_sequences(cache, "layers.0", None), 2))
    page = render_page(summary, views, shard_facts(cache, 1))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
        '<p id="out"></p><script>f.onload = () => { const d = f.contentDocument.documentElement;'
        "out.textContent = `${d.scrollWidth} of ${d.clientWidth}`; }</script>"
    )
    found = re.search(r"(\d+) of (\d+)", browser(outer))
    assert found
    assert int(found[1]) <= int(found[2]) <= width
