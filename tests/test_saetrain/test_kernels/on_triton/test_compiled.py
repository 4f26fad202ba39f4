"""The compiler itself, which needs no GPU: what the interpreter lets pass it may refuse, and
registers that do not suffice are nowhere else to be seen.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from saetrain.kernels import UpdateOptions

pytest.importorskip("triton")

SIZES = [(8192, 768, 24576, 32), (8192, 2048, 65536, 128), (32768, 4096, 131072, 64)]
REGISTERS = 65536
"""Of a processor of Hopper's; 8 of a thread are given at a time."""
ODD = [(37, 100, 999, 5), (3, 20000, 1500, 1), (64, 64, 300000, 1024)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
    # Triton 3.7 builds syntax trees as Python 3.15 will no longer let it.
    pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning"),
]


def ops():
    from saetrain.kernels import on_triton

    return on_triton


def compiled(launch, capability):
    """The kernel, compiled for a chip of NVIDIA's that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source_of(launch), target=target, options=dict(launch.options))


def source_of(launch):
    """What triton compiles; 3.2 has other words for it."""
    from triton.backends import compiler
    from triton.compiler import ASTSource

    constants = dict(launch.constants)
    if hasattr(compiler, "AttrsDescriptor"):
        divisible = {"tt.divisibility": launch.divisible, "tt.equal_to": ()}
        described = {"cls": "AttrsDescriptor", "arg_properties": divisible}
        attrs = compiler.AttrsDescriptor.from_dict(described)
        kinds = {name: kind for name, kind in launch.signature if kind != "constexpr"}
        return ASTSource(launch.kernel, kinds, constants, attrs)
    attrs = {(place,): [["tt.divisibility", 16]] for place in launch.divisible}
    return ASTSource(launch.kernel, dict(launch.signature), constants, attrs)


def loops(ptx):
    """The code up to its last jump back; what follows is run once by a program."""
    seen, end = set(), 0
    for found in re.finditer(r"bra\S*\s+(\$L\w+);|^(\$L\w+):", ptx, re.MULTILINE):
        jump, label = found.groups()
        if label:
            seen.add(label)
        elif jump in seen:
            end = found.end()
    assert end
    return ptx[:end]


def resources(cubin, folder):
    """What a program takes, by name: REG and STACK of a thread, and more.

    The disassembler comes with triton.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [tool, "--dump-resource-usage", file]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", told)}


def bytes_off_registers(cubin, folder):
    """Bytes of a thread's stack."""
    took = resources(cubin, folder)
    return took["STACK"] + took["LOCAL"]


@pytest.mark.parametrize(
    "precision", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.soak)]
)
def test_every_kernel_compiles_for_hopper_and_keeps_to_its_registers(
    launches, make_step, tmp_path, monkeypatch, precision
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    make_step(*SIZES[1], precision).run(ops())
    assert len({launch.kernel for launch in launches}) == 12
    ops().topk(make_step(*ODD[2], precision).pre_acts, ODD[2][3])  # the widest selection
    for launch in launches:
        kernel = compiled(launch, 90)
        assert bytes_off_registers(kernel.asm["cubin"], tmp_path) == 0, launch


def test_rows_are_read_sixteen_bytes_at_a_time_and_summed_without_a_barrier(
    launches, make_step, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    step = make_step(*SIZES[1], torch.bfloat16)
    ops().gather_sum(step.acts, step.indices, step.W)
    ops().weight_gradients(step.acts, step.dY, step.g, step.x, step.indices, len(step.W))
    ops().topk(step.pre_acts, 32)
    code = {}
    for launch in launches:
        name = launch.kernel.__name__
        code[name] = code.get(name, "") + compiled(launch, 90).asm["ptx"]
    loads = {name: ptx.count("ld.global.v4.b32") for name, ptx in code.items()}
    # As many as rows under way, of one matrix and of two, at least.
    assert loads["gather_sum_kernel"] >= 8
    assert loads["segments_kernel"] >= 8
    assert loads["tile_maxima_kernel"] >= 4
    for name in ("gather_sum_kernel", "segments_kernel"):
        assert "bar.sync" not in loops(code[name])


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
@pytest.mark.parametrize("width", [2048, 4096, 8192])
def test_at_least_two_updates_of_rows_share_a_processor_and_load_all_before_they_wait(
    launches, tmp_path, monkeypatch, optimizer, width
):
    """While one program waits for the sum of a row, another loads the next."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    w, m, v, grad = (torch.empty(64, width, device="meta") for _ in range(4))
    outputs = {
        "squares": torch.empty(64, device="meta"),
        "bf16_copy": torch.empty(64, width, dtype=torch.bfloat16, device="meta"),
        "ok": torch.empty((), dtype=torch.bool, device="meta"),
    }
    if optimizer == "signum":
        outputs["norms"] = torch.empty(64, device="meta")
        options = UpdateOptions(lr=1e-3, mix=0.1, momentum=0.9, unit=True, **outputs)
        ops().signum_update_(w, m, grad, options)
    else:
        options = UpdateOptions(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, unit=True, **outputs)
        ops().adam_update_(w, m, v, grad, options)
    (launch,) = launches
    kernel = compiled(launch, 90)
    took, threads = resources(kernel.asm["cubin"], tmp_path), 32 * dict(launch.options)["num_warps"]
    assert took["STACK"] + took["LOCAL"] == 0
    assert -(-took["REG"] // 8) * 8 * threads <= REGISTERS // 2
    if width <= 4096:  # wider rows are read three times
        loads, waits = (
            [found.start() for found in re.finditer(what, kernel.asm["ptx"])]
            for what in (r"ld\.global\.v4", r"bar\.sync")
        )
        assert max(loads) < min(waits)
        matrices = 3 if optimizer == "signum" else 4
        assert len(loads) == matrices * (width // threads // 4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_another_number_of_tokens_compiles_nothing_anew(launches, make_step, precision):
    make_step(8192, 2048, 65536, 32, precision).run(ops())
    known = set(launches)
    for N in (1, 2, 17, 1000, 4096, 100_000):
        make_step(N, 2048, 65536, 32, precision).run(ops())
    assert launches == known


@pytest.mark.parametrize("sizes", SIZES + ODD)
def test_every_size_is_within_the_limits_of_a_launch(launches, make_step, sizes):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        make_step(*sizes, dtype).run(ops())
    assert launches


def test_nothing_waits_for_the_device_and_no_product_of_pairs_and_columns_is_made(
    launches, make_step, allocations
):
    """A tensor on "meta" has no numbers to wait for."""
    N, D, M, K = 32768, 4096, 131072, 64
    step = make_step(N, D, M, K, torch.bfloat16)
    weights, sums = M * D * 2, N * K * D * 4 // 128
    with allocations() as made:
        ops().weight_gradients(step.acts, step.dY, step.g, step.x, step.indices, M)
    pairs = N * K * 8
    assert made.largest == weights
    assert made.total < 2 * weights + 2 * sums + 10 * pairs
    with allocations() as made:
        ops().gather_sum(step.acts, step.indices, step.W)
    assert made.total == N * D * 2
    with allocations() as made:
        ops().gather_dot(step.dY, step.indices, step.W)
    assert made.total <= N * K * (2 + 4 * D // 128)
    with allocations() as made:
        ops().topk(step.pre_acts, K)
    assert made.total < N * M * 2 // 16
    with allocations() as made:
        ops().batch_topk_threshold(step.pre_acts, N * K)
    assert made.total < N * M * 2 // 16
    with allocations() as made:
        options = UpdateOptions(lr=1.0, mix=1.0, momentum=0.9, unit=True)
        ops().signum_update_(step.W, step.W, step.W, options)
    assert made.total == 0
    assert launches
