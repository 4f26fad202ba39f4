"""Cases that every backend of the kernels is tested with, and comparisons of their results.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k.
"""

import math
import mmap
import os
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from saetrain.kernels import (
    PrefixGroups,
    autoencode,
    batch_topk,
    grad_memory,
    group_max,
    make_selector,
    on_torch,
    reference,
    sparse_decode,
    sparse_encode,
    topk_selector,
)

VAST = 1 << 24  # numbers
UNRESERVED = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, from Python 3.13 on
PRIMITIVES = ("gather_sum", "gather_dot", "scatter_outer", "scatter_sum")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# A bfloat16 result is rounded once, by at most 2^-8. Triton's interpreter cuts digits off instead.
ONE_ROUNDING = 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2**-8
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: ONE_ROUNDING}


@dataclass(frozen=True)
class Case:
    name: str
    N: int
    D: int
    M: int
    K: int
    hits: str = "spread"

    def inputs(self, dtype, device):
        generator = torch.Generator().manual_seed(0)
        acts = torch.rand(self.N, self.K, generator=generator)
        acts[torch.rand(self.N, self.K, generator=generator) < 0.3] = 0.0
        if self.hits == "silent":
            acts.zero_()
        floats = {
            "acts": acts,
            "dY": torch.randn(self.N, self.D, generator=generator),
            "W": torch.randn(self.M, self.D, generator=generator),
            "b_enc": torch.randn(self.M, generator=generator)
            - (1000 if self.hits == "silent" else 0),
            "b_dec": torch.randn(self.D, generator=generator),
        }
        floats = {name: tensor.to(device, dtype) for name, tensor in floats.items()}
        return Inputs(indices=self.indices(generator).to(device), **floats)

    def indices(self, generator):
        """Draw indices [N, K]; "spread" repeats latents within and across rows by chance."""
        indices = torch.randint(self.M, (self.N, self.K), generator=generator)
        if self.hits == "repeated":
            indices[::2] = indices[::2, :1]
        if self.hits == "skewed":
            indices[:, 0] = self.M // 2
        if self.hits == "few":
            indices %= 5
        return indices


@dataclass(frozen=True)
class Inputs:
    acts: torch.Tensor  # [N, K]
    indices: torch.Tensor  # [N, K]
    dY: torch.Tensor  # noqa: N815  [N, D]
    W: torch.Tensor  # [M, D]
    b_enc: torch.Tensor  # [M]
    b_dec: torch.Tensor  # [D]

    def map(self, change):
        names = ("acts", "dY", "W", "b_enc", "b_dec")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def call(self, ops, primitive):
        arguments = {
            "gather_sum": (self.acts, self.indices, self.W),
            "gather_dot": (self.dY, self.indices, self.W),
            "scatter_outer": (self.acts, self.indices, self.dY, self.W.shape[0]),
            "scatter_sum": (self.acts, self.indices, self.W.shape[0]),
        }
        return getattr(ops, primitive)(*arguments[primitive])


CASES = (
    Case("one_of_everything", N=1, D=1, M=1, K=1),
    Case("odd_widths", N=7, D=37, M=19, K=5),
    Case("several_blocks", N=3, D=1030, M=11, K=9),
    Case("k_is_one", N=9, D=20, M=30, K=1),
    Case("repeated_in_a_row", N=8, D=33, M=10, K=4, hits="repeated"),
    Case("one_hot_latent", N=150, D=17, M=23, K=3, hits="skewed"),
    Case("most_latents_unhit", N=20, D=16, M=40, K=6, hits="few"),
    Case("all_acts_zero", N=6, D=24, M=9, K=3, hits="silent"),
)


@dataclass(frozen=True)
class Coding:
    """Sizes and arguments of a call of `autoencode`."""

    name: str
    N: int
    D: int
    E: int
    M: int
    K: int
    select: str = "largest"
    prefix_groups: PrefixGroups | None = None
    rows: tuple[int, ...] = ()
    reach: tuple[str, ...] = ("outs", "acts", "rows")  # by the backward pass

    def selector(self):
        def repeated(pre_acts):
            """Select the two largest latents of a row alternately."""
            indices = pre_acts.topk(2).indices.repeat(1, self.K)[:, : self.K]
            return pre_acts.gather(1, indices), indices

        def hot(pre_acts):
            indices = torch.arange(self.K, device=pre_acts.device).repeat(len(pre_acts), 1)
            return pre_acts.gather(1, indices), indices

        return {
            "largest": topk_selector(self.K),
            "chunks": topk_selector(self.K, 4),
            "batch": make_selector(lambda pre_acts: batch_topk(pre_acts, self.K)),
            "groups": make_selector(lambda pre_acts: group_max(pre_acts, self.K), by_token=True),
            "repeated": make_selector(repeated),
            "hot": make_selector(hot),
            "silent": topk_selector(self.K),
        }[self.select]

    def inputs(self, dtype, device):
        """Draw the inputs, by name; `subtracted` is None where the widths differ."""
        generator = torch.Generator().manual_seed(3)
        sizes = {
            "x": (self.N, self.D),
            "W_enc": (self.M, self.D),
            "b_enc": (self.M,),
            "subtracted": (self.D,),
            "W_dec": (self.M, self.E),
            "b_dec": (self.E,),
        }
        made = {n: torch.randn(*size, generator=generator) for n, size in sizes.items()}
        if self.select == "silent":
            made["b_enc"] -= 1000
        made = {n: tensor.to(device, dtype).requires_grad_() for n, tensor in made.items()}
        return made if self.D == self.E else made | {"subtracted": None}

    def results(self, inputs):
        """Return all outputs and gradients, by name."""
        like = inputs["x"]
        rows = torch.tensor(self.rows, device=like.device) if self.rows else None
        coded = autoencode(
            **inputs, selector=self.selector(), prefix_groups=self.prefix_groups, rows=rows
        )
        acts, indices = coded.top_acts, coded.top_indices
        # Slots are unordered, so gradients are defined on the dense activations.
        dense = torch.zeros(self.N, self.M, dtype=like.dtype, device=like.device)
        given = {"dense acts": dense.scatter_add(1, indices, acts)}
        given |= {f"out {n}": out for n, out in enumerate(coded.reconstructions)}
        given |= coded.rows._asdict() if rows is not None else {}
        loss = torch.zeros((), dtype=like.dtype, device=like.device)
        generator = torch.Generator().manual_seed(4)
        for name, output in given.items():
            kind = {"out": "outs", "dense": "acts"}.get(name.split(" ")[0], "rows")
            weight = torch.randn(output.shape, generator=generator).to(output)
            if kind in self.reach or name in self.reach:
                loss = loss + (output * weight).sum()
        leaves = {name: leaf for name, leaf in inputs.items() if leaf is not None}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, found, strict=True):
            zeros = torch.zeros_like(wanted[name])
            given[f"gradient of {name}"] = zeros if gradient is None else gradient
        return {name: tensor.detach() for name, tensor in given.items()}


ODD = {"N": 7, "D": 37, "E": 37, "M": 19, "K": 5}
BY_LATENT = PrefixGroups("latent", (4, 4, 11))
CODINGS = (
    Coding("one_of_everything", N=1, D=1, E=1, M=1, K=1, rows=(0,)),
    Coding("odd_widths", **ODD),
    Coding("rows_active_or_not", **ODD, rows=(18, 2, 7, 0)),
    Coding("k_is_one", N=9, D=20, E=20, M=30, K=1, rows=(3,)),
    Coding("wider_output", N=6, D=13, E=41, M=19, K=5, rows=(1, 4), prefix_groups=BY_LATENT),
    Coding("narrower_output", N=6, D=41, E=13, M=19, K=5, rows=(1, 4)),
    Coding("repeated_in_a_row", **ODD, select="repeated"),
    Coding("slots_of_a_batch", **ODD, select="batch", prefix_groups=BY_LATENT),
    Coding("groups", N=7, D=37, E=37, M=20, K=5, select="groups", prefix_groups=BY_LATENT),
    Coding("chunks_of_latents", **ODD, select="chunks"),
    Coding("all_acts_zero", **ODD, select="silent", rows=(0, 5), prefix_groups=BY_LATENT),
    Coding("an_empty_group", **ODD, prefix_groups=BY_LATENT, rows=(18, 2)),
    Coding("first_and_last_group_empty", **ODD, prefix_groups=PrefixGroups("latent", (0, 9, 19))),
    Coding("one_group", **ODD, prefix_groups=PrefixGroups("latent", ())),
    Coding("the_strongest_first", **ODD, prefix_groups=PrefixGroups("rank", (2,)), rows=(18, 2)),
    Coding("no_more_than_the_strongest", **ODD, prefix_groups=PrefixGroups("rank", (5,))),
    Coding("hot_latents", N=300, D=6, E=6, M=9, K=3, select="hot", prefix_groups=BY_LATENT),
    Coding("several_blocks", N=3, D=1030, E=1030, M=11, K=9, prefix_groups=BY_LATENT, rows=(10,)),
    Coding("only_rows_reached", **ODD, rows=(18, 2), reach=("rows",)),
    Coding("only_acts_reached", **ODD, rows=(18, 2), prefix_groups=BY_LATENT, reach=("acts",)),
    Coding("only_outs_reached", **ODD, rows=(18, 2), prefix_groups=BY_LATENT, reach=("outs",)),
    Coding("one_out_reached", **ODD, prefix_groups=BY_LATENT, reach=("out 2",)),
)


def pytest_generate_tests(metafunc):
    names = metafunc.fixturenames
    if "coding" in names:
        metafunc.parametrize("coding", CODINGS, ids=[coding.name for coding in CODINGS])
    if "case" in names:
        metafunc.parametrize("case", CASES, ids=[case.name for case in CASES])
    if "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=[str(dtype).split(".")[1] for dtype in DTYPES])
    if "primitive" in names:
        metafunc.parametrize("primitive", PRIMITIVES)


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def inputs(case, dtype, device):
    return case.inputs(dtype, device)


@pytest.fixture
def assert_primitive_matches():
    return check_primitive


def check_primitive(ops, primitive, inputs):
    """Compare every row with the reference in float64, relative to the sum of absolute values.

    That sum is exactly zero where nothing is summed, and there the result must be zero too.
    """
    got = inputs.call(ops, primitive)
    wide = inputs.map(torch.Tensor.double)
    want = wide.call(reference, primitive)
    size = wide.map(torch.abs).call(reference, primitive)
    assert got.dtype == inputs.W.dtype
    assert got.shape == want.shape
    rows = (len(want), -1)
    error = (got.double() - want).reshape(rows).norm(dim=1)
    bound = TOLERANCE[got.dtype] * size.reshape(rows).norm(dim=1)
    assert bool((error <= bound).all()), f"worst excess {(error - bound).max().item():.3g}"


@pytest.fixture
def decode_results(monkeypatch):
    def run(backend, inputs):
        """Return output and gradients of a backend, by name."""
        monkeypatch.setenv("SAETRAIN_KERNELS", backend)
        top_acts, W_dec, b_dec = leaves(inputs.acts, inputs.W, inputs.b_dec)
        out = sparse_decode(top_acts, inputs.indices, W_dec, b_dec)
        out.backward(inputs.dY)
        return {
            "output": out.detach(),
            "top_acts": top_acts.grad,
            "W_dec": W_dec.grad,
            "b_dec": b_dec.grad,
        }

    return run


@pytest.fixture
def encode_results(monkeypatch):
    def run(backend, inputs):
        """Return activations, as a dense [N, M], and gradients of a backend, by name."""
        monkeypatch.setenv("SAETRAIN_KERNELS", backend)
        x, W_enc, b_enc, b_dec = leaves(inputs.dY, inputs.W, inputs.b_enc, inputs.b_dec)
        k = min(inputs.acts.shape[1], len(W_enc))
        top_acts, top_indices = sparse_encode(x, W_enc, b_enc, b_dec, k)
        # Slots are unordered, so gradients are defined on the dense activations.
        dense = torch.zeros(len(x), len(W_enc), dtype=x.dtype, device=x.device)
        dense.scatter_(1, top_indices, top_acts.detach())
        top_acts.backward((top_acts.detach() + 1.0) * (top_indices % 7 - 3))
        return {
            "dense acts": dense,
            "x": x.grad,
            "W_enc": W_enc.grad,
            "b_enc": b_enc.grad,
            "b_dec": b_dec.grad,
        }

    return run


@pytest.fixture
def autoencode_results(monkeypatch):
    def run(backend, coding, dtype, device, *frozen):
        """Return outputs and gradients of a backend, by name; `frozen` inputs require none."""
        monkeypatch.setenv("SAETRAIN_KERNELS", backend)
        inputs = coding.inputs(dtype, device)
        for name in frozen:
            inputs[name] = inputs[name].detach()
        return coding.results(inputs)

    return run


@pytest.fixture
def make_coding():
    return Coding


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.fixture
def assert_same_results():
    def check(got, want, tolerance):
        assert got.keys() == want.keys()
        for name, expected in want.items():
            expected = expected.double()
            error = (got[name].double() - expected).norm().item()
            assert error <= tolerance * expected.norm().item(), f"{name} is off by {error:.3g}"

    return check


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill allocated memory with NaN, integers with -1, so that tests detect unwritten results.

    This includes results, scratch memory of kernels and recycled memory of gradients. Very large
    tensors of the host, of which a test writes little, are not filled.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (on_torch.decode, "reuse_memory"),
        (grad_memory, "reuse_memory"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(make):
    def call(*args, **options):
        tensor = make(*args, **options)
        if tensor.device.type == "cpu" and tensor.numel() > VAST:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(math.nan)
        return tensor if tensor.dtype in (torch.bool, torch.uint8) else tensor.fill_(-1)

    return call


@pytest.fixture
def lazily():
    """Return a function that makes tensors of zeros whose memory is allocated when written."""

    def make(*shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | UNRESERVED
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(*shape)

    return make


@pytest.fixture
def make_case():
    return Case


@pytest.fixture
def make_empty():
    def make(dtype, device="cpu"):
        return Case("no_tokens", N=0, D=5, M=4, K=3).inputs(dtype, device)

    return make


@pytest.fixture
def make_odd():
    def make(dtype, device="cpu"):
        return Case("odd_widths", N=7, D=37, M=19, K=5).inputs(dtype, device)

    return make
