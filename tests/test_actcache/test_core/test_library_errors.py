from __future__ import annotations

import errno
from pathlib import Path

import pytest

from actcache.core.library_errors import full_disk, remedy_of


def wrapped(cause: BaseException) -> BaseException:
    error = RuntimeError("cannot load")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint."),
            "pip install 'actcache[demo]'",
        ),
        (
            ValueError("accelerate is required when loading a GGUF file `pip install accelerate`."),
            "pip install 'actcache[demo]'",
        ),
        (
            ImportError("Using `device_map` requires Accelerate: `pip install 'accelerate>=1.1'`"),
            "pip install 'actcache[quantized]'",
        ),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "pip install einops"),
        (
            ImportError("requires packages not found: flash_attn. Run `pip install flash_attn`"),
            "pip install flash_attn",
        ),
        (ImportError("run `pip install -U 'hqq>=1.2'` first"), "pip install 'hqq>=1.2'"),
        (
            ValueError("You need to have sentencepiece or tiktoken installed to convert it."),
            "pip install sentencepiece",
        ),
        (ValueError("Please pass the argument `trust_remote_code=True`"), "--trust-remote-code"),
        (OSError("You are trying to access a gated repo."), "hf auth login"),
        (
            FileNotFoundError("No such file or directory: m/model-00002-of-00006.safetensors"),
            "a part of the checkpoint is missing",
        ),
        (
            OSError("Error no file named model.safetensors, or pytorch_model.bin, found in m."),
            "a part of the checkpoint is missing",
        ),
        (
            ValueError("Error while deserializing header: incomplete metadata, file not fully "),
            "cut or damaged",
        ),
        (
            ValueError("model type `new`, but Transformers does not recognize this architecture."),
            "pip install -U transformers",
        ),
    ],
)
def test_the_remedy_of_a_library_is_kept_in_our_words(error: Exception, remedy: str) -> None:
    for shown in (error, wrapped(error)):
        found = remedy_of(shown)
        assert found is not None
        assert remedy in found


def test_an_error_without_a_known_remedy_has_none() -> None:
    assert remedy_of(KeyError("hidden_size")) is None
    assert remedy_of(wrapped(ValueError("mean of an empty gguf"))) is None


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_folder_of_the_libraries_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for error in (FULL, wrapped(FULL), OSError("Not enough disk space. Needed: 4 GB")):
        found = full_disk(error, "HF_DATASETS_CACHE")
        assert found is not None
        assert found.exit_code == 10
        message = str(found)
        assert f"the disk of HF_DATASETS_CACHE is full: {tmp_path}/hf/datasets" in message
        assert "bytes are free" in message
        assert "set HF_DATASETS_CACHE to a folder on another disk" in message
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    full = OSError(errno.EDQUOT, "Quota exceeded", str(tmp_path / "hub" / "blob"))
    assert "the disk of HF_HUB_CACHE is full" in str(full_disk(full, "HF_HOME"))


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for number in (errno.EROFS, errno.EACCES):
        found = full_disk(OSError(number, "no", str(tmp_path / "modules")), "HF_HOME")
        assert f"HF_HOME cannot be written to: {tmp_path}" in str(found)
    assert full_disk(PermissionError(errno.EACCES, "no", "/elsewhere"), "HF_HOME") is None
    elsewhere = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/offloaded")
    assert full_disk(elsewhere, "HF_HOME") is None  # --offload-folder, for instance
