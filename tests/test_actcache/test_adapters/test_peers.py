"""Other trainers run their own loops on exactly the batches of the stream."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from actcache.adapters import (
    DictionaryLearningBuffer,
    Feed,
    HookpointBatches,
    SaeLensBatches,
    open_feed,
)

STEPS = 12
D, M, K = 16, 64, 4  # d_in, num_latents, k
DTYPES = ["float32", "bfloat16", "int8"]


@contextmanager
def others_warnings() -> Iterator[None]:
    """Ignore warnings of other trainers at import and in their loops; warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def feed(make_cache: Callable[..., Path], request: pytest.FixtureRequest) -> Feed:
    root = make_cache(shards=6, dtype=getattr(request, "param", "float32"))
    return open_feed(root, "layers.0", batch_size=64, val_fraction=0.3, pool_rows=256)


def truth(feed: Feed, count: int = STEPS) -> list[torch.Tensor]:
    """Return the first batches of the stream. Each float32 [B, D]"""
    with feed.stream() as stream:
        return [next(stream).activations["layers.0"].float() for _ in range(count)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def saelens() -> Any:
    with others_warnings():
        return pytest.importorskip("sae_lens", reason="the extra `peers` is not installed")


def saelens_sae() -> Any:
    sizes = {"k": K, "d_in": D, "d_sae": M}
    return saelens().TopKTrainingSAE(saelens().TopKTrainingSAEConfig(**sizes))


def saelens_config() -> Any:
    from sae_lens.config import SAETrainerConfig

    rate = {"lr": 2e-2, "lr_end": 2e-3}
    return SAETrainerConfig(STEPS * 64, train_batch_size_samples=64, **rate)


@pytest.mark.parametrize("feed", DTYPES, indirect=True)
def test_saelens_trains_a_topk_sae_on_the_batches_of_the_stream(feed: Feed) -> None:
    saelens()
    from sae_lens.training.sae_trainer import SAETrainer

    seen, losses = [], []

    class Watched(SAETrainer):
        def step(self, batch: torch.Tensor) -> Any:
            seen.append(batch.clone())
            output = super().step(batch)
            losses.append(float(output.losses["mse_loss"]))
            return output

    torch.manual_seed(0)
    with others_warnings(), SaeLensBatches(feed) as batches:
        sae = Watched(saelens_config(), saelens_sae(), batches).fit()
        assert batches.state_dict() == {"epoch": 1, "step": STEPS - feed.plan.steps_per_epoch}
    assert same(seen, truth(feed))
    assert {batch.dtype for batch in seen} == {torch.float32}
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    with SaeLensBatches(feed.held_out()) as held_out:
        x = next(held_out)
    assert float((sae(x) - x).square().mean()) < float(x.square().mean())


def test_saelens_estimates_the_scale_from_the_same_batches_before_it_trains(feed: Feed) -> None:
    saelens()
    from sae_lens.training.sae_trainer import SAETrainer

    config, sae = saelens_config(), saelens_sae()
    config.n_batches_for_norm_estimate = 3
    sae.cfg.normalize_activations = "expected_average_only_in"
    with others_warnings(), SaeLensBatches(feed) as batches:
        SAETrainer(config, sae, batches).fit()
        assert same([next(batches)], truth(feed, STEPS + 4)[-1:])


def test_saelens_trains_several_saes_on_aligned_hookpoints(make_cache: Callable[..., Path]) -> None:
    saelens()
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    names = {"first": "layers.0", "second": "layers.1"}
    feed = open_feed(make_cache(), tuple(names.values()), batch_size=64, pool_rows=256)
    saes = {name: saelens_sae() for name in names}
    before = {name: sae.W_dec.detach().clone() for name, sae in saes.items()}
    with others_warnings(), HookpointBatches(feed) as batches:
        MultiSAETrainer(saelens_config(), saes, names, batches).fit()
    for name, sae in saes.items():
        assert not torch.equal(before[name], sae.W_dec)


@pytest.mark.parametrize("feed", DTYPES, indirect=True)
def test_dictionary_learning_trains_a_topk_sae_on_the_batches_of_the_stream(
    feed: Feed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "nnsight" not in sys.modules:  # imported for the type of an argument, never called here
        nnsight = types.ModuleType("nnsight")
        nnsight.LanguageModel = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nnsight", nnsight)
    with others_warnings():
        pytest.importorskip("dictionary_learning", reason="pip install --no-deps it to run this")
        from dictionary_learning.trainers.top_k import TopKTrainer
        from dictionary_learning.training import trainSAE

    seen, losses = [], []

    class Watched(TopKTrainer):
        def update(self, step: int, x: torch.Tensor) -> float:
            seen.append(x.clone())
            losses.append(super().update(step, x))
            return losses[-1]

    options = {
        "trainer": Watched,
        "steps": STEPS,
        "activation_dim": D,
        "dict_size": M,
        "k": K,
        "lr": 3e-3,
        "warmup_steps": 1,
        "layer": 0,
        "lm_name": "synthetic",
        "seed": 0,
        "device": "cpu",
    }
    with others_warnings(), DictionaryLearningBuffer(feed) as buffer:
        trainSAE(buffer, [options], STEPS, save_dir=str(tmp_path), device="cpu")
        saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
        assert saved["buffer"] == buffer.config
    assert same(seen, truth(feed))
    assert {batch.dtype for batch in seen} == {torch.float32}
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert saved["buffer"]["d_submodule"] == D
    assert saved["buffer"]["out_batch_size"] == 64
