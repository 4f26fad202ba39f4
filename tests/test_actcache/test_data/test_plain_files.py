"""Local files of text of any kind, alone, in folders and by patterns."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache.config import HarvestConfig
from actcache.data.datasets import DocumentStream, IndexedDocuments, open_dataset
from actcache.data.plain_files import list_files
from actcache.data.records import LongText
from actcache.errors import DatasetError

TEXTS = ["one", "", "two words", "naïve — café 🦊", "last\nlines\n", "NA", "007", *"abcdefgh"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}
TABLES = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"]


@pytest.fixture(autouse=True)
def _copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "copies"))


def table(suffix: str, texts: list[str], column: str = "text") -> bytes:
    """Return the bytes of a table with a column of numbers and one of texts."""
    rows = [{"n": n, column: text} for n, text in enumerate(texts)]
    if suffix == ".parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=4)
        return out.getvalue()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix in (".csv", ".tsv"):
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
        writer.writerows([["n", column], *(row.values() for row in rows)])
        return file.getvalue().encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    """Write a table or a text of the kind that the path's suffixes say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    *_, suffix = [s for s in path.suffixes if s not in COMPRESS]
    data = table(suffix, texts, column) if suffix in TABLES else texts[0].encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def opened(path: Path | str, **options: Any) -> Any:
    if options.get("streaming"):
        options["max_tokens"] = 4096
    return open_dataset(HarvestConfig("model", str(path), "out", **options))


def texts_of(path: Path | str, **options: Any) -> list[str]:
    """Read all documents, in order, in reverse and as a stream, which must agree."""
    documents = opened(path, **options)
    assert isinstance(documents, IndexedDocuments)
    found = documents.batch(range(documents.count))
    assert documents.batch(range(documents.count)[::-1]) == found[::-1]
    if not Path(path).name.startswith("single") and "split" not in options:
        stream = opened(path, streaming=True, **options)
        assert isinstance(stream, DocumentStream)
        assert list(stream.walk()) == list(stream.walk()) == found
        assert stream.fingerprint == documents.fingerprint
        assert stream.warnings() == documents.warnings()
    return found


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", TABLES)
def test_every_kind_of_table_is_read_and_compressed_too(
    suffix: str, compression: str, tmp_path: Path
) -> None:
    assert texts_of(write(tmp_path / f"train-a{suffix}{compression}", TEXTS)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_is_one_document_alone_and_in_folders(
    suffix: str, compression: str, tmp_path: Path
) -> None:
    texts = ["one\n\ntwo\n", "three\r\nfour\rfive", "naïve"]
    for number, text in enumerate(texts):
        write(tmp_path / "texts" / f"single-{number}{suffix}{compression}", [text])
    assert texts_of(tmp_path / "texts" / f"single-0{suffix}{compression}") == texts[:1]
    assert texts_of(tmp_path / "texts") == [texts[0], "three\nfour\nfive", texts[2]]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [".json", ".jsonl"])
def test_json_is_known_by_its_content(content: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(table(content, TEXTS)))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "single.txt"])
def test_texts_are_read_by_their_byte_order_mark(name: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, TEXTS[3:])
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    assert texts_of(path) == (TEXTS[3:4] if name == "single.txt" else TEXTS[3:])


def test_a_folder_is_read_sorted_with_its_folders_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a.jsonl", ".hidden.jsonl", ".git/c.jsonl", "a/b/c.jsonl"):
        write(tmp_path / "parts" / name, [name, "end of it"])
    names = ["a.jsonl", "a/b/c.jsonl", "a/z.jsonl", "b.jsonl"]
    expected = [text for name in names for text in (name, "end of it")]
    assert texts_of(tmp_path / "parts") == expected
    assert texts_of(tmp_path / "parts" / "**" / "*.jsonl") == expected
    assert texts_of(tmp_path / "par[t]s") == expected
    assert texts_of(tmp_path / "parts" / "a*") == expected[:6]
    order = np.random.RandomState(0).permutation(8).tolist()
    assert opened(tmp_path / "parts").batch(order) == [expected[i] for i in order]


def test_a_folder_within_itself_by_a_link_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "a.jsonl", ["one"])
    write(tmp_path / "parts" / "sub" / "b.jsonl", ["two"])
    write(tmp_path / "elsewhere" / "c.jsonl", ["three"])
    (tmp_path / "parts" / "sub" / "loop").symlink_to(tmp_path / "parts")
    (tmp_path / "parts" / "sub" / "here").symlink_to(tmp_path / "elsewhere")
    for name in ("parts", "parts/**", "parts/*", "parts/**/*.jsonl"):
        assert texts_of(tmp_path / name) == ["one", "two", "three"]


def test_a_pattern_may_be_below_a_folder_with_brackets_in_its_name(tmp_path: Path) -> None:
    write(tmp_path / "texts [v1]" / "part (1)" / "a b.jsonl", ["one"])
    for name in ("texts [v1]/*/*.jsonl", "texts [v1]/part (1)/a*", "texts*/**/*.jsonl"):
        assert texts_of(tmp_path / name) == ["one"]


def test_empty_files_among_others_are_named_in_a_warning(tmp_path: Path) -> None:
    for name in ("a.csv", "b.jsonl", "c.tsv"):
        write(tmp_path / "parts" / name, []).write_bytes(b"")
    write(tmp_path / "parts" / "d.csv", ["one"])
    assert texts_of(tmp_path / "parts") == ["one"]
    assert opened(tmp_path / "parts").warnings() == (
        f"3 files of {tmp_path / 'parts'} are empty: a.csv, b.jsonl, c.tsv",
    )
    (tmp_path / "parts" / "e.parquet").touch()
    with pytest.raises(DatasetError, match=r"e\.parquet cannot be read"):
        opened(tmp_path / "parts")


def test_a_pattern_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "parts" / "a.jsonl", ["one"])
    write(tmp_path / "parts" / "b.jsonl", ["two"])
    monkeypatch.chdir(tmp_path / "parts")
    for pattern in ("*.jsonl", "./*.jsonl", "../parts/?.jsonl", str(tmp_path / "*" / "[ab].jsonl")):
        assert [Path(name).name for name in list_files(pattern)] == ["a.jsonl", "b.jsonl"]
        assert texts_of(pattern) == ["one", "two"]


def test_a_pattern_has_the_fingerprint_of_its_files_wherever_they_are(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write(tmp_path / place / "a.jsonl", ["one"])
        write(tmp_path / place / "b.jsonl", ["two"])
    here = opened(tmp_path / "here" / "*.jsonl").fingerprint
    assert here == opened(tmp_path / "there" / "*").fingerprint
    assert here != opened(tmp_path / "there" / "a*").fingerprint
    (tmp_path / "there" / "a.jsonl").rename(tmp_path / "there" / "c.jsonl")
    assert here != opened(tmp_path / "there" / "*").fingerprint


def test_names_of_splits_mean_nothing_and_a_warning_says_so(tmp_path: Path) -> None:
    for split in ("test", "train", "validation"):
        write(tmp_path / "parts" / f"{split}-00000.parquet", [split])
    assert texts_of(tmp_path / "parts") == ["test", "train", "validation"]
    (warning,) = opened(tmp_path / "parts").warnings()
    assert "all files of" in warning
    assert "test and train and validation" in warning
    assert opened(tmp_path / "parts" / "train-*").warnings() == ()
    with pytest.raises(DatasetError, match=r"(?s)no split 'test'.*train\[:10%\].*test-\*"):
        opened(tmp_path / "parts", split="test")
    with pytest.raises(DatasetError, match=r"(?s)no configurations.*--dataset-config"):
        opened(tmp_path / "parts", dataset_config="en")


@pytest.mark.parametrize(
    "split", ["train[:3]", "train[2:5]", "train[-2:]", "train[:10%]+train[80%:]"]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "parts"])
def test_slices_are_those_of_datasets(name: str, split: str, tmp_path: Path) -> None:
    import datasets

    if name == "parts":
        write(tmp_path / "parts" / "a.jsonl", TEXTS[:4])
        write(tmp_path / "parts" / "b.jsonl", TEXTS[4:])
    else:
        write(tmp_path / name, TEXTS)
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(whole)})
    expected = [text for part in parts for text in TEXTS[part.from_ : part.to]]
    assert texts_of(tmp_path / name, split=split) == expected
    assert opened(tmp_path / name, split=split).fingerprint != opened(tmp_path / name).fingerprint


@pytest.mark.parametrize("split", ["train[:", "train[a:b]", "train[900:901]", "train[:3]x"])
def test_an_impossible_slice_is_refused(split: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="train"):
        opened(write(tmp_path / "a.jsonl", TEXTS), split=split)


def test_a_slice_of_a_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"(?s)train\[:3\].*--streaming"):
        opened(write(tmp_path / "a.jsonl", TEXTS), split="train[:3]", streaming=True)


def test_tables_of_several_kinds_are_read_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "b.jsonl.zst", ["from jsonl"])
    write(tmp_path / "parts" / "a.parquet", ["from parquet"])
    write(tmp_path / "parts" / "c.csv", ["x"], column="body")
    for name in ("README.md", "LICENSE.txt", "code.py", "photo.jpg", "a.lock", "d.bin", "e.sh"):
        (tmp_path / "parts" / name).write_text("something")
    assert texts_of(tmp_path / "parts") == ["from parquet", "from jsonl"]
    assert [
        warning.partition(" left unread, ")[2] for warning in opened(tmp_path / "parts").warnings()
    ] == [
        "of an unknown kind: a.lock, code.py, d.bin and 2 more",
        "as texts beside tables: LICENSE.txt, README.md",
        "without column 'text': c.csv",
    ]


def test_texts_are_read_beside_tables_that_lack_the_column(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "metadata.csv", ["x"], column="title")
    write(tmp_path / "parts" / "a.txt", ["a text"])
    assert texts_of(tmp_path / "parts") == ["a text"]
    (warning,) = opened(tmp_path / "parts").warnings()
    assert "without column 'text': metadata.csv" in warning


def test_a_folder_without_a_readable_file_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with pytest.raises(DatasetError, match=r"(?s)no file of a known kind.*\.parquet.*no file"):
        opened(tmp_path / "parts")
    (tmp_path / "parts" / "photo.jpg").touch()
    with pytest.raises(DatasetError, match=r"(?s)no file of a known kind.*\.parquet.*photo\.jpg"):
        opened(tmp_path / "parts")
    (tmp_path / "parts" / "a.txt").touch()
    with pytest.raises(DatasetError, match=r"holds no table"):
        opened(tmp_path / "parts", chat_column="chat")
    write(tmp_path / "parts" / "b.csv", ["x"], column="body")
    with pytest.raises(DatasetError, match=r"(?s)no column 'chat'.*n \| body.*--chat-column"):
        opened(tmp_path / "parts", chat_column="chat")
    with pytest.raises(DatasetError, match=r"no such file or folder: .*gone"):
        opened(tmp_path / "gone" / "*.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_column_that_is_missing_is_refused_with_the_existing_ones(
    suffix: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a{suffix}", TEXTS, column="body")
    for how in ({}, {"streaming": True}):
        with pytest.raises(DatasetError, match=r"(?s)no column 'text'.*n \| body.*--text-column"):
            opened(path, **how)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz"])
def test_a_number_in_place_of_a_text_is_reported_with_file_and_row(
    suffix: str, streaming: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a{suffix}", TEXTS)
    source = opened(path, text_column="n", streaming=streaming)
    found = next(source.walk()) if streaming else source.batch([0])[0]
    said = rf"(?s)'n' does not hold text.*int in document 0 \(.*a\{suffix}.*--text"
    assert re.search(said, str(found.error))
    assert (found.reason, found.shown) == ("type", "0")
    assert found.place in str(found.error)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz", ".txt"])
def test_what_is_no_text_is_replaced_and_counted_in_a_warning(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"single{suffix}"
    if suffix == ".txt":
        data, count = b"caf\xe9 and \xe2\x82 more", 1
    else:
        bad = ["caf#", "fine", "#", "two # and #"]
        data, count = table(suffix.removesuffix(".gz"), bad).replace(b"#", b"\xe9"), 3
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    documents = opened(path)
    texts = documents.batch(range(documents.count))
    assert texts == (
        ["caf\ufffd and \ufffd more"]
        if suffix == ".txt"
        else ["caf\ufffd", "fine", "\ufffd", "two \ufffd and \ufffd"]
    )
    holds = f"{count} documents of {path} hold" if count > 1 else f"1 document of {path} holds"
    assert documents.warnings() == (f"{holds} bytes that are not UTF-8; they were replaced",)
    if suffix != ".txt":
        stream = opened(path, streaming=True)
        assert list(stream.walk()) == texts
        assert stream.warnings() == documents.warnings()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_documents_and_fingerprints_are_those_of_earlier_versions_where_datasets_reads_the_same(
    suffix: str, tmp_path: Path
) -> None:
    import datasets
    import xxhash

    texts = [text for text in TEXTS if text != "NA"]  # null in a CSV file
    path = write(tmp_path / f"a{suffix}", texts)
    builder = {".jsonl": "json"}.get(suffix, suffix[1:])
    rows = datasets.load_dataset(
        builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert texts_of(path) == ["" if text is None else text for text in rows["text"]] == texts
    assert opened(path).earlier()[0] == xxhash.xxh3_128_hexdigest(path.read_bytes())
    folder = tmp_path / "folder"
    write(folder / f"b{suffix}", texts[:3])
    write(folder / "sub" / f"a{suffix}", texts[3:])
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert texts_of(folder) == ["" if text is None else text for text in rows["text"]] == texts
    assert opened(folder).earlier()[0].endswith("-files")


def test_files_that_earlier_versions_read_otherwise_have_another_fingerprint(
    tmp_path: Path,
) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"chat": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbftext")
    write(tmp_path / "folder" / "train.jsonl", ["a"])
    write(tmp_path / "folder" / "test.jsonl", ["b"])
    for path, options in {
        write(tmp_path / "words.csv", ["NA"]): {},
        chat: {"chat_column": "chat"},
        tmp_path / "mark.txt": {},
        tmp_path / "folder": {},
    }.items():
        assert opened(path, **options).earlier()[0].endswith("-v2")


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet", ".jsonl.zst", ".txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_changes_ends_the_reading_of_it(
    streaming: bool, suffix: str, tmp_path: Path
) -> None:
    write(tmp_path / "parts" / f"a{suffix}", [f"text {n}" for n in range(1000)])
    write(tmp_path / "parts" / f"b{suffix}", ["another"])
    source = opened(tmp_path / "parts", streaming=streaming)
    write(tmp_path / "parts" / f"a{suffix}", [f"other {n}" for n in range(1000)])
    with pytest.raises(DatasetError, match="has changed since this command opened it"):
        list(source.walk()) if streaming else source.batch([0])


def test_a_stream_copies_nothing(tmp_path: Path) -> None:
    for suffix in (".csv", ".json", ".parquet", ".jsonl.zst"):
        list(opened(write(tmp_path / f"a{suffix}", TEXTS), streaming=True).walk())
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz"])
def test_conversations_and_token_ids_are_read_from_any_kind(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"chat": [{"role": "user", "content": "a"}], "ids": [1, 2]},
        {"chat": None, "ids": []},
        {"chat": [], "ids": None},
    ]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = (
            json.dumps(rows) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows)
        )
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(text.encode()))
    assert texts_of(path, chat_column="chat") == [[{"role": "user", "content": "a"}], [], []]
    assert texts_of(path, token_column="ids") == [[1, 2], [], []]


def test_a_folder_of_more_files_than_a_process_may_open_is_read(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(120):
        write(tmp_path / "parts" / f"{number:03}.jsonl", [f"text {number}"])
        write(tmp_path / "parts" / f"{number:03}.parquet", [f"row {number}"])
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard)
    )
    try:
        found = texts_of(tmp_path / "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [f"{kind} {n}" for n in range(120) for kind in ("text", "row")]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_long_text_is_read_in_pieces_while_it_is_used(
    suffix: str, damaged: bool, tmp_path: Path
) -> None:
    text = "naïve café 日本\r\n" * 70_000  # line ends and characters at the ends of pieces, too
    data = text.encode() + b"\xe9" * damaged
    path = tmp_path / f"single{suffix}"
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    source = opened(path)
    (found,) = source.batch([0])
    assert isinstance(found, LongText)
    for _ in range(2):
        pieces = list(found.pieces())
        assert len(pieces) > 1
        assert "".join(pieces) == text.replace("\r\n", "\n") + "\ufffd" * damaged
    assert len(source.warnings()) == damaged


def test_a_long_text_that_changes_while_it_is_read_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "single.txt"
    path.write_text("one two " * 300_000)
    (found,) = opened(path).batch([0])
    pieces = found.pieces()
    next(pieces)
    path.write_text("three fo" * 300_000)
    with pytest.raises(DatasetError, match=r"single\.txt has changed"):
        list(pieces)


def test_a_single_document_of_another_type_is_left_to_who_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": "one"}, {"text": 7}, {"text": ["x"]}, {"text": "two"}]
    path.write_text(json.dumps(rows))
    for _ in range(2):  # the second reads the copy of the first
        one, seven, inner, two = opened(path).batch(range(4))
        assert (one, two) == ("one", "two")
        assert (seven.reason, seven.shown) == ("type", "7")
        assert seven.place.startswith(str(path))
        assert "list of str" in str(inner.error)


def test_a_column_is_not_copied_whose_first_thousand_values_are_no_documents(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": list(range(2000))}), path)
    with pytest.raises(DatasetError, match=r"(?s)'text' does not hold text.*--text-column"):
        opened(path)
