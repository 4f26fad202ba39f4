"""`--finetune`: SAEs that begin with weights of others, from a folder or a repository of the Hub.

What is read is sparsify's layout, which is ours: `cfg.json` beside `sae.safetensors`, in the folder
itself (one SAE, also `best-STEP`), or in folders called after hookpoints (a run, what sparsify
trained or published), or one level below (`layers.9/k32-lr1e-3`, `layers.9/seed0`). Sizes and kind
come from there; optimisers, dead latents and the order of rows begin anew. Letters: D d_in,
M num_latents.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from actcache.core.json_codec import decode_json, truncated_repr
from actcache.errors import ConfigError, FormatError, RunError
from actcache.filesystem.atomic import FileDigest, digest_file
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.config.sae_options import SaeEntry, SaeOptions
from saetrain.formats.sparsify import (
    CONFIG,
    WEIGHTS,
    load_sae,
    read_config,
    read_sae_config,
    tensors_of,
)
from saetrain.model.sae import Sae
from saetrain.runs.record import PretrainedSource

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 1 << 20


class PretrainedSaes:
    """The SAEs that there are to begin with.

    Args:
        place: a folder, or USER/REPO of the Hub, with @REVISION or without.

    Raises:
        ConfigError: it is neither.
        RunError: the Hub does not give it.
        FormatError: there is no SAE in it.
    """

    def __init__(self, place: str) -> None:
        self._place, self._folder = place, Path(place)
        self._repository: str | None = None
        self._revision: str | None = None
        if not self._folder.is_dir():
            match = _HUB_ID.fullmatch(place)
            if match is None or self._folder.exists():
                raise ConfigError(
                    f"--finetune {place} is no folder, and no repository of the Hub",
                    expected="the folder of a run or of an SAE, or USER/REPO[@REVISION]",
                )
            self._repository = match[1]
            patterns = [CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}"]
            self._folder = _download(match[1], match[2], patterns)
            self._revision = self._folder.name  # the commit
        found = [self._folder / CONFIG, *self._folder.glob(f"*/{CONFIG}")]
        found += self._folder.glob(f"*/*/{CONFIG}")
        self.names = sorted(
            str(path.parent.relative_to(self._folder)) for path in found if path.is_file()
        )
        """Folders of SAEs within; '.' is the place itself."""
        if not self.names:
            raise FormatError(
                f"--finetune {place} holds no SAE",
                expected=f"{CONFIG} and {WEIGHTS}, in it or in folders called after hookpoints",
            )

    def kinds(self, entries: Sequence[SaeEntry]) -> list[SaeConfig]:
        """What each SAE of a run is, given what it would be without the weights.

        Raises:
            RunError: there is none for it, or several.
            ConfigError: the options contradict it.
            FormatError: its configuration is damaged.
        """
        return [self._kind(*each) for each in zip(entries, self._assign(entries), strict=True)]

    def sources(self, entries: Sequence[SaeEntry]) -> tuple[PretrainedSource, ...]:
        """What a run writes down of the weights that its SAEs begin with."""
        return tuple(map(self._source, self._assign(entries)))

    def _assign(self, entries: Sequence[SaeEntry]) -> list[str]:
        """Which SAE each begins with."""
        hookpoints = list(dict.fromkeys(entry.hookpoint for entry in entries))
        if "." not in self.names:
            return [self._name_of(entry.hookpoint, entry.setting) for entry in entries]
        if len(hookpoints) > 1:
            raise RunError(
                f"--finetune {self._place} is one SAE, the run is of several hookpoints",
                expected="one hookpoint, or a folder of SAEs called after hookpoints",
                got=", ".join(hookpoints),
                remedy=f"--hookpoint {hookpoints[0]}, for instance",
            )
        return ["."] * len(entries)

    def _name_of(self, hookpoint: str, setting: str) -> str:
        below = [n for n in self.names if n.startswith(f"{hookpoint}/") and "/best-" not in n]
        if setting and f"{hookpoint}/{setting}" in below:
            return f"{hookpoint}/{setting}"
        if hookpoint in self.names:
            return hookpoint
        if len(below) == 1:
            return below[0]
        several = f"several SAEs of {hookpoint}" if below else f"no SAE of {hookpoint}"
        raise RunError(
            f"--finetune {self._place} holds {several}",
            expected=f"{hookpoint}/{CONFIG}",
            got=" | ".join(below or self.names),
            remedy="name the folder of one" if below else "--hookpoint, or another place",
        )

    def _kind(self, entry: SaeEntry, name: str) -> SaeConfig:
        folder, place = self._folder / name, self._written(name)
        require_norm(read_config(folder).normalize_decoder, place, entry.config, entry.options)
        return require_compatible(read_sae_config(folder), place, entry.config, entry.options)

    def _source(self, name: str) -> PretrainedSource:
        source = PretrainedSource(self._written(name), self._revision, FileDigest(0, ""))
        path = folder_of(source) / WEIGHTS
        if not path.is_file():
            raise FormatError(f"{path.parent} holds no SAE", expected=f"{CONFIG} and {WEIGHTS}")
        return dataclasses.replace(source, file=digest_file(path))

    def _written(self, name: str) -> str:
        if self._repository is not None:
            return self._repository if name == "." else f"{self._repository}/{name}"
        return str((self._folder / name).resolve())


def folder_of(source: PretrainedSource) -> Path:
    """Where weights are on this machine; raises `RunError` if the Hub does not give them."""
    if source.revision is None:
        return Path(source.path)
    user, repository, *below = source.path.split("/")
    files = ["/".join((*below, file)) for file in (CONFIG, WEIGHTS)]
    return _download(f"{user}/{repository}", source.revision, files).joinpath(*below)


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a repository of the Hub, in the Hub's own cache: the folder of their commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client and what it stands on raise anything
        raise RunError(
            f"--finetune {repository} is no folder here, and cannot be had from the Hub",
            got=f"{type(error).__name__}: {truncated_repr(str(error), 400)}",
            remedy="look at its name, the network and HF_TOKEN; or download it and name the folder",
        ) from error


def require_compatible(
    found: SaeConfig, place: str, asked: SaeConfig, options: SaeOptions
) -> SaeConfig:
    """What an SAE is that begins with the weights of another.

    Sizes and kind are those of the weights. An option that is left at its default does not
    contradict them. What only the loss has (Multi-TopK, prefixes, penalty) is as asked.

    Args:
        found: the SAE that there is.
        place: where, for errors.
        asked: what the options make, given the hookpoints' widths.
        options: the options.

    Raises:
        ConfigError: they contradict each other.
    """
    defaults = SaeOptions()
    wrong = [
        (name, getattr(found, name), getattr(asked, name))
        for name in ("d_in", "width_out", "widths", "transcode", "skip_connection")
        if getattr(found, name) != getattr(asked, name)
    ]
    wrong += [
        (f"--{name}", getattr(found, name), getattr(options, name))
        for name in ("k", "activation")
        if getattr(options, name) not in (getattr(defaults, name), getattr(found, name))
    ]
    wrong += [  # these weights take raw rows, and are of the size that they are
        (f"--{name.replace('_', '-')}", getattr(defaults, name), getattr(options, name))
        for name in ("input_scale", "encoder_scale")
        if getattr(options, name) != getattr(defaults, name)
    ]
    said = options.num_latents or options.expansion_factor != defaults.expansion_factor
    if said and asked.num_latents != found.num_latents:
        wrong.append(("--num-latents", found.num_latents, asked.num_latents))
    if wrong:
        raise ConfigError(
            f"the options contradict the SAE in {place}",
            expected=", ".join(f"{name} {value}" for name, value, _ in wrong),
            got=", ".join(f"{name} {value}" for name, _, value in wrong),
            remedy="leave out what it says itself: its sizes and kind (--transcode, "
            "--skip-connection and --crosscode are to be said)",
        )
    return dataclasses.replace(
        found,
        multi_topk=asked.multi_topk,
        matryoshka=asked.matryoshka,
        sparsity=found.sparsity if options.sparsity is None else asked.sparsity,
        bandwidth=found.bandwidth if options.bandwidth is None else asked.bandwidth,
    )


def require_norm(unit_rows: bool, place: str, asked: SaeConfig, options: SaeOptions) -> None:
    """Refuse to scale rows to norm 1 that are not meant to have it; raises `ConfigError`."""
    if options.decoder_norm == "unit" and not unit_rows and not asked.transcode:
        raise ConfigError(
            f"the decoder rows in {place} are of any norm (normalize_decoder is false)",
            expected="--decoder-norm free or fold",
            got=options.decoder_norm,
        )


@torch.no_grad()
def load_pretrained(sae: Sae, entry: SaeEntry, source: PretrainedSource, config: FitConfig) -> None:
    """Put weights into an SAE that is as a new one begins.

    Args:
        sae: it keeps its type and device.
        entry: what it is.
        source: the weights, as they were when the run began.
        config: of the run: what is fresh.

    Raises:
        RunError: they are not those that the run began with.
        FormatError: they are damaged, or not finite.
    """
    folder = folder_of(source)
    path = folder / WEIGHTS
    got: object = digest_file(path) if path.is_file() else "nothing"
    if got != source.file:
        raise RunError(
            f"{path} is not what this run began with",
            expected=source.file,
            got=got,
            remedy="restore it, or begin another run",
        )
    require_header(path, tensors_of(entry.config))
    loaded = load_sae(folder).state_dict()
    for name, tensor in loaded.items():
        if not bool(tensor.isfinite().all()):
            raise FormatError(f"{path}: tensor {name} is not finite")
    b_dec = sae.b_dec.clone()
    sae.load_state_dict(loaded)
    if config.fresh_b_dec:
        sae.b_dec.copy_(b_dec)
    if config.fresh_decoder:  # as a new SAE begins: see `Sae`
        if sae.transcode:
            sae.W_dec.zero_()
        else:
            sae.W_dec.copy_(sae.W_enc)
            sae.normalise_decoder()


def require_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check a safetensors file's sizes before anything of it is mapped.

    Args:
        path: the file.
        shapes: of the tensors that it must hold, by the file's names.

    Raises:
        FormatError: they are others, or the file is not as long as they need.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise FormatError(f"{path} is no safetensors file", expected="a header", got=length)
        text = file.read(length)
    try:
        header = decode_json(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is no safetensors file", got=truncated_repr(str(error))
        ) from error
    entries = header if isinstance(header, dict) else {}
    for name, shape in shapes.items():
        said = entries.get(name)
        said = said if isinstance(said, dict) else {}
        each = _BYTES.get(str(said.get("dtype")))
        offsets = said.get("data_offsets")
        fits = (
            each is not None
            and said.get("shape") == list(shape)
            and isinstance(offsets, list)
            and [type(offset) for offset in offsets] == [int, int]
            and 0 <= offsets[0] <= offsets[1] <= size - 8 - length
            and offsets[1] - offsets[0] == math.prod(shape) * each
        )
        if not fits:
            raise FormatError(
                f"{path}: tensor {name}",
                expected=f"{list(shape)} in {' | '.join(_BYTES)}, within {size:,} bytes",
                got=truncated_repr(json.dumps(said), 200),
            )
