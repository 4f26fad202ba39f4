"""One shard's rows, from the model to memory. Letters: S sequences, C context length, B batch."""

from __future__ import annotations

import numpy as np
import torch

from actcache.cache.writer import RowBuffers, ShardData, ShardText, kept_positions, row_norms
from actcache.core.progress import Progress
from actcache.data.sequences import Sequence
from actcache.harvester.job import HarvestJob
from actcache.model.hooks import ActivationCapture
from actcache.storage import ROW_DTYPES, check_overflow


def capture_shard(
    job: HarvestJob,
    shard: int,
    group: list[Sequence],
    capture: ActivationCapture,
    bar: Progress,
    memory: RowBuffers,
) -> ShardData:
    """Run the model over a shard's sequences and keep the rows that the filters leave."""
    identity = job.manifest.identity
    row_dtype, size = ROW_DTYPES[identity.dtype], identity.batch_size
    text = _text(group)
    kept, dropped = kept_positions(identity, text.tokens, text.lengths)
    count = int(kept.sum())
    rows = {h.name: memory.rows(h.name, count, h.width, row_dtype) for h in identity.hookpoints}
    asks_norms = identity.max_norm_ratio is not None
    norms = {h.name: np.empty(count) for h in identity.hookpoints if asks_norms}
    filled = 0
    for start in range(0, len(group), size):
        chosen = torch.from_numpy(np.flatnonzero(kept[start : start + size])).to(job.device)
        captured = capture.run(*_batch(job, text, start), chosen)
        place = slice(filled, filled + len(chosen))
        for name, found in captured.items():
            stored = row_dtype.from_torch(found)
            rows[name][place] = stored
            if not asks_norms:
                check_overflow(found, stored, row_dtype, name)
            else:  # whether a row is left out is told by all the shard's norms
                norms[name][place] = row_norms(found.float().cpu().numpy())
        filled += len(chosen)
        written = len(chosen) * sum(row_dtype.row_bytes(h.width) for h in identity.hookpoints)
        bar.advance(min(size, len(group) - start) * identity.ctx_len, written)
    return ShardData(shard, text, kept, dropped, rows, norms)


def _text(group: list[Sequence]) -> ShardText:
    return ShardText(
        tokens=np.stack([sequence.tokens for sequence in group]),
        lengths=np.array([sequence.length for sequence in group], dtype=np.int32),
        documents=np.array([sequence.document for sequence in group], dtype=np.int64),
        starts=np.array([sequence.start for sequence in group], dtype=np.int64),
    )


def _batch(
    job: HarvestJob, text: ShardText, start: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids of one forward pass, and the mask that hides padding where there can be any.

    Always of the same shape, whatever is left: kernels may round differently at another.
    """
    identity = job.manifest.identity
    shape = (identity.batch_size, identity.ctx_len)
    part = slice(start, start + identity.batch_size)
    tokens = np.zeros(shape, dtype=np.int64)
    tokens[: len(text.tokens[part])] = text.tokens[part]
    ids = torch.from_numpy(tokens).to(job.device)
    if identity.pipeline == "pack":
        return ids, None
    mask = np.ones(shape, dtype=np.int64)  # where no sequence is left: attention to nothing is NaN
    lengths = text.lengths[part]
    mask[: len(lengths)] = np.arange(identity.ctx_len) < lengths[:, None]
    return ids, torch.from_numpy(mask).to(job.device)
