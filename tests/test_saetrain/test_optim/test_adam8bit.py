"""`saetrain.optim.adam8bit` against bitsandbytes, and where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.optim import AdamConstants
from saetrain.optim.adam8bit import Adam8bit
from saetrain.optim.schedule import Schedule

LR, STEPS = 0.01, 6
SCHEDULE = Schedule("linear", 2, STEPS)


def parameters() -> dict[str, nn.Parameter]:
    """W has moments in 8 bits; b is too small for them."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in {"W": (96, 64), "b": (5,)}.items()
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("constants", [AdamConstants(), AdamConstants(0.5, 0.9, 0.1)])
def test_its_steps_are_those_of_bitsandbytes_and_its_moments_have_8_bits(
    constants: AdamConstants,
) -> None:
    from bitsandbytes.optim import Adam8bit as Theirs

    ours, theirs = parameters(), parameters()
    beta1, beta2, eps = constants
    adam = Adam8bit(ours, LR, SCHEDULE, constants)
    peer = Theirs(theirs.values(), lr=LR, betas=(beta1, beta2), eps=eps)
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        peer.param_groups[0]["lr"] = LR * SCHEDULE.factor(step)
        adam.step(step)
        peer.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = adam.state_tensors()
    assert {n for n, t in state.items() if t.dtype == torch.uint8} == {"W.state1", "W.state2"}


def refusal(optimizer: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        optimizer()
    return str(caught.value)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    told = refusal(lambda: Adam8bit(parameters(), LR, SCHEDULE))
    assert "--optimizer adam8bit needs bitsandbytes" in told
    assert "actcache[quantized]" in told


@pytest.mark.parametrize("silent", [True, False])
def test_a_device_on_which_it_cannot_step_is_named(
    monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    import bitsandbytes.optim

    def step(self: Any) -> None:
        if not silent:
            raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.optim.Adam8bit, "step", step)
    told = refusal(lambda: Adam8bit(parameters(), LR, SCHEDULE))
    assert "cannot run on cpu" in told
    assert ("does not move" if silent else "no kernel") in told


def test_the_command_ends_with_code_2_where_it_is_not_installed(
    options: Callable[..., FitConfig], tmp_path: Path
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('not here')\n")
    config = options()
    program = "from actcache_cli.main import saetrain; saetrain()"
    words = [sys.executable, "-c", program, "fit", config.cache, "--out", config.out]
    words += ["--optimizer", "adam8bit", "--k", "3", "--batch-size", "32", "--device", "cpu"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "actcache[quantized]" in done.stderr
    assert not Path(config.out).exists()
