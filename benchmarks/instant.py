"""A language model without computation: its layers return constant tensors.

This isolates the other costs of a harvest. The numbers are normal with a few large dimensions, as
activations are; no two layers return the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging


class InstantConfig(PretrainedConfig):  # type: ignore[misc]
    """Width and number of layers, and nothing to compute."""

    model_type = "actcache_instant"

    def __init__(self, width: int = 8, num_hidden_layers: int = 1, **kwargs: Any) -> None:
        self.width = width
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = 256
        super().__init__(**kwargs)


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self._made: Tensor | None = None

    def forward(self, shape: torch.Size, device: torch.device) -> Tensor:
        whole = (*shape, len(self.scale))
        if device.type == "meta":
            return torch.empty(whole, device=device, dtype=self.scale.dtype)
        if self._made is None or self._made.shape != whole:
            drawn = torch.randn(whole, dtype=torch.float32)
            self._made = (drawn * self.scale.float()).to(self.scale.dtype)
        return self._made


class InstantModel(PreTrainedModel):  # type: ignore[misc]
    """Layer that returns the tensor created at its first call. [B, C, D]"""

    config_class = InstantConfig
    base_model_prefix = ""

    def __init__(self, config: InstantConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(_Layer(config.width) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        """Whatever the tokens [B, C] are."""
        hidden = [layer(input_ids.shape, input_ids.device) for layer in self.layers]
        return BaseModelOutput(last_hidden_state=hidden[-1])


AutoConfig.register(InstantConfig.model_type, InstantConfig)
AutoModelForCausalLM.register(InstantConfig, InstantModel)


def build_instant_model(folder: Path, width: int, layers: int) -> None:
    """Save such a model in bfloat16, for `from_pretrained`."""
    torch.manual_seed(0)
    model = InstantModel(InstantConfig(width, layers)).to(torch.bfloat16)
    for layer in model.layers:
        layer.scale.data[:3] = 50
    logging.disable_progress_bar()
    model.save_pretrained(folder)
