"""The largest of each group of neighbours. Letters: N tokens, M num_latents, K groups."""

import torch
from torch import Tensor


def group_max(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k groups of M/k neighbours, the first of equals, in their order.

    Values [N, k], indices [N, k] int64. A group with a NaN gives NaN.
    """
    size = pre_acts.shape[1] // k
    values, within = pre_acts.view(len(pre_acts), k, size).max(dim=-1)  # [N, K]
    return values, within + size * torch.arange(k, device=within.device)
