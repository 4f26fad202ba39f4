"""GGUF files with sizes of no model, and damaged ones."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from actcache.config import HarvestConfig
from actcache.errors import ActcacheError, ModelError
from actcache.model.gguf_header import read_gguf_header
from actcache.model.loading import load_config, load_model, load_tokenizer

WIDTH, HIDDEN, VOCABULARY, LAYERS = 32, 64, 40, 2
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a tiny Llama, some of its sizes changed."""

    def write_model(**changes: int) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        sizes = {
            "context_length": 128,
            "embedding_length": WIDTH,
            "block_count": LAYERS,
            "feed_forward_length": HIDDEN,
            "head_count": 2,
            "head_count_kv": 2,
            "rope_dimension_count": WIDTH // 2,
            "vocab_size": VOCABULARY,
        }
        for name, size in (sizes | changes).items():
            getattr(writer, f"add_{name}")(size)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([chr(97 + n) if n < 26 else f"<{n}>" for n in range(VOCABULARY)])
        writer.add_token_merges(["a b"])
        writer.add_token_types([1] * VOCABULARY)
        writer.add_bos_token_id(30)
        writer.add_eos_token_id(31)
        shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
        for layer in range(LAYERS):
            shapes |= {f"blk.{layer}.{name}.weight": of for name, of in SHAPES.items()}
        for name, shape in shapes.items():
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_model


def config(path: Path) -> HarvestConfig:
    return HarvestConfig(str(path.parent), "data", "out", gguf_file=path.name)


def test_a_sound_file_is_loaded(write: Write) -> None:
    path = write()
    elements = VOCABULARY * WIDTH + WIDTH
    elements += LAYERS * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert read_gguf_header(path).elements == elements
    model = load_model(config(path))
    assert model.config.num_hidden_layers == LAYERS
    assert sum(p.numel() for p in model.parameters()) == elements


@pytest.mark.parametrize(
    "changes",
    [
        {"block_count": 2**32 - 1},
        {"block_count": 9_999},
        {"embedding_length": 2**31},
        {"embedding_length": 2**20},
        {"feed_forward_length": 2**32 - 1},
        {"feed_forward_length": 2**24},
        {"head_count": 2**30},
        {"head_count_kv": 2**30},
        {"context_length": 2**32 - 1},
        {"vocab_size": 2**32 - 1},
        {"vocab_size": 2**24},
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_the_memory_is_reserved(
    changes: dict[str, int], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(**changes)

    def reserve(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", reserve)
    with pytest.raises(ModelError, match=r"model\.gguf|the configuration of"):
        load_model(config(path))


def put(path: Path, offset: int, code: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + code, data, offset, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "code", "value", "what"),
    [
        (0, "I", 1, "the magic number"),
        (4, "I", 9, "the version"),
        (8, "Q", 2**63, "the count of tensors"),
        (16, "Q", 2**63, "the count of keys"),
        (24, "Q", 2**62, "the length of a key"),
    ],
)
def test_counts_that_the_file_cannot_hold_are_refused(
    offset: int, code: str, value: int, what: str, write: Write
) -> None:
    path = write()
    put(path, offset, code, value)
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ModelError, match=what):
            load(config(path))


def test_a_truncated_file_is_refused(write: Write) -> None:
    path = write()
    whole = path.read_bytes()
    for size in (*range(0, 200, 7), len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.gguf is damaged"):
            read_gguf_header(path)


def test_no_flipped_bit_of_the_header_ends_in_anything_but_our_errors(write: Write) -> None:
    path = write()
    whole, state = path.read_bytes(), random.Random(7)
    header = len(whole) - 4 * read_gguf_header(path).elements
    refused = 0
    for _ in range(3000):
        data = bytearray(whole)
        data[state.randrange(header)] ^= 1 << state.randrange(8)
        path.write_bytes(data)
        read_gguf_header.__globals__["_read"].cache_clear()
        try:
            read_gguf_header(path)
        except ActcacheError:
            refused += 1
    assert refused > 500


@pytest.mark.soak
def test_a_flipped_bit_anywhere_in_the_header_is_loaded_or_refused_in_our_words(
    write: Write,
) -> None:
    path = write()
    whole, state = path.read_bytes(), random.Random(11)
    header = len(whole) - 4 * read_gguf_header(path).elements
    loaded = 0
    for _ in range(1000):
        data = bytearray(whole)
        data[state.randrange(header)] ^= 1 << state.randrange(8)
        path.write_bytes(data)
        read_gguf_header.__globals__["_read"].cache_clear()
        for load in (load_config, load_tokenizer, load_model):
            try:
                load(config(path))
            except ActcacheError:
                continue
            loaded += 1
    assert loaded > 100
