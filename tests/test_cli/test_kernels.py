"""`saetrain kernels`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from actcache_cli.programs import saetrain_app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(saetrain_app(), ["kernels", "--device", "cpu", *arguments])


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAETRAIN_KERNELS", raising=False)


def paths(*arguments: str) -> dict[str, tuple[str, str]]:
    done = run("--json", *arguments)
    assert done.exit_code == 0, done.output
    return {c["function"]: (c["path"], c["how"]) for c in json.loads(done.stdout)}


def test_the_table_has_a_line_for_every_function() -> None:
    done = run("--explain")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["function", "path", "how"]
    assert [line.split()[0] for line in lines[1:]] == list(paths())


def test_the_backend_depends_on_the_shape_and_the_device() -> None:
    assert paths("--num-latents", "18432")["topk"] == ("torch", "tiles of 64")
    assert paths("--num-latents", "500")["topk"] == ("torch", "torch.topk")
    assert "256 tokens at once" in paths("--num-latents", "18432")["product"][1]
    assert "in pieces of 64" in paths()["scatter_outer"][1]


def test_backends_of_an_absent_gpu_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrain.kernels.backends._has_triton", lambda: True)
    found = paths("--device", "cuda")
    assert found["topk"][0] == found["scatter_outer"][0] == found["adam_update_"][0] == "triton"
    assert found["product"] == ("torch", "torch's linear, 8,192 tokens at once")
    assert "tiles of 32" in found["topk"][1]


def test_fallbacks_from_triton_to_torch_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrain.kernels.backends._has_triton", lambda: True)
    assert paths("--device", "cuda", "--k", "1025")["topk"] == ("torch", "torch.topk")
    many = paths("--device", "cuda", "--k", "4096")
    assert many["gather_sum"][0] == "torch"
    assert "dense products" in many["weight_gradients"][1]
    wide = paths("--device", "cuda", "--dtype", "float64")
    assert {wide[f][0] for f in ("topk", "batch_topk", "group_max", "sort_pairs")} == {"torch"}
    assert wide["adam_update_"][0] == "reference"
    assert "three passes" in paths("--device", "cuda", "--d-in", "5000")["signum_update_"][1]


def test_an_invalid_forced_backend_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAETRAIN_KERNELS", "reference")
    assert paths()["topk"][0] == "reference"
    monkeypatch.setenv("SAETRAIN_KERNELS", "cuda")
    done = run()
    assert done.exit_code != 0
    assert "SAETRAIN_KERNELS='cuda'" in done.output


def test_k_above_the_number_of_latents_is_rejected() -> None:
    done = run("--k", "9", "--num-latents", "8")
    assert done.exit_code != 0
    assert "--k is above --num-latents" in done.output
