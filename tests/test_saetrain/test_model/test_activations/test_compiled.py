"""Dense activations through torch.compile. Letters: N tokens, D d_in, M num_latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from actcache.errors import ConfigError
from saetrain.config.sae import SaeConfig
from saetrain.model.activations import compiled
from saetrain.model.losses import make_loss_config
from saetrain.model.sae import build_sae
from saetrain.training.step import require_compiler

D, M = 11, 30
pytestmark = pytest.mark.skipif(
    compiled.missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)
CONFIGS = {
    "jumprelu": SaeConfig(D, M, 1, activation="jumprelu", sparsity=0.3, threshold=0.4),
    "gated": SaeConfig(D, M, 1, activation="gated", sparsity=0.3),
}


def gradients(
    accumulate: Callable[..., Any], config: SaeConfig, rows: int, compiles: bool
) -> dict[str, Tensor]:
    """Compute the gradient of every parameter, and the loss, of the same batch at every call."""
    generator = torch.Generator().manual_seed(rows)
    sae = build_sae(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise.abs())
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    losses = accumulate(
        sae, x, variance=7.5, loss_config=make_loss_config(config, 0), compile=compiles
    )
    found = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return found | {"loss": losses.total(0.0)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_losses_and_gradients_are_equal_up_to_rounding(
    kind: str, accumulate: Callable[..., Any]
) -> None:
    config = CONFIGS[kind]
    known = None
    for rows in (13, 64, 5):
        found = gradients(accumulate, config, rows, True)
        expected = gradients(accumulate, config, rows, False)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
        known = known or dict(counters["stats"])
        assert dict(counters["stats"]) == known  # other rows compile nothing again
    assert known is not None
    assert known["unique_graphs"] > 0


def test_the_option_raises_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"--compile(.|\n)*C\+\+ compiler \(no-such-compiler\)"):
        require_compiler(torch.device("cpu"))
