"""A TopK training step in stages: of our kernels, of sparsify's package, and by dense autograd.

All three start from the same weights and take the same rows. On CUDA weights are float32 and
products bfloat16, as sparsify's autocast has them; on a CPU all is float32. Needs torch, triton on
CUDA, and for its side sparsify. Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import checkout  # noqa: F401  saetrain, from a plain checkout too
import torch
from ceilings import STAGES, OptimizerName
from torch import Tensor
from torch.nn.functional import linear

from saetrain.kernels import reference, select_backend
from saetrain.kernels.backends import backend_module
from saetrain.kernels.sorted_pairs import sort_pairs
from saetrain.kernels.update import UpdateOptions

Firing = Literal["uniform", "zipf"]
LR = 1e-4
MOMENTUM = 0.95
BETAS = (0.9, 0.999)
EPS = 1e-8


@dataclass(frozen=True)
class Problem:
    """Inputs of every side."""

    sizes: tuple[int, int, int, int]
    """(N, D, M, K)."""
    x: Tensor
    """Rows, float32 [N, D], of which every number is one of bfloat16 too."""
    W: Tensor
    """Both weights' start, float32 [M, D] of unit rows."""
    b_enc: Tensor
    """[M]: with "zipf", so that latents fire in proportion to 1 / rank."""

    @property
    def low(self) -> torch.dtype:
        """The dtype of products."""
        return torch.bfloat16 if self.x.is_cuda else torch.float32

    @property
    def variance(self) -> Tensor:
        """Denominator of the loss."""
        return (self.x - self.x.mean(0)).square().sum()


def make_problem(
    sizes: tuple[int, int, int, int], dead_tracker: Firing, device: torch.device
) -> Problem:
    """Pre-activations are about normal, of deviation 1, around the latents' biases."""
    N, D, M, K = sizes
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, device=device, generator=generator).bfloat16().float()
    W = torch.randn(M, D, device=device, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    share = torch.full((M,), K / M, device=device)
    if dead_tracker == "zipf":
        rank = torch.arange(1, M + 1, device=device, dtype=torch.float32)
        share = (K / (1 / rank).sum() / rank).clamp(max=0.95)
    # A normal number of mean b is above 0 as often as one of mean 0 is above -b.
    b_enc = torch.special.ndtri(share.double()).float()
    return Problem(sizes, x, W, b_enc)


class Side(Protocol):
    """Implementation to time. Stages may be called repeatedly after the first `step`."""

    name: str

    def stages(self) -> dict[str, Callable[[], object]]:
        """Functions to time, by name."""

    def step(self) -> Tensor:
        """Run one whole step; return its loss."""


class Ours:
    """The kernels themselves, by the path that the device has."""

    name = "ours"

    def __init__(self, problem: Problem, optimizer: OptimizerName) -> None:
        self.problem, self.optimizer = problem, optimizer
        self.ops = backend_module(select_backend(problem.x))
        low = problem.low
        self.x = problem.x.to(low)
        self.W = [problem.W.clone(), problem.W.clone()]  # encoder, decoder
        self.b = [problem.b_enc.clone(), torch.zeros_like(problem.x[0])]
        all_four = [*self.W, *self.b]
        adam = optimizer == "adam"
        self.first = [torch.zeros_like(w) if adam else w.clone() for w in all_four]
        self.second = [torch.zeros_like(w) for w in all_four] if adam else []
        self.bf16_copy = [w.to(low) for w in self.W] if low != torch.float32 else self.W
        self.scale = 2 / problem.variance
        self.number = 0
        self.gradients: list[Tensor] = []

    def stages(self) -> dict[str, Callable[[], object]]:
        """See `Side`."""
        return dict(
            zip(STAGES, (self.encode, self.decode, self.backward, self.update), strict=True)
        )

    def step(self) -> Tensor:
        """See `Side`."""
        self.encode()
        self.decode()
        self.backward()
        self.update()
        self.gradients.clear()
        return self.loss

    def encode(self) -> None:
        """Activations and latents, [N, K]."""
        self.centred = self.x - self.b[1].to(self.x.dtype)
        pre_acts = linear(self.centred, self.bf16_copy[0], self.b[0].to(self.x.dtype))  # [N, M]
        values, self.indices = self._op("topk")(pre_acts, self.problem.sizes[3])
        self.acts = values.relu_()

    def decode(self) -> None:
        """The reconstruction, [N, D]."""
        out = self.ops.gather_sum(self.acts, self.indices, self.bf16_copy[1])
        self.out = out.add_(self.b[1].to(out.dtype))

    def backward(self) -> None:
        """The loss, and the gradient of it."""
        error = self.out - self.x
        self.loss = error.float().square().sum() * (self.scale / 2)
        dY = error.mul_(self.scale.to(error.dtype))
        M = self.problem.sizes[2]
        g = self.ops.gather_dot(dY, self.indices, self.bf16_copy[1])
        g = g.masked_fill_(self.acts <= 0, 0)
        pairs = sort_pairs(self.indices, M)
        given = (self.acts, dY, g, self.centred, self.indices, M, pairs)
        dW_dec, dW_enc, db_enc = self.ops.weight_gradients(*given, dtype=torch.float32)
        along = (db_enc.to(self.x.dtype) @ self.bf16_copy[0]).float()  # [D]
        db_dec = dY.sum(dim=0, dtype=torch.float32) - along
        self.gradients[:] = [dW_enc, dW_dec, db_enc, db_dec]

    def update(self) -> None:
        """Projection, optimiser, unit norm and bfloat16 copies; nothing if the loss is not finite.

        The gradient's part along a row is taken out, so calling this again changes no work.
        """
        self.number += 1
        ok = self.loss.isfinite()
        bf16_copies = [*self.bf16_copy, None, None] if self.bf16_copy is not self.W else [None] * 4
        for place, w in enumerate([*self.W, *self.b]):
            options = UpdateOptions(
                lr=LR,
                unit=place == 1,
                mix=1 / self.number,
                momentum=MOMENTUM,
                beta1=BETAS[0],
                beta2=BETAS[1],
                eps=EPS,
                step=self.number,
                bf16_copy=bf16_copies[place],
                ok=ok,
            )
            grad, first = self.gradients[place], self.first[place]
            if self.optimizer == "signum":
                self._op("signum_update_")(w, first, grad, options)
            else:
                self._op("adam_update_")(w, first, self.second[place], grad, options)

    def _op(self, name: str) -> Any:
        return getattr(self.ops, name, None) or getattr(reference, name)


class Sparsify:
    """sparsify's module, in the order of its own trainer."""

    name = "sparsify"

    def __init__(self, problem: Problem, optimizer: OptimizerName) -> None:
        if not problem.x.is_cuda:
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # sparsify needs it on a CPU
        from sparsify import SparseCoder, SparseCoderConfig

        _, D, M, K = problem.sizes
        config = SparseCoderConfig(num_latents=M, k=K)
        self.sae = SparseCoder(D, config, problem.x.device, dtype=torch.float32)
        with torch.no_grad():
            self.sae.encoder.weight.copy_(problem.W)
            self.sae.W_dec.copy_(problem.W)
            self.sae.encoder.bias.copy_(problem.b_enc)
        self.x = problem.x
        self.optimizer: Any = torch.optim.Adam(self.sae.parameters(), lr=LR, betas=BETAS)
        if optimizer == "signum":
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            base = SignSGD(self.sae.parameters(), lr=LR)
            self.optimizer = ScheduleFreeWrapper(base, momentum=MOMENTUM)
            self.optimizer.train()

    def stages(self) -> dict[str, Callable[[], object]]:
        """See `Side`."""
        found = self._encode()
        acts, indices = found.top_acts.detach().requires_grad_(), found.top_indices
        output = self.sae(self.x)
        parameters = list(self.sae.parameters())
        gradients = torch.autograd.grad(output.fvu, parameters, retain_graph=True)

        def backward() -> object:
            return torch.autograd.grad(output.fvu, parameters, retain_graph=True)

        def update() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self._update()

        runs = (self._encode, lambda: self._decode(acts, indices), backward, update)
        return dict(zip(STAGES, runs, strict=True))

    def step(self) -> Tensor:
        """See `Side`."""
        self.sae.set_decoder_norm_to_unit_norm()
        output = self.sae(self.x)
        output.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss: Tensor = output.fvu.detach()
        return loss

    def _encode(self) -> Any:
        with _autocast(self.x):
            return self.sae.encode(self.x)

    def _decode(self, acts: Tensor, indices: Tensor) -> Any:
        with _autocast(self.x):
            return self.sae.decode(acts, indices)

    def _update(self) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Dense:
    """Both products in full, forward and backward, by autograd: SAELens's TopK step, with Adam."""

    name = "dense"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        start = (problem.W, problem.W, problem.b_enc, torch.zeros_like(problem.x[0]))
        self.parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        on_cuda = problem.x.is_cuda
        self.adam = torch.optim.Adam(self.parameters, lr=LR, betas=BETAS, fused=on_cuda)

    def stages(self) -> dict[str, Callable[[], object]]:
        """See `Side`."""
        acts, indices = (tensor.detach() for tensor in self._encode())
        loss = self._loss()
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True)

        def backward() -> object:
            return torch.autograd.grad(loss, self.parameters, retain_graph=True)

        def update() -> None:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient.clone()  # clipping writes to it
            self._update()

        runs = (self._encode, lambda: self._decode(acts, indices), backward, update)
        return dict(zip(STAGES, runs, strict=True))

    def step(self) -> Tensor:
        """See `Side`."""
        loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self._update()
        return loss.detach()

    def _loss(self) -> Tensor:
        out = self._decode(*self._encode())
        return (out - self.problem.x).square().sum() / self.problem.variance

    def _encode(self) -> tuple[Tensor, Tensor]:
        W_enc, _, b_enc, b_dec = self.parameters
        with _autocast(self.problem.x):
            pre_acts = linear(self.problem.x - b_dec, W_enc, b_enc)
            values, indices = torch.topk(pre_acts, self.problem.sizes[3], sorted=False)
            return values.relu(), indices

    def _decode(self, acts: Tensor, indices: Tensor) -> Tensor:
        _, W_dec, _, b_dec = self.parameters
        with _autocast(self.problem.x):
            dense = acts.new_zeros(len(acts), len(W_dec)).scatter(1, indices, acts)  # [N, M]
            return dense @ W_dec + b_dec

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad()


def make_sides(problem: Problem, optimizer: OptimizerName) -> list[Callable[[], Side]]:
    """Return constructors of the sides, ours first; sparsify's only if it is installed."""
    makers: list[Callable[[], Side]] = [lambda: Ours(problem, optimizer)]
    if find_spec("sparsify") is not None:
        makers.append(lambda: Sparsify(problem, optimizer))
    if optimizer == "adam":
        makers.append(lambda: Dense(problem))
    return makers


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda)


def quartiles_text(low: float, high: float) -> str:
    """Two figures, as the table has them."""
    digits = 2 if high >= 1 else 3
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(high) else ""
