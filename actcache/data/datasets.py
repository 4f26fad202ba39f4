"""DATASET to documents: whatever the command line accepts, found and opened."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from actcache.config import HarvestConfig
from actcache.data.documents import (
    Column,
    DocumentStream,
    IndexedDocuments,
    Mixture,
    Record,
    Source,
    TokenFile,
)
from actcache.errors import DatasetError
from actcache.filesystem.atomic import digest_file

_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SAMPLED = 1024  # documents that the fingerprint of a dataset without a single file covers
_STREAMED = 64  # the same of a stream: its first


def open_dataset(config: HarvestConfig) -> Source:
    """Find the text that DATASET names, and what --mix adds to it.

    Raises:
        DatasetError: it does not exist, cannot be read, has no such split or column, or is empty.
    """
    if not config.mix:
        return _open_one(config)
    parts: list[IndexedDocuments | DocumentStream] = []
    for dataset in (config.dataset, *config.mix):
        part = _open_one(dataclasses.replace(config, dataset=dataset, mix=(), weight=()))
        assert not isinstance(part, Mixture)
        if isinstance(part, TokenFile):
            raise DatasetError(
                f"{dataset} cannot be mixed: it holds no documents",
                expected="datasets with a column of documents",
                remedy="a table with a column of token ids, and --token-column",
            )
        parts.append(part)
    return Mixture(tuple(parts), config.weight or (1.0,) * len(parts))


def _open_one(config: HarvestConfig) -> Source:
    path = Path(config.dataset)
    if path.is_file():
        return _open_file(path, config)
    if path.is_dir():
        return _from_table(_load(config, folder=path), config, fingerprint=None)
    if _looks_local(config.dataset):
        raise DatasetError(
            f"no such file or folder: {config.dataset}",
            expected="a dataset id, a save_to_disk folder, or a .jsonl, .json, .csv, .parquet, "
            ".txt or .bin file",
        )
    return _from_table(_load(config), config, fingerprint=None)


def _open_file(path: Path, config: HarvestConfig) -> Source:
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty")
    if suffix in {".bin", ".txt"}:
        _refuse_table_options(path, config)
    if suffix == ".bin":
        return _open_bin(path, config)
    fingerprint = digest_file(path).xxh3_128
    if suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path} is not UTF-8 text", got=str(error)) from error
        size, column = path.stat().st_size, Column("", "text")
        return IndexedDocuments(
            lambda numbers: [text for _ in numbers], 1, column, fingerprint, size
        )
    if suffix not in _TABLES:
        raise DatasetError(
            f"do not know how to read {path}",
            expected="a .jsonl, .json, .csv, .parquet, .txt or .bin file",
            got=suffix or "no suffix",
        )
    table = _load(config, builder=_TABLES[suffix], fingerprint=fingerprint)
    if config.split != "train":  # a slice of the file
        fingerprint = f"{fingerprint}-{config.split}"
    return _from_table(table, config, fingerprint, path.stat().st_size)


def _open_bin(path: Path, config: HarvestConfig) -> TokenFile:
    dtype = np.dtype(config.bin_dtype).newbyteorder("<")
    if path.stat().st_size % dtype.itemsize:
        raise DatasetError(
            f"{path} is not a whole number of token ids",
            expected=f"a multiple of {dtype.itemsize} bytes ({config.bin_dtype})",
            got=f"{path.stat().st_size} bytes",
            remedy="name the right type with --bin-dtype",
        )
    fingerprint = f"{digest_file(path).xxh3_128}-{config.bin_dtype}"
    return TokenFile(np.memmap(path, dtype=dtype, mode="r"), path, fingerprint)


def _load(
    config: HarvestConfig,
    folder: Path | None = None,
    builder: str | None = None,
    fingerprint: str = "",
) -> Any:
    import datasets

    if not sys.stderr.isatty():  # its bars are for terminals
        datasets.disable_progress_bars()
    try:
        if folder is not None and (
            (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        ):
            return datasets.load_from_disk(str(folder))
        if builder is not None:  # a file is one split, train, of which slices may be asked
            # Named by its digest: datasets knows a file by path and time, and would give the text
            # of an older one with the same.
            return datasets.load_dataset(
                builder,
                name=fingerprint,
                data_files=glob.escape(config.dataset),  # a path, not a pattern
                split=config.split,
                streaming=config.streaming,
            )
        return datasets.load_dataset(
            config.dataset, config.dataset_config, split=config.split, streaming=config.streaming
        )
    except Exception as error:  # datasets raises dozens of types, and pyarrow's besides
        raise DatasetError(
            f"cannot load dataset {config.dataset}",
            got=_reason(error),
            remedy="check the name, --split and --dataset-config; files must match their suffix",
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of errors, which the top often hides."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _refuse_split(config: HarvestConfig) -> None:
    if config.split != "train":
        raise DatasetError(
            f"{config.dataset} has no splits", expected="no --split", got=config.split
        )


def _refuse_table_options(path: Path, config: HarvestConfig) -> None:
    """Options that mean nothing for a file without columns are not ignored."""
    _refuse_split(config)
    for option in ("streaming", "token_column", "chat_column"):
        if getattr(config, option):
            raise DatasetError(
                f"{path} has neither rows nor columns",
                expected="a table, such as a .jsonl or .parquet file",
                got=f"--{option.replace('_', '-')}",
            )


def _column(config: HarvestConfig) -> Column:
    if config.token_column is not None:
        return Column(config.token_column, "ids")
    if config.chat_column is not None:
        return Column(config.chat_column, "chat")
    return Column(config.text_column, "text")


def _from_table(
    table: Any, config: HarvestConfig, fingerprint: str | None, size: int | None = None
) -> IndexedDocuments | DocumentStream:
    if hasattr(table, "keys"):  # a DatasetDict from save_to_disk
        if config.split not in table:
            raise DatasetError(
                f"{config.dataset} has no split {config.split!r}",
                expected=" | ".join(table.keys()),
                got=config.split,
                remedy="name one of them with --split",
            )
        table = table[config.split]
    elif Path(config.dataset).is_dir():
        _refuse_split(config)
    column = _column(config)
    if table.column_names is not None and column.name not in table.column_names:
        raise _no_column(config, column, table.column_names)
    if config.streaming:
        return _from_stream(table, config, column, fingerprint)
    if len(table) == 0:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    table = table.select_columns([column.name])

    def fetch(numbers: list[int]) -> Any:
        return table[numbers][column.name]

    documents = IndexedDocuments(fetch, len(table), column, fingerprint or "", size)
    if fingerprint is None:
        return dataclasses.replace(documents, fingerprint=_sampled_fingerprint(documents))
    return documents


def _from_stream(
    table: Any, config: HarvestConfig, column: Column, fingerprint: str | None
) -> DocumentStream:
    if hasattr(table, "to_iterable_dataset"):  # a folder lies here already
        table = table.to_iterable_dataset()

    def walk() -> Iterator[Record]:
        rows = enumerate(table)
        while (found := _next_row(rows, config)) is not None:
            number, row = found
            if column.name not in row:
                raise _no_column(config, column, row)
            yield column.check(row[column.name], number)

    first = list(itertools.islice(walk(), _STREAMED))
    if not first:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    if fingerprint is None:
        name = Path(config.dataset).name if Path(config.dataset).exists() else config.dataset
        told = json.dumps([name, config.dataset_config, config.split])
        fingerprint = f"{_digest(told, first)}-streamed"
    return DocumentStream(walk, column, fingerprint)


def _next_row(rows: Iterator[tuple[int, Any]], config: HarvestConfig) -> tuple[int, Any] | None:
    try:
        return next(rows, None)
    except Exception as error:  # whatever the hub's client and the parsers raise
        raise DatasetError(
            f"the stream of {config.dataset} broke off",
            got=_reason(error),
            remedy="run the same command again: what is published stays, and it goes on there",
        ) from error


def _no_column(config: HarvestConfig, column: Column, names: Any) -> DatasetError:
    option = {"text": "--text-column", "chat": "--chat-column", "ids": "--token-column"}
    return DatasetError(
        f"{config.dataset} has no column {column.name!r}",
        expected=" | ".join(names),
        got=column.name,
        remedy=f"name one of them with {option[column.kind]}",
    )


def _sampled_fingerprint(documents: IndexedDocuments) -> str:
    """Digest of the number of documents and of 1,024 of them, evenly spread.

    Reading all of a hub dataset to name it could cost more than the harvest.
    """
    step = max(1, documents.count // _SAMPLED)
    records = documents.batch(range(0, documents.count, step))
    return f"{_digest(str(documents.count), records)}-sampled"


def _digest(told: str, records: Sequence[Record]) -> str:
    digest = xxhash.xxh3_128(told.encode())
    for record in records:
        text = record if isinstance(record, str) else json.dumps(record, sort_keys=True)
        digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _looks_local(dataset: str) -> bool:
    suffix = Path(dataset).suffix.lower()
    return dataset.startswith((".", "/", "~")) or suffix in {*_TABLES, ".txt", ".bin"}
