"""Muon for matrices, Adam for the rest. Jordan et al., "Muon" (2024), kellerjordan.github.io.

The momentum of each matrix is made nearly orthogonal by five Newton-Schulz iterations in bfloat16,
and scaled by 0.2 · sqrt(max(rows, columns)), which gives its entries the size of Adam's updates
(Liu et al., "Muon is scalable for LLM training", 2025). With that scale one learning rate serves
both parts and every width, as in sparsify.
"""

from __future__ import annotations

import torch

from actcache.errors import ConfigError
from saetrain.optim.fused import AdamConstants, Parameters
from saetrain.optim.layout import COUNTER, StateLayout, TensorSpec, spec_of
from saetrain.optim.schedule import Schedule
from saetrain.optim.torch_optimizers import TorchOptimizer

MOMENTUM = 0.95


class Muon(TorchOptimizer):
    """torch's Muon over named matrices [rows, columns], torch's Adam over all other parameters.

    Args:
        parameters: by name.
        lr: peak learning rate of both.
        schedule: share of the peak in each step.
        weight_decay: decoupled weight decay of the matrices.
        constants: betas and eps of Adam.

    Raises:
        ConfigError: this torch has no Muon.
    """

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        schedule: Schedule,
        weight_decay: float,
        constants: AdamConstants | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                "--optimizer muon needs torch.optim.Muon",
                expected="torch >= 2.9",
                got=torch.__version__,
                remedy="pip install -U torch, or --optimizer adam",
            )
        matrices = [p for p in parameters.values() if p.ndim == 2]
        others = {name: p for name, p in parameters.items() if p.ndim != 2}
        muon = torch.optim.Muon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        kinds = {p.device.type for p in others.values()}
        self._counts_on_device = kinds in ({"cpu"}, {"cuda"})  # as torch's fused kernels do
        beta1, beta2, eps = constants or AdamConstants()
        adam = torch.optim.Adam(
            others.values(),
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            fused=self._counts_on_device or None,
        )
        super().__init__(parameters, lr, schedule, [muon, adam])

    def state_layout(self) -> StateLayout:
        """Return the shapes of the matrices' momentum, and of Adam's state of the others."""
        tensors: dict[str, TensorSpec] = {}
        for name, parameter in self._parameters.items():
            like = spec_of(parameter)
            of_one = {"step": COUNTER, "exp_avg": like, "exp_avg_sq": like}
            of_one = {"momentum_buffer": like} if parameter.ndim == 2 else of_one
            tensors |= {f"{name}.{key}": spec for key, spec in of_one.items()}
        return StateLayout(tensors)
