"""Time of the sparse decoder, forward and backward, against other implementations.

    python benchmarks/bench_decoder.py [--device cuda] [--rounds 30]

Needs torch; triton on CUDA; measures sparsify's decoder as well if that is installed. Every result
is first checked against the float64 reference. Implementations are timed in turns, so that a slow
minute of the machine affects all of them. Latents are drawn with density 1 / (2 sqrt(m M)): a few
fire often and many rarely, as in training. Letters: N tokens, D d_in, M num_latents, K k.
"""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from timing import milliseconds
from torch import Tensor

if find_spec("saetrain") is None:  # a plain checkout, nothing installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saetrain.kernels import reference, sparse_decode
from saetrain.kernels.backends import backend_module
from saetrain.kernels.sorted_pairs import sort_pairs

SIZES = {
    "cpu": [(2048, 576, 4608, 32)],
    "cuda": [(2048, 576, 4608, 32), (8192, 768, 24576, 32), (8192, 2048, 65536, 32)],
}
DTYPES = (torch.float32, torch.bfloat16)
# Relative error of the whole result; the dense product and rivals may round bfloat16 twice.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Decoder = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Results = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """Inputs of one size: acts [N, K], indices [N, K], W [M, D], b_dec [D], dY [N, D]."""

    acts: Tensor
    indices: Tensor
    W: Tensor
    b_dec: Tensor
    dY: Tensor  # noqa: N815


class Contender(NamedTuple):
    """One line of the table: the primitive, its backend, and the function to time."""

    question: str
    path: str
    run: Callable[[], Tensor | Results]


def main() -> None:
    """Measure every size and dtype of the device, then print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted(SIZES), default=default)
    parser.add_argument("--rounds", type=int, default=30, help="timings of each contender")
    options = parser.parse_args()

    rivals: dict[str, Decoder] = {"dense": dense_decode}
    sparsify = sparsify_decode()
    if sparsify is not None:
        rivals["sparsify"] = sparsify
    lines = []
    for sizes in SIZES[options.device]:
        for dtype in DTYPES:
            inputs = make_inputs(sizes, dtype, options.device)
            lines += measure(inputs, rivals, options.rounds, sizes)
    print_table(options.device, lines)


def make_inputs(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Inputs:
    """Draw one problem, the same on every device."""
    N, D, M, K = sizes
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(N, K, generator=generator).square() * M).long()
    floats = (
        torch.rand(N, K, generator=generator),
        torch.randn(M, D, generator=generator),
        torch.randn(D, generator=generator),
        torch.randn(N, D, generator=generator),
    )
    acts, W, b_dec, dY = (tensor.to(device, dtype) for tensor in floats)
    return Inputs(acts, indices.to(device), W, b_dec, dY)


def measure(
    inputs: Inputs, rivals: dict[str, Decoder], rounds: int, sizes: tuple[int, int, int, int]
) -> list[list[str]]:
    """Check every contender, time them in turns, and return the table's lines."""
    dtype = inputs.W.dtype
    contenders = [*primitive_contenders(inputs), *decoder_contenders(inputs, rivals)]
    errors = check(inputs, contenders)
    timings: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, times in zip(contenders, timings, strict=True):
            times.append(milliseconds(contender.run, inputs.W.device))
    lines = []
    for contender, times, error in zip(contenders, timings, errors, strict=True):
        low, median, high = statistics.quantiles(times, n=4)
        name = str(dtype).removeprefix("torch.")
        lines.append(
            [
                str(sizes),
                name,
                contender.question,
                contender.path,
                f"{median:.3f}",
                f"{high - low:.3f}",
                error,
            ]
        )
    return lines


def primitive_contenders(inputs: Inputs) -> list[Contender]:
    """Return each primitive in each of our backends, and the sort that two of them share."""
    acts, indices, W, _, dY = inputs
    M = len(W)
    pairs = sort_pairs(indices, M)
    found = [Contender("sort_pairs", "any", partial(sort_pairs, indices, M))]
    for path in our_paths(W.device):
        ops = backend_module(path)
        found += [
            Contender("gather_sum", path, partial(ops.gather_sum, acts, indices, W)),
            Contender("gather_dot", path, partial(ops.gather_dot, dY, indices, W)),
            Contender(
                "scatter_outer", path, partial(ops.scatter_outer, acts, indices, dY, M, pairs)
            ),
        ]
    return sorted(found, key=lambda contender: contender.question)


def decoder_contenders(inputs: Inputs, rivals: dict[str, Decoder]) -> list[Contender]:
    """Forward and backward: the output and the gradients of acts, W and b_dec."""
    decoders = {path: our_decode(path) for path in our_paths(inputs.W.device)} | rivals

    def forward_and_backward(decode: Decoder) -> Results:
        leaves = [t.detach().requires_grad_() for t in (inputs.acts, inputs.W, inputs.b_dec)]
        acts, W, b_dec = leaves
        out = decode(acts, inputs.indices, W, b_dec)
        return (out, *torch.autograd.grad(out, leaves, inputs.dY))

    return [
        Contender("decode + gradients", path, partial(forward_and_backward, decode))
        for path, decode in decoders.items()
    ]


def our_paths(device: torch.device) -> list[str]:
    """Return the paths worth timing on a device."""
    return ["torch", "triton"] if device.type == "cuda" else ["torch"]


def our_decode(path: str) -> Decoder:
    """Return `sparse_decode` with its path forced."""

    def decode(acts: Tensor, indices: Tensor, W: Tensor, b_dec: Tensor) -> Tensor:
        os.environ["SAETRAIN_KERNELS"] = path
        return sparse_decode(acts, indices, W, b_dec)

    return decode


def dense_decode(acts: Tensor, indices: Tensor, W: Tensor, b_dec: Tensor) -> Tensor:
    """Scatter acts into [N, M] and multiply by all of W."""
    dense = torch.zeros(len(acts), len(W), dtype=W.dtype, device=W.device)  # [N, M]
    return torch.addmm(b_dec, dense.scatter_add(1, indices, acts), W)


def sparsify_decode() -> Decoder | None:
    """Return sparsify's own choice of decoder, or None where it is not installed."""
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # sparsify needs it on a CPU
    try:
        from sparsify.utils import decoder_impl
    except ImportError:
        return None

    def decode(acts: Tensor, indices: Tensor, W: Tensor, b_dec: Tensor) -> Tensor:
        out: Tensor = decoder_impl(indices, acts, W.mT) + b_dec
        return out

    return decode


def check(inputs: Inputs, contenders: list[Contender]) -> list[str]:
    """Return each contender's largest relative error over its results, or stop if it is wrong."""
    acts, indices, W, b_dec, dY = inputs
    wide = [tensor.double() for tensor in (acts, W, b_dec, dY)]
    out = reference.gather_sum(wide[0], indices, wide[1])
    d_acts = reference.gather_dot(wide[3], indices, wide[1])
    dW = reference.scatter_outer(wide[0], indices, wide[3], len(W))
    want: dict[str, Results] = {
        "gather_sum": (out,),
        "gather_dot": (d_acts,),
        "scatter_outer": (dW,),
        "decode + gradients": (out + wide[2], d_acts, dW, wide[3].sum(dim=0)),
    }
    errors = []
    for question, path, run in contenders:
        if question not in want:
            errors.append("")
            continue
        got = run()
        got = (got,) if isinstance(got, Tensor) else got
        pairs = zip(got, want[question], strict=True)
        worst = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
        if not worst <= TOLERANCE[W.dtype]:
            raise SystemExit(f"{question} by {path} in {W.dtype} is wrong: error {worst:.2g}")
        errors.append(f"{worst:.1e}")
    return errors


def print_table(device: str, lines: list[list[str]]) -> None:
    """Print aligned columns, then the machine and the versions."""
    heads = ["(N, D, M, K)", "dtype", "what", "path", "median ms", "IQR ms", "error"]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    for line in [heads, *lines]:
        left = [cell.ljust(width) for cell, width in zip(line[:4], widths[:4], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
        print("  ".join(left + right))
    if device == "cuda":
        import triton

        machine = f"{torch.cuda.get_device_name()}, triton {triton.__version__}"
    else:
        machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, python {platform.python_version()}")


if __name__ == "__main__":
    main()
