"""Remedies for errors of the libraries that load models and datasets.

They report a full disk, a missing library or code that is not trusted in their own words, and name
options of Python that the command line does not have.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from actcache.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)
_SAYS_FULL = re.compile(r"no space left|not enough disk space|isn't enough disk space|quota exceed")

_EXTRAS = {"gguf": "demo", "accelerate": "quantized", "bitsandbytes": "quantized"}
"""Optional libraries that an extra of this package installs in tested versions."""
_PIP = re.compile(r"pip install (?:-[-\w]+ )*['\"]?([\w.\[\],<>=~!/:+-]*\w\]?)")
_WANTED = re.compile(r"\b(gguf|accelerate|bitsandbytes|sentencepiece|tiktoken|protobuf)\b")
_KNOWN = {
    "accelerate", "aqlm", "auto-gptq", "autoawq", "bitsandbytes", "causal-conv1d",
    "compressed-tensors", "datasets", "einops", "flash-attn", "gguf", "gptqmodel", "hqq",
    "huggingface-hub", "jinja2", "kernels", "librosa", "mamba-ssm", "optimum", "optimum-quanto",
    "peft", "pillow", "protobuf", "safetensors", "sentencepiece", "soundfile", "tiktoken", "timm",
    "tokenizers", "torch", "torchao", "torchvision", "transformers", "zstandard",
}  # fmt: skip
"""Libraries that messages of transformers and datasets recommend to install."""

_REMEDIES = {
    r"trust_remote_code": "read the Python code of its repository; if you trust it, add "
    "--trust-remote-code",
    r"gated repo|401 client|403 client|awaiting a review": "ask for access on the page of its "
    "repository, then run hf auth login",
    r"does not recognize this architecture|unrecognized configuration class": (
        "a newer version of transformers may support it: pip install -U transformers"
    ),
    r"HeaderTooLarge|HeaderTooSmall|IncompleteBuffer|InvalidHeader|PytorchStreamReader|central "
    r"directory|deserializing header": "the file is cut or damaged: download it again, with git "
    "lfs pull where it is a clone",
    r"no such file or directory: \S+\.(safetensors|bin)|no file named \S+\.(safetensors|bin)": (
        "a part of the checkpoint is missing: copy or download it again"
    ),
}
"""Remedy by what the message of a library holds."""


def remedy_of(error: BaseException) -> str | None:
    """Return what helps against an error of a library, as far as it is known; else None."""
    texts = [f"{type(cause).__name__}: {cause}" for cause in _causes(error)]
    missing = any(isinstance(cause, ImportError) for cause in _causes(error))
    for text in texts:  # which may quote a file: only libraries that are known are recommended
        if (found := _PIP.search(text)) and _name_of(found[1]).replace("_", "-") in _KNOWN:
            return _pip(found[1], text)
    for cause in _causes(error):
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return _pip(cause.name.partition(".")[0], str(cause))
    for text in texts:
        wants = missing or "install" in text
        if wants and (found := _WANTED.search(text)):
            return _pip(found[1], text)
        for pattern, remedy in _REMEDIES.items():
            if re.search(pattern, text, re.IGNORECASE):
                return remedy
    return None


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0]


def _pip(wanted: str, text: str) -> str:
    name = _name_of(wanted)
    if name in _EXTRAS:
        return f"pip install 'actcache[{'demo' if 'gguf' in text.lower() else _EXTRAS[name]}]'"
    return f"pip install {wanted if wanted == name else repr(wanted)}"


def full_disk(error: BaseException, variable: str) -> DiskFullError | None:
    """Return an error that names the disk, if a library could not write to its own folder.

    It is full, or may not be written to. None: the error has another cause.

    Args:
        error: what a library raised.
        variable: the environment variable that moves the folder it writes to, unless the error
            names a file.
    """
    folders = _folders()
    for cause in _causes(error):
        number, name = getattr(cause, "errno", None), getattr(cause, "filename", None)
        place, path = variable, None
        if isinstance(name, str | bytes):
            path = Path(os.fsdecode(name)).absolute()
            place = next((v for v, folder in folders.items() if path.is_relative_to(folder)), "")
        if place and (number in _FULL or _SAYS_FULL.search(str(cause).lower())):
            return DiskFullError(
                f"the disk of {place} is full: {folders[place]}",
                got=f"{cause}; {_free(folders[place])}",
                remedy=f"free space there, or set {place} to a folder on another disk",
            )
        # An existing file may be one that may not be read.
        denied = number in _DENIED and path is not None and not path.exists()
        if place and (number == errno.EROFS or denied):
            return DiskFullError(
                f"{place} cannot be written to: {folders[place]}",
                got=cause,
                remedy=f"set {place} to a folder that can be written to",
            )
    return None


def _folders() -> dict[str, Path]:
    """Return the folders of the Hugging Face libraries by the variable that moves each."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    home = Path(os.environ.get("HF_HOME", default)).expanduser()
    variables = {"HF_DATASETS_CACHE": "datasets", "HF_HUB_CACHE": "hub", "HF_HOME": ""}
    given = {name: os.environ.get(name) or home / below for name, below in variables.items()}
    return {name: Path(path).expanduser().absolute() for name, path in given.items()}


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{shutil.disk_usage(existing).free:,} bytes are free"


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception and what caused it, the outermost first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found
