"""Share of a text that each process tokenises, and time to enter a text in its middle.

    python benchmarks/bench_shares.py [--megabytes 32]

(1) Tokens tokenised by the processes of one harvest, over the tokens of the text: the mean and the
most of a rank. Each rank is a thread that reads its shards and counts those of the others. (2)
Seconds until the sequence in the middle of the text is there: from its document on, as a resumed
harvest does, against tokenising from the beginning. Opening the text is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common import prose
from report import machine, print_table
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from actcache.config import HarvestConfig
from actcache.data.datasets import Source, open_dataset
from actcache.data.document_order import DocumentOrder
from actcache.data.sequences import SequencePipeline, iter_sequences
from actcache.data.shared_sequences import SharedSequences, documents_of_a_block

CTX_LEN, SHARD = 256, 32
WORLD_SIZES = (1, 2, 4, 8)


def make_text(path: Path, size: int) -> Any:
    """Write documents of `size` bytes in all; return a tokenizer trained on some of them."""
    texts = list(itertools.islice(prose(), 2000))
    with path.open("w") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            if file.tell() >= size:
                break
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts[:200], vocab_size=4096, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)


def tokens_by_rank(
    source: Any, tokenizer: Any, pipeline: SequencePipeline, folder: Path, world_size: int
) -> list[int]:
    """Return the tokens that each rank tokenises in one pass over the text."""
    size = documents_of_a_block(source, pipeline, None)
    ranks = [
        SharedSequences(source, tokenizer, pipeline, folder, size, rank, world_size)
        for rank in range(world_size)
    ]

    def run(rank: int, text: SharedSequences) -> None:
        for shard in itertools.count():
            mine = shard % world_size == rank
            first = shard * SHARD
            found = len(text.read(first, SHARD)) if mine else text.count(first, SHARD)
            if found < SHARD:
                break
        text.close()

    threads = [threading.Thread(target=run, args=each) for each in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [text.tokens for text in ranks]


def seconds_of(work: Callable[[], object]) -> float:
    """Return the duration of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def times_to_middle(
    source: Source, tokenizer: Any, pipeline: SequencePipeline
) -> tuple[float, float]:
    """Return the seconds to the middle of the text, from its beginning and from its document on."""
    count = sum(1 for _ in iter_sequences(source, tokenizer, pipeline))

    def walk() -> Any:
        return next(itertools.islice(iter_sequences(source, tokenizer, pipeline), count // 2, None))

    middle = walk()
    place = (middle.document, middle.start)
    entered = seconds_of(lambda: next(iter_sequences(source, tokenizer, pipeline, *place)))
    return seconds_of(walk), entered


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=32, help="size of the text")
    size = int(parser.parse_args().megabytes * 1e6)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "text.jsonl")
        tokenizer = make_text(path, size)
        order = DocumentOrder(0, False, 1000)
        pipeline = SequencePipeline("pack", CTX_LEN, None, 0, None, order, 4096)
        source = open_dataset(HarvestConfig("model", str(path), "out"))
        shares, total = [], 0
        for world_size in WORLD_SIZES:
            folder = Path(work, f"blocks-{world_size}")
            found = tokens_by_rank(source, tokenizer, pipeline, folder, world_size)
            total = total or sum(found)
            share = [f"{sum(found) / world_size / total:.3f}", f"{max(found) / total:.3f}"]
            shares.append([str(world_size), "1.000", *share, f"{sum(found) / total:.3f}"])
        stream = open_dataset(
            HarvestConfig("model", str(path), "out", streaming=True, max_tokens=4096)
        )
        entries = []
        for name, text in (("documents", source), ("stream", stream)):
            walked, entered = times_to_middle(text, tokenizer, pipeline)
            entries.append([name, f"{walked:.2f}", f"{entered:.3f}", f"{entered / walked:.3f}"])
    print(f"\n{size / 1e6:.0f} MB of prose, {total:,} tokens")
    print(machine("tokenizers", "transformers") + "\n")
    header = ["processes", "a rank, each alone", "a rank, mean", "a rank, most", "all ranks"]
    print_table(header, shares)
    print()
    print_table(["text", "from the beginning, s", "entered, s", "ratio"], entries)


if __name__ == "__main__":
    main()
