"""The k largest of each row, exactly. Letters: N tokens, M num_latents, K k."""

from torch import Tensor

from saetrain.kernels.paths import chosen_path, primitives


def topk(pre_acts: Tensor, k: int, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Select as `torch.topk` does, as a set; which of equal values are taken is not said.

    A row with a NaN gives NaN for all its values, so that what is made of it is not finite.

    Args:
        pre_acts: [N, M], any floating type.
        k: 1 to M.
        path: forces one.

    Returns:
        Values, and int64 indices in [0, M), distinct within a row; in any order. [N, K]
    """
    return primitives(chosen_path(pre_acts, path)).topk(pre_acts, k)
