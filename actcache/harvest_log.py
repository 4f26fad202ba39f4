"""What varies from run to run, under `logs/` and nowhere else: times, hosts, speeds."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

from actcache.atomic import tell_full_disk
from actcache.receipt import ShardReceipt


class HarvestLog:
    """A line for each shard that one process publishes."""

    def __init__(self, root: Path, rank: int) -> None:
        self._path = root / "logs" / f"harvest-rank{rank}.jsonl"
        self._last = time.monotonic()

    def shard(self, receipt: ShardReceipt) -> ShardReceipt:
        """Note a published shard."""
        now = time.monotonic()
        entry = {
            "shard": receipt.shard,
            "rows": receipt.rows,
            "bytes": sum(file.bytes for file in receipt.files.values()),
            "seconds": round(now - self._last, 3),
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._last = now
        line = json.dumps(entry) + "\n"
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise tell_full_disk(error, self._path, len(line)) from error
        return receipt
