"""Length of the main call paths: product files, and changes of file.

    python benchmarks/bench_ways.py [--show]

Three call paths are traced by `sys.setprofile` on one thread: from `harvest()` to the first forward
pass of the model with weights, from `fit()` to `train()`, and one TopK step with AuxK. A change of
file is a call into a function of another product file than the last call. Calls in loops count too,
so the figures belong to this cache: a tiny Llama, 640 tokens in 3 shards, one hookpoint. Each path
is run once beforehand, so that imports are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import actcache
import saetrain
import saetrain.training.loop as loop

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = tuple(f"{ROOT / folder}/" for folder in ("actcache", "saetrain", "cli"))
WORDS = [f"w{i}" for i in range(60)]


class Way:
    """Counts calls into product files, until `ends` holds for a frame or `stop` is called."""

    def __init__(self, ends: Callable[[FrameType], bool] = lambda _: False) -> None:
        self.files: list[str] = []
        self.changes, self.depth, self.deepest = 0, 0, 0
        self._last, self._ends, self._ended = "", ends, False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take one event of the profiler."""
        path = frame.f_code.co_filename
        ours = path.startswith(PRODUCT) and frame.f_code.co_name != "<module>"
        if self._ended or not ours or event not in ("call", "return"):
            return
        self.depth += 1 if event == "call" else -1
        if event == "return":
            return
        self.deepest = max(self.deepest, self.depth)
        self.changes += path != self._last
        self._last = path
        if path not in self.files:
            self.files.append(path)
        self._ended = self._ends(frame)

    def stop(self) -> None:
        """Count nothing from here on."""
        self._ended = True

    def walk(self, function: Callable[..., Any], *arguments: Any) -> Way:
        """Call a function under the profiler."""
        sys.setprofile(self)
        try:
            function(*arguments)
        finally:
            sys.setprofile(None)
        return self


def make_model(folder: Path) -> None:
    """Save a Llama of two layers of width 16, and a tokenizer of 60 tokens."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def to_first_forward(config: actcache.HarvestConfig) -> Way:
    """Follow `harvest()` until the model, with weights, sees its first batch."""
    from transformers.models.llama.modeling_llama import LlamaModel

    way, forward = Way(), LlamaModel.forward

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.embed_tokens.weight.device.type != "meta":
            way.stop()
        return forward(self, *arguments, **options)

    LlamaModel.forward = watched
    try:
        return way.walk(actcache.harvest, config)
    finally:
        LlamaModel.forward = forward


def to_train(config: saetrain.FitConfig) -> Way:
    """Follow `fit()` until `train()` is called."""
    code = loop.train.__code__
    return Way(lambda frame: frame.f_code is code).walk(saetrain.fit, config)


def one_step(config: saetrain.FitConfig) -> Way:
    """Follow the eighth step, half of whose latents are dead."""
    found, real = [], getattr(loop, "train_batch")  # noqa: B009

    def watched(groups: Any, batch: Any, step: int) -> None:
        if step != 8:
            real(groups, batch, step)
            return
        for trainer in (trainer for group in groups.values() for trainer in group):
            trainer.dead_tracker.rows_since[::2] = 1 << 40
        found.append(Way().walk(real, groups, batch, step))

    setattr(loop, "train_batch", watched)  # noqa: B010
    try:
        saetrain.fit(config)
    finally:
        setattr(loop, "train_batch", real)  # noqa: B010
    return found[0]


def main() -> None:
    """Walk all three ways and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="list the files of each way")
    show = parser.parse_args().show
    torch.manual_seed(0)
    shuffled = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model")
        texts = [" ".join(shuffled.choices(WORDS, k=120)) for _ in range(60)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "text.jsonl").write_text(lines)
        harvest = actcache.HarvestConfig(
            model=str(root / "model"),
            dataset=str(root / "text.jsonl"),
            out=str(root / "warm"),
            hookpoint=("layers.0",),
            ctx_len=32,
            max_tokens=640,
        )
        fit = saetrain.FitConfig(
            cache=str(root / "cache"),
            out=str(root / "run-warm"),
            num_latents=64,
            k=4,
            batch_size=32,
            dead_after=1 << 20,
        )
        actcache.harvest(harvest)
        ways = {
            "`harvest()` to the first forward pass": to_first_forward(
                dataclasses.replace(harvest, out=fit.cache)
            )
        }
        saetrain.fit(fit)
        ways["`fit()` to `train()`"] = to_train(dataclasses.replace(fit, out=str(root / "run")))
        ways["one TopK step with AuxK"] = one_step(
            dataclasses.replace(fit, out=str(root / "run-step"))
        )
    print("| way | files | changes of file | deep |\n| --- | --- | --- | --- |")
    for name, way in ways.items():
        print(f"| {name} | {len(way.files)} | {way.changes} | {way.deepest} |")
        for path in way.files if show else ():
            print(f"    {Path(path).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
