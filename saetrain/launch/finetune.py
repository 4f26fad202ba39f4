"""`--finetune`: initialise SAEs from pretrained weights in a folder or a repository of the Hub.

The layout is that of sparsify and of run folders: `cfg.json` beside `sae.safetensors`, in the
folder itself (one SAE, also `best-STEP`), in subfolders named after hookpoints (a run, or SAEs of
sparsify), or one level below (`layers.9/k32-lr1e-3`, `layers.9/seed0`). Sizes and activation come
from the files; optimizer states, dead latents and the order of rows are new.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from actcache.core.json_codec import truncated_repr
from actcache.errors import ConfigError, FormatError, RunError
from actcache.filesystem.atomic import FileDigest
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig, SaeEntry, SaeOptions
from saetrain.formats.sparsify import (
    CONFIG,
    WEIGHTS,
    digest_weights,
    read_config,
    read_sae,
    read_sae_config,
)
from saetrain.model.activations import JumpRelu
from saetrain.model.sae import Sae
from saetrain.runs.checkpoint import best_folder, differing_file, newest_state
from saetrain.runs.own_files import is_plain
from saetrain.runs.record import RUN, PretrainedSource, read_run

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


class PretrainedSaes:
    """Pretrained SAEs of a folder or repository.

    Args:
        path: a folder, or USER/REPO of the Hub, optionally with @REVISION.

    Raises:
        ConfigError: the path is neither.
        RunError: the download failed.
        FormatError: the folder holds no SAE.
    """

    def __init__(self, path: str) -> None:
        self._path, self._folder = path, Path(path)
        self._repository: str | None = None
        self._revision: str | None = None
        if not self._folder.is_dir():
            match = _HUB_ID.fullmatch(path)
            if match is None or self._folder.exists():
                raise ConfigError(
                    f"--finetune {path} is no folder, and no repository of the Hub",
                    expected="the folder of a run or of an SAE, or USER/REPO[@REVISION]",
                )
            self._repository = match[1]
            patterns = [CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}"]
            self._folder = _download(match[1], match[2], patterns)
            self._revision = self._folder.name  # the commit
        found = [self._folder / CONFIG, *self._folder.glob(f"*/{CONFIG}")]
        found += self._folder.glob(f"*/*/{CONFIG}")
        self.names = sorted(
            str(file.parent.relative_to(self._folder)) for file in found if file.is_file()
        )
        """Relative folders of the SAEs; '.' is the folder itself."""
        if not self.names:
            raise FormatError(
                f"--finetune {path} holds no SAE",
                expected=f"{CONFIG} and {WEIGHTS}, in it or in folders named after hookpoints",
            )

    def configs(self, entries: Sequence[SaeEntry]) -> list[SaeConfig]:
        """Return the configuration of each SAE of a run, from entries made of the options alone.

        Raises:
            RunError: a hookpoint has no pretrained SAE, or several.
            ConfigError: the options contradict a pretrained SAE.
            FormatError: a configuration file is damaged.
        """
        return [self._config(*each) for each in zip(entries, self._assign(entries), strict=True)]

    def sources(self, entries: Sequence[SaeEntry]) -> tuple[PretrainedSource, ...]:
        """Return what run.json records of the weights: path, revision and digest.

        Raises:
            FormatError: the weights do not fit their configuration.
            RunError: they are not those that the checkpoint of their run names.
        """
        named = zip(entries, self._assign(entries), strict=True)
        return tuple(self._source(entry, name) for entry, name in named)

    def _assign(self, entries: Sequence[SaeEntry]) -> list[str]:
        """Return the folder of the pretrained SAE of each entry."""
        hookpoints = list(dict.fromkeys(entry.hookpoint for entry in entries))
        if "." not in self.names:
            return [self._name_of(entry.hookpoint, entry.setting) for entry in entries]
        if len(hookpoints) > 1:
            raise RunError(
                f"--finetune {self._path} is one SAE, the run is of several hookpoints",
                expected="one hookpoint, or a folder of SAEs named after hookpoints",
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
            f"--finetune {self._path} holds {several}",
            expected=f"{hookpoint}/{CONFIG}",
            got=" | ".join(below or self.names),
            remedy="name the folder of one" if below else "--hookpoint, or another path",
        )

    def _config(self, entry: SaeEntry, name: str) -> SaeConfig:
        folder, path = self._folder / name, self._recorded_path(name)
        require_norm(read_config(folder).normalize_decoder, path, entry.config, entry.options)
        return require_compatible(read_sae_config(folder), path, entry.config, entry.options)

    def _source(self, entry: SaeEntry, name: str) -> PretrainedSource:
        source = PretrainedSource(self._recorded_path(name), self._revision, FileDigest(0, ""))
        folder = folder_of(source)
        if not (folder / WEIGHTS).is_file():
            raise FormatError(f"{folder} holds no SAE", expected=f"{CONFIG} and {WEIGHTS}")
        source = dataclasses.replace(source, file=digest_weights(folder, entry.config))
        if self._repository is None:
            require_saved(folder)
        return source

    def _recorded_path(self, name: str) -> str:
        if self._repository is not None:
            return self._repository if name == "." else f"{self._repository}/{name}"
        return str(self._folder.resolve() / name)


def require_saved(folder: Path) -> None:
    """Compare an SAE that lies in the folder of a run with the digests of the run's checkpoint.

    Raises:
        RunError: a file differs.
        FormatError: a file of the run is damaged.
    """
    for root in list(folder.parents)[:3]:  # HOOKPOINT/SETTING/best-STEP
        if not is_plain(root / RUN):
            continue
        record, state = read_run(root), newest_state(root)
        for entry, sae in zip(record.saes, () if state is None else state.saes, strict=False):
            of_best = None if sae.best is None else best_folder(root / entry.name, sae.best.step)
            named = {root / entry.name: sae, of_best: sae.best}.get(folder)
            if named is not None and (path := differing_file(folder, named)):
                raise RunError(
                    f"{path} is not what the last checkpoint of {root} names",
                    remedy=f"resume that run first if it was stopped, or restore {path.name}",
                )


def folder_of(source: PretrainedSource) -> Path:
    """Return the local folder of weights, downloaded if necessary; raises `RunError`."""
    if source.revision is None:
        return Path(source.path)
    user, repository, *below = source.path.split("/")  # parsed by `PretrainedSource`
    files = ["/".join((*below, file)) for file in (CONFIG, WEIGHTS)]
    return _download(f"{user}/{repository}", source.revision, files).joinpath(*below)


def require_below(source: PretrainedSource, path: str) -> None:
    """Raise `FormatError` unless weights that run.json names are of the path of --finetune.

    So a run.json that comes from elsewhere names no other repository and no other folder.
    """
    if source.revision is not None:
        match = _HUB_ID.fullmatch(path)
        below = match is not None and f"{source.path}/".startswith(f"{match[1]}/")
    else:
        below = Path(source.path).is_relative_to(Path(path).resolve())
    if not below:
        raise FormatError(
            f"{RUN} names pretrained weights outside --finetune {path}",
            got=truncated_repr(source.path, 400),
            remedy="restore it from a copy, or start another run",
        )


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Download files of a repository of the Hub into the Hub's cache; return their folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client and its HTTP library raise many types
        raise RunError(
            f"--finetune {repository} is no folder here, and cannot be downloaded from the Hub",
            got=f"{type(error).__name__}: {truncated_repr(str(error), 400)}",
            remedy="check its name, the network and HF_TOKEN; or download it and name the folder",
        ) from error


def require_compatible(
    found: SaeConfig, path: str, requested: SaeConfig, options: SaeOptions
) -> SaeConfig:
    """Merge the configuration of pretrained weights with the options.

    Sizes and activation are those of the weights; an option at its default does not contradict
    them. Settings of the loss alone (Multi-TopK, prefixes, penalty) are those of the options.

    Args:
        found: configuration of the pretrained SAE.
        path: its path, for errors.
        requested: configuration that the options and the hookpoints' widths give.
        options: the options.

    Raises:
        ConfigError: the options contradict the weights.
    """
    defaults = SaeOptions()
    wrong = [
        (name, getattr(found, name), getattr(requested, name))
        for name in ("d_in", "width_out", "widths", "transcode", "skip_connection")
        if getattr(found, name) != getattr(requested, name)
    ]
    wrong += [
        (f"--{name}", getattr(found, name), getattr(options, name))
        for name in ("k", "activation")
        if getattr(options, name) not in (getattr(defaults, name), getattr(found, name))
    ]
    wrong += [  # the weights apply to raw rows, at the scale that they have
        (f"--{name.replace('_', '-')}", neutral, getattr(options, name))
        for name, neutral in (("input_scale", "none"), ("encoder_scale", "1"))
        if getattr(options, name) not in (None, neutral)
    ]
    explicit = options.num_latents or options.expansion_factor != defaults.expansion_factor
    if explicit and requested.num_latents != found.num_latents:
        wrong.append(("--num-latents", found.num_latents, requested.num_latents))
    if wrong:
        raise ConfigError(
            f"the options contradict the SAE in {path}",
            expected=", ".join(f"{name} {value}" for name, value, _ in wrong),
            got=", ".join(f"{name} {value}" for name, _, value in wrong),
            remedy="leave out the options that its cfg.json gives: sizes and activation (but give "
            "--transcode, --skip-connection and --crosscode)",
        )
    # A penalty that is steered to an L0 starts from the default weight, whatever the old one was.
    given = options.sparsity is not None or options.target_l0 is not None
    return dataclasses.replace(
        found,
        multi_topk=requested.multi_topk,
        matryoshka=requested.matryoshka,
        sparsity=requested.sparsity if given else found.sparsity,
        bandwidth=found.bandwidth if options.bandwidth is None else requested.bandwidth,
    )


def require_norm(unit_rows: bool, path: str, requested: SaeConfig, options: SaeOptions) -> None:
    """Refuse --decoder-norm unit for a decoder of other norms; raises `ConfigError`."""
    if options.decoder_norm == "unit" and not unit_rows and not requested.transcode:
        raise ConfigError(
            f"the decoder rows in {path} are of any norm (normalize_decoder is false)",
            expected="--decoder-norm free or fold",
            got=options.decoder_norm,
        )


@torch.no_grad()
def load_pretrained(sae: Sae, source: PretrainedSource, config: FitConfig) -> None:
    """Load pretrained weights into a new SAE.

    Args:
        sae: the SAE; it keeps its dtype and device.
        source: path and digest of the weights, from the run record.
        config: options of the run: --fresh-b-dec and --fresh-decoder.

    Raises:
        RunError: the file differs from the one that the run started from.
        FormatError: the weights are damaged, not finite, of another shape, or not those of
            --finetune.
    """
    assert config.finetune is not None
    require_below(source, config.finetune)
    folder = folder_of(source)
    path = folder / WEIGHTS
    loaded = read_sae(folder, expected=source.file)[0].state_dict()
    b_dec = sae.b_dec.clone()
    if isinstance(sae.activation, JumpRelu):
        loaded = sae.activation.from_saved(loaded)
    try:
        sae.load_state_dict(loaded)
    except RuntimeError as error:
        raise FormatError(
            f"{path} does not fit this run", got=truncated_repr(str(error))
        ) from error
    if config.fresh_b_dec:
        sae.b_dec.copy_(b_dec)
    if config.fresh_decoder:  # the initial values of `Sae`
        if sae.transcode:
            sae.W_dec.zero_()
        else:
            sae.W_dec.copy_(sae.W_enc)
            sae.normalise_decoder()
