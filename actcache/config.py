"""Options of a harvest, a plan and a conversion. Imports no torch: `--help` reads them."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from actcache.core.options import MAIN, option
from actcache.errors import ConfigError
from actcache.filesystem.paths import reject_url

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
StoredDtype = Literal["auto", "bfloat16", "float16", "float32", "int8", "float8_e4m3"]
BinDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]
Bos = Literal["auto", "always", "never"]
PipelineKind = Literal["pack", "crop", "truncate"]
RowOrder = Literal["shuffled", "sequence"]
Backend = Literal["memmap", "zarr"]
Compression = Literal["none", "zstd"]
AnyBackend = Literal["auto", "memmap", "zarr"]
AnyCompression = Literal["auto", "none", "zstd"]
LoadIn = Literal["none", "8bit", "4bit"]
DeviceMap = Literal["none", "auto"]

_BUDGET = re.compile(r"(cpu|[0-9]+)=([0-9.]+[KMG]i?B)")


@dataclass(frozen=True)
class HarvestConfig:
    """One harvest: a model, a text, the hookpoints, and the cache they go to."""

    model: str = option(group=MAIN)
    """Model: a Hugging Face id, or a folder that `from_pretrained` loads."""

    dataset: str = option(group=MAIN)
    """Text: a Hugging Face dataset id, a save_to_disk folder, a .jsonl, .json, .csv, .parquet or
    .txt file, or a .bin file of little-endian token ids."""

    out: str = option(group=MAIN, metavar="DIR")
    """Folder of the cache: made when missing, finished when it holds this very harvest."""

    hookpoint: tuple[str, ...] = option((), group=MAIN, metavar="NAME")
    """Module name or fnmatch pattern, such as layers.9.mlp or 'layers.*.mlp'; repeatable. The
    model's base prefix may be left out; ':in' at the end takes the module's input. A * crosses
    dots: for the residual stream alone, use --layers. Default: the residual stream after every
    layer."""

    layers: tuple[int, ...] = option((), group=MAIN)
    """Layer numbers, from 0, whose residual stream is taken, instead of --hookpoint; repeatable."""

    layer_stride: int = option(1, group="Model")
    """Take every n-th layer only (layers; not with --layers or --hookpoint)."""

    ctx_len: int = option(1024, group=MAIN)
    """Length of a sequence, in tokens."""

    max_tokens: int | None = option(None, group=MAIN)
    """Tokens to run the model on, rounded down to whole sequences. Default: all of the text."""

    extend: bool = option(False, group="Storage")
    """Go on beyond the goal of the cache in --out, to a larger --max-tokens or all of the text. All
    else must be as it was; a goal not yet reached is reached first."""

    split: str = option("train", group="Data", metavar="NAME")
    """Split of the dataset."""

    dataset_config: str | None = option(None, group="Data", metavar="NAME")
    """Configuration (subset) of a dataset on the hub, such as wikitext-103-raw-v1."""

    text_column: str = option("text", group="Data", metavar="NAME")
    """Column that holds the text of a document."""

    chat_column: str | None = option(None, group="Data", metavar="NAME")
    """Column that holds a conversation, as a list of messages with role and content: the
    tokenizer's chat template writes it out. Instead of --text-column."""

    token_column: str | None = option(None, group="Data", metavar="NAME")
    """Column that holds a document's token ids, made with this model's tokenizer. Instead of
    --text-column."""

    mix: tuple[str, ...] = option((), group="Data", metavar="DATASET")
    """Another dataset to draw documents from, with the same split and columns; repeatable. The text
    ends with the first dataset that is drawn and has none left: nothing is repeated."""

    weight: tuple[float, ...] = option((), group="Data")
    """Share of the documents that come from DATASET, then from each --mix in its order; repeatable.
    Default: equal shares."""

    streaming: bool = option(False, group="Data")
    """Read the dataset as a stream instead of downloading it first; needs --max-tokens."""

    shuffle_buffer: int = option(10_000, group="Data")
    """Documents held to shuffle a stream; part of the cache's identity."""

    pipeline: PipelineKind = option("pack", group="Data")
    """How documents become sequences. pack: joined by EOS and cut, without a gap; crop: one window
    of each, at a random place; truncate: the beginning of each. Documents shorter than a sequence
    are padded on the right with crop and truncate, and padding leaves no rows."""

    bin_dtype: BinDtype = option("uint16", group="Data")
    """Type of the token ids in a .bin file, little-endian."""

    batch_size: int = option(8, group="Model")
    """Sequences in one forward pass. Part of the cache's identity: kernels may round differently
    at another shape."""

    dtype: StoredDtype = option("auto", group=MAIN)
    """Type of the activations on disk. auto: that of the model. int8 and float8_e4m3 have a scale
    for each row and are read back as float32."""

    model_dtype: Dtype = option("auto", group="Model")
    """Type of the model's weights and arithmetic. auto: that of its checkpoint."""

    device: str = option("auto", group=MAIN)
    """Torch device, such as cpu or cuda:1. auto: cuda:LOCAL_RANK where there is one, else cpu."""

    load_in: LoadIn = option("none", group="Model")
    """Load the weights in 8 bits (LLM.int8) or 4 (NF4); needs bitsandbytes and accelerate. The
    weights are others then, and so is the cache. With 8bit a row depends on the other rows of its
    batch, so batches are kept the same: --max-tokens is rounded down to whole ones."""

    device_map: DeviceMap = option("none", group="Model")
    """auto: a model too large for one device, spread over the GPUs, then memory, then disk; needs
    accelerate, and one process a machine. The rows are those of one device of that kind."""

    max_memory: tuple[str, ...] = option((), group="Model", metavar="DEVICE=BYTES")
    """With --device-map auto, what the weights may take of a device, such as 0=60GiB or cpu=200GiB;
    repeatable. Devices not named are not used. Default: nearly all there is, which may leave too
    little for a batch."""

    offload_folder: str | None = option(None, group="Model", metavar="DIR")
    """With --device-map auto, a folder for weights that fit nowhere else and cannot be read from
    the model's own files."""

    seed: int = option(0, group="Data")
    """Seed of the order of documents and of the rows within a shard."""

    revision: str | None = option(None, group="Model")
    """Revision (branch, tag, commit) of a model on the hub."""

    gguf_file: str | None = option(None, group="Model", metavar="FILE")
    """GGUF file within MODEL to load the weights from."""

    shard_size: int | None = option(None, group="Storage")
    """Sequences in one shard, the unit of publishing and of the held-out split. Default: about a
    128th of the harvest in whole batches, at most 4 GiB over all hookpoints."""

    skip_positions: int = option(1, group="Rows")
    """Leave out the rows of the first n positions of each sequence: position 0 alone can hold most
    of the variance of a layer."""

    exclude_special: bool = option(False, group="Rows")
    """Leave out the rows of the tokenizer's special tokens (BOS, EOS, those of a chat template)."""

    exclude_tokens: tuple[str, ...] = option((), group="Rows", metavar="TOKEN")
    """Leave out the rows of this token, given by id or as the tokenizer writes it; repeatable."""

    max_norm_ratio: float | None = option(None, group="Rows")
    """Leave out a row everywhere if its norm at any hookpoint is over so many times the median of
    its shard there, or if it is not finite."""

    bos: Bos = option("auto", group="Data")
    """Whether each sequence begins with the BOS token. auto: if the tokenizer does so by itself
    with text; never with token ids or chats, which bring their own."""

    keep_order: bool = option(False, group="Data")
    """Take the documents in the dataset's order instead of a seeded one."""

    order: RowOrder = option("shuffled", group="Rows")
    """Order of the rows within a shard: shuffled, or sequence (as in the text)."""

    backend: Backend = option("memmap", group="Storage")
    """How the cache lies on disk. memmap: a safetensors file for each shard and hookpoint; zarr: a
    Zarr v3 array for each hookpoint. The rows are the same."""

    compress: Compression = option("none", group="Storage")
    """Compression of the activations, without loss. zstd: blosc over shuffled bytes, with --backend
    zarr only; about 0.7 of the size in bfloat16."""

    trust_remote_code: bool = option(False, group="Model")
    """Run Python code that the model's repository brings."""

    def __post_init__(self) -> None:
        """Refuse numbers and combinations that no harvest can carry out."""
        reject_url(self.out, "--out", "files are published by renaming them")
        for name, low in {
            "layer_stride": 1,
            "ctx_len": 2,
            "max_tokens": 1,
            "batch_size": 1,
            "seed": 0,
            "shard_size": 1,
            "skip_positions": 0,
            "shuffle_buffer": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{_option(name)} is too small", expected=f">= {low}", got=value)
        for name in ("ctx_len", "batch_size", "shard_size", "shuffle_buffer", "max_tokens"):
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
        self._check_documents()
        if self.max_norm_ratio is not None and not 1 <= self.max_norm_ratio < math.inf:
            raise ConfigError(
                "--max-norm-ratio leaves out more than half of the rows",
                expected=">= 1",
                got=self.max_norm_ratio,
            )
        if self.compress != "none" and self.backend != "zarr":
            raise ConfigError(
                f"--compress {self.compress} needs --backend zarr",
                expected="--compress none, or --backend zarr",
                got=f"--backend {self.backend}",
            )
        if self.hookpoint and (self.layers or self.layer_stride != 1):
            raise ConfigError(
                "--hookpoint excludes --layers and --layer-stride: it already names the modules",
                got="--hookpoint with --layers or --layer-stride",
                remedy="use a pattern such as --hookpoint 'layers.*.mlp'",
            )
        if self.layers and self.layer_stride != 1:
            raise ConfigError("--layers and --layer-stride cannot both be given")
        if any(layer < 0 for layer in self.layers):
            raise ConfigError("--layers counts from 0", got=self.layers)
        self._check_loading()

    def _check_loading(self) -> None:
        if self.load_in != "none" and self.gguf_file is not None:
            raise ConfigError(
                f"--load-in {self.load_in} with --gguf-file: a GGUF file is quantised already",
                remedy="leave one of them out",
            )
        if self.load_in == "8bit":
            if self.shard_size is not None and self.shard_size % self.batch_size:
                raise ConfigError(
                    "with --load-in 8bit a shard is made of whole batches",
                    expected=f"--shard-size a multiple of --batch-size {self.batch_size}",
                    got=self.shard_size,
                )
            if self.goal == 0:
                raise ConfigError(
                    "--max-tokens is less than one batch, which --load-in 8bit needs",
                    expected=f">= --batch-size {self.batch_size} x --ctx-len {self.ctx_len}",
                    got=self.max_tokens,
                )
        if self.device_map == "auto":
            if self.device != "auto":
                raise ConfigError(
                    "--device-map auto chooses the devices itself",
                    got=f"--device {self.device}",
                    remedy="--max-memory lists devices to use; CUDA_VISIBLE_DEVICES hides others",
                )
        elif self.max_memory or self.offload_folder is not None:
            raise ConfigError("--max-memory and --offload-folder need --device-map auto")
        for budget in self.max_memory:
            if not _BUDGET.fullmatch(budget):
                raise ConfigError(
                    "--max-memory is not a device and a size",
                    expected="DEVICE=SIZE, such as 0=60GiB or cpu=200GiB",
                    got=budget,
                )

    @property
    def goal(self) -> int | None:
        """Sequences of --max-tokens, rounded down to whole batches with --load-in 8bit."""
        if self.max_tokens is None:
            return None
        sequences = self.max_tokens // self.ctx_len
        return sequences - (sequences % self.batch_size if self.load_in == "8bit" else 0)

    @property
    def budgets(self) -> dict[int | str, str]:
        """Size by device, of --max-memory."""
        pairs = (budget.split("=") for budget in self.max_memory)
        return {int(device) if device.isdecimal() else device: size for device, size in pairs}

    def _check_documents(self) -> None:
        columns = {
            "--text-column": self.text_column if self.text_column != "text" else None,
            "--chat-column": self.chat_column,
            "--token-column": self.token_column,
        }
        named = [option for option, column in columns.items() if column is not None]
        if len(named) > 1:
            raise ConfigError(f"{' and '.join(named)} cannot be given together", got=columns)
        if self.streaming and self.max_tokens is None:
            raise ConfigError(
                "--streaming needs --max-tokens: a stream has no length to plan for",
                remedy="--max-tokens N; if the text ends before, the cache ends with it",
            )
        if self.weight and (not self.mix or len(self.weight) != 1 + len(self.mix)):
            raise ConfigError(
                "--weight is given once for DATASET and once for each --mix",
                expected=f"{1 + len(self.mix)} weights" if self.mix else "--mix",
                got=f"{len(self.weight)} weights",
            )
        if any(not 0 < weight < math.inf for weight in self.weight):
            raise ConfigError("--weight is not above 0", got=self.weight)
        twice = [d for d, n in Counter((self.dataset, *self.mix)).items() if n > 1]
        if self.mix and twice:
            raise ConfigError(
                f"{twice[0]} is mixed with itself, so its documents would be repeated",
                remedy="name each dataset once, and give it its --weight",
            )


@dataclass(frozen=True)
class PlanConfig(HarvestConfig):
    """A harvest that is planned and not carried out: its options, and these."""

    out: str = option(".", group=MAIN, metavar="DIR")
    """Folder the cache would go to; the free space of its disk is compared with the size."""

    measure: bool = option(False, group="Estimate")
    """Run a short trial harvest into a temporary folder beside OUT, which is removed, and tell the
    time and memory that one process takes."""

    measure_seconds: float = option(20.0, group="Estimate")
    """How long the trial's model runs, seconds; loading it comes before."""


@dataclass(frozen=True)
class ConvertConfig:
    """One conversion: a cache, and what the new one shall be."""

    source: str = option(group=MAIN)
    """Folder or URL of the cache to convert. It is only read, and may be unfinished."""

    out: str = option(group=MAIN, metavar="DIR")
    """Folder of the new cache: made when missing, finished when it holds this very conversion."""

    backend: AnyBackend = option("auto", group="Storage")
    """How the new cache lies on disk: memmap or zarr. auto: as the source."""

    compress: AnyCompression = option("auto", group="Storage")
    """Compression of the activations, with zarr only. auto: as the source if the backend stays,
    else none."""

    dtype: StoredDtype = option("auto", group=MAIN)
    """Type of the activations on disk. auto: that of the source."""

    def __post_init__(self) -> None:
        """Refuse an --out that cannot be written to."""
        reject_url(self.out, "--out", "files are published by renaming them")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
