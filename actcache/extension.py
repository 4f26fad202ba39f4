"""Go on beyond the goal of a harvest, under the same identity: the cache's id stays what it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from actcache.atomic import publish
from actcache.manifest import Extension, Manifest, extension_path
from actcache.parse import to_json
from actcache.storage import BACKENDS


def extended(manifest: Manifest, goal: int | None) -> Manifest:
    """The manifest with one more extension, to `goal` sequences in all (None: all of the text)."""
    part = manifest.plan.extended(goal).parts[-1]
    extension = Extension(
        cache_id=manifest.cache_id,
        number=len(manifest.extensions) + 1,
        first_shard=part.first_shard,
        first_sequence=part.first_sequence,
        planned_sequences=goal,
    )
    return dataclasses.replace(manifest, extensions=(*manifest.extensions, extension))


def publish_extension(root: Path, manifest: Manifest) -> None:
    """Publish the last extension of a manifest. From here on, earlier seals seal nothing.

    Several processes of one harvest may do so at once: they write the same bytes. Killed before the
    backend's documents are renewed, the next harvest renews them.
    """
    last = manifest.extensions[-1]
    publish(extension_path(root, last.number), [to_json(last)])
    BACKENDS[manifest.backend].lay(root, manifest)
