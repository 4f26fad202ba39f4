"""Options of a harvest, a plan and a conversion. Imports no torch: `--help` reads them."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from actcache.core.json_codec import check_fields
from actcache.core.options import MAIN, option, require_names
from actcache.errors import ConfigError
from actcache.filesystem.paths import reject_url

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
StoredDtype = Literal["auto", "bfloat16", "float16", "float32", "int8", "float8_e4m3"]
BinDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]
Bos = Literal["auto", "always", "never"]
PipelineKind = Literal["pack", "crop", "truncate"]
IdRows = Literal["auto", "whole", "joined"]
RowOrder = Literal["shuffled", "sequence"]
Backend = Literal["memmap", "zarr"]
Compression = Literal["none", "zstd"]
AnyBackend = Literal["auto", "memmap", "zarr"]
AnyCompression = Literal["auto", "none", "zstd"]
LoadIn = Literal["none", "8bit", "4bit"]
DeviceMap = Literal["none", "auto"]

_DAY = 86400
_BUDGET = re.compile(r"(cpu|[0-9]+)=([0-9.]+[KMG]i?B)")


def layer_number(text: str) -> int | str:
    """Parse a value of --layers: an integer, or 'middle'; raises `ValueError`."""
    return text if text == "middle" else int(text)


@dataclass(frozen=True)
class HarvestConfig:
    """Options of a harvest: the model, the dataset, the hookpoints and the cache to write."""

    model: str = option(group=MAIN)
    """Language model: a Hugging Face id, or a folder that `from_pretrained` loads."""

    dataset: str = option(group=MAIN)
    """Text: a Hugging Face dataset id, a save_to_disk folder, a .jsonl, .ndjson, .json, .csv, .tsv,
    .parquet, .txt or .md file (each also .gz, .zst, .xz), a folder of such files or a pattern such
    as 'parts/*.parquet', or a .bin file of little-endian token ids."""

    out: str = option(group=MAIN, metavar="DIR")
    """Folder of the cache. It is created if it does not exist; an unfinished harvest with the same
    options is resumed."""

    hookpoint: tuple[str, ...] = option((), group=MAIN, metavar="NAME")
    """Module whose output is harvested, by name or fnmatch pattern, such as layers.9.mlp or
    'layers.*.mlp'; repeatable. The model's base prefix may be omitted; a final ':in' selects the
    module's input. Names of TransformerLens, such as blocks.9.hook_resid_post, are translated. A *
    also matches dots: for the residual stream alone, use --layers. Default: the residual stream
    after every layer."""

    layers: tuple[int | Literal["middle"], ...] = option(
        (), group=MAIN, metavar="N|middle", parse=layer_number, alias="layer"
    )
    """Layer after which the residual stream is harvested, counted from 0, or from the last one
    (-1) backwards; middle: half of the number of layers; repeatable. Excludes --hookpoint."""

    layer_stride: int = option(1, group="Model")
    """Harvest every n-th layer only. Not with --layers or --hookpoint."""

    ctx_len: int = option(1024, group=MAIN)
    """Context length: tokens in one sequence."""

    max_tokens: int | None = option(None, group=MAIN)
    """Number of tokens to harvest, rounded down to whole sequences. Default: the whole dataset."""

    extend: bool = option(False, group="Storage")
    """Extend the cache in --out to a larger --max-tokens or to the whole dataset. All other options
    must be unchanged. An unfinished harvest is finished first."""

    split: str = option("train", group="Data", metavar="NAME")
    """Split of the dataset to read. Local files are the split train, of which slices such as
    train[:10%] can be read."""

    dataset_config: str | None = option(None, group="Data", metavar="NAME")
    """Configuration (subset) of a Hub dataset, such as wikitext-103-raw-v1. Default: the dataset's
    own."""

    dataset_revision: tuple[str, ...] = option((), group="Data", metavar="REVISION")
    """Revision (branch, tag or commit) of a Hub dataset; repeatable: of DATASET, then of each --mix
    in order. Default: their main branches. The commit is part of the cache's identity."""

    text_column: str = option("text", group="Data", metavar="NAME")
    """Column with the text of a document. In local files, doc.text is the field text of a column
    doc. Without a column text, one of token ids (input_ids, tokens, token_ids) or of conversations
    (messages, conversations, conversation) is read if it is the only one."""

    chat_column: str | None = option(None, group="Data", metavar="NAME")
    """Column with a conversation, as a list of messages with role and content, or from and value.
    The tokenizer's chat template renders it as text, and is given the columns that it reads, such
    as tools. Replaces --text-column."""

    date: str | None = option(None, group="Data", metavar="DATE")
    """Moment that a chat template reads from the clock, as an ISO 8601 date or date and time, such
    as 2026-01-31. Part of the cache's identity. Default: that of the cache in --out, or now."""

    token_column: str | None = option(None, group="Data", metavar="NAME")
    """Column with the token ids of a document, made with this model's tokenizer. Tokens that a
    column attention_mask marks as padding are left out. Replaces --text-column."""

    id_rows: IdRows = option("auto", group="Data")
    """With --pipeline pack, what the rows of --token-column are. joined: documents, which are
    joined and cut. whole: sequences already, which are kept whole, short ones padded, longer ones
    cut at the end. auto: whole if the rows that are looked at first have the length of a sequence,
    or one length, or each begin with BOS."""

    mix: tuple[str, ...] = option((), group="Data", metavar="DATASET")
    """Additional dataset to sample documents from, with the same split and columns; repeatable.
    Sampling ends at the first dataset that is exhausted; no document is repeated."""

    weight: tuple[float, ...] = option((), group="Data")
    """Sampling weight of DATASET, then of each --mix in order; repeatable, any positive numbers.
    Default: equal weights."""

    streaming: bool = option(False, group="Data")
    """Stream the dataset instead of downloading it first; needs --max-tokens. Local files are read
    from first to last, and no column is copied."""

    shuffle_buffer: int = option(10_000, group="Data")
    """With --streaming: documents held in memory to shuffle them. Part of the cache's identity."""

    max_bad_documents: float = option(0.01, group="Data", metavar="SHARE")
    """Share of the documents that may be left out because they cannot be used: the chat template
    refuses one, it has another type than its column, or a token is outside the model's vocabulary.
    They are counted by reason; over this share, the harvest stops. It is of the documents so far,
    at least of 1,000, and at the end of the text of all. 0: stop at the first."""

    pipeline: PipelineKind = option("pack", group="Data")
    """How documents become sequences. pack: concatenate them, separated by --separator, and cut
    into sequences without padding. crop: take one window of each, at a random position. truncate:
    take the beginning of each. crop and truncate pad short documents on the right; padding leaves
    no rows."""

    separator: str = option("auto", group="Data", metavar="auto|eos|bos|none|TOKEN")
    """With --pipeline pack: token after each document, given as eos, bos, none, by id or as the
    tokenizer writes it. auto: EOS; for the plain text of a chat model, whose EOS ends a turn, the
    token that its pretraining put there (end of text); none for conversations that the chat
    template ends with a token of its own."""

    bin_dtype: BinDtype = option("uint16", group="Data")
    """Integer type of the token ids in a .bin file, little-endian."""

    batch_size: int = option(8, group="Model")
    """Sequences in one forward pass. Part of the cache's identity, because kernels may round
    differently for another shape."""

    dtype: StoredDtype = option("auto", group=MAIN)
    """Storage dtype of the activations. auto: the dtype of the model. int8 and float8_e4m3 store
    one scale per row and are read back as float32."""

    model_dtype: Dtype = option("auto", group="Model")
    """Dtype of the model's weights and arithmetic. auto: the dtype of its checkpoint."""

    device: str = option("auto", group=MAIN)
    """Torch device, such as cpu or cuda:1. auto: cuda:LOCAL_RANK if there is a GPU, else cpu."""

    load_in: LoadIn = option("none", group="Model")
    """Quantise the weights to 8 bits (LLM.int8) or 4 bits (NF4); needs bitsandbytes and accelerate.
    This changes the activations, and so the cache's identity. With 8bit a row depends on the other
    rows of its batch, so --max-tokens is rounded down to whole batches."""

    device_map: DeviceMap = option("none", group="Model")
    """auto: distribute a model that is too large for one device over the GPUs, then CPU memory,
    then disk. Needs accelerate and a single process per machine. The rows are the same as on one
    device of that kind."""

    max_memory: tuple[str, ...] = option((), group="Model", metavar="DEVICE=BYTES")
    """With --device-map auto: memory for the weights on one device, such as 0=60GiB or cpu=200GiB;
    repeatable. Devices that are not listed are not used. Default: nearly all memory of every
    device, which may leave too little for a batch."""

    offload_folder: str | None = option(None, group="Model", metavar="DIR")
    """With --device-map auto: folder for weights that fit on no device and cannot be read from the
    model's own files. Default: none."""

    seed: int = option(0, group="Data")
    """Random seed of the order of documents and of the rows within a shard."""

    revision: str | None = option(None, group="Model")
    """Revision (branch, tag or commit) of a Hub model. Default: its main branch."""

    gguf_file: str | None = option(None, group="Model", metavar="FILE")
    """Name of a GGUF file in MODEL to load the weights from."""

    shard_size: int | None = option(None, group="Storage")
    """Sequences in one shard, the unit of publishing and of the held-out split. Default: about
    1/128 of the harvest, in whole batches, at most 4 GiB over all hookpoints."""

    skip_positions: int = option(1, group="Rows")
    """Number of leading positions of each sequence whose rows are dropped. Position 0 alone can
    account for most of a layer's variance."""

    exclude_special: bool = option(False, group="Rows")
    """Drop the rows of the tokenizer's special tokens (BOS, EOS, those of a chat template)."""

    exclude_tokens: tuple[str, ...] = option((), group="Rows", metavar="TOKEN")
    """Token whose rows are dropped, given by id or as the tokenizer writes it; repeatable."""

    max_norm_ratio: float | None = option(None, group="Rows")
    """Drop a row at all hookpoints if at any one its norm exceeds this multiple of the median norm
    of its shard, or is not finite. Default: keep all rows."""

    bos: Bos = option("auto", group="Data")
    """Whether each sequence begins with the BOS token. auto: for text, if the tokenizer adds it by
    default; never for token ids and chats, which contain their own."""

    keep_order: bool = option(False, group="Data")
    """Read documents in the dataset's order instead of a shuffled one."""

    order: RowOrder = option("shuffled", group="Rows")
    """Order of the rows within a shard. shuffled: random; sequence: as in the text."""

    backend: Backend = option("memmap", group="Storage")
    """File format of the activations. memmap: one safetensors file per shard and hookpoint. zarr:
    one Zarr v3 array per hookpoint. The rows are the same."""

    compress: Compression = option("none", group="Storage")
    """Lossless compression of the activations. zstd: blosc with byte shuffle, with --backend zarr
    only; about 0.7 of the size in bfloat16."""

    trust_remote_code: bool = option(False, group="Model")
    """Run Python code from the model's repository."""

    def __post_init__(self) -> None:
        """Reject invalid values and combinations of options."""
        check_fields(self)
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
        for name in (
            "ctx_len",
            "batch_size",
            "shard_size",
            "shuffle_buffer",
            "layer_stride",
            "max_tokens",
        ):
            value, high = getattr(self, name), 2**53 if name == "max_tokens" else 2**31 - 1
            if value is not None and value > high:
                raise ConfigError(f"{_option(name)} is too large", expected=f"<= {high}", got=value)
        if self.seed >= 2**32:
            raise ConfigError("--seed is too large", expected="< 2**32", got=self.seed)
        if self.skip_positions >= self.ctx_len:
            raise ConfigError(
                "--skip-positions drops every row of a sequence",
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
                "--max-norm-ratio below 1 drops more than half of the rows",
                expected=">= 1",
                got=self.max_norm_ratio,
            )
        if not 0 <= self.max_bad_documents <= 1:
            raise ConfigError(
                "--max-bad-documents is no share",
                expected="0 to 1, such as 0.01 for one in a hundred",
                got=self.max_bad_documents,
            )
        if self.compress != "none" and self.backend != "zarr":
            raise ConfigError(
                f"--compress {self.compress} needs --backend zarr",
                expected="--compress none, or --backend zarr",
                got=f"--backend {self.backend}",
            )
        if self.hookpoint and (self.layers or self.layer_stride != 1):
            raise ConfigError(
                "--hookpoint cannot be combined with --layers or --layer-stride",
                got="--hookpoint with --layers or --layer-stride",
                remedy="use a pattern such as --hookpoint 'layers.*.mlp'",
            )
        if self.layers and self.layer_stride != 1:
            raise ConfigError("--layers and --layer-stride cannot both be given")
        self._check_loading()

    def _check_loading(self) -> None:
        if self.load_in != "none" and self.gguf_file is not None:
            raise ConfigError(
                f"--load-in {self.load_in} with --gguf-file: a GGUF file is quantised already",
                remedy="omit one of them",
            )
        if self.load_in == "8bit":
            if self.shard_size is not None and self.shard_size % self.batch_size:
                raise ConfigError(
                    "--load-in 8bit needs shards of whole batches",
                    expected=f"--shard-size a multiple of --batch-size {self.batch_size}",
                    got=self.shard_size,
                )
            whole_batch = self.batch_size * self.ctx_len
            if self.max_tokens is not None and self.max_tokens < whole_batch:
                raise ConfigError(
                    "--load-in 8bit needs --max-tokens of at least one batch",
                    expected=f">= --batch-size {self.batch_size} x --ctx-len {self.ctx_len}",
                    got=self.max_tokens,
                )
        if self.device_map == "auto":
            if self.device != "auto":
                raise ConfigError(
                    "--device-map auto cannot be combined with --device",
                    got=f"--device {self.device}",
                    remedy="--max-memory lists devices to use; CUDA_VISIBLE_DEVICES hides others",
                )
        elif self.max_memory or self.offload_folder is not None:
            raise ConfigError("--max-memory and --offload-folder need --device-map auto")
        for budget in self.max_memory:
            if not _BUDGET.fullmatch(budget):
                raise ConfigError(
                    "--max-memory has an invalid value",
                    expected="DEVICE=SIZE, such as 0=60GiB or cpu=200GiB",
                    got=budget,
                )

    @property
    def budgets(self) -> dict[int | str, str]:
        """Sizes of --max-memory by device."""
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
        if self.pipeline != "pack":
            joins = {"--separator": self.separator, "--id-rows": self.id_rows}
            for option, value in joins.items():
                if value not in ("auto", "none", "whole"):
                    raise ConfigError(
                        f"{option} {value} has no effect with --pipeline {self.pipeline}: it joins "
                        "no documents",
                        expected="--pipeline pack",
                        got=f"--pipeline {self.pipeline}",
                    )
        if self.streaming and self.max_tokens is None:
            raise ConfigError(
                "--streaming needs --max-tokens: the length of a stream is unknown",
                remedy="add --max-tokens N; if the text ends earlier, so does the cache",
            )
        if self.weight and (not self.mix or len(self.weight) != 1 + len(self.mix)):
            raise ConfigError(
                "--weight must be given once for DATASET and once for each --mix",
                expected=f"{1 + len(self.mix)} weights" if self.mix else "--mix",
                got=f"{len(self.weight)} weights",
            )
        if any(not 0 < weight < math.inf for weight in self.weight):
            raise ConfigError("--weight must be above 0", got=self.weight)
        if len(self.dataset_revision) > 1 + len(self.mix):
            raise ConfigError(
                "--dataset-revision is given for more datasets than there are",
                expected=f"at most {1 + len(self.mix)}",
                got=len(self.dataset_revision),
            )
        if self.date is not None:
            try:
                datetime.fromisoformat(self.date)
            except ValueError:
                raise ConfigError(
                    "--date is no date",
                    expected="ISO 8601, such as 2026-01-31 or 2026-01-31T09:30:00",
                    got=self.date,
                ) from None
        twice = [d for d, n in Counter((self.dataset, *self.mix)).items() if n > 1]
        if self.mix and twice:
            raise ConfigError(
                f"{twice[0]} is mixed with itself, so its documents would be repeated",
                remedy="give each dataset once, and set its --weight",
            )


@dataclass(frozen=True)
class PlanConfig(HarvestConfig):
    """Options of a harvest whose size and time are estimated without running it."""

    out: str = option(".", group=MAIN, metavar="DIR")
    """Folder for the cache; the free space of its disk is compared with the estimated size."""

    measure: bool = option(False, group="Estimate")
    """Run a short trial harvest and report the time and memory of one process. It writes to a
    temporary folder beside OUT, which is removed."""

    measure_seconds: float = option(20.0, group="Estimate")
    """With --measure: duration of the trial in seconds, without the time to load the model."""

    def __post_init__(self) -> None:
        """Reject invalid values and combinations of options."""
        super().__post_init__()
        if not 0 < self.measure_seconds <= _DAY:
            raise ConfigError(
                "--measure-seconds is out of range",
                expected=f"above 0, at most {_DAY}",
                got=self.measure_seconds,
            )


@dataclass(frozen=True)
class ConvertConfig:
    """Options of a conversion: the cache to read, and the format of the new one."""

    source: str = option(group=MAIN)
    """Folder or URL of the cache to convert. It is not modified, and may be unfinished."""

    out: str = option(group=MAIN, metavar="DIR")
    """Folder of the new cache. It is created if it does not exist; an unfinished conversion with
    the same options is resumed."""

    backend: AnyBackend = option("auto", group="Storage")
    """File format of the new cache: memmap or zarr. auto: that of the source."""

    compress: AnyCompression = option("auto", group="Storage")
    """Lossless compression of the activations, with zarr only. auto: that of the source if the
    backend is unchanged, else none."""

    dtype: StoredDtype = option("auto", group=MAIN)
    """Storage dtype of the activations. auto: that of the source."""

    def __post_init__(self) -> None:
        """Reject folders without a name, and a URL as --out."""
        check_fields(self)
        require_names(self, "source", "out")
        reject_url(self.out, "--out", "files are published by renaming them")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
