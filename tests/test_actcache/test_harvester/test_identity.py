"""What two commands may change of a harvest, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.core.process import World
from actcache.data import template_clock
from actcache.errors import CacheMismatchError, ConfigError
from actcache.harvester import job
from actcache.harvester.run import harvest
from actcache.model.loading import load_tokenizer

Options = Callable[..., HarvestConfig]
Tree = Callable[[Path | str], dict[str, str]]

CLOCK = (
    "{%- for m in messages -%}<s>{{ strftime_now('%d %B %Y %H') }} {{ m.content }}{%- endfor -%}"
)


@pytest.fixture
def chats(options: Options, tiny_model: Path, tmp_path: Path) -> Options:
    """Factory of options for a chat model whose template writes the date."""
    shutil.copytree(tiny_model, tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(CLOCK)
    talk = [{"role": "user", "content": "the row"}, {"role": "model", "content": "the cache"}]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"talk": talk}) + "\n") * 60)

    def make(**given: object) -> HarvestConfig:
        common = {"model": str(tmp_path / "dated"), "dataset": str(tmp_path / "talk.jsonl")}
        return options(**{**common, "chat_column": "talk", "max_tokens": None} | given)

    return make


def interrupt(root: str | Path) -> None:
    """Leave of a harvest what a kill after its first shard leaves."""
    shards = Path(root) / "shards"
    for path in sorted(shards.iterdir())[1:]:
        path.unlink()


def at(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock of the process."""
    for module in (job, template_clock):
        monkeypatch.setattr(module, "now", lambda: moment)


def test_a_resumed_harvest_renders_the_date_of_its_first_command(
    chats: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    at("2031-12-31T23:59:59", monkeypatch)
    root = harvest(chats()).cache
    cache, whole = Cache.open(root), tree(root)
    assert cache.manifest.identity.date == "2031-12-31T23:59:59"
    text = load_tokenizer(chats()).decode(cache.tokens(0).tokens.reshape(-1))
    assert text.startswith("<s>31 December 2031 23 the row<s>31 December 2031 23 the cache")
    interrupt(root)
    at("2032-01-01T00:00:03", monkeypatch)
    assert harvest(chats()).complete
    assert tree(root) == whole
    assert harvest(chats(out=root + "-now")).cache_id != cache.manifest.cache_id
    given = harvest(chats(out=root + "-given", date="2031-12-31T23:59:59"))
    assert given.cache_id == cache.manifest.cache_id
    assert given.warnings == ()


def test_another_date_is_refused_by_name(chats: Options) -> None:
    root = harvest(chats(date="2024-07-26")).cache
    interrupt(root)
    with pytest.raises(
        CacheMismatchError,
        match=r"date: '2024-07-26T00:00:00', not '2024-07-27.*--date 2024-07-26T00:00:00",
    ):
        harvest(chats(date="2024-07-27"))
    assert harvest(chats(date="2024-07-26T00:00")).complete


def test_every_rank_renders_the_date_of_rank_zero(
    chats: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "broadcast", lambda *_: "2024-07-26T08:00:00")
    assert Cache.open(harvest(chats()).cache).manifest.identity.date == "2024-07-26T08:00:00"


def test_a_date_is_recorded_only_where_a_template_reads_the_clock(
    chats: Options, tmp_path: Path
) -> None:
    template = tmp_path / "dated" / "chat_template.jinja"
    template.write_text("{# strftime_now #}" + CLOCK.replace("strftime_now", "'%s'|format"))
    summary = harvest(chats(date="2024-07-26"))
    assert summary.warnings == ("--date has no effect: no chat template reads the clock",)
    identity = Cache.open(summary.cache).manifest.identity
    assert identity.date is None
    assert harvest(chats()).cache_id == summary.cache_id


def test_a_pinned_clock_is_that_of_one_tokenizer_alone(tiny_model: Path) -> None:
    config = HarvestConfig(str(tiny_model), "", "x")
    tokenizers = [load_tokenizer(config) for _ in range(3)]
    for tokenizer in tokenizers:
        tokenizer.chat_template = {"default": "{{ strftime_now('%Y') }}", "tool_use": ""}
    dates = [
        template_clock.pin_clock(t, lambda n=n: f"18{n}0-01-01")
        for n, t in enumerate(tokenizers[:2])
    ]
    talk = [{"role": "user", "content": ""}]
    years = [t.apply_chat_template(talk, tokenize=False) for t in tokenizers]
    assert years[:2] == ["1800", "1810"]
    assert years[2] > "2000"
    assert dates == ["1800-01-01T00:00:00", "1810-01-01T00:00:00"]


def test_a_date_that_is_none_is_refused(options: Options) -> None:
    for date in ("yesterday", "2024-13-01", ""):
        with pytest.raises(ConfigError, match=r"(?s)--date is no date.*2026-01-31"):
            options(date=date)


@pytest.fixture
def hub_model(tiny_model: Path, make_model: Callable[..., Path]) -> Iterator[Callable[[str], None]]:
    """A model someone/tiny in the cache of the hub; returns a function that moves main."""
    folder = Path(constants.HF_HUB_CACHE) / "models--someone--tiny"
    for name, model in (("a", tiny_model), ("b", tiny_model), ("c", make_model(seed=3))):
        shutil.copytree(model, folder / "snapshots" / (name * 40))
    (folder / "refs").mkdir()

    def move(name: str) -> None:
        (folder / "refs" / "main").write_text(name * 40)

    yield move
    shutil.rmtree(folder)


def test_a_commit_of_the_model_that_differs_is_refused_by_name(
    hub_model: Callable[[str], None], options: Options, tree: Tree
) -> None:
    hub_model("a")
    first = harvest(options(model="someone/tiny"))
    whole = tree(first.cache)
    manifest = Cache.open(first.cache).manifest
    assert (manifest.identity.model_commit, manifest.revision) == ("a" * 40, None)
    interrupt(first.cache)
    for name in "bc":  # with the same weights, and with others
        hub_model(name)
        with pytest.raises(
            CacheMismatchError, match=rf"model commit: '{'a' * 40}', not '{name}"
        ) as e:
            harvest(options(model="someone/tiny"))
        assert f"(--revision {'a' * 40})" in str(e.value)
    again = harvest(options(model="someone/tiny", revision="a" * 40))
    assert (again.cache_id, again.complete) == (first.cache_id, True)
    assert tree(first.cache) == whole


def test_a_local_folder_has_no_commit(options: Options) -> None:
    identity = Cache.open(harvest(options()).cache).manifest.identity
    assert (identity.model_commit, identity.dataset_commits) == (None, ())


def test_rules_of_a_tokenizer_do_not_matter_to_token_ids(
    options: Options, tiny_model: Path, tree: Tree, tmp_path: Path
) -> None:
    lines = [json.dumps({"ids": [7, 8, 9, 10, 11][: 1 + n % 5]}) + "\n" for n in range(200)]
    (tmp_path / "ids.jsonl").write_text("".join(lines))
    ids = {"dataset": str(tmp_path / "ids.jsonl"), "token_column": "ids", "max_tokens": None}
    root = harvest(options(**ids)).cache
    whole = tree(root)
    interrupt(root)
    other = shutil.copytree(tiny_model, tmp_path / "other")
    parts = json.loads((other / "tokenizer.json").read_text())
    parts["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(parts))
    assert harvest(options(**ids, model=str(other))).complete
    assert tree(root) == whole
    with pytest.raises(CacheMismatchError, match="separator"):
        harvest(options(**ids, separator="7"))
