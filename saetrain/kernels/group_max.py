"""The largest of each group of latents. Letters: N tokens, M num_latents, K groups."""

from torch import Tensor

from saetrain.kernels.paths import chosen_path, primitives


def group_max(pre_acts: Tensor, k: int, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Select the largest of each of k groups of M/k neighbours, the first of equals.

    A group with a NaN gives NaN.

    Args:
        pre_acts: [N, M], M a multiple of k.
        k: groups.
        path: forces one.

    Returns:
        Values, and int64 indices in [0, M), in the groups' order. [N, K]
    """
    return primitives(chosen_path(pre_acts, path)).group_max(pre_acts, k)
