from __future__ import annotations

import subprocess
import sys

import pytest

from actcache.config import HarvestConfig
from actcache.errors import ConfigError


def config(**options: object) -> HarvestConfig:
    return HarvestConfig("model", "data", "out", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx_len": 1}, r"--ctx-len is too small\n  expected: >= 2\n  got:      1"),
        ({"batch_size": 0}, r"--batch-size is too small"),
        ({"max_tokens": 0}, r"--max-tokens is too small"),
        ({"shard_size": 0}, r"--shard-size is too small"),
        ({"skip_positions": -1}, r"--skip-positions is too small"),
        ({"layer_stride": 0}, r"--layer-stride is too small"),
        ({"seed": -1}, r"--seed is too small"),
        ({"seed": 2**32}, r"--seed is too large"),
        ({"ctx_len": 8, "skip_positions": 8}, r"(?s)--skip-positions drops every row.*--ctx-len 8"),
        ({"max_tokens": 1023}, r"(?s)--max-tokens is less than one sequence.*--ctx-len 1024"),
        ({"hookpoint": ("a",), "layers": (1,)}, r"(?s)--hookpoint cannot be combined.*remedy"),
        ({"hookpoint": ("a",), "layer_stride": 2}, r"--hookpoint cannot be combined"),
        ({"layers": (1,), "layer_stride": 2}, r"--layers and --layer-stride"),
        ({"layers": (1, "last")}, r"(?s)--layers\[1\].*middle.*got: +'last'"),
        ({"separator": "eos", "pipeline": "crop"}, r"(?s)--separator eos has no effect.*pack"),
        ({"id_rows": "joined", "pipeline": "truncate"}, r"(?s)--id-rows joined has no effect"),
        ({"streaming": True}, r"(?s)--streaming needs --max-tokens.*remedy"),
        ({"shuffle_buffer": 0}, r"--shuffle-buffer is too small"),
        ({"max_norm_ratio": 0.5}, r"(?s)--max-norm-ratio.*>= 1"),
        ({"max_norm_ratio": float("nan")}, r"--max-norm-ratio"),
        ({"chat_column": "a", "token_column": "b"}, r"--chat-column and --token-column"),
        ({"chat_column": "a", "text_column": "b"}, r"--text-column and --chat-column"),
        (
            {"mix": ("other",), "weight": (1.0,)},
            r"(?s)--weight must be given.*2 weights.*1 weights",
        ),
        ({"weight": (1.0,)}, r"(?s)--weight must be given once.*--mix"),
        ({"mix": ("other",), "weight": (1.0, 0.0)}, r"--weight must be above 0"),
        ({"mix": ("a", "data")}, r"(?s)data is mixed with itself.*repeated"),
        (
            {"load_in": "8bit", "batch_size": 4, "shard_size": 6},
            r"(?s)needs shards of whole batches.*--batch-size 4.*got: +6",
        ),
        (
            {"load_in": "8bit", "batch_size": 4, "max_tokens": 4095},
            r"(?s)needs --max-tokens of at least one batch.*--batch-size 4 x --ctx-len 1024",
        ),
        ({"load_in": "4bit", "gguf_file": "a.gguf"}, r"--load-in 4bit with --gguf-file"),
        (
            {"device_map": "auto", "device": "cuda:1"},
            r"(?s)--device-map auto cannot be combined.*got: +--device cuda:1.*--max-memory",
        ),
        ({"max_memory": ("0=1GiB",)}, r"need --device-map auto"),
        ({"offload_folder": "there"}, r"need --device-map auto"),
        *(
            ({"device_map": "auto", "max_memory": (bad,)}, rf"(?s)DEVICE=SIZE.*got: +{bad}")
            for bad in ("60GiB", "0=60", "gpu=1GB", "0=1GB,1=1GB", "cpu=-1GB")
        ),
        ({"compress": "zstd"}, r"(?s)--compress zstd needs --backend zarr.*got.*memmap"),
    ],
)
def test_the_error_for_an_invalid_option_names_it(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**options)
    assert caught.value.exit_code == 2


def test_the_defaults_and_the_limits_are_accepted() -> None:
    assert config().skip_positions == 1
    config(backend="zarr")
    config(backend="zarr", compress="zstd")
    config(ctx_len=2, skip_positions=1, max_tokens=2, batch_size=1, shard_size=1, seed=2**32 - 1)


def test_max_memory_is_parsed_by_device() -> None:
    given = config(device_map="auto", max_memory=("0=60GiB", "cpu=1.5GB"))
    assert given.budgets == {0: "60GiB", "cpu": "1.5GB"}


def test_the_configuration_imports_neither_torch_nor_numpy() -> None:
    code = "import actcache.config, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
