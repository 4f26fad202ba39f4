"""What a harvest is asked to do. No torch here: the command line reads this for its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actcache.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
BinDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]
Bos = Literal["auto", "always", "never"]
RowOrder = Literal["shuffled", "sequence"]
Backend = Literal["memmap", "zarr"]
Compression = Literal["none", "zstd"]


@dataclass(frozen=True)
class HarvestConfig:
    """One harvest: a model, a text, the hookpoints, and the cache they go to."""

    model: str
    """Model: a Hugging Face id, or a folder that `from_pretrained` loads."""

    dataset: str
    """Text: a Hugging Face dataset id, a save_to_disk folder, a .jsonl, .json, .csv, .parquet or
    .txt file, or a .bin file of little-endian token ids."""

    out: str
    """Folder of the cache: made when missing, finished when it holds this very harvest."""

    hookpoint: tuple[str, ...] = ()
    """Module name or fnmatch pattern, such as layers.9.mlp or 'layers.*.mlp'; repeatable. The
    model's base prefix may be left out; ':in' at the end takes the module's input. A * crosses
    dots: for the residual stream alone, use --layers. Default: the residual stream after every
    layer."""

    layers: tuple[int, ...] = ()
    """Layer numbers, from 0, whose residual stream is taken, instead of --hookpoint; repeatable."""

    layer_stride: int = 1
    """Take every n-th layer only (layers; not with --layers or --hookpoint)."""

    ctx_len: int = 1024
    """Length of a sequence, in tokens."""

    max_tokens: int | None = None
    """Tokens to run the model on, rounded down to whole sequences. Default: all of the text."""

    split: str = "train"
    """Split of the dataset."""

    dataset_config: str | None = None
    """Configuration (subset) of a dataset on the hub, such as wikitext-103-raw-v1."""

    text_column: str = "text"
    """Column that holds the text of a document."""

    bin_dtype: BinDtype = "uint16"
    """Type of the token ids in a .bin file, little-endian."""

    batch_size: int = 8
    """Sequences in one forward pass. Part of the cache's identity: kernels may round differently
    at another shape."""

    dtype: Dtype = "auto"
    """Type of the activations on disk. auto: that of the model."""

    model_dtype: Dtype = "auto"
    """Type of the model's weights and arithmetic. auto: that of its checkpoint."""

    device: str = "auto"
    """Torch device, such as cpu or cuda:1. auto: cuda:LOCAL_RANK where there is one, else cpu."""

    seed: int = 0
    """Seed of the order of documents and of the rows within a shard."""

    revision: str | None = None
    """Revision (branch, tag, commit) of a model on the hub."""

    gguf_file: str | None = None
    """GGUF file within MODEL to load the weights from."""

    shard_size: int | None = None
    """Sequences in one shard, the unit of publishing and of the held-out split. Default: about a
    128th of the harvest in whole batches, at most 4 GiB over all hookpoints."""

    skip_positions: int = 1
    """Leave out the rows of the first n positions of each sequence: position 0 alone can hold most
    of the variance of a layer."""

    bos: Bos = "auto"
    """Whether each sequence begins with the BOS token. auto: if the tokenizer does so by itself."""

    keep_order: bool = False
    """Take the documents in the dataset's order instead of a seeded one."""

    order: RowOrder = "shuffled"
    """Order of the rows within a shard: shuffled, or sequence (as in the text)."""

    backend: Backend = "memmap"
    """How the cache lies on disk. memmap: a safetensors file for each shard and hookpoint; zarr: a
    Zarr v3 array for each hookpoint. The rows are the same."""

    compress: Compression = "none"
    """Compression of the activations, without loss. zstd: blosc over shuffled bytes, with --backend
    zarr only; about 0.7 of the size in bfloat16."""

    trust_remote_code: bool = False
    """Run Python code that the model's repository brings."""

    def __post_init__(self) -> None:
        """Refuse numbers and combinations that no harvest can carry out."""
        for name, low in {
            "layer_stride": 1,
            "ctx_len": 2,
            "max_tokens": 1,
            "batch_size": 1,
            "seed": 0,
            "shard_size": 1,
            "skip_positions": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{_option(name)} is too small", expected=f">= {low}", got=value)
        for name in ("ctx_len", "batch_size", "shard_size", "max_tokens"):
            value, high = getattr(self, name), 2**53 if name == "max_tokens" else 2**31 - 1
            if value is not None and value > high:
                raise ConfigError(f"{_option(name)} is too large", expected=f"<= {high}", got=value)
        if self.seed >= 2**32:
            raise ConfigError("--seed is too large", expected="< 2**32", got=self.seed)
        if self.skip_positions >= self.ctx_len:
            raise ConfigError(
                "--skip-positions leaves no row of a sequence",
                expected=f"< --ctx-len {self.ctx_len}",
                got=self.skip_positions,
            )
        if self.max_tokens is not None and self.max_tokens < self.ctx_len:
            raise ConfigError(
                "--max-tokens is less than one sequence",
                expected=f">= --ctx-len {self.ctx_len}",
                got=self.max_tokens,
            )
        if self.compress != "none" and self.backend != "zarr":
            raise ConfigError(
                f"--compress {self.compress} needs --backend zarr",
                expected="--compress none, or --backend zarr",
                got=f"--backend {self.backend}",
            )
        if self.hookpoint and (self.layers or self.layer_stride != 1):
            raise ConfigError(
                "--hookpoint stands alone: it already says which modules",
                got="--hookpoint with --layers or --layer-stride",
                remedy="use a pattern such as --hookpoint 'layers.*.mlp'",
            )
        if self.layers and self.layer_stride != 1:
            raise ConfigError("--layers and --layer-stride cannot both be given")
        if any(layer < 0 for layer in self.layers):
            raise ConfigError("--layers counts from 0", got=self.layers)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
