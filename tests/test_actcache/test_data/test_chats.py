"""Conversations as text: what a chat template is given, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache.config import HarvestConfig
from actcache.data.chats import chat_text, closing_token, template_variables
from actcache.data.datasets import open_dataset
from actcache.data.table_rows import DOCUMENT
from actcache.errors import DatasetError

TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
CALLS = (
    "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls or [] %}"
    "[{{ t.function.name }} ARGUMENTS]{% endfor %}{% endfor %}"
)
TOOLS = "{% if tools %}{% for t in tools %}({{ t | tojson }}){% endfor %}{% endif %}" + TURNS
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True)
def _copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "copies"))


@pytest.fixture
def speaking(make_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """Factory of tokenizers with a chat template."""

    def make(template: str) -> Any:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    return make


def call_of(arguments: Any) -> list[dict[str, Any]]:
    calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize(
    "written",
    [
        "{{ t.function.arguments | tojson }}",
        "{{ '' + t.function.arguments }}",
        "{{ t.function.arguments }}",
        "{% if t.function.arguments is string %}{{ t.function.arguments }}{% else %}"
        "{{ t.function.arguments | tojson }}{% endif %}",
    ],
)
def test_arguments_are_objects_or_strings_as_the_template_needs_them(
    written: str, arguments: Any, speaking: Callable[[str], Any]
) -> None:
    messages = call_of(arguments)
    text = chat_text(speaking(CALLS.replace("ARGUMENTS", written)), messages)
    assert text == '[add {"a": 1}]'
    assert messages == call_of(arguments)  # nothing is changed in place


def test_arguments_that_are_no_json_stay_as_they_are(speaking: Callable[[str], Any]) -> None:
    template = CALLS.replace("ARGUMENTS", "{{ t.function.arguments }}")
    for arguments in ("{not json", "", "7"):
        assert chat_text(speaking(template), call_of(arguments)) == f"[add {arguments}]"


def test_messages_of_sharegpt_get_roles(speaking: Callable[[str], Any]) -> None:
    stored = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "weight": None},
    ]
    expected = "<s>system: be kind</s><s>user: a</s><s>assistant: b</s>"
    assert chat_text(speaking(TURNS), stored) == expected
    with pytest.raises(DatasetError, match=r"(?s)refuses.*'narrator'.*human.*roles"):
        chat_text(speaking(TURNS), [{"from": "narrator", "value": "a"}])


def test_the_variables_of_a_template_are_those_that_columns_can_give(
    speaking: Callable[[str], Any],
) -> None:
    template = (
        "{{ bos_token }}{% generation %}{% endgeneration %}{% set ns = namespace(n=0) %}"
        "{% for d in documents %}{{ d }}{% break %}{% endfor %}{{ strftime_now('%Y') }}"
        "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    )
    assert template_variables(speaking(template + TOOLS)) == {"tools", "documents"}
    several = speaking(TURNS)
    several.chat_template = {"default": TURNS, "tool_use": TOOLS}
    assert template_variables(several) == {"tools"}
    assert template_variables(speaking("{% broken")) == frozenset()


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_further_columns_are_given_to_the_template(
    tools: Any, speaking: Callable[[str], Any]
) -> None:
    tokenizer = speaking(TOOLS + "{{ mood }}")
    record = {DOCUMENT: TALK, "tools": tools, "mood": "glad"}
    plain = "<s>user: a</s><s>assistant: b</s>"
    assert chat_text(tokenizer, record) == f'({{"name": "add"}}){plain}glad'
    for none in ([], "[]", "null", " ", ""):
        assert chat_text(tokenizer, {DOCUMENT: TALK, "tools": none}) == plain
    assert set(record) == {DOCUMENT, "tools", "mood"}


ROWS: list[dict[str, Any]] = [
    {"messages": TALK, "tools": [{"name": "add", "parameters": {"a": "int"}}], "id": 1},
    {"messages": call_of({"x": None, "y": [None, 2]}), "id": 2},
    {"messages": call_of({"z": 3}), "tools": [{"name": "see", "parameters": {"b": "str"}}]},
    {"messages": None, "tools": []},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_columns_that_the_template_reads_are_read_beside_the_messages(
    kind: str, streaming: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"talk.{kind}"
    table = pa.Table.from_pylist([{"messages": None, "tools": None, "id": None} | r for r in ROWS])
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(path)
    options = {"streaming": True, "max_tokens": 4096} if streaming else {}
    config = HarvestConfig("model", str(path), "out", chat_column="messages", **options)
    for _ in range(2):  # a copy of the columns is made, then read
        source: Any = open_dataset(config, lambda: frozenset(["tools", "documents"]))
        assert source.column.others == ("tools",)
        found = list(source.walk()) if streaming else source.batch(range(source.count))
        written = kind in ("jsonl", "json")
        first, second, third, last = found
        assert first == {DOCUMENT: TALK, "tools": ROWS[0]["tools"]}
        assert third == {DOCUMENT: call_of({"z": 3}), "tools": ROWS[2]["tools"]}
        # A null that stands in JSON is kept; of those of Arrow nobody knows who put them there.
        expected = {"x": None, "y": [None, 2]} if written else {"y": [None, 2]}
        assert second == {DOCUMENT: call_of(expected)}
        assert last == []
    assert open_dataset(config, lambda: frozenset(["documents"])).column.others == ()  # type: ignore[union-attr]


def test_a_column_is_not_taken_for_a_nested_field_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": [TALK[0] | {"tools": 1}], "tool": 2}) + "\n")
    config = HarvestConfig("model", str(path), "out", chat_column="messages")
    source: Any = open_dataset(config, lambda: frozenset(["tools"]))
    assert source.column.others == ()
    assert source.batch([0]) == [[TALK[0] | {"tools": 1}]]


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (TURNS, "</s>"),
        (TURNS.replace("</s>", "</s>\n"), "</s>"),
        (TURNS.replace("</s>", ""), None),
        (TURNS.replace("m.content", "m.content[0].text"), "</s>"),
        ("{{ raise_exception('only tools') }}", None),
    ],
)
def test_a_template_ends_a_conversation_with_a_token_or_not(
    template: str, closing: str | None, speaking: Callable[[str], Any]
) -> None:
    assert closing_token(speaking(template)) == closing
