"""Fixtures shared by all tests: synthetic caches, a tiny model with its tokenizer, prose,
digests of a folder, commands in processes of their own.

Heavy packages are imported only inside the fixtures that need them.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before any conftest imports torch: two cores, many processes

Rows = Callable[[str, int, int, int], np.ndarray]
"""(hookpoint, shard, number of rows, width) -> float32 rows in natural order. [N, D]"""

CODES = 24  # directions that synthetic rows are sparse combinations of
ACTIVE = 4  # of them in one row

CACHES = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep Hugging Face off the network, and out of the user's folders; restore Ctrl-C.

    A shell starts background jobs with SIGINT ignored, which the processes of tests would inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="actcache-tests-", ignore_cleanup_errors=True)
    config.stash[CACHES] = folder
    os.environ |= {
        "HF_HOME": folder.name,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "SPARSIFY_DISABLE_TRITON": "1",  # needed on a CPU, at import
    }


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[CACHES].cleanup()


def structured_rows(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
    """Return rows that an SAE can learn: few of 24 directions each, a mean, and noise."""
    name = [ord(c) for c in hookpoint]
    directions = np.random.RandomState([7, *name]).standard_normal((CODES, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    state = np.random.RandomState([11, shard, *name])
    codes = np.zeros((count, CODES))
    for row in codes:
        row[state.permutation(CODES)[:ACTIVE]] = 1 + state.random_sample(ACTIVE)
    noise = 0.02 * state.standard_normal((count, width))
    return (codes @ directions + 0.5 + noise).astype(np.float32)


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of small caches, written as a harvest writes them but without a model."""

    def make(
        path: Path | None = None,
        *,
        shards: int = 4,
        sequences: int = 8,
        ctx_len: int = 17,
        hookpoints: Mapping[str, int] | None = None,
        dtype: str = "float32",
        skip_positions: int = 1,
        row_order: str = "shuffled",
        block_rows: int = 16,
        seed: int = 0,
        last_sequences: int | None = None,
        rows: Rows = structured_rows,
        end: bool = True,
        backend: str = "memmap",
        compression: str = "none",
        extended_by: int = 0,
        most_rows: Mapping[int, int] | None = None,
        format_version: int | None = None,
    ) -> Path:
        """Write a cache and return its folder.

        Args:
            path: the folder; a new temporary one by default.
            shards: how many; each holds sequences * (ctx_len - skip_positions) rows.
            sequences: in a shard.
            ctx_len: tokens in a sequence.
            hookpoints: width by name; by default layers.0 and layers.1 of width 16.
            dtype: on disk.
            skip_positions: positions left out at the start of each sequence.
            row_order: shuffled or sequence.
            block_rows: of the manifest.
            seed: of the identity.
            last_sequences: sequences in the last shard, if fewer.
            rows: what the rows are.
            end: seal the harvest.
            backend: memmap or zarr.
            compression: none, or zstd with zarr.
            extended_by: sequences by which the harvest is extended, in shards of their own.
            most_rows: rows that filters leave of a shard, by its number; of others, all.
            format_version: of the cache; by default the newest.
        """
        from actcache.cache.folder import publish_extension
        from actcache.cache.writer import ShardData, publish_shard
        from actcache.core.json_codec import to_json
        from actcache.filesystem.atomic import write_atomic
        from actcache.format.manifest import (
            FORMAT_VERSION,
            Hookpoint,
            Identity,
            Manifest,
            kept_positions,
            with_extension,
        )
        from actcache.format.receipts import CompletionMarker, write_completion_marker
        from actcache.storage import BACKENDS

        root = path or tmp_path_factory.mktemp("cache")
        widths = dict(hookpoints or {"layers.0": 16, "layers.1": 16})
        last = sequences if last_sequences is None else last_sequences
        total = (shards - 1) * sequences + last
        identity = Identity(
            model_fingerprint="00" * 16,
            model_dtype="float32",
            tokenizer_fingerprint="",
            dataset_fingerprint="11" * 16,
            weights=(),
            documents="text",
            column="text",
            shuffle_buffer=None,
            pipeline="pack",
            ctx_len=ctx_len,
            bos_id=None,
            eos_id=0,
            pad_id=None,
            keep_order=False,
            skip_positions=skip_positions,
            exclude_special=(),
            exclude_tokens=(),
            max_norm_ratio=None,
            hookpoints=tuple(Hookpoint(name, width) for name, width in widths.items()),
            dtype=dtype,  # type: ignore[arg-type]
            via=(),
            batch_size=4,
            row_order=row_order,  # type: ignore[arg-type]
            seed=seed,
        )
        manifest = Manifest(
            format_version=format_version or FORMAT_VERSION,
            cache_id=identity.digest(),
            identity=identity,
            model="synthetic",
            revision=None,
            architecture="None",
            dataset="synthetic",
            split="train",
            backend=backend,  # type: ignore[arg-type]
            compression=compression,  # type: ignore[arg-type]
            sequences_per_shard=sequences,
            planned_sequences=max(total, 1),
            block_rows=block_rows,
            versions={"actcache": "0"},
        )
        text = to_json(manifest, sealed=manifest.format_version > 1)
        write_atomic(root / "manifest.json", [text])
        BACKENDS[backend].initialize(root, manifest)
        if extended_by:
            manifest = with_extension(manifest, total + extended_by)
            publish_extension(root, manifest)
            total, shards = total + extended_by, manifest.plan.shards or 0
        for shard in range(shards):
            count = manifest.plan.max_sequences(shard)
            tokens = np.random.RandomState([3, shard]).randint(0, 200, (count, ctx_len))
            text = whole_text(tokens.astype(np.int32))
            kept, dropped = kept_positions(identity, text.tokens, text.lengths)
            if most_rows and shard in most_rows:
                beyond = kept & (kept.cumsum().reshape(kept.shape) > most_rows[shard])
                dropped["exclude_tokens"] += int(beyond.sum())
                kept &= ~beyond
            stored = {
                name: encode(rows(name, shard, int(kept.sum()), width), dtype)
                for name, width in widths.items()
            }
            publish_shard(root, manifest, ShardData(shard, text, kept, dropped, stored, {}))
        if end:
            end_receipt = CompletionMarker(
                manifest.cache_id, shards - 1, total, "goal", len(manifest.extensions)
            )
            write_completion_marker(root, manifest, end_receipt)
        return root

    return make


def whole_text(tokens: np.ndarray) -> Any:
    """Sequences without padding, each from its own document. tokens [S, C] int32"""
    from actcache.cache.writer import ShardText

    count, ctx_len = tokens.shape
    numbers = np.arange(count, dtype=np.int64)
    return ShardText(tokens, np.full(count, ctx_len, dtype=np.int32), numbers, numbers * 0)


def encode(rows: np.ndarray, dtype: str) -> Any:
    """Convert float32 rows to the bytes on disk (bfloat16 by truncation, as uint16)."""
    from actcache.storage import ROW_DTYPES, StoredRows

    if dtype == "bfloat16":
        values = (rows.astype("<f4").view("<u4") >> 16).astype("<u2")
    elif dtype in ("float32", "float16"):
        values = rows.astype({"float32": "<f4", "float16": "<f2"}[dtype])
    else:
        import torch

        return ROW_DTYPES[dtype].from_torch(torch.from_numpy(rows))
    return StoredRows({"activations": values})


WORDS = """
    the a of to in and row rows shard model reads writes token text cache window lane block small
    large every only when last first never order value tensor layer stream through from
"""


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Sixty documents of 20 to 60 words; a few are empty."""
    state = np.random.RandomState(5)
    vocabulary = WORDS.split()
    documents = []
    for number in range(60):
        words = [vocabulary[i] for i in state.randint(len(vocabulary), size=state.randint(20, 61))]
        documents.append("" if number % 17 == 16 else " ".join(words) + ".")
    return documents


@pytest.fixture(scope="session")
def prose_file(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as a .jsonl file with the column `text`."""
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    return path


@pytest.fixture(scope="session")
def make_tokenizer(prose: list[str]) -> Callable[..., Any]:
    """Factory of byte-level BPE tokenizers, trained on the prose."""

    def make(*, adds_bos: bool = True, bos: bool = True, eos: bool = True) -> Any:
        from tokenizers import ByteLevelBPETokenizer
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        trained = ByteLevelBPETokenizer()
        special = ["<s>", "</s>"]
        trained.train_from_iterator(
            prose, vocab_size=300, special_tokens=special, show_progress=False
        )
        if adds_bos:
            trained._tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=trained._tokenizer,
            bos_token="<s>" if bos else None,
            eos_token="</s>" if eos else None,
        )

    return make


@pytest.fixture(scope="session")
def make_model(
    make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Factory of tiny random Llamas on disk, each with a tokenizer."""

    def make(
        *,
        layers: int = 3,
        width: int = 32,
        inner: int = 48,
        seed: int = 0,
        dtype: str = "float32",
        **tokenizer: Any,
    ) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        config = LlamaConfig(
            vocab_size=300,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
        path = tmp_path_factory.mktemp("model")
        logging.disable_progress_bar()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
        make_tokenizer(**tokenizer).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """Folder of a Llama with 3 layers of width 32 whose tokenizer puts BOS first."""
    return make_model()


@pytest.fixture
def warm_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load each model and tokenizer once per test, for tests with many harvests."""
    from actcache.harvester import job, resolve

    def by_model(load: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        @functools.wraps(load)
        def once(config: Any, *rest: Any) -> Any:
            key = (
                config.model,
                config.model_dtype,
                config.load_in,
                config.device_map,
                config.max_memory,
            )
            if key not in known:
                known[key] = load(config, *rest)
            return known[key]

        return once

    for name in ("load_config", "load_tokenizer", "probe_model"):
        monkeypatch.setattr(resolve, name, by_model(getattr(resolve, name)))
    monkeypatch.setattr(job, "load_model", by_model(job.load_model))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Any]:
    """The `ForkServer` of `fork_server.py`: starts commands that have done their imports."""
    path = Path(__file__).with_name("fork_server.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """Return the digest of every file below a folder by relative path, without logs/."""
    from actcache.filesystem.atomic import digest_file

    def digests(root: str | Path) -> dict[str, str]:
        root = Path(root)
        files = [p for p in sorted(root.rglob("*")) if p.is_file()]
        names = {str(p.relative_to(root)): digest_file(p).xxh3_128 for p in files}
        return {name: d for name, d in names.items() if not name.startswith("logs/")}

    return digests


PUBLISHING = ("mkdir", "posix_fallocate", "pwrite", "fsync", "replace", "unlink", "rmdir")
"""System calls by which files and folders come to be, and vanish."""


@pytest.fixture
def killed() -> Callable[[int, Callable[[], object]], bool]:
    """Return a function that does work in a child process, killed by SIGKILL at a system call.

    It is given the index of the call, from 0, and the work; it returns whether the work came to
    that call. A `pwrite` first writes half of its bytes.
    """

    def count_down(number: int) -> None:
        counter = iter(range(10**9))

        def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                if next(counter) == number:
                    if name == "pwrite":
                        fd, data, offset = args
                        real(fd, data[: len(data) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **named)

            return call

        for name in PUBLISHING:
            setattr(os, name, watch(name, getattr(os, name)))

    def work_until(number: int, work: Callable[[], object]) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: they do not use locks
            child = os.fork()
        if child == 0:
            try:
                count_down(number)
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        return code != 0

    return work_until


def rows_with_sinks(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
    """Return rows of which at layers.1 every 50th has 60 times the norm of the others."""
    made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
    if hookpoint == "layers.1":
        made[::50] *= 60
    return made


@pytest.fixture(scope="session")
def sinks_path(make_cache: Callable[..., Path]) -> Path:
    """A shared read-only cache with sinks at layers.1: 3 of the 128 rows of each of 4 shards."""
    return make_cache(rows=rows_with_sinks)
