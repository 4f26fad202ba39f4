"""Open the text that DATASET and --mix name, as one of four kinds of source.

`IndexedDocuments` give any document by index; a `DocumentStream` can only be iterated; a `Mixture`
draws from several of these; a `TokenFile` is one long array of token ids. Each carries a
fingerprint, so that the manifest records which text a cache was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.config import HarvestConfig
from actcache.core.library_errors import full_disk, remedy_of
from actcache.data.plain_files import (
    KNOWN,
    PlainText,
    Wanted,
    columns_in,
    is_pattern,
    list_files,
    open_plain,
    plain_file,
)
from actcache.data.records import LongText, Record, Unusable, shown
from actcache.data.table_rows import DOCUMENT, NoColumnError, joined, without_nulls
from actcache.data.watched_files import MappedFiles, WatchedFile
from actcache.errors import DatasetError, shortage_of

Kind = Literal["text", "chat", "ids"]
Variables = Callable[[], frozenset[str]]
"""Function to the variables of the chat template."""

_SAMPLED = 1024  # documents hashed for the fingerprint of a dataset of the hub
_STREAMED = 64  # documents hashed for the fingerprint of a stream of the hub
_KNOWN = f"{KNOWN}, or a .bin file"
_MASK = frozenset(["attention_mask"])
_FOUND = {
    "token_column": ("input_ids", "tokens", "token_ids"),
    "chat_column": ("messages", "conversations", "conversation"),
}
"""Columns that are taken, by option, where no option names one and the default is not there."""
_SLICES = re.compile(r"train(\[[^]]*\])?(\+train(\[[^]]*\])?)*")
_COMMIT = re.compile(r"^hf://.*@([0-9a-f]{40})/")
_IS_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Column:
    """Column that holds the documents of a table, and their type."""

    name: str
    """Name; empty for a file without columns."""
    kind: Kind
    others: tuple[str, ...] = ()
    """Further columns: those that the chat template takes, or the attention mask of token ids."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns."""
        return (self.name, *self.others)

    def check(
        self, record: object, index: int, place: Callable[[int], str] | None = None
    ) -> Record | Unusable:
        """Return a record of this column's type; null becomes an empty document.

        Args:
            record: the record.
            index: its index.
            place: function from an index to where the document is.

        Returns:
            The record, or `Unusable` if it has another type.
        """
        if record is None:
            return "" if self.kind == "text" else []
        if isinstance(record, Unusable):
            return record
        if self.others and isinstance(record, dict):
            document = self.check(record.get(DOCUMENT), index, place)
            has_document = document and not isinstance(document, Unusable)
            return record | {DOCUMENT: document} if has_document else document
        if _CHECKS[self.kind](record):
            return record
        expected, option = _WANTED[self.kind]
        inner = ""
        if isinstance(record, list) and record:
            wrong = (item for item in record if not _CHECKS[self.kind]([item]))
            inner = f" of {type(next(wrong, record[0])).__name__}"
        found = place(index) if place is not None else ""
        where = f"document {index}" + (f" ({found})" if found else "")
        error = DatasetError(
            f"column {self.name!r} does not hold {expected}",
            expected=expected,
            got=f"{type(record).__name__}{inner} in {where}",
            remedy=f"name another column with {option}",
        )
        return Unusable("type", error, shown(record), found or f"document {index} of the dataset")


_CHECKS: dict[Kind, Callable[[Any], bool]] = {
    "text": lambda record: isinstance(record, str | LongText),
    "chat": lambda record: (
        isinstance(record, list)
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in record)
    ),
    "ids": lambda record: isinstance(record, list) and all(type(i) is int for i in record),
}
_WANTED: dict[Kind, tuple[str, str]] = {
    "text": ("text", "--text-column"),
    "chat": ("lists of messages, each with a role (or from, as ShareGPT)", "--chat-column"),
    "ids": ("lists of token ids", "--token-column"),
}
"""For each type of column: its description in error messages, and the option that names it."""


@dataclass(frozen=True)
class IndexedDocuments:
    """Documents that can be read by index."""

    fetch: Callable[[list[int]], Sequence[object]]
    """Function from a list of indices to the records."""
    count: int
    """Number of documents."""
    column: Column
    fingerprint: str
    """Digest of the text."""
    bytes: int | None = None
    """Size of the source file, an upper bound of its tokens; None: not from a single file."""
    earlier: Callable[[], tuple[str, ...]] = tuple
    """Function to the fingerprints that caches of earlier versions may have, the newest first."""
    place: Callable[[int], str] | None = None
    """Function from an index to where the document is, such as a line of a file."""
    warnings: Callable[[], tuple[str, ...]] = tuple
    """Function to warnings about the text."""
    commits: tuple[str, ...] = ()
    """Commit of the dataset's repository; empty for local files."""

    def batch(self, indices: Sequence[int]) -> list[Record]:
        """Read the documents at these indices; `Unusable` where one has another type."""
        check, records = self.column.check, self.fetch(list(indices))
        place = self.place
        return [check(record, i, place) for i, record in zip(indices, records, strict=True)]


@dataclass(frozen=True)
class DocumentStream:
    """Documents that can only be read in order, from the first, any number of times."""

    walk: Callable[[], Iterator[Record]]
    """Function that starts a new iteration."""
    column: Column
    fingerprint: str
    """Digest of the dataset's name and first documents, or of the files."""
    earlier: Callable[[], tuple[str, ...]] = tuple
    """As in `IndexedDocuments`."""
    warnings: Callable[[], tuple[str, ...]] = tuple
    """As in `IndexedDocuments`; they may become more while the stream is read."""
    commits: tuple[str, ...] = ()
    """As in `IndexedDocuments`."""
    walk_from: Callable[[int], Iterator[Record]] | None = None
    """As `walk`, from the document of this index; None: those before it are read and dropped."""

    def begin(self, first: int) -> Iterator[Record]:
        """Start an iteration at the document of this index."""
        if self.walk_from is not None:
            return self.walk_from(first)
        return itertools.islice(self.walk(), first, None)


@dataclass(frozen=True)
class Mixture:
    """Several datasets from which documents are drawn at random by weight."""

    sources: tuple[IndexedDocuments | DocumentStream, ...]
    weights: tuple[float, ...]
    """Relative share of each source in the drawn documents; need not sum to 1."""

    @property
    def column(self) -> Column:
        """Column of the documents: the options give every source the same."""
        return self.sources[0].column

    @property
    def fingerprint(self) -> str:
        """Digest of the sources' fingerprints."""
        return _mixed(source.fingerprint for source in self.sources)

    @property
    def commits(self) -> tuple[str, ...]:
        """Commit of each source, in order, '' of a local one; empty if all are local."""
        commits = tuple("".join(source.commits) for source in self.sources)
        return commits if any(commits) else ()

    def earlier(self) -> tuple[str, ...]:
        """As in `IndexedDocuments`: the newest of all sources, the next of all, and so on."""
        each = [source.earlier() or (source.fingerprint,) for source in self.sources]
        versions = range(max(map(len, each)))
        return tuple(_mixed(found[min(n, len(found) - 1)] for found in each) for n in versions)

    def warnings(self) -> tuple[str, ...]:
        """As in `IndexedDocuments`."""
        return tuple(warning for source in self.sources for warning in source.warnings())


def _mixed(fingerprints: Iterable[str]) -> str:
    return f"{xxhash.xxh3_128_hexdigest(' '.join(fingerprints).encode())}-mixed"


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids without document boundaries."""

    count: int
    """Number of token ids."""
    read: Callable[[int, int], NDArray[Any]]
    """Function from a first index and a number to so many token ids, in file order."""
    path: Path
    fingerprint: str
    """Digest of the file and of --bin-dtype."""
    column: ClassVar[Column] = Column("", "ids")
    commits: ClassVar[tuple[str, ...]] = ()

    def earlier(self) -> tuple[str, ...]:
        """As in `IndexedDocuments`."""
        return ()

    def warnings(self) -> tuple[str, ...]:
        """As in `IndexedDocuments`."""
        return ()


Source = IndexedDocuments | DocumentStream | Mixture | TokenFile


def open_dataset(config: HarvestConfig, variables: Variables = frozenset) -> Source:
    """Open DATASET, as a `Mixture` if --mix names further datasets.

    Args:
        config: the options.
        variables: called for conversations only: columns of these names are read beside them.

    Raises:
        DatasetError: a dataset does not exist, cannot be read, has no such split or column, or is
            empty.
    """
    if not config.mix:
        return _open_one(config, variables)
    sources: list[IndexedDocuments | DocumentStream] = []
    names = (config.dataset, *config.mix)
    for dataset, revision in itertools.zip_longest(names, config.dataset_revision):
        own = (revision,) if revision else ()
        one = dataclasses.replace(config, dataset=dataset, mix=(), weight=(), dataset_revision=own)
        source = _open_one(one, variables)
        if isinstance(source, TokenFile):
            raise DatasetError(
                f"{dataset} cannot be mixed: it holds no documents",
                expected="datasets with a column of documents",
                remedy="a table with a column of token ids, and --token-column",
            )
        sources.append(source)
        kinds = [source.column.kind for source in sources]
        if kinds[0] != kinds[-1]:
            raise DatasetError(
                f"{dataset} cannot be mixed with {config.dataset}",
                expected=f"{_WANTED[kinds[0]][0]}, in column {sources[0].column.name!r}",
                got=f"{_WANTED[kinds[-1]][0]}, in column {source.column.name!r}",
                remedy="datasets with the same columns",
            )
    return Mixture(tuple(sources), config.weight or (1.0,) * len(sources))


def _open_one(
    config: HarvestConfig, variables: Variables
) -> IndexedDocuments | DocumentStream | TokenFile:
    path = Path(config.dataset)
    if path.exists() and any(config.dataset_revision):
        raise DatasetError(
            f"{config.dataset} is local, and has no revisions",
            expected="no --dataset-revision; with --mix, '' in its place",
            got=config.dataset_revision[0],
        )
    if path.is_file():
        return _open_file(path, config, variables)
    if path.is_dir() and _is_saved(path):
        return _open_saved(path, config, variables)
    if path.is_dir() or is_pattern(config.dataset):
        files = list_files(config.dataset)
        if files or path.is_dir():
            return _open_plain(config, files, variables)
    local = plain_file(path) is not None or path.suffix.lower() == ".bin"
    if config.dataset.startswith((".", "/", "~")) or local or is_pattern(config.dataset):
        raise DatasetError(
            f"no such file or folder: {config.dataset}",
            expected=f"a dataset id, a save_to_disk folder, {_KNOWN}, or a folder or pattern of "
            "such files",
        )
    table, commit = _load_from_hub(config)
    return _from_table(table, config, variables, commit=commit)


def _open_file(
    path: Path, config: HarvestConfig, variables: Variables
) -> IndexedDocuments | DocumentStream | TokenFile:
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty")
    found = plain_file(path)
    if path.suffix.lower() == ".bin" or (found is not None and found.format == "text"):
        _refuse_table_options(path, config)
    if path.suffix.lower() == ".bin":
        return _open_bin(path, config)
    if found is None:
        raise DatasetError(
            f"unknown file type: {path}", expected=_KNOWN, got=path.suffix.lower() or "no suffix"
        )
    return _open_plain(config, {path.name: path}, variables)


def _open_plain(
    config: HarvestConfig, files: Mapping[str, Path], variables: Variables
) -> IndexedDocuments | DocumentStream:
    """Open local files that are read here, and not by `datasets`."""
    column = _column(config)
    if further := _further(column, variables):
        column = dataclasses.replace(column, others=columns_in(files.values(), further))
    if config.dataset_config is not None and Path(config.dataset).is_dir():
        raise DatasetError(
            f"{config.dataset} has no configurations",
            expected="no --dataset-config",
            got=config.dataset_config,
            remedy="name the files of one with a pattern, such as 'folder/name/*.parquet'",
        )
    if not _SLICES.fullmatch(config.split):
        raise DatasetError(
            f"{config.dataset} has no split {config.split!r}: names of files mean no splits",
            expected="train, or slices of it such as train[:10%]",
            got=config.split,
            remedy="name the files of a split with a pattern, such as 'folder/test-*.parquet'",
        )
    wanted = Wanted(column.name, column.kind, column.check, column.others)
    try:
        text = open_plain(config.dataset, files, wanted, streaming=config.streaming)
    except NoColumnError as error:
        if (other := _with_found_column(config, error.names)) is None:
            raise _no_column(config, column, error.names) from error
        return _said(config, _open_plain(other, files, variables))
    if text.is_text:
        column = Column("", "text")
    fingerprint = _of_plain(files, text, config)
    if config.streaming:
        return _stream_plain(text, config, column, fingerprint)
    chosen = _slices(text.count, config)
    count = text.count if chosen is None else len(chosen)
    if count == 0:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    if chosen is None:
        fetch, place = text.fetch, text.place
    else:
        fetch = lambda indices: text.fetch(chosen[indices].tolist())  # noqa: E731
        place = lambda index: text.place(chosen[index])  # noqa: E731
    documents = IndexedDocuments(
        fetch, count, column, fingerprint, text.bytes, tuple, place, text.warnings
    )
    before = _of_plain_before(text, config)
    if Path(config.dataset).is_dir():
        return dataclasses.replace(
            documents, earlier=lambda: (before, _sampled_fingerprint(documents))
        )
    return dataclasses.replace(documents, earlier=lambda: (before,))


def _of_plain(files: Mapping[str, Path], text: PlainText, config: HarvestConfig) -> str:
    """Return the fingerprint of local files: their bytes, in order, and how these are read."""
    kinds = [found for path in files.values() if (found := plain_file(path)) is not None]
    formats = {str(found.path): f"{found.format}{found.compression}" for found in kinds}
    read = [f"{formats[str(files[name])]} {digest}" for name, digest in text.digests.items()]
    return f"{_digest(config.split, read)}-plain"


def _of_plain_before(text: PlainText, config: HarvestConfig) -> str:
    """Return the fingerprint that format version 2 has, and 1 for what it read the same."""
    if Path(config.dataset).is_file():
        (fingerprint,) = text.digests.values()
        fingerprint += "" if text.reads_as_before else "-v2"
        return fingerprint if config.split == "train" else f"{fingerprint}-{config.split}"
    header = json.dumps([config.dataset_config, config.split])
    fingerprint = _digest(header, [f"{name} {digest}" for name, digest in text.digests.items()])
    return f"{fingerprint}-files" if text.reads_as_before else f"{fingerprint}-files-v2"


def _stream_plain(
    text: PlainText, config: HarvestConfig, column: Column, fingerprint: str
) -> DocumentStream:
    if config.split != "train":
        raise DatasetError(
            f"--split {config.split} needs the number of documents",
            expected="--split train",
            got="--streaming",
            remedy="omit --streaming",
        )

    def walk(first: int = 0) -> Iterator[Record]:
        for index, value in enumerate(text.walk(first), start=first):
            yield column.check(value, index, text.place)

    first = list(itertools.islice(walk(), _STREAMED))
    if not first:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    earlier = [_of_plain_before(text, config)]
    if Path(config.dataset).is_dir():
        header = json.dumps([Path(config.dataset).name, config.dataset_config, config.split])
        earlier.append(f"{_digest(header, first)}-streamed")
    return DocumentStream(
        walk, column, fingerprint, lambda: tuple(earlier), text.warnings, walk_from=walk
    )


def _slices(count: int, config: HarvestConfig) -> NDArray[np.int64] | None:
    """Return the indices that --split names, as `datasets` counts them; None: all."""
    if config.split == "train":
        return None
    import datasets

    try:
        instruction = datasets.ReadInstruction.from_spec(config.split)
        slices = instruction.to_absolute({"train": count})
        chosen = np.concatenate([np.arange(part.from_ or 0, part.to) for part in slices])
    except (ValueError, AssertionError) as error:
        got, chosen = str(error), np.empty(0, np.int64)
    else:
        got = "no document"
    if len(chosen) == 0:
        raise DatasetError(
            f"{config.dataset} has no slice {config.split}",
            expected=f"part of {count:,} documents, such as train[:10%]",
            got=got,
        )
    return chosen


def _open_saved(
    folder: Path, config: HarvestConfig, variables: Variables
) -> IndexedDocuments | DocumentStream:
    within = folder / config.split if (folder / "dataset_dict.json").exists() else folder
    files = {str(path.relative_to(folder)): path for path in _tables(within)}
    watched = {name: WatchedFile(path, held=False) for name, path in sorted(files.items())}
    header = json.dumps([config.dataset_config, config.split])
    before = _digest(header, [f"{name} {file.digest}" for name, file in watched.items()])
    table = _load_saved(config, folder)
    digests = [file.digest for name, file in sorted(watched.items(), key=_in_order(within))]
    for file in watched.values():
        file.check()
    return _from_table(table, config, variables, f"{_digest('', digests)}-saved", f"{before}-files")


def _in_order(folder: Path) -> Callable[[tuple[str, WatchedFile]], Any]:
    """Return the key by which tables of `save_to_disk` are sorted as they are read."""
    order = []
    if (folder / "state.json").exists():  # else there is no such split
        state = json.loads((folder / "state.json").read_text())
        order = [Path(file["filename"]).name for file in state["_data_files"]]
    return lambda item: order.index(name) if (name := Path(item[0]).name) in order else len(order)


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of a Dataset or DatasetDict has written the folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _tables(folder: Path) -> list[Path]:
    """List the files of a folder of `save_to_disk` that decide its text."""
    # The other tables are results of `map` and `filter` that `datasets` keeps there.
    tables = folder.glob("*.arrow")
    return [path for path in tables if not path.name.startswith(("cache-", "tmp"))]


def _open_bin(path: Path, config: HarvestConfig) -> TokenFile:
    dtype = np.dtype(config.bin_dtype).newbyteorder("<")
    file = WatchedFile(path, held=True)
    if file.bytes % dtype.itemsize:
        raise DatasetError(
            f"{path} is not a whole number of token ids",
            expected=f"a multiple of {dtype.itemsize} bytes ({config.bin_dtype})",
            got=f"{file.bytes} bytes",
            remedy="name the right type with --bin-dtype",
        )

    def read(first: int, number: int) -> NDArray[Any]:
        found = file.read(first * dtype.itemsize, number * dtype.itemsize)
        return np.frombuffer(found, dtype)

    fingerprint = f"{file.digest}-{config.bin_dtype}"
    return TokenFile(file.bytes // dtype.itemsize, read, path, fingerprint)


def _load_saved(config: HarvestConfig, folder: Path) -> Any:
    """Load the `save_to_disk` folder, with its values as plain objects."""
    import datasets

    with _explained(config, "it is cut or damaged: copy or download it again"):
        return datasets.load_from_disk(str(folder)).with_format(None)


def _load_from_hub(config: HarvestConfig) -> tuple[Any, str | None]:
    """Load a dataset of the hub; return it with the commit that it is loaded at, if known."""
    import datasets

    revision = config.dataset_revision[0] if any(config.dataset_revision) else None
    remedy = "check the name, --split, --dataset-config and --dataset-revision"
    with _explained(config, remedy):
        builder = datasets.load_dataset_builder(
            config.dataset, config.dataset_config, revision=revision
        )
        # The name of its cache: for a dataset without code, the commit.
        found = _IS_COMMIT.fullmatch(str(builder.hash))
        commit = found[0] if found else None
        if commit is not None and revision is not None and _IS_COMMIT.fullmatch(revision):
            _require_commit(config, revision, commit)
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split), commit
        builder.download_and_prepare()
        return builder.as_dataset(split=config.split), commit


def _require_commit(config: HarvestConfig, wanted: str, found: str) -> None:
    """Raise `DatasetError` if another commit was loaded, as `datasets` does where it is offline."""
    if found != wanted:
        raise DatasetError(
            f"{config.dataset} is not there at the commit of --dataset-revision",
            expected=wanted,
            got=f"{found}, in the cache of datasets",
            remedy="download that commit first, with the Hub in reach",
        )


@contextlib.contextmanager
def _explained(config: HarvestConfig, remedy: str) -> Iterator[None]:
    """Convert every exception of `datasets` to `DatasetError`; hide its bars without a terminal."""
    import datasets

    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # `datasets` and pyarrow raise dozens of types
        if shortage := full_disk(error, "HF_DATASETS_CACHE") or shortage_of(error):
            raise shortage from None
        raise DatasetError(
            f"cannot load dataset {config.dataset}",
            got=_reason(error),
            remedy=remedy_of(error) or remedy,
        ) from error


def _reason(error: BaseException) -> str:
    """Describe the first exception of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _refuse_split(config: HarvestConfig) -> None:
    if config.split != "train":
        raise DatasetError(
            f"{config.dataset} has no splits", expected="no --split", got=config.split
        )


def _refuse_table_options(path: Path, config: HarvestConfig) -> None:
    """Raise `DatasetError` for options that have no effect on a file without columns."""
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


def _further(column: Column, variables: Variables) -> frozenset[str]:
    """Return the columns to read beside a column, where they exist."""
    if column.kind == "text":
        return frozenset()
    return (_MASK if column.kind == "ids" else variables()) - {column.name}


def _with_found_column(config: HarvestConfig, names: Iterable[str]) -> HarvestConfig | None:
    """Return the options with the only kind of column that is known by its name, else None."""
    if config.text_column != "text" or config.token_column or config.chat_column:
        return None
    present = set(names)
    found = {
        option: next(name for name in known if name in present)
        for option, known in _FOUND.items()
        if present & set(known)
    }
    return dataclasses.replace(config, **found) if len(found) == 1 else None  # type: ignore[arg-type]


def _said(
    config: HarvestConfig, source: IndexedDocuments | DocumentStream
) -> IndexedDocuments | DocumentStream:
    """Add a warning about the column that was found."""
    what, option = _WANTED[source.column.kind]
    note = (
        f"{config.dataset} has no column 'text': {source.column.name!r} is read, as {what} "
        f"({option} {source.column.name})"
    )
    before = source.warnings
    return dataclasses.replace(source, warnings=lambda: (note, *before()))


def _from_table(
    table: Any,
    config: HarvestConfig,
    variables: Variables,
    fingerprint: str = "",
    before: str = "",
    *,
    commit: str | None = None,
) -> IndexedDocuments | DocumentStream:
    """Read a table of `datasets`.

    Args:
        table: the table, a stream, or the splits of a folder.
        config: the options.
        variables: function to the names that the chat template reads.
        fingerprint: of the folder; empty: a sample of the documents is digested.
        before: that of format version 2.
        commit: commit of the repository.
    """
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
    return _from_columns(table, config, variables, (fingerprint, before), commit)


def _from_columns(
    table: Any,
    config: HarvestConfig,
    variables: Variables,
    fingerprints: tuple[str, str],
    commit: str | None,
) -> IndexedDocuments | DocumentStream:
    """Read the asked column, or the one that is known by its name; arguments as `_from_table`."""
    column = _column(config)
    further, outer = _further(column, variables), column.name.partition(".")[0]
    names = table.column_names
    is_nested = names is not None and column.name not in names and outer in names
    if is_nested and hasattr(table, "flatten"):  # a stream of the hub has no such method
        table = table.select_columns([outer, *(further & {*names} - {outer})]).flatten()
        names = table.column_names
    if names is None and (further or column.name == "text"):  # a stream whose columns are unknown
        first = _next_row(enumerate(table), config)
        names = None if first is None else list(first[1])
    if names is not None and column.name not in names:
        if (other := _with_found_column(config, names)) is None:
            raise _no_column(config, column, names)
        return _said(config, _from_columns(table, other, variables, fingerprints, commit))
    column = dataclasses.replace(column, others=tuple(sorted(further & set(names or ()))))
    if config.streaming:
        return _from_stream(table, config, column, fingerprints, commit)
    fingerprint, before = fingerprints
    if len(table) == 0:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    table = table.select_columns(list(column.names))
    mapped = MappedFiles(Path(file["filename"]) for file in table.cache_files)

    def fetch(indices: list[int]) -> Any:
        mapped.check()
        records = _rows_of(table, indices, column)
        mapped.check()
        return records

    documents = IndexedDocuments(fetch, len(table), column, fingerprint)
    if fingerprint:
        return dataclasses.replace(
            documents, earlier=lambda: (before, _sampled_fingerprint(documents))
        )
    sampled = _sampled_fingerprint(documents)
    commits = _commits_of(table)
    if commit is None and len(commits) == 1:  # offline, of a dataset whose cache has another name
        (commit,) = commits
    return dataclasses.replace(
        documents,
        fingerprint=sampled,
        earlier=lambda: ((f"{_digest(sampled, commits)}-commit",) if commits else ()) + (sampled,),
        commits=() if commit is None else (commit,),
    )


def _rows_of(table: Any, indices: list[int], column: Column) -> list[Record]:
    """Read rows; those whose bytes are no text are `Unusable`."""
    try:
        found = table[indices]
    except UnicodeDecodeError as error:
        if len(indices) > 1:
            return [_rows_of(table, [index], column)[0] for index in indices]
        what = f"column {column.name!r} holds bytes that are not UTF-8"
        refused = DatasetError(what, got=str(error))
        return [Unusable("undecodable", refused, shown(error.object), f"document {indices[0]}")]
    return [_record(column, row) for row in zip(*map(found.get, column.names), strict=True)]


def _record(column: Column, values: Sequence[Any]) -> Record:
    """Return what the columns hold in one row. Nulls of objects are those that Arrow puts."""
    if column.kind == "chat":
        values = [without_nulls(value) for value in values]
    return joined(column.names, values) if column.others else values[0]


def _from_stream(
    table: Any,
    config: HarvestConfig,
    column: Column,
    fingerprints: tuple[str, str],
    commit: str | None,
) -> DocumentStream:
    saved = hasattr(table, "to_iterable_dataset")  # loaded from a local folder
    mapped = MappedFiles(Path(f["filename"]) for f in (table.cache_files if saved else ()))

    def walk(first: int = 0) -> Iterator[Record]:
        if saved:
            yield from _walk_saved(table, column, mapped, first)
            return
        rows = enumerate(table.skip(first) if first else table, start=first)
        while (item := _next_row(rows, config)) is not None:
            index, row = item
            if column.name not in row:
                raise _no_column(config, column, row)
            yield column.check(_record(column, [row.get(name) for name in column.names]), index)

    first = list(itertools.islice(walk(), _STREAMED))
    if not first:
        raise DatasetError(f"{config.dataset} is empty", expected="at least one document", got=0)
    local, (fingerprint, before) = Path(config.dataset).exists(), fingerprints
    name = Path(config.dataset).name if local else config.dataset
    header = json.dumps([name, config.dataset_config, config.split])
    sampled = f"{_digest(header, first)}-streamed"
    if local:
        earlier = lambda: (before, sampled)  # noqa: E731
        return DocumentStream(walk, column, fingerprint, earlier, walk_from=walk)
    commits = () if commit is None else (commit,)
    return DocumentStream(walk, column, sampled, lambda: (sampled,), tuple, commits, walk)


def _walk_saved(table: Any, column: Column, mapped: MappedFiles, first: int) -> Iterator[Record]:
    """Yield the documents of a saved dataset from index `first` on."""
    table = table.select_columns(list(column.names))
    for start in range(first, len(table), _STREAMED):
        mapped.check()
        indices = list(range(start, min(start + _STREAMED, len(table))))
        records = _rows_of(table, indices, column)
        mapped.check()
        for index, record in zip(indices, records, strict=True):
            yield column.check(record, index)


def _next_row(rows: Iterator[tuple[int, Any]], config: HarvestConfig) -> tuple[int, Any] | None:
    try:
        return next(rows, None)
    except Exception as error:  # the hub's client and the parsers raise many types
        if (shortage := shortage_of(error)) is not None:
            raise shortage from None
        raise DatasetError(
            f"the stream of {config.dataset} ended with an error",
            got=_reason(error),
            remedy="run the same command again: it resumes after the published shards",
        ) from error


def _no_column(config: HarvestConfig, column: Column, names: Any) -> DatasetError:
    return DatasetError(
        f"{config.dataset} has no column {column.name!r}",
        expected=" | ".join(names),
        got=column.name,
        remedy=f"name one of them with {_WANTED[column.kind][1]}"
        if (column.name, column.kind) != ("text", "text")
        else "name one of them with --text-column, --chat-column or --token-column",
    )


def _sampled_fingerprint(documents: IndexedDocuments) -> str:
    """Digest the number of documents and about 1,024 of them at equal distances.

    Reading a whole hub dataset to fingerprint it could cost more than the harvest.
    """
    step = max(1, documents.count // _SAMPLED)
    records = documents.batch(range(0, documents.count, step))
    return f"{_digest(str(documents.count), records)}-sampled"


def _commits_of(table: Any) -> list[str]:
    """List the commits that the files of a hub dataset were downloaded at, where they are known."""
    names = getattr(table.info, "download_checksums", None) or {}
    return sorted({found[1] for name in names if (found := _COMMIT.search(name))})


def _digest(header: str, records: Sequence[Record]) -> str:
    digest = xxhash.xxh3_128(header.encode())
    for record in records:
        if isinstance(record, dict) and not record.keys() - _MASK - {DOCUMENT}:
            record = record[DOCUMENT]  # as before masks were read
        if isinstance(record, LongText):
            record = "".join(record.pieces())
        elif isinstance(record, Unusable):
            record = record.shown
        is_text = isinstance(record, str)
        text = record if is_text else json.dumps(record, sort_keys=True, default=str)
        digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
