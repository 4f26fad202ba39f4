"""Types on disk and in memory. Little-endian throughout; bfloat16 travels as uint16 in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]


@dataclass(frozen=True)
class Codec:
    """One type of activations: how NumPy, safetensors and torch call it."""

    name: str
    """Torch's name, and the manifest's."""
    storage: str
    """NumPy type of the bytes."""
    tag: str
    """Type in a safetensors header."""

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return np.dtype(self.storage).itemsize

    def to_float32(self, rows: Array) -> NDArray[np.float32]:
        """Stored rows, as they lie on disk, to float32; exact for every type here."""
        if self.name == "bfloat16":  # the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def to_torch(self, rows: Array) -> torch.Tensor:
        """Stored rows as a torch tensor of this type that shares their memory."""
        import torch

        if self.name == "bfloat16":
            return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(rows)

    def from_torch(self, rows: torch.Tensor) -> Array:
        """A tensor of any float type and device to rows as stored, in C order."""
        import torch

        rows = rows.detach().to(device="cpu", dtype=getattr(torch, self.name)).contiguous()
        if self.name == "bfloat16":
            return rows.view(torch.int16).numpy().view(np.uint16)
        array: Array = rows.numpy()
        return array


CODECS = {
    codec.name: codec
    for codec in (
        Codec("bfloat16", "<u2", "BF16"),
        Codec("float16", "<f2", "F16"),
        Codec("float32", "<f4", "F32"),
    )
}
"""Every type that a cache may hold, by its name in the manifest."""
