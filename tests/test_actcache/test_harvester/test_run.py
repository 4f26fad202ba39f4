from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.core import rng
from actcache.core.json_codec import to_json
from actcache.core.process import World
from actcache.errors import (
    ActcacheError,
    CacheMismatchError,
    ConfigError,
    DatasetError,
    DiskFullError,
    EmptyCacheError,
    FileSystemError,
    FormatError,
    HookpointError,
)
from actcache.format.receipts import receipt_path
from actcache.harvester import job as job_module
from actcache.harvester import resolve
from actcache.harvester import run as run_module
from actcache.harvester.run import HarvestSummary, harvest
from actcache.model.loading import load_model, load_tokenizer
from actcache.storage import blosc

Options = Callable[..., HarvestConfig]
Tree = Callable[[Path | str], dict[str, str]]

pytestmark = pytest.mark.usefixtures("warm_model")

ZARR = {"backend": "zarr"}
ZSTD = {"backend": "zarr", "compress": "zstd"}
STORAGES = pytest.mark.parametrize("storage", [{}, ZARR, ZSTD], ids=["memmap", "zarr", "zstd"])


def hidden_states(model: Any, tokens: np.ndarray, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Run the model itself on a shard's sequences, in batches of one shape."""
    batches = []
    for start in range(0, len(tokens), batch_size):
        padded = np.zeros((batch_size, tokens.shape[1]), dtype=np.int64)
        batch = tokens[start : start + batch_size]
        padded[: len(batch)] = batch
        with torch.inference_mode():
            out = model(torch.from_numpy(padded), output_hidden_states=True, use_cache=False)
        batches.append([state[: len(batch)] for state in out.hidden_states])
    return tuple(torch.cat(states) for states in zip(*batches, strict=True))


@pytest.mark.parametrize("order", ["shuffled", "sequence"])
@pytest.mark.parametrize("skip", [0, 1, 5])
def test_row_j_is_the_hidden_state_of_the_token_at_its_recorded_position(
    order: str, skip: int, options: Options
) -> None:
    points = ("layers.0", "layers.1:in", "layers.2:in", "layers.2", "norm")
    config = options(order=order, skip_positions=skip, hookpoint=points, shard_size=6)
    cache = Cache.open(harvest(config).cache)
    model = load_model(config)
    for shard in cache.shards:
        words = cache.tokens(shard)
        assert len(words.row_sequence) == cache.receipts[shard].rows
        states = hidden_states(model, words.tokens, config.batch_size)
        at = (torch.from_numpy(words.row_sequence).long(), torch.from_numpy(words.row_position))

        def row(name: str, shard: int = shard) -> torch.Tensor:
            return cache.row_dtype.to_torch(cache.read(name, shard))

        at = (at[0], at[1].long())
        assert torch.equal(row("layers.0"), states[1][at])
        assert torch.equal(row("layers.1:in"), states[1][at])
        assert torch.equal(row("layers.2:in"), states[2][at])
        assert torch.equal(row("norm"), states[3][at])
        # hidden_states ends with the output of the final norm, not of the last layer.
        final = model.model.norm(row("layers.2"))
        torch.testing.assert_close(final, states[3][at])
        natural = list(itertools.product(range(len(words.tokens)), range(skip, 16)))
        positions = list(zip(at[0].tolist(), at[1].tolist(), strict=True))
        assert sorted(positions) == natural
        assert (positions == natural) == (order == "sequence")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_are_rounded_to_the_type_on_disk(dtype: str, options: Options) -> None:
    exact = Cache.open(harvest(options(out=options().out + "-exact")).cache)
    cache = Cache.open(harvest(options(dtype=dtype)).cache)
    assert cache.manifest.identity.dtype == dtype
    for shard, name in itertools.product(exact.shards, exact.hookpoints):
        full = exact.row_dtype.to_torch(exact.read(name, shard))
        rounded = cache.row_dtype.to_torch(cache.read(name, shard))
        assert torch.equal(rounded, full.to(getattr(torch, dtype)))


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_8_bit_rows_are_the_quantised_exact_rows(
    dtype: str, backend: str, options: Options, tmp_path: Path
) -> None:
    exact = Cache.open(harvest(options(out=str(tmp_path / "exact"))).cache)
    cache = Cache.open(harvest(options(dtype=dtype, backend=backend)).cache)
    assert verify(cache.root).is_sound
    for shard, name in itertools.product(exact.shards, exact.hookpoints):
        expected = cache.row_dtype.from_torch(exact.row_dtype.to_torch(exact.read(name, shard)))
        for part, array in cache.read(name, shard).parts.items():
            np.testing.assert_array_equal(array, expected.parts[part])
        statistics = cache.statistics(name, [shard])
        decoded = cache.row_dtype.to_float32(expected)
        total = decoded.sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(statistics.total, total, rtol=1e-5, atol=1e-4)
        names = {"tokens", "stats", *(f"activations/{n}" for n in exact.hookpoints)}
        names |= {f"scales/{n}" for n in exact.hookpoints} if backend == "zarr" else set()
        assert cache.receipts[shard].files.keys() == names


def test_8_bit_rows_that_are_not_finite_decode_to_nan(
    make_model: Callable[..., Path], options: Options
) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 0] = torch.inf  # EOS
    model.save_pretrained(path)
    config = options(model=str(path), hookpoint=("layers.0:in",), max_tokens=None, dtype="int8")
    cache = Cache.open(harvest(config).cache)
    counted = 0
    for shard in cache.shards:
        words = cache.tokens(shard)
        is_eos = words.tokens[words.row_sequence, words.row_position] == 1
        stored = cache.read("layers.0:in", shard)
        np.testing.assert_array_equal(np.isnan(stored.scales), is_eos)
        np.testing.assert_array_equal(
            np.isnan(cache.row_dtype.to_float32(stored)).all(axis=1), is_eos
        )
        assert cache.receipts[shard].non_finite == {"layers.0:in": is_eos.sum()}
        counted += is_eos.sum()
    assert counted > 10


def test_the_dtype_on_disk_is_that_of_the_model_by_default(options: Options) -> None:
    cache = Cache.open(harvest(options(model_dtype="bfloat16")).cache)
    assert cache.manifest.identity.model_dtype == cache.manifest.identity.dtype == "bfloat16"


def packed_by_hand(config: HarvestConfig, prose: list[str]) -> np.ndarray:
    """Pack the prose independently of the code under test. [S, C]"""
    tokenizer = load_tokenizer(config)
    order = rng.stream("documents", config.seed).permutation(len(prose))
    texts = [prose[i] for i in (range(len(prose)) if config.keep_order else order)]
    line = []
    for text in filter(None, texts):
        line += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    bos = [] if config.bos == "never" else [tokenizer.bos_token_id]
    size = config.ctx_len - len(bos)
    starts = range(0, len(line) - size + 1, size)
    return np.array([bos + line[start : start + size] for start in starts], dtype=np.int32)


@pytest.mark.parametrize(
    "given",
    [{}, {"seed": 3}, {"keep_order": True}, {"bos": "never"}, {"ctx_len": 33, "batch_size": 2}],
)
def test_the_tokens_of_the_cache_are_the_documents_packed(
    given: dict, options: Options, prose: list[str]
) -> None:
    config = options(max_tokens=None, shard_size=40, **given)
    cache = Cache.open(harvest(config).cache)
    tokens = np.concatenate([cache.tokens(shard).tokens for shard in cache.shards])
    np.testing.assert_array_equal(tokens, packed_by_hand(config, prose))
    assert cache.end is not None
    assert (cache.end.reason, cache.end.sequences) == ("text", len(tokens))


def test_token_ids_from_a_file_are_harvested_unchanged(options: Options, tmp_path: Path) -> None:
    ids = np.random.RandomState(0).randint(300, size=16 * 9 + 5)
    caches = []
    for dtype in ("uint16", "uint32"):
        path = tmp_path / f"{dtype}.bin"
        ids.astype(dtype).tofile(path)
        out = str(tmp_path / dtype)
        config = options(dataset=str(path), bin_dtype=dtype, out=out, max_tokens=None)
        caches.append(Cache.open(harvest(config).cache))
    first, second = caches
    tokens = np.concatenate([first.tokens(shard).tokens for shard in first.shards])
    np.testing.assert_array_equal(tokens.reshape(-1), ids[: 16 * 9])
    identity = first.manifest.identity
    assert (identity.bos_id, identity.eos_id, identity.tokenizer_fingerprint) == (None, None, "")
    for shard in first.shards:
        a, b = first.read("layers.0", shard), second.read("layers.0", shard)
        np.testing.assert_array_equal(a.values, b.values)


def test_token_ids_outside_the_vocabulary_are_refused(options: Options, tmp_path: Path) -> None:
    ids = np.zeros(16 * 8, dtype="<u2")
    ids[16 * 6] = 300
    ids.tofile(tmp_path / "ids.bin")
    config = options(dataset=str(tmp_path / "ids.bin"), max_tokens=None)
    with pytest.raises(DatasetError, match=r"(?s)outside the model's vocabulary.*0 to 299"):
        harvest(config)
    assert not Cache.open(config.out).complete


def test_a_saved_dataset_gives_the_sequences_of_the_file_it_came_from(
    options: Options, prose: list[str], tmp_path: Path
) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": prose}).save_to_disk(tmp_path / "saved")
    config = options(dataset=str(tmp_path / "saved"), out=str(tmp_path / "other"))
    first, second = Cache.open(harvest(options()).cache), Cache.open(harvest(config).cache)
    for shard in first.shards:
        np.testing.assert_array_equal(first.tokens(shard).tokens, second.tokens(shard).tokens)


# The manifest.


def test_the_manifest_is_written_first_and_the_end_marker_last(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    replace = os.replace

    def record(source: str, target: str, **folders: int) -> None:
        published.append(target)
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", record)
    harvest(options())
    assert published[0] == "manifest.json"
    assert published[-1] == "END.json"
    assert published.count("manifest.json") == published.count("END.json") == 1


def test_the_manifest_records_model_text_and_options(options: Options) -> None:
    config = options(revision=None)
    cache = Cache.open(harvest(config).cache)
    manifest, identity = cache.manifest, cache.manifest.identity
    assert manifest.model == Path(config.model).name
    assert manifest.dataset == "prose.jsonl"
    assert manifest.architecture == "LlamaForCausalLM"
    assert (identity.ctx_len, identity.batch_size, identity.skip_positions) == (16, 4, 1)
    assert (identity.bos_id, identity.eos_id, identity.column) == (0, 1, "text")
    assert cache.hookpoints == ["layers.0", "layers.1.mlp:in"]
    assert (manifest.planned_sequences, manifest.sequences_per_shard) == (10, 4)
    assert {"torch", "transformers", "tokenizers", "actcache", "python"} <= set(manifest.versions)


def test_a_finished_harvest_run_again_changes_nothing(options: Options, tree: Tree) -> None:
    first = harvest(options())
    before, mtime = tree(first.cache), Path(first.cache, "manifest.json").stat().st_mtime_ns
    second = harvest(options())
    assert (first.new_shards, first.new_rows, first.complete) == (3, 150, True)
    assert (second.new_shards, second.new_rows, second.complete) == (0, 0, True)
    assert first.reason == second.reason == "goal"
    assert tree(first.cache) == before
    assert Path(first.cache, "manifest.json").stat().st_mtime_ns == mtime


def test_the_bytes_do_not_depend_on_the_folders_of_model_and_text(
    options: Options, tree: Tree, tmp_path: Path
) -> None:
    config = options()
    copies = {}
    for name, path in (("model", config.model), ("dataset", config.dataset)):
        copies[name] = str(tmp_path / "copies" / Path(path).name)
        copy = shutil.copytree if Path(path).is_dir() else shutil.copy
        (tmp_path / "copies").mkdir(exist_ok=True)
        copy(path, copies[name])
    harvest(config)
    harvest(options(out=str(tmp_path / "other"), **copies))
    assert tree(config.out) == tree(tmp_path / "other")


OTHERS = {
    "hookpoint": (("layers.0",), "hookpoints"),
    "ctx_len": (17, "ctx_len"),
    "max_tokens": (16 * 11, "planned_sequences"),
    "batch_size": (5, "batch_size"),
    "shard_size": (5, "sequences_per_shard"),
    "dtype": ("bfloat16", "dtype"),
    "backend": ("zarr", "backend"),
    "model_dtype": ("bfloat16", "model"),
    "seed": (1, "seed"),
    "skip_positions": (2, "skip_positions"),
    "bos": ("never", "bos_id"),
    "keep_order": (True, "keep_order"),
    "order": ("sequence", "row_order"),
}


def test_a_folder_that_holds_another_cache_is_refused_with_the_fields_that_differ(
    options: Options, tree: Tree, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    harvest(options())
    before = tree(options().out)
    others = {name: ({name: value}, field) for name, (value, field) in OTHERS.items()}
    others["model"] = ({"model": str(make_model(seed=1))}, "model")
    text = tmp_path / "other.jsonl"
    text.write_text(Path(options().dataset).read_text() + '{"text": "more"}\n')
    others["dataset"] = ({"dataset": str(text)}, "text")
    for given, field in others.values():
        with pytest.raises(CacheMismatchError, match=rf"(?s)holds another cache.*\b{field}: .*rem"):
            harvest(options(**given))
    assert tree(options().out) == before


def test_resuming_with_other_library_versions_warns(options: Options) -> None:
    harvest(options())
    path = Path(options().out, "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["versions"] |= {"torch": "1.0", "gone": "3"}
    path.write_bytes(changed := to_json(manifest, sealed=True))
    receipt_path(Path(options().out), 1).unlink()
    summary = harvest(options())
    assert summary.complete
    first, second = sorted(summary.warnings)
    assert first == "gone is None now; this cache was begun with 3"
    assert first != second
    torch_now = metadata.version("torch")  # torch.__version__ may have more: +cu130
    assert second == f"torch is {torch_now} now; this cache was begun with 1.0"
    assert path.read_bytes() == changed


def test_a_folder_that_is_not_a_cache_is_refused_and_unchanged(
    options: Options, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CacheMismatchError, match=r"(?s)holds other files.*another folder"):
        harvest(options(out=str(tmp_path)))
    for name in ("notes", "notes/below/it", "/dev/null", "/dev/null/x"):
        with pytest.raises(CacheMismatchError, match=r"(?s)is a file or device.*another --out"):
            harvest(options(out=str(tmp_path / name)))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CacheMismatchError, match=r"(?s)a link that leads nowhere.*nowhere"):
        harvest(options(out=str(tmp_path / "link")))
    with pytest.raises(CacheMismatchError, match="a link that leads nowhere"):
        harvest(options(out=str(tmp_path / "link" / "below")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "notes"]


@pytest.mark.parametrize("name", ["n" * 300, "n/" * 1950, "read-only/a/b", "full/read-only"])
def test_an_out_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    name: str, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "read-only").mkdir()
    (tmp_path / "full" / "read-only").mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, _: Path(path).name != "read-only")  # for root too
    with pytest.raises(FileSystemError, match=r"(?s)--out .*n.* cannot be .*another --out"):
        harvest(options(out=str(tmp_path / name), model="no-such-model"))


LINKED = (
    "activations",
    "activations/layers.0",
    "tokens",
    "stats",
    "shards",
    "logs",
    "extensions",
    "manifest.json",
    "shards/END.json",
    "shards/00001.json",
    "tokens/00001.safetensors",
    "logs/harvest.lock",
    "logs/harvest-rank0.jsonl",
)


@pytest.mark.parametrize("make", ["link", "pipe"])
def test_links_and_pipes_of_a_cache_are_refused_before_the_model_is_loaded(
    make: str, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, elsewhere = Path(harvest(options()).cache), tmp_path / "elsewhere"
    whole = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    monkeypatch.setattr(job_module, "resolve", None)
    for name in LINKED:
        path, kept = root / name, root / "kept"
        if path.exists():
            path.rename(kept)
        if make == "link":
            path.symlink_to(elsewhere)
            kind = "a symbolic link"
        else:
            os.mkfifo(path)
            kind = "a pipe"
        with pytest.raises(FormatError, match=rf"(?s){re.escape(name)} is {kind}.*remedy"):
            harvest(options())
        assert not elsewhere.exists()
        assert stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFLNK, stat.S_IFIFO)
        path.unlink()
        if kept.exists():
            kept.rename(path)
    assert whole == {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_files_of_notebooks_and_file_systems_are_left_alone(options: Options) -> None:
    root = Path(options().out)
    strays = [".ipynb_checkpoints/x.json", ".nfs0001", "Thumbs.db", "lost+found/x"]
    strays += [f"{folder}/.nfs0002" for folder in ("shards", "tokens", "activations/layers.0")]
    strays += ["shards/.ipynb_checkpoints/00000.json", "activations/.ipynb_checkpoints/x"]
    for stray in strays[:4]:
        (root / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / stray).write_text("theirs")
    harvest(options())
    for stray in strays[4:]:
        (root / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / stray).write_text("theirs")
    receipt_path(root, 1).unlink()
    assert harvest(options()).complete
    checked = verify(root)
    assert checked.is_sound
    assert sorted(checked.leftovers) == sorted(strays)
    assert all((root / stray).read_text() == "theirs" for stray in strays)


@pytest.mark.parametrize("storage", [ZARR, ZSTD], ids=["zarr", "zstd"])
def test_backend_and_compression_change_neither_the_id_nor_the_rows(
    storage: dict[str, str], options: Options, tmp_path: Path
) -> None:
    cache = Cache.open(harvest(options()).cache)
    other = Cache.open(harvest(options(out=str(tmp_path / "other"), **storage)).cache)
    assert other.manifest.cache_id == cache.manifest.cache_id
    assert (other.manifest.backend, other.manifest.compression) == (
        "zarr",
        storage.get("compress", "none"),
    )
    assert ("numcodecs" in other.manifest.versions) == (storage == ZSTD)
    for shard, name in itertools.product(cache.shards, cache.hookpoints):
        theirs, ours = other.read(name, shard), cache.read(name, shard)
        np.testing.assert_array_equal(theirs.values, ours.values)
        assert other.receipts[shard].non_finite == cache.receipts[shard].non_finite
        assert other.receipts[shard].files["stats"] == cache.receipts[shard].files["stats"]
        assert other.receipts[shard].files["tokens"] == cache.receipts[shard].files["tokens"]
    with pytest.raises(CacheMismatchError, match=r"backend: 'memmap', not 'zarr'"):
        harvest(options(**storage))


def test_zarr_json_is_written_before_the_first_chunk(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    replace = os.replace

    def record(source: str, target: str, **folders: int) -> None:
        folder = Path(f"/proc/self/fd/{folders['dst_dir_fd']}").resolve()
        published.append(str((folder / target).relative_to(Path(options().out).resolve())))
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", record)
    harvest(options(**ZARR))
    assert published[:3] == [
        "manifest.json",
        "activations/layers.0/zarr.json",
        "activations/layers.1.mlp:in/zarr.json",
    ]
    assert sum(name.endswith("zarr.json") for name in published) == 2


def test_a_shard_larger_than_bloscs_limit_is_refused_before_anything_is_written(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blosc, "MAX_BYTES", 15 * 32 * 4 * 3)
    with pytest.raises(ConfigError, match=r"(?s)too large for --compress zstd.*--shard-size 3 or"):
        harvest(options(hookpoint=("layers.0",), **ZSTD))
    assert not Path(options().out).exists()
    # The default shard size stays below the limit, here with one batch.
    default = options(hookpoint=("layers.0",), shard_size=None, batch_size=3, **ZSTD)
    assert harvest(default).complete


# Crashes: the cache stays valid, and the same command finishes it.


def small(options: Options, out: Path, storage: dict[str, str]) -> HarvestConfig:
    return options(out=str(out), max_tokens=16 * 3, shard_size=2, batch_size=2, **storage)


def check_valid(root: Path) -> None:
    """Check that the folder holds no cache yet, or one whose shards are all complete."""
    try:
        cache = Cache.open(root)
    except EmptyCacheError:
        assert not (root / "shards").exists()
        return
    for shard in cache.shards:
        for name in cache.hookpoints:
            assert len(cache.read(name, shard)) == cache.receipts[shard].rows
            assert cache.statistics(name, [shard]).count == cache.receipts[shard].rows
        assert len(cache.tokens(shard).tokens) == cache.receipts[shard].sequences
    assert cache.end is None or cache.complete


# Writing a file takes five calls: a step of seven reaches each of them in turn.
STEPS = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.soak)])


@STEPS
@STORAGES
def test_a_crash_at_any_system_call_leaves_a_valid_cache_that_the_same_command_finishes(
    storage: dict[str, str], step: int, options: Options, faults: Any, tree: Tree, tmp_path: Path
) -> None:
    harvest(small(options, tmp_path / "whole", storage))
    whole = tree(tmp_path / "whole")
    for number in itertools.count(0, step):
        root = tmp_path / str(number)
        try:
            with faults.at(number):
                harvest(small(options, root, storage))
        except faults.Crash:
            check_valid(root)
        else:
            break
        assert harvest(small(options, root, storage)).complete
        assert tree(root) == whole  # no partial file is left
        shutil.rmtree(root)
    assert number > 80


@STORAGES
def test_a_harvest_that_crashes_repeatedly_is_finished(
    storage: dict[str, str], options: Options, faults: Any, tree: Tree, tmp_path: Path
) -> None:
    """Each run crashes six system calls later than the one before."""
    harvest(small(options, tmp_path / "whole", storage))
    root = tmp_path / "cache"
    crashes = 0
    for number in itertools.count(6, 6):
        try:
            with faults.at(number):
                harvest(small(options, root, storage))
        except faults.Crash:
            crashes += 1
            check_valid(root)
        else:
            break
    assert crashes > 3
    assert tree(root) == tree(tmp_path / "whole")


@STEPS
@STORAGES
def test_a_full_disk_leaves_a_valid_cache_and_the_harvest_resumes_later(
    storage: dict[str, str], step: int, options: Options, faults: Any, tree: Tree, tmp_path: Path
) -> None:
    harvest(small(options, tmp_path / "whole", storage))
    whole = tree(tmp_path / "whole")
    full = OSError(errno.ENOSPC, "No space left on device")
    for number in itertools.count(0, step):
        root = tmp_path / str(number)
        try:
            with faults.at(number, full):
                harvest(small(options, root, storage))
        except DiskFullError:
            assert not list(root.rglob("*.partial-*"))
            check_valid(root)
        else:
            break
        harvest(small(options, root, storage))
        assert tree(root) == whole
        shutil.rmtree(root)
    assert number > 80


def test_a_disk_that_is_full_for_the_log_is_reported_alike(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, *rest: Any, **named: Any) -> int:
        if path == "harvest-rank0.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(DiskFullError, match=r"(?s)harvest-rank0\.jsonl.*same command again"):
            harvest(options())
    assert harvest(options()).complete


def test_too_little_disk_space_is_refused_before_anything_is_written(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(DiskFullError, match=r"(?s)does not fit.*free.*10 kB free.*--max-tokens"):
        harvest(options())
    assert not Path(options().out).exists()


def test_a_shard_whose_receipt_was_deleted_is_written_again(options: Options, tree: Tree) -> None:
    root = Path(harvest(options()).cache)
    whole = tree(root)
    receipt_path(root, 1).unlink()
    (root / "activations" / "layers.0" / "00001.safetensors").write_bytes(b"damaged")
    summary = harvest(options())
    assert (summary.new_shards, summary.complete) == (1, True)
    assert tree(root) == whole


def test_files_that_differ_between_runs_lie_under_logs(options: Options, tree: Tree) -> None:
    root = Path(harvest(options()).cache)
    assert {path.name for path in root.iterdir()} == {
        "manifest.json",
        "activations",
        "tokens",
        "stats",
        "shards",
        "logs",
    }
    lines = (root / "logs" / "harvest-rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["shard"] for line in lines] == [0, 1, 2]


# Any number of processes.


def harvest_by(ranks: list[int], world_size: int, config: HarvestConfig) -> list[HarvestSummary]:
    """Run some ranks of a harvest in this process, one after another."""

    class Alone(World):
        def check_equal_then_run_on_rank_zero(self, what: bytes, act: Callable[[], None]) -> None:
            act()

    summaries = []
    for rank in ranks:
        with pytest.MonkeyPatch.context() as patched:
            alone = SimpleNamespace(from_environment=lambda r=rank: Alone(r, world_size))
            patched.setattr(run_module, "World", alone)
            summaries.append(harvest(config))
    return summaries


@STORAGES
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_each_rank_writes_its_shards_and_the_last_one_completes_the_cache(
    world_size: int, storage: dict[str, str], options: Options, tree: Tree, tmp_path: Path
) -> None:
    config = options(max_tokens=16 * 25, **storage)
    harvest(config)
    ranks = list(range(world_size))[::-1]
    many = options(max_tokens=16 * 25, out=str(tmp_path / "many"), **storage)
    summaries = harvest_by(ranks, world_size, many)
    assert tree(config.out) == tree(tmp_path / "many")
    for rank, summary in zip(ranks, summaries, strict=True):
        assert summary.new_shards == len(range(rank, 7, world_size))
    assert [s.complete for s in summaries].index(True) >= min(world_size, 7) - 1
    assert summaries[-1].complete


def test_a_harvest_begun_by_two_is_finished_by_three_and_by_one(
    options: Options, tree: Tree, tmp_path: Path
) -> None:
    whole = options(max_tokens=16 * 25, out=str(tmp_path / "whole"))
    harvest(whole)
    config = options(max_tokens=16 * 25)
    harvest_by([1], 2, config)
    assert Cache.open(config.out).shards == [1, 3, 5]
    harvest_by([0], 3, config)
    assert Cache.open(config.out).shards == [0, 1, 3, 5, 6]
    assert not Cache.open(config.out).complete
    summary = harvest(config)
    assert (summary.new_shards, summary.complete) == (2, True)
    assert tree(config.out) == tree(whole.out)


def test_the_last_process_says_how_many_documents_all_have_left_out(
    options: Options, prose: list[str], tmp_path: Path
) -> None:
    rows: list[Any] = [7, *prose[:30], 8, *prose[30:], 9]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = options(
        dataset=str(path), max_tokens=None, keep_order=True, max_bad_documents=0.2, shard_size=1
    )
    first, last = harvest_by([0, 1], 2, config)
    (so_far,), (total,) = (
        [warning for warning in summary.warnings if "could not be used" in warning]
        for summary in (first, last)
    )
    assert not first.complete
    assert "left out so far" in so_far
    assert total.startswith("3 documents could not be used and were left out (3 type)")
    assert "could not be used" not in str(harvest_by([1], 2, config)[0].warnings)


# The end of the harvest.


def test_the_last_shard_holds_the_remaining_sequences(options: Options) -> None:
    cache = Cache.open(harvest(options(shard_size=3)).cache)
    receipts = cache.receipts.values()
    assert [r.sequences for r in receipts] == [3, 3, 3, 1]
    assert [r.first_sequence for r in receipts] == [0, 3, 6, 9]
    assert [r.rows for r in receipts] == [45, 45, 45, 15]
    assert cache.end is not None
    assert (cache.end.last_shard, cache.end.sequences, cache.end.reason) == (3, 10, "goal")


@pytest.mark.parametrize("counted", [True, False])
def test_a_text_that_ends_before_the_goal_completes_the_cache_with_reason_text(
    counted: bool, options: Options, prose: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not counted:
        monkeypatch.setattr(resolve, "COUNTED_TOKENS", 0)
    config = options(max_tokens=16 * 500, shard_size=50)
    summary = harvest(config)
    count = len(packed_by_hand(config, prose))
    assert (summary.complete, summary.reason) == (True, "text")
    cache = Cache.open(summary.cache)
    assert cache.end is not None
    assert cache.end.sequences == count
    assert cache.manifest.planned_sequences == (count if counted else 500)
    again = harvest(config)
    assert (again.new_shards, again.complete, again.reason) == (0, True, "text")


def test_batches_are_padded_to_one_shape(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    run = run_module.ActivationCapture.run

    def record(capture: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        shapes.add(tuple(tokens.shape))
        return run(capture, tokens, *rest)

    monkeypatch.setattr(run_module.ActivationCapture, "run", record)
    harvest(options(shard_size=3))
    assert shapes == {(4, 16)}


def test_the_bits_do_not_depend_on_the_number_of_threads(
    options: Options, tree: Tree, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            harvest(options(out=str(tmp_path / str(threads))))
    finally:
        torch.set_num_threads(before)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")


def test_rows_that_are_not_finite_are_kept_and_counted(
    options: Options, make_model: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model(seed=2)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 0] = torch.inf  # EOS
    model.save_pretrained(path)
    config = options(model=str(path), hookpoint=("layers.0:in",), max_tokens=None, shard_size=500)
    summary = harvest(config)
    cache = Cache.open(summary.cache)
    words = cache.tokens(0)
    is_eos = words.tokens[words.row_sequence, words.row_position] == 1
    assert 10 < is_eos.sum() < len(is_eos)
    assert cache.receipts[0].non_finite == {"layers.0:in": is_eos.sum()}
    (warning,) = summary.warnings
    assert f"{is_eos.sum()} rows of layers.0:in hold an infinity or NaN" in warning
    rows = cache.read("layers.0:in", 0).values
    np.testing.assert_array_equal(~np.isfinite(rows).all(axis=1), is_eos)
    statistics = cache.statistics("layers.0:in")
    mean = rows[~is_eos].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(statistics.mean, mean, atol=1e-8)


# Refusals.


def check_refused(config: HarvestConfig, kind: type[ActcacheError], message: str) -> None:
    with pytest.raises(kind, match=message):
        harvest(config)
    assert not Path(config.out).exists()


def test_bad_input_is_refused_before_anything_is_written(options: Options, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the row")
    check_refused(options(hookpoint=("layer.1",)), HookpointError, r"such as .*layers\.1")
    check_refused(options(hookpoint=("lm_head",)), HookpointError, "no module of the model matches")
    check_refused(options(hookpoint=(), layers=(3,)), HookpointError, r"(?s)--layers.*0 to 2")
    check_refused(
        options(text_column="body"), DatasetError, r"(?s)no column 'body'.*text.*--text-c"
    )
    check_refused(options(dataset="./gone.jsonl"), DatasetError, r"no such file.*gone\.jsonl")
    check_refused(options(dataset=str(tmp_path / "short.txt")), DatasetError, "shorter than one")
    check_refused(options(model="./gone"), ActcacheError, r"no such model folder: \./gone")
    check_refused(options(device="cuda:77"), ConfigError, "--device cannot be used")
    longer = options(ctx_len=65, max_tokens=None)
    check_refused(longer, ConfigError, r"(?s)longer than the model's context.*<= 64.*65")


def test_a_model_of_a_dtype_that_cannot_be_stored_needs_option_dtype(
    options: Options, make_model: Callable[..., Path]
) -> None:
    model = str(make_model(seed=3, dtype="float64"))
    check_refused(options(model=model), ConfigError, r"(?s)cannot be stored.*float64.*--dtype")
    assert harvest(options(model=model, dtype="float32")).complete


def test_activations_beyond_float16_are_refused_with_a_remedy(
    options: Options, make_model: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model(seed=4)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e6
    model.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"(?s)layers\.0 do not fit float16.*65,520.*bfloat16"):
        harvest(options(model=str(path), dtype="float16"))
    check_valid(Path(options().out))


def test_a_damaged_receipt_is_reported_with_its_path(options: Options) -> None:
    root = Path(harvest(options()).cache)
    receipt_path(root, 1).write_text("{")
    with pytest.raises(ActcacheError, match=r"00001\.json"):
        harvest(options())


def test_the_summary_is_json(options: Options) -> None:
    summary = harvest(options())
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["new_rows"] == 150
    size = sum(p.stat().st_size for p in Path(summary.cache).rglob("*.safetensors"))
    assert summary.new_bytes == size
    assert summary.tokens_per_second > 0


def test_a_folder_without_published_shards_accepts_other_options(
    options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = options(batch_size=2, out=str(tmp_path / "whole"))
    harvest(whole)
    for backend in ("memmap", "zarr"):
        out = str(tmp_path / backend)
        with monkeypatch.context() as patched:
            patched.setattr(run_module, "capture_shard", out_of_memory)
            with pytest.raises(MemoryError):
                harvest(options(batch_size=8, backend=backend, out=out))
        assert harvest(dataclasses.replace(whole, out=out)).complete
        assert tree(out) == tree(whole.out)


def out_of_memory(*_: Any) -> None:
    raise MemoryError


def test_a_finished_harvest_warns_about_missing_files(options: Options) -> None:
    config = options()
    root = Path(harvest(config).cache)
    assert harvest(config).warnings == ()
    next(root.glob("activations/*/00001.safetensors")).unlink()
    (warning,) = harvest(config).warnings
    assert "1 files of published shards are missing or cut" in warning
    assert "verify" in warning
    first, second = harvest_by([0, 1], 2, config)
    assert (first.warnings, second.warnings) == ((warning,), ())  # rank 0 checks all shards


def test_a_text_without_splits_records_none(options: Options, prose: list[str]) -> None:
    config = options()
    path = Path(config.out).with_name("prose.txt")
    path.write_text("\n".join(prose))
    assert Cache.open(harvest(config).cache).manifest.split == "train"
    text = dataclasses.replace(config, dataset=str(path), out=config.out + "-text")
    assert Cache.open(harvest(text).cache).manifest.split == ""


def test_the_summary_of_rank_0_warns_of_sinks(sinks_path: Path) -> None:
    cache = Cache.open(sinks_path)
    for rank, count in ((0, 1), (1, 0)):
        job: Any = SimpleNamespace(
            root=cache.root,
            manifest=cache.manifest,
            published=cache.receipts,
            ranks=World(rank, 2),
        )
        warnings = run_module._sink_warnings(job)
        assert len(warnings) == count
        assert all("12 rows (2.34%) above 10 median norms" in warning for warning in warnings)
    job = SimpleNamespace(manifest=cache.manifest, published={}, ranks=World(0, 1))
    assert run_module._sink_warnings(job) == ()


def test_warnings_of_libraries_appear_once_by_rank_zero_and_are_logged(
    options: Options, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    state = load_file(folder / "model.safetensors")
    state["extra"] = state["lm_head.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = options(model=str(folder))
    first, second = harvest_by([0, 1], 2, config)
    (warning,) = first.warnings
    assert warning.endswith("1 weights are not used: extra")
    assert second.warnings == ()
    logs = Path(config.out) / "logs"
    (line,) = (logs / "warnings-rank0.jsonl").read_text().splitlines()
    assert json.loads(line)["warning"] == warning
    assert not (logs / "warnings-rank1.jsonl").exists()


def test_a_hookpoint_may_have_the_name_of_another_library(options: Options) -> None:
    summary = harvest(options(hookpoint=("blocks.0.hook_resid_post", "layers.1.mlp:in")))
    assert summary.renamed == {"blocks.0.hook_resid_post": ["layers.0"]}
    assert summary.cache_id == harvest(options()).cache_id
    assert harvest(options()).renamed == {}
