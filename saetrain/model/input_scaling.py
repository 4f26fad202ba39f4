"""Rows scaled in training, by one number for each hookpoint, and weights that take them raw.

`rms`: so that the root of the mean square of their numbers is 1, as SAELens scales by default.
`unit`: so that that of their norms is 1, as dictionary_learning scales. Both from the statistics of
all training rows. Letters: N tokens, D d_in, E width of the output, M num_latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from actcache.format.statistics import Statistics
    from saetrain.config.sae import InputScale, SaeEntry


_OF_LATENTS = ("b_enc", "activation.threshold", "activation.b_mag")
"""In the unit of pre-activations; `activation.r_mag` has none."""
_WEIGHTS = {"W_enc", "W_dec", "b_dec", "W_skip", "activation.r_mag", *_OF_LATENTS}


def scale_of(kind: InputScale, statistics: Statistics) -> float:
    """What a hookpoint's rows are multiplied by."""
    if kind == "none":
        return 1.0
    width = len(statistics.mean)
    return (float(width) ** 0.5 if kind == "rms" else 1.0) / statistics.rms_norm


@dataclass(frozen=True)
class InputScaling:
    """How the rows of one SAE are scaled."""

    rows: Tensor
    """Of each column that it is given. [D], a transcoder's [D + E]"""
    read: Tensor
    """Of those it reads. [D]"""
    predicted: Tensor
    """Of those it predicts. [E]"""
    by: float | None
    """Of all, where that is one number, and what is read is what is predicted."""

    def fold_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same function of rows that are not scaled; by name, as `Sae` has them.

        With one scale s, latents are 1/s as large, and decoder rows as long as they were:
        relu(W_enc (s x - b_dec) + b_enc) / s = relu(W_enc (x - b_dec / s) + b_enc / s). Otherwise
        latents stay as they are, and the columns of W_enc and W_dec take the scales.
        """
        assert weights.keys() <= _WEIGHTS, weights.keys()
        found = {**weights}
        if self.by is not None:
            for name in (*_OF_LATENTS, "b_dec"):
                if name in weights:
                    found[name] = weights[name] / self.by
            return found
        found["W_enc"] = weights["W_enc"] * self.read
        found["W_dec"] = weights["W_dec"] / self.predicted
        found["b_dec"] = weights["b_dec"] / self.predicted
        if "W_skip" in weights:  # [E, D]
            found["W_skip"] = weights["W_skip"] * self.read / self.predicted.unsqueeze(1)
        return found


def input_scaling(
    entry: SaeEntry, device: torch.device, dtype: torch.dtype = torch.float32
) -> InputScaling | None:
    """How the rows of an SAE are scaled; None: not at all."""
    if not entry.scales:
        return None
    config = entry.config
    widths = config.widths or (config.d_in, config.width_out)[: len(entry.scales)]
    parts = [
        torch.full((width,), scale, device=device, dtype=dtype)
        for width, scale in zip(widths, entry.scales, strict=True)
    ]
    rows = torch.cat(parts)
    one = len(parts) == 1
    read = rows[: config.d_in]
    predicted = rows[config.d_in :] if config.transcode else rows
    return InputScaling(rows, read, predicted, entry.scales[0] if one else None)
