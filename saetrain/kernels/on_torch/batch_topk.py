"""Where a batch is cut by BatchTopK. Letters: N tokens, M num_latents."""

import torch
from torch import Tensor


def batch_topk_threshold(pre_acts: Tensor, count: int) -> Tensor:
    """The count-th largest of all N*M values, no dimensions; NaN if there is one among them."""
    values = torch.topk(pre_acts.flatten(), count, sorted=False).values  # [count]
    return values.min()  # NaN if one is among them, and one is if there is any
