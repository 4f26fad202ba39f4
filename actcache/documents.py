"""DATASET to documents: whatever the command line accepts, behind two small classes.

`TextDocuments` are texts by number; `TokenFile` is one long run of token ids. Both carry a
fingerprint, so that a cache knows which text it was made of.
"""

from __future__ import annotations

import dataclasses
import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from actcache.atomic import digest_file
from actcache.config import HarvestConfig
from actcache.errors import DatasetError

_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SAMPLED = 1024  # documents that the fingerprint of a dataset without a single file covers


@dataclass(frozen=True)
class TextDocuments:
    """Texts by number."""

    texts: Any
    """Function from a list of numbers to the texts."""
    count: int
    """How many."""
    column: str
    """Column they came from; empty for a .txt file."""
    fingerprint: str
    """Digest of the text."""
    bytes: int | None = None
    """Size of the file they came from, which bounds their tokens; None: not from one file."""

    def batch(self, numbers: Sequence[int]) -> list[str]:
        """Texts with these numbers.

        Raises:
            DatasetError: one of them is not text.
        """
        texts = self.texts(list(numbers))
        for number, text in zip(numbers, texts, strict=True):
            if text is not None and not isinstance(text, str):
                raise DatasetError(
                    f"column {self.column!r} does not hold text",
                    expected="str",
                    got=f"{type(text).__name__} in document {number}",
                    remedy="name another column with --text-column",
                )
        return [text or "" for text in texts]


@dataclass(frozen=True)
class TokenFile:
    """Token ids as they are."""

    ids: np.memmap[Any, Any]
    """All of them, in order."""
    path: Path
    fingerprint: str
    """Digest of the file and of the type its ids are read as."""


def open_documents(config: HarvestConfig) -> TextDocuments | TokenFile:
    """Find the text that DATASET names.

    Raises:
        DatasetError: it does not exist, cannot be read, has no such split or column, or is empty.
    """
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


def _open_file(path: Path, config: HarvestConfig) -> TextDocuments | TokenFile:
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty")
    if suffix in {".bin", ".txt"}:
        _refuse_split(config)
    if suffix == ".bin":
        return _open_bin(path, config)
    fingerprint = digest_file(path).xxh3_128
    if suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path} is not UTF-8 text", got=str(error)) from error
        size = path.stat().st_size
        return TextDocuments(lambda numbers: [text for _ in numbers], 1, "", fingerprint, size)
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
            )
        return datasets.load_dataset(config.dataset, config.dataset_config, split=config.split)
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


def _from_table(
    table: Any, config: HarvestConfig, fingerprint: str | None, size: int | None = None
) -> TextDocuments:
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
    if config.text_column not in table.column_names:
        raise DatasetError(
            f"{config.dataset} has no column {config.text_column!r}",
            expected=" | ".join(table.column_names),
            got=config.text_column,
            remedy="name one of them with --text-column",
        )
    if len(table) == 0:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    table = table.select_columns([config.text_column])

    def texts(numbers: Sequence[int]) -> Any:
        return table[list(numbers)][config.text_column]

    documents = TextDocuments(texts, len(table), config.text_column, fingerprint or "", size)
    if fingerprint is None:
        return dataclasses.replace(documents, fingerprint=_sampled_fingerprint(documents))
    return documents


def _sampled_fingerprint(documents: TextDocuments) -> str:
    """Digest of the number of documents and of 1,024 of them, evenly spread.

    Reading all of a hub dataset to name it could cost more than the harvest.
    """
    step = max(1, documents.count // _SAMPLED)
    digest = xxhash.xxh3_128(str(documents.count).encode())
    for text in documents.batch(range(0, documents.count, step)):
        digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
    return f"{digest.hexdigest()}-sampled"


def _looks_local(dataset: str) -> bool:
    suffix = Path(dataset).suffix.lower()
    return dataset.startswith((".", "/", "~")) or suffix in {*_TABLES, ".txt", ".bin"}
