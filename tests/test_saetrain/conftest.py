"""Fixtures: options of a small run, an SAE in training, and sparsify as the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cache_path(make_cache: Callable[..., Path]) -> Path:
    """A shared read-only cache: 4 shards of 128 rows at layers.0 and layers.1, width 16."""
    return make_cache()


@pytest.fixture
def options(cache_path: Path, tmp_path: Path) -> Callable[..., Any]:
    """A factory of options: two SAEs, 12 steps an epoch, AuxK from step 2 on."""
    from saetrain.config.fit_config import FitConfig

    def make(**changes: Any) -> FitConfig:
        small = {
            "cache": str(cache_path),
            "out": str(tmp_path / "run"),
            "num_latents": 48,
            "k": 3,
            "optimizer": "signum",
            "batch_size": 32,
            "lr": 0.01,
            "lr_warmup_steps": 4,
            "dead_after": 64,
            "save_every": 3,
            "log_every": 4,
            "device": "cpu",
        }
        return FitConfig(**small | changes)

    return make


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """A function that reads every reproducible file of a run."""

    def take(root: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.name not in ("run.json", "timings.jsonl", "fit.lock")
        }

    return take


@pytest.fixture(scope="session")
def batches() -> Callable[..., Any]:
    """A factory of 50 batches of 64 rows of width 16, in a dtype: [50, 64, 16].

    Rows are sparse combinations of 64 directions plus noise and a mean.
    """
    import torch

    def make(dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        directions = torch.randn(64, 16, generator=generator, dtype=torch.float64)
        codes = torch.rand(50, 64, 64, generator=generator, dtype=torch.float64)
        codes *= torch.rand(50, 64, 64, generator=generator) < 4 / 64
        noise = torch.randn(50, 64, 16, generator=generator, dtype=torch.float64)
        return (codes @ directions + 0.1 * noise + 0.5).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., Any]:
    """A factory of `SaeTrainer` objects."""
    import torch

    from saetrain.config.sae import SaeConfig, SaeEntry
    from saetrain.model.sae import Sae
    from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer

    def make(
        d_in: int = 16,
        num_latents: int = 64,
        k: int = 4,
        *,
        optimizer: str = "signum",
        lr: float = 0.01,
        warmup: int = 0,
        steps: int = 50,
        dtype: torch.dtype = torch.float32,
        dead_after: int = 10**9,
        variance: float = 1.0,
        **settings: Any,
    ) -> SaeTrainer:
        sae, step_settings = Sae(d_in, num_latents, k, dtype=dtype), StepSettings(**settings)
        norm = step_settings.decoder_norm
        return SaeTrainer(
            SaeEntry("layers.0", SaeConfig(d_in, num_latents, k), lr, seed=0),
            sae,
            make_optimizer(optimizer, sae, lr, warmup, steps, decoder_norm=norm),  # type: ignore[arg-type]
            dead_after,
            variance,
            settings=step_settings,
        )

    return make


@pytest.fixture(scope="session")
def accumulate() -> Callable[..., Any]:
    """A function that adds the gradient of a batch to an SAE's weights and returns the losses."""
    import torch

    from saetrain.config.sae import SaeConfig, SaeEntry
    from saetrain.model.losses import FVU_ONLY
    from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
    from saetrain.training.step import accumulate_gradient

    def call(
        sae: Any,
        x: Any,
        *,
        variance: float = 1.0,
        dead: Any = None,
        loss_config: Any = FVU_ONLY,
        step: int = 0,
        **settings: Any,
    ) -> Any:
        trainer = SaeTrainer(
            SaeEntry("layers.0", SaeConfig(sae.d_in, sae.num_latents, sae.k or 1), 0.1, seed=0),
            sae,
            make_optimizer("adam", sae, 0.1, 0, 50),
            0,
            variance,
            loss_config,
            StepSettings(**settings),
        )
        if dead is not None:
            trainer.dead_tracker.rows_since.copy_(torch.where(dead, 0, -1))
        return accumulate_gradient(trainer, x, step)

    return call


@pytest.fixture(scope="session")
def sparsify() -> ModuleType:
    """The sparsify package."""
    import sparsify

    return sparsify


@pytest.fixture(scope="session")
def make_sparse_coder(sparsify: ModuleType) -> Callable[..., Any]:
    """A factory of sparsify's SparseCoder."""

    def make(d_in: int, num_latents: int, k: int, **arguments: Any) -> Any:
        config = sparsify.SparseCoderConfig(num_latents=num_latents, k=k)
        return sparsify.SparseCoder(d_in, config, **arguments)

    return make


@pytest.fixture(scope="session")
def tape() -> Any:
    """The module `tape.py` in this folder: a substitute for CUDA graphs on a CPU."""
    spec = importlib.util.spec_from_file_location("tape", Path(__file__).with_name("tape.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
