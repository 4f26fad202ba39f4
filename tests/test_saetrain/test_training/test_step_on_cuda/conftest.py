"""A CUDA device that need not exist, which records what a step does on it.

Tensors "on" it are on torch's device "meta": they have shapes and no numbers, so nothing can wait
for a number, and sizes that are trained at cost nothing. The code that is run reads their device as
"cuda:0" and takes its CUDA path, torch's optimisers too; launches of Triton's kernels are checked
and not made. What the kernels compute is tested elsewhere; this is about the calls around them.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
PAGE = 512
"""Bytes that torch's allocator rounds up to."""


class WaitedError(AssertionError):
    """A call would make the host wait for the device."""


READERS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "masked_select",
    "multinomial",
    "nonzero",
    "repeat_interleave",  # without an output_size, which is another overload
    "unique_consecutive",
    "unique_dim",
}
"""Operators whose result, or its size, the host gets from the device's numbers."""

PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.mm,
}
"""What autocast rounds, of all that is used here."""

COPIERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""What makes a tensor of numbers that the host has: on a device, by a copy that is waited for."""


class Named(TorchFunctionMode):
    """Calls "meta" by the name "cuda:0", both ways.

    Args:
        watches: whether to refuse what copies numbers there.
    """

    def __init__(self, *, watches: bool) -> None:
        super().__init__()
        self._watches = watches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return CUDA if args[0].is_meta else func(*args)
        if func == Tensor.is_cuda.__get__:
            return args[0].is_meta
        if func == Tensor.is_meta.__get__:
            return False
        if func is Tensor.cuda:
            return args[0].to("meta", non_blocking=kwargs.get("non_blocking", False))
        args, kwargs = tree_map_only((torch.device, str), _to_meta, (args, kwargs))
        to_device = kwargs.get("device") == "meta" or (
            func is Tensor.new_tensor and args[0].is_meta
        )
        if self._watches and func in COPIERS and to_device:
            raise WaitedError(f"{func.__name__} copies a number to the device; use full or zeros")
        if func in PRODUCTS and torch.is_autocast_enabled("cuda"):
            args = tree_map_only(Tensor, _rounded, args)
        return func(*args, **kwargs)


def _to_meta(device):
    if isinstance(device, torch.device):
        return "meta" if device.type == "cuda" else device
    return "meta" if device.partition(":")[0] == "cuda" else device


def _rounded(tensor):
    if tensor.is_meta and tensor.dtype == torch.float32:
        return tensor.to(torch.get_autocast_dtype("cuda"))
    return tensor


class Taken(NamedTuple):
    """Memory of the device that was taken once."""

    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operator: str


class Device(TorchDispatchMode):
    """Refuses what would make the host wait, and counts memory.

    Args:
        pinned: memory of the host from which the device copies by itself.
        refuses: False: it counts only.
    """

    def __init__(self, pinned: tuple[Tensor, ...] = (), *, refuses: bool = True) -> None:
        super().__init__()
        self._refuses = refuses
        self._pinned = [tensor.untyped_storage() for tensor in pinned]
        self._live: dict[int, tuple[Any, Taken]] = {}
        self.taken: list[Taken] = []
        self.now = self.most = 0
        self.at_most: list[Taken] = []
        """What was there when it was most."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # here "meta" is called so
            return self._watch(operator, args, kwargs or {})

    def _watch(self, operator, args, kwargs):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._refuses:
            self._check(operator, args, kwargs, given)
        result = None if _in_place(operator) else operator(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.keep(tensor, str(operator))
        return result

    def _check(self, operator, args, kwargs, given):
        name = operator._schema.name.removeprefix("aten::")
        here = [tensor for tensor in given if tensor.is_meta]
        host = [tensor for tensor in given if not tensor.is_meta]
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, args, kwargs, here)
        elif here:
            if name in READERS and "output_size" not in kwargs:
                raise WaitedError(f"{operator} looks at numbers on the device")
            if name.startswith("index") and any(
                tensor.dtype in (torch.bool, torch.uint8)
                for tensor in tree_leaves(args[1])
                if isinstance(tensor, Tensor)
            ):
                raise WaitedError(f"{operator} counts a mask; use where or masked_fill")
            # One number of the host goes to a kernel with its other arguments.
            if any(tensor.dim() for tensor in host):
                raise WaitedError(f"{operator} is given tensors of the host and of the device")

    def _check_copy(self, name, args, kwargs, here):
        if name == "copy_":
            to, source = args[:2]
            free = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            to_device = to.is_meta
        else:
            source, free = args[0], kwargs.get("non_blocking", False)
            kind = kwargs.get("device")
            to_device = source.is_meta if kind is None else torch.device(kind).type == "meta"
        if source.is_meta and not to_device:
            raise WaitedError("numbers are copied from the device to the host")
        if to_device and not source.is_meta:
            pinned = any(source.untyped_storage()._cdata == s._cdata for s in self._pinned)
            if not (free and pinned):
                raise WaitedError(
                    f"{tuple(source.shape)} numbers are copied to the device, and waited for"
                )

    def keep(self, tensor: Tensor, operator: str = "") -> None:
        """Count the memory of a tensor as long as it is there."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self._live:
            return
        size = -(-storage.nbytes() // PAGE) * PAGE
        taken = Taken(size, tuple(tensor.shape), tensor.dtype, operator)
        self._live[number] = (weakref.ref(storage, lambda _: self._drop(number)), taken)
        self.taken.append(taken)
        self.now += size
        if self.now > self.most:
            self.most = self.now
            self.at_most = [taken for _, taken in self._live.values()]

    def _drop(self, number):
        self.now -= self._live.pop(number)[1].size

    def forget(self) -> None:
        """Count anew, from what is there."""
        self.most, self.taken, self.at_most = self.now, [], []


def _in_place(operator):
    """Fused optimisers, which return nothing and do not support the device "meta"."""
    return operator._schema.name.startswith(("aten::_fused_adam", "aten::_fused_sgd"))


class Cuda:
    """The device, as tests use it."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.device = CUDA
        self.arriving: int | None = None
        """What copies of integers to the host bring; None: they do not arrive."""

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Within it, everything is made on the device, and nothing is refused."""
        with Named(watches=False), torch.device("meta"):
            yield

    @contextlib.contextmanager
    def watched(self, *pinned: Tensor) -> Iterator[Device]:
        """Within it, every wait raises."""
        with Named(watches=True), Device(pinned) as device:
            yield device

    @contextlib.contextmanager
    def counted(self, *kept: Tensor) -> Iterator[Device]:
        """Within it, memory is counted, that of `kept` from the start."""
        with Named(watches=False), Device(refuses=False) as device:
            for tensor in kept:
                device.keep(tensor)
            yield device


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The device; torch.autocast and torch.cuda.device take it for a real one."""
    import torch._dynamo  # torch's optimisers import it on first use, and it makes tensors
    from triton.runtime.jit import JITFunction

    found = Cuda()

    def launch(kernel, *args, grid, warmup, **kwargs):
        assert not warmup
        assert 0 < grid[0] < 2**31
        assert all(0 < side < 2**16 for side in grid[1:])
        names = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, value in names.items():
            if isinstance(value, Tensor):
                assert value.is_cuda, f"{kernel.__name__} is given {name} of the host"
                assert value.is_contiguous(), f"{kernel.__name__} is given {name} with gaps"
        found.launches.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", launch)
    copies = lambda number: lambda: found.arriving  # noqa: E731
    monkeypatch.setattr("saetrain.training.metrics.copy_to_host", copies)
    # A mode is off within its own handler; backward passes are to be watched.
    monkeypatch.setattr(torch.autograd, "has_torch_function", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.delenv("SAETRAIN_KERNELS", raising=False)
    return found


@pytest.fixture
def make_trainee_on(cuda: Cuda) -> Callable[..., Any]:
    """A factory of SAEs in training on the device, of any kind and with any recipe."""
    from saetrain.config.sae import SaeConfig, SaeEntry
    from saetrain.model.losses import OutputSlice, make_loss_config
    from saetrain.model.sae import build_sae
    from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer

    def make(
        d_in: int = 64,
        num_latents: int = 512,
        k: int = 4,
        *,
        optimizer: str = "signum",
        weight_decay: float | None = None,
        settings: StepSettings | None = None,
        scales: tuple[float, ...] = (),
        parts: tuple[OutputSlice, ...] = (),
        dead_after: int = 1,
        **kind: Any,
    ) -> Any:
        with cuda.building():
            config = SaeConfig(d_in, num_latents, k, **kind)
            sae = build_sae(config, device=CUDA)
            entry = SaeEntry("layers.0", config, 1e-3, seed=0, scales=scales)
            loss_config = make_loss_config(config, 10, parts)
            return SaeTrainer(
                entry,
                sae,
                make_optimizer(optimizer, sae, 1e-3, 5, 50, weight_decay=weight_decay),
                dead_after,
                1.0,
                loss_config,
                settings or StepSettings(),
            )

    return make
