"""The dense encoder and decoder against the reference. Letters: N tokens, D d_in, M num_latents."""

import pytest
import torch

from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.kernels import dense, dense_decode, dense_encode, reference
from saetrain.model.losses import OutputSlice, make_loss_config
from saetrain.model.sae import build_sae
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_step

SIZES = [(1, 1, 1), (7, 37, 19), (150, 17, 523), (0, 5, 4)]
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}


def leaves(N, D, M, dtype):
    """Make inputs of both functions: rows, weight, added bias, subtracted bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (N, D), "W": (M, D), "b": (M,), "b_dec": (D,), "acts": (N, M)}
    made = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def results(ops, given, *, subtracts=True):
    """Return outputs and all gradients of both functions, by name."""
    found = {}
    b_dec = given["b_dec"] if subtracts else None
    out = ops.dense_encode(given["rows"], given["W"], given["b"], b_dec)
    back = ops.dense_decode(given["acts"], given["W"], given["b_dec"])
    for name, output in (("encode", out), ("decode", back)):
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        of = torch.autograd.grad(output, list(given.values()), slope.to(output), allow_unused=True)
        found |= {f"{name} d {n}": g for n, g in zip(given, of, strict=True)}
        found[name] = output.detach()
    return found


class Ours:
    dense_encode, dense_decode = staticmethod(dense_encode), staticmethod(dense_decode)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("of", BOUND, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_every_gradient_match_the_reference(sizes, of, subtracts):
    given = leaves(*sizes, of)
    got = results(Ours, given, subtracts=subtracts)
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    want = results(reference, wide, subtracts=subtracts)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        assert got[name].dtype == of, name
        assert (got[name].double() - value).norm() <= BOUND[of] * value.norm(), name


def test_rows_that_require_no_gradient_cost_no_product(monkeypatch):
    given = leaves(7, 37, 19, torch.float32)
    products = []
    true = torch.Tensor.__matmul__
    monkeypatch.setattr("saetrain.kernels.dense.by_onednn", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a) or true(a, b))
    out = dense_encode(given["rows"].detach(), given["W"], given["b"], given["b_dec"])
    out.sum().backward()
    assert sorted(a.dim() for a in products) == [1, 2]  # d b_enc by W_enc, and dW_enc
    assert given["b_dec"].grad is not None


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_under_autocast_products_alone_are_rounded(name):
    given = leaves(40, 37, 19, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(Ours, given)
        want = results(reference, given)
    assert got[name].dtype == want[name].dtype
    for key, value in want.items():
        if key.startswith(name) and value is not None:
            assert got[key].dtype == value.dtype, key
            assert (got[key] - value).float().norm() <= 2**-6 * value.float().norm(), key


def test_two_runs_give_the_same_bits():
    given = leaves(150, 17, 523, torch.float32)
    first, second = results(Ours, given), results(Ours, given)
    assert all(first[n] is None or torch.equal(first[n], second[n]) for n in first)


def test_shapes_that_do_not_match_raise():
    given = leaves(7, 37, 19, torch.float32)
    with pytest.raises(ValueError, match="x must be"):
        dense_encode(given["acts"], given["W"], given["b"], None)


FORMS = {
    "autoencoder": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "crosscoder": {},
}
KINDS = {
    "topk": {},
    "multi-topk": {"multi_topk": True},
    "prefixes": {"matryoshka": (8, 16)},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu": {"activation": "relu", "sparsity": 0.1},
    "relu, prefixes": {"activation": "relu", "sparsity": 0.1, "matryoshka": (8, 16)},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.1},
    "gated": {"activation": "gated", "sparsity": 0.1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_that_onednn_multiplies_lies_in_memory_without_gaps(kind, form, monkeypatch):
    """AuxK is included. The product is replaced, so that any processor takes this way."""
    N, D, M, seen = 300, 12, 64, []

    def product(a, W, b, *_):
        seen.extend(m.is_contiguous() or m.T.is_contiguous() for m in (a, W))
        return torch.nn.functional.linear(a, W, b)

    monkeypatch.setattr(dense, "by_onednn", lambda *_: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    sizes = SaeConfig(D, M, 4, **{"threshold": 0.01, **KINDS[kind]}, **FORMS[form])
    parts = ()
    if form == "crosscoder":
        parts = (OutputSlice("a", 5, 5.0), OutputSlice("b", 7, 7.0))
    sae, losses = build_sae(sizes), make_loss_config(sizes, 0, parts)
    optimizer, settings = make_optimizer("adam", sae, 0.01, 0, 9), StepSettings(auxk_alpha=0.1)
    entry = SaeEntry("layers.0", sizes, 0.01, 0)
    trainer = SaeTrainer(entry, sae, optimizer, 1, float(D), losses, settings)
    trainer.dead_tracker.rows_since[:20] = 1
    width = D + sae.d_out if sae.transcode else D
    train_step(trainer, torch.randn(N, width, generator=torch.Generator().manual_seed(0)), 1)
    assert trainer.meter.pop_means()["auxk"] > 0
    assert len(seen) >= 2 * (5 if "relu" in kind or kind == "gated" else 1)
    assert all(seen)
