from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actcache.config import HarvestConfig
from actcache.data import datasets as datasets_module
from actcache.data.datasets import (
    Column,
    DocumentStream,
    IndexedDocuments,
    Mixture,
    TokenFile,
    _commits_of,
    open_dataset,
)
from actcache.errors import DatasetError

TEXTS = ["one", "", "two words", "naïve — café", "last\nlines\n"]


def opened(path: Path | str, **options: Any) -> Any:
    return open_dataset(HarvestConfig("model", str(path), "out", **options))


def texts_of(path: Path | str, **options: Any) -> list[str]:
    documents = opened(path, **options)
    assert isinstance(documents, IndexedDocuments)
    return documents.batch(range(documents.count))


def table(column: str = "text") -> Any:
    import datasets

    return datasets.Dataset.from_dict({column: TEXTS, "number": list(range(len(TEXTS)))})


def write(path: Path, column: str = "text") -> Path:
    rows = [{column: text, "number": i} for i, text in enumerate(TEXTS)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        table(column).to_csv(path)
    else:
        table(column).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "A.JSONL", "a[1]*.csv"]
)
def test_every_table_format_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "A.JSONL":
        write(tmp_path / "a.jsonl").rename(path)
    else:
        write(path)
    assert texts_of(path) == TEXTS


def test_text_column_names_another_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", column="body")
    assert texts_of(path, text_column="body") == TEXTS
    assert opened(path, text_column="body").column.name == "body"


def test_a_text_file_is_one_document_without_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("naïve\nlines\n", encoding="utf-8")
    documents = opened(path)
    assert (documents.count, documents.column.name) == (1, "")
    assert documents.batch([0]) == ["naïve\nlines\n"]


def test_saved_datasets_and_splits_of_saved_dictionaries_are_read(tmp_path: Path) -> None:
    import datasets

    table().save_to_disk(tmp_path / "one")
    assert texts_of(tmp_path / "one") == TEXTS
    other = datasets.Dataset.from_dict({"text": ["other"]})
    datasets.DatasetDict(train=table(), test=other).save_to_disk(tmp_path / "many")
    assert texts_of(tmp_path / "many") == TEXTS
    assert texts_of(tmp_path / "many", split="test") == ["other"]
    with pytest.raises(DatasetError, match=r"(?s)no split 'dev'.*train \| test.*--split"):
        opened(tmp_path / "many", split="dev")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_a_saved_dataset_with_a_format_gives_plain_objects(
    form: str, streaming: bool, tmp_path: Path
) -> None:
    import datasets

    rows = {"ids": [[1, 2], [3], []], "text": ["a", "b", ""]}
    chat = [[{"role": "user", "content": "a"}], [], [{"role": "user", "content": "b"}]]
    data = datasets.Dataset.from_dict({**rows, "chat": chat}).with_format(form)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "many")
    how: dict[str, Any] = {"streaming": True, "max_tokens": 4096} if streaming else {}
    for name in ("one", "many"):
        for option, expected in (
            ({}, rows["text"]),
            ({"token_column": "ids"}, rows["ids"]),
            ({"chat_column": "chat"}, chat),
        ):
            source = opened(tmp_path / name, **option, **how)
            assert list(source.walk() if streaming else source.batch(range(3))) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_nested_column_of_a_saved_dataset_is_named_by_its_path(
    streaming: bool, tmp_path: Path
) -> None:
    import datasets

    rows = [{"doc": {"text": text, "n": 1}, "text": "no"} for text in ("a", "b", "c")]
    rows.append({"doc": None, "text": "no"})
    data = datasets.Dataset.from_list(rows).select([3, 1, 0])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "many")
    how: dict[str, Any] = {"streaming": True, "max_tokens": 4096} if streaming else {}
    for name in ("one", "many"):
        source = opened(tmp_path / name, text_column="doc.text", **how)
        assert list(source.walk() if streaming else source.batch(range(3))) == ["", "b", "a"]
        with pytest.raises(DatasetError, match=r"(?s)no column 'doc.body'.*doc.text"):
            opened(tmp_path / name, text_column="doc.body", **how)


def test_a_cut_saved_dataset_is_refused_as_damaged(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "one")
    (path,) = (tmp_path / "one").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=r"(?s)cannot load dataset .*cut or damaged"):
        opened(tmp_path / "one")


def test_documents_are_read_by_index(tmp_path: Path) -> None:
    documents = opened(write(tmp_path / "a.jsonl"))
    assert documents.batch([3, 0]) == [TEXTS[3], TEXTS[0]]


def test_a_null_text_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n')
    assert texts_of(path) == ["a", ""]


def test_a_file_of_token_ids_is_read_with_bin_dtype(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16", "uint32", "int32", "int64"):
        path = tmp_path / f"{dtype}.bin"
        ids = np.array([0, 1, 255, 7], dtype=np.dtype(dtype).newbyteorder("<"))
        ids.tofile(path)
        source = opened(path, bin_dtype=dtype)
        assert isinstance(source, TokenFile)
        np.testing.assert_array_equal(source.read(0, source.count), ids)


def test_a_file_with_a_partial_token_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    with pytest.raises(DatasetError, match=r"(?s)multiple of 2 bytes.*5 bytes.*--bin-dtype"):
        opened(path)


def test_the_fingerprint_depends_on_bytes_and_bin_dtype(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(first.read_bytes())
    assert opened(first).fingerprint == opened(tmp_path / "b.jsonl").fingerprint
    (tmp_path / "c.jsonl").write_bytes(first.read_bytes() + b'{"text": "", "number": 9}\n')
    assert opened(first).fingerprint != opened(tmp_path / "c.jsonl").fingerprint
    for name in ("as.csv", "as.tsv"):  # the same bytes mean other rows
        (tmp_path / name).write_text("text\na\n")
    assert len({opened(tmp_path / name).fingerprint for name in ("as.csv", "as.tsv")}) == 2
    assert opened(first).fingerprint != opened(first, split="train[:50%]").fingerprint
    (tmp_path / "a.bin").write_bytes(bytes(8))
    types = {opened(tmp_path / "a.bin", bin_dtype=d).fingerprint for d in ("uint16", "uint32")}
    assert len(types) == 2


def test_the_fingerprint_of_files_depends_on_their_order_and_not_on_their_names(
    tmp_path: Path,
) -> None:
    found = []
    for folder, names in (("a", ("0.jsonl", "1.jsonl")), ("b", ("x.ndjson", "y.JSONL"))):
        for name, texts in zip(names, (TEXTS[:2], TEXTS[2:]), strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (tmp_path / folder / name).write_text("".join(lines))
        found.append(opened(tmp_path / folder).fingerprint)
    (tmp_path / "b" / "x.ndjson").rename(tmp_path / "b" / "z.ndjson")
    other = opened(tmp_path / "b").fingerprint
    assert found[0] == found[1] == opened(tmp_path / "a" / "*").fingerprint != other
    (tmp_path / "a" / "1.jsonl").unlink()
    assert opened(tmp_path / "a").fingerprint == opened(tmp_path / "a" / "0.jsonl").fingerprint


def test_the_fingerprint_of_a_saved_dataset_covers_the_order_of_its_tables(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "a", num_shards=2)
    first = opened(tmp_path / "a").fingerprint
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    state["_fingerprint"] = "other"
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    assert opened(tmp_path / "a").fingerprint == first
    state["_data_files"].reverse()
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    assert texts_of(tmp_path / "a") != TEXTS
    assert opened(tmp_path / "a").fingerprint != first


def test_the_fingerprint_of_a_folder_depends_on_its_text_and_not_on_its_path(
    tmp_path: Path,
) -> None:
    import datasets

    def fingerprint(name: str, texts: list[str]) -> str:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name)
        return opened(tmp_path / name).fingerprint

    first = fingerprint("a", TEXTS)
    assert first.endswith("-saved")
    assert first == fingerprint("b", TEXTS)
    others = [TEXTS[1:], [*TEXTS, ""], TEXTS[::-1], ["o", "ne", *TEXTS[2:]]]
    assert len({first, *(fingerprint(f"c{i}", t) for i, t in enumerate(others))}) == 5


def save(path: Path, rows: list[list[int]]) -> None:
    import datasets

    datasets.Dataset.from_dict({"ids": rows}).save_to_disk(path)


def save_dictionary(path: Path, rows: list[list[int]]) -> None:
    import datasets

    datasets.DatasetDict(train=datasets.Dataset.from_dict({"ids": rows})).save_to_disk(path)


def save_jsonl(path: Path, rows: list[list[int]]) -> None:
    path.mkdir(exist_ok=True)
    (path / "a.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    os.utime(path / "a.jsonl", (1e9, 1e9))  # as archives and checkouts set it


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write_rows", [save, save_dictionary, save_jsonl])
def test_a_change_of_any_document_of_a_folder_changes_its_fingerprint(
    write_rows: Callable[[Path, list[list[int]]], None], streaming: bool, tmp_path: Path
) -> None:
    how = {"streaming": True, "max_tokens": 4096} if streaming else {}
    rows = [[n, n] for n in range(3000)]
    found = []
    for changed in ([1001, 1001], [1001, 7]):
        rows[1001] = changed
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        write_rows(tmp_path / "rows", rows)
        source = opened(tmp_path / "rows", token_column="ids", **how)
        read = list(source.walk()) if streaming else source.batch(range(source.count))
        assert read[1001] == changed
        found.append((source.fingerprint, source.earlier()[-1]))
    (before, sampled), (after, also_sampled) = found
    assert before != after
    assert sampled == also_sampled  # which is why it is used for old caches only


def test_the_commits_of_a_hub_dataset_are_those_of_its_files() -> None:
    def commits(*names: str) -> list[str]:
        info = SimpleNamespace(download_checksums=dict.fromkeys(names))
        return _commits_of(SimpleNamespace(info=info))

    file = "hf://datasets/owner/name@{}/train.parquet"
    assert commits() == commits("https://host/a") == []
    assert commits(*[file.format(each * 40) for each in "bab"]) == ["a" * 40, "b" * 40]


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/x", "~/gone", "gone.bin"])
def test_a_missing_local_path_is_reported_as_such(name: str) -> None:
    with pytest.raises(DatasetError, match=r"(?s)no such file or folder: .*gone.*save_to_disk"):
        opened(name)


def test_a_dataset_that_cannot_be_loaded_is_reported_with_options_to_check() -> None:
    with pytest.raises(DatasetError, match=r"(?s)cannot load dataset .*nobody.*remedy.*--split"):
        opened("nobody/nothing-of-that-name")


def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", column="body")
    with pytest.raises(DatasetError, match=r"(?s)no column 'text'.*body \| number.*--text-column"):
        opened(path)


def test_a_column_without_text_is_reported_with_the_document_index(tmp_path: Path) -> None:
    documents = opened(write(tmp_path / "a.jsonl"), text_column="number")
    (found,) = documents.batch([3])
    assert found.reason == "type"
    assert re.search(r"(?s)'number' .*int in document 3.*--text-column", str(found.error))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.bin", "a.parquet"])
def test_an_empty_file_is_refused_with_its_path(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=rf"{name} is empty"):
        opened(tmp_path / name)


def test_a_dataset_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("text\n")
    with pytest.raises(DatasetError, match=r"none\.csv"):
        opened(tmp_path / "none.csv")
    table().select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(DatasetError, match="none"):
        opened(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"no json at all\n"),
        ("a.json", b"{"),
        ("a.parquet", b"PAR1 is how it begins"),
        ("a.csv", b'"never closed\n\n"""'),
    ],
)
def test_a_damaged_file_is_refused_with_its_path(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetError, match=name):
        opened(tmp_path / name)


@pytest.mark.parametrize("name", ["a.xml", "noending"])
def test_a_file_of_unknown_type_is_refused_with_the_known_types(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DatasetError, match=r"unknown file type: .*\n  expected: a \.jsonl"):
        opened(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_rewritten_file_with_the_same_mtime_is_read_again(suffix: str, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / f"a.{suffix}"
    for text in ("before", "after!"):
        rows = datasets.Dataset.from_dict({"text": [text]})
        getattr(rows, {"jsonl": "to_json"}.get(suffix, f"to_{suffix}"))(path)
        os.utime(path, (1e9, 1e9))  # as archives and checkouts set it
        assert texts_of(path) == [text]


def test_no_progress_bar_is_drawn_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(write(tmp_path / "a.jsonl"))
    assert capsys.readouterr() == ("", "")


def test_a_slice_of_a_file_has_its_own_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    assert texts_of(path, split="train[:2]") == TEXTS[:2]
    assert opened(path, split="train[:2]").fingerprint != opened(path).fingerprint


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.bin", "saved"])
def test_a_missing_split_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "saved":
        table().save_to_disk(path)
    elif name == "a.jsonl":
        write(path)
    else:
        path.write_bytes(b"some text ")
    with pytest.raises(DatasetError, match="validation"):
        opened(path, split="validation")


def test_a_truncated_json_file_is_reported_as_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "cut')
    with pytest.raises(DatasetError, match="JSON"):
        opened(path)


MESSAGES = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}, {"role": "x"}]]
COLUMNS = {"chat": ("chat_column", MESSAGES), "ids": ("token_column", [[1, 2, 3], [], [4]])}


def rows_file(path: Path, rows: list[Any], column: str = "it") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", COLUMNS)
def test_conversations_and_token_ids_are_read_from_their_columns(
    kind: str, streaming: bool, tmp_path: Path
) -> None:
    option, rows = COLUMNS[kind]
    path = rows_file(tmp_path / "a.jsonl", rows)
    how = {"streaming": True, "max_tokens": 4096} if streaming else {}
    source = opened(path, **{option: "it"}, **how)
    assert source.column.kind == kind
    found = list(source.walk()) if streaming else source.batch(range(source.count))
    plain = [
        [{k: v for k, v in m.items() if v} for m in row] if kind == "chat" else row for row in found
    ]
    assert plain == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("option", "rows", "message"),
    [
        ("chat_column", ["text"], r"messages.*str in document 0.*--chat-column"),
        ("chat_column", [[{"content": "a"}]], r"messages.*list of dict.*--chat-column"),
        ("token_column", [["a", "b"]], r"token ids.*list of str in document 0.*--token-column"),
        ("token_column", [[1, None]], r"token ids.*list of NoneType.*--token-column"),
        ("token_column", [[1.5]], r"token ids.*list of float.*--token-column"),
        ("text_column", [[1]], r"text.*list of int.*--text-column"),
    ],
)
def test_a_column_of_another_type_is_reported_with_the_option_to_change(
    option: str, rows: list[Any], message: str, streaming: bool, tmp_path: Path
) -> None:
    path = rows_file(tmp_path / "a.jsonl", rows)
    how = {"streaming": True, "max_tokens": 4096} if streaming else {}
    source = opened(path, **{option: "it"}, **how)
    found = next(source.walk()) if streaming else source.batch([0])[0]
    assert found.reason == "type"
    assert re.search(rf"(?s)does not hold.*{message}", str(found.error))


def streamed(path: Path | str, **options: Any) -> DocumentStream:
    source = opened(path, streaming=True, max_tokens=4096, **options)
    assert isinstance(source, DocumentStream)
    return source


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_stream_can_be_iterated_repeatedly(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    source = streamed(path)
    assert list(source.walk()) == list(source.walk()) == TEXTS
    assert source.fingerprint == opened(path).fingerprint


def test_the_fingerprint_of_a_streamed_folder_covers_its_files(
    tmp_path: Path,
) -> None:
    import datasets

    def fingerprint(folder: str, texts: list[str]) -> str:
        path = tmp_path / folder / "texts"
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
        assert list(streamed(path).walk()) == texts
        return streamed(path).fingerprint

    first = fingerprint("a", TEXTS)
    assert first == fingerprint("b", TEXTS) != fingerprint("c", TEXTS[1:])
    assert first == opened(tmp_path / "a" / "texts").fingerprint


def test_an_interrupted_stream_is_reported_with_how_to_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    hub = table().to_iterable_dataset(), None
    monkeypatch.setattr(datasets_module, "_load_from_hub", lambda _: hub)
    source = streamed("somebody/something")

    def broken(_: Any) -> Any:
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    walk = source.walk()
    assert next(walk) == "one"
    with pytest.raises(DatasetError, match=r"(?s)stream of .*something ended with an error.*reset"):
        next(walk)


def test_a_stream_without_the_column_or_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"(?s)no column 'text'.*body"):
        streamed(write(tmp_path / "a.jsonl", column="body"))
    (tmp_path / "none.csv").write_text("text\n")
    with pytest.raises(DatasetError, match="none"):
        streamed(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
@pytest.mark.parametrize("option", ["streaming", "token_column", "chat_column"])
def test_options_of_tables_are_refused_for_files_without_columns(
    name: str, option: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(bytes(8))
    value: Any = True if option == "streaming" else "x"
    with pytest.raises(DatasetError, match=option.replace("_", "-")):
        opened(tmp_path / name, max_tokens=4096, **{option: value})


def test_a_mixture_has_its_own_fingerprint(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl"), rows_file(tmp_path / "b.jsonl", ["b"], "text")
    mixed = opened(first, mix=(str(second),))
    assert isinstance(mixed, Mixture)
    assert mixed.weights == (1.0, 1.0)
    assert [source.fingerprint for source in mixed.sources] == [
        opened(path).fingerprint for path in (first, second)
    ]
    assert mixed.fingerprint != opened(second, mix=(str(first),)).fingerprint
    assert opened(first, mix=(str(second),), weight=(3, 1)).weights == (3, 1)


def test_a_file_of_token_ids_cannot_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(8))
    with pytest.raises(DatasetError, match=r"(?s)a\.bin cannot be mixed.*--token-column"):
        opened(write(tmp_path / "a.jsonl"), mix=(str(tmp_path / "a.bin"),))


TALK = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "saved"])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"input_ids": [1, 2], "id": 7}, Column("input_ids", "ids")),
        ({"token_ids": [1, 2], "tokens": [3, 4]}, Column("tokens", "ids")),
        ({"messages": TALK, "prompt": "a"}, Column("messages", "chat")),
        ({"conversations": [{"from": "human", "value": "a"}]}, Column("conversations", "chat")),
        ({"text": "a", "input_ids": [1, 2], "messages": TALK}, Column("text", "text")),
    ],
)
def test_a_column_that_is_known_by_its_name_is_found_and_said(
    row: dict[str, Any], column: Column, kind: str, streaming: bool, tmp_path: Path
) -> None:
    import datasets

    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        datasets.DatasetDict(test=datasets.Dataset.from_list([row])).save_to_disk(path)
    options: dict[str, Any] = {"streaming": True, "max_tokens": 4096} if streaming else {}
    options |= {"split": "test"} if kind == "saved" else {}
    source = opened(path, **options)
    assert source.column == column
    found = next(source.walk()) if streaming else source.batch([0])[0]
    assert found == row[column.name]
    if column.kind == "text":
        assert source.warnings() == ()
    else:
        (note,) = source.warnings()
        assert "no column 'text'" in note
        assert note.endswith(f"-column {column.name})")


@pytest.mark.parametrize("row", [{"input_ids": [1], "messages": TALK}, {"body": "a"}])
def test_a_column_is_not_guessed_among_several_kinds(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    remedies = "--text-column, --chat-column or --token-column"
    with pytest.raises(DatasetError, match=rf"(?s)no column 'text'.*{remedies}"):
        opened(path)
    path.write_text(json.dumps({"input_ids": [1]}) + "\n")
    with pytest.raises(DatasetError, match=r"(?s)no column 'body'.*--text-column"):
        opened(path, text_column="body")


def test_datasets_of_different_kinds_are_not_mixed(tmp_path: Path) -> None:
    for name, row in {"a": {"text": "a"}, "b": {"input_ids": [1]}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DatasetError, match=r"(?s)cannot be mixed.*column 'text'.*'input_ids'"):
        opened(tmp_path / "a.jsonl", mix=(str(tmp_path / "b.jsonl"),))


def test_bytes_that_are_no_text_in_a_saved_dataset_cost_one_document(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa

    raw = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
    _, offsets, data = raw.buffers()
    bad = pa.table({"text": pa.StringArray.from_buffers(3, offsets, data)})
    datasets.Dataset(bad).save_to_disk(tmp_path / "saved")
    for found in (
        opened(tmp_path / "saved").batch([0, 1, 2]),
        list(streamed(tmp_path / "saved").walk()),
    ):
        first, second, third = found
        assert (first, third) == ("one", "three")
        assert second.reason == "undecodable"
        assert "not UTF-8" in str(second.error)
        assert second.shown == repr(b"caf\xe9")
