"""Harvests and runs that an earlier version left half finished, under `tests/golden/runs-v*/`.

Today's code must open, resume and finish them as the version that began them would have. They were
left as users leave them, by the command line and a signal, and are finished by the command line, so
that this file imports no module of the project:

- `cache/`: a finished harvest. The numbers of the model that was harvested are small integers, of
  which sums are exact, so its rows, statistics and receipts are the same bytes on any machine;
- a folder for each of RUNS: a run that SIGTERM stopped about half way, with its checkpoint;
- `expected.json`: size and SHA-256 of every file of those runs and harvests once finished, that
  depends on nothing but the options; metrics.jsonl in full; and the machine it was made on;
- in `runs-v1/` besides, `harvest/` and `harvest-zarr/`: that harvest killed by SIGKILL, in bfloat16
  and in int8 arrays; and `model/`, `text.jsonl`: what is harvested.

`runs-v1/` was written before `actcache` 0.1.0 was put in order: runs of format 1. `runs-v2/` was
written by the last version before runs of format 3, with their numbered defaults: runs of format 2,
of the kinds of SAE that `runs-v1/` does not hold, and one with no option that has a default which
depends on the run's length and widths. Those are begun anew, too, and must end in the same bytes: a
resumed run keeps what the formulas of its defaults gave.

**Other machines.** A run's last bits are promised on one kind of device and with the same libraries
only. So files are compared by their bytes, and where some differ, the test fails if this machine is
of the kind that made them. On another kind, they must be the same files, those of tensors of the
same size, and the figures of metrics.jsonl must be close: the same processor with other
instructions differed by 5e-5 at most, of an FVU with muon. What holds no rounded number must be the
same bytes everywhere: all of a harvest, configurations, and every line of metrics.jsonl that was
there when the run stopped.

`python tests/test_saetrain/test_golden_runs.py runs-v2` writes a folder anew, with whichever
version is installed. So a folder is written once, by the version that its runs are to be from; a
new format of runs adds a folder, to RUNS and COMMON too, written by the last version before it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
BIN = Path(sys.executable).parent
SECONDS = 120  # until a process that hangs is given up

# --- options --------------------------------------------------------------------------------------

HARVEST = (
    "harvest model text.jsonl --ctx-len 17 --shard-size 16 --batch-size 4 --max-tokens 1700 "
    "--dtype bfloat16"
)
HOOKPOINTS = {
    "runs-v1": "--hookpoint wte --hookpoint h.0",
    "runs-v2": "--hookpoint h.0 --hookpoint h.0:in",
}
HARVESTS = {"harvest": "", "harvest-zarr": "--backend zarr --dtype int8 --compress zstd"}
"""Further options of each harvest of runs-v1; the other folders hold finished ones only."""

COMMON = {
    "runs-v1": "--batch-size 32 --dead-after 64 --log-every 4 --device cpu --epochs 2 "
    "--lr-warmup-steps 4",
    "runs-v2": "--batch-size 32 --log-every 8 --histogram-every 4 --device cpu --epochs 2",
}
"""Options of every run of a folder."""

RUNS_V1 = {
    # One SAE, over the end of an epoch, with AuxK at work; batches in parts, k that falls.
    "single": "--hookpoint h.0 --num-latents 64 --k 4 --lr 0.01 --grad-acc-steps 2 --grad-clip 1 "
    "--micro-batch-size 8 --k-anneal-steps 60 --input-scale rms --decoder-norm fold",
    # Eight, of both hookpoints.
    "grid": "--num-latents 32 --k 2 --k 4 --lr 0.01 --lr 0.003 --val-every 10",
    # Other optimisers and ways to be active, with the best of each kept.
    "kinds": "--hookpoint wte --num-latents 32 --k 4 --activation batchtopk --activation jumprelu "
    "--optimizer signum --optimizer muon --lr 0.005 --val-every 10 --save-best",
    # Beside a harvest: it was stopped while it waited for shards.
    "follow": "--hookpoint wte --num-latents 32 --k 4 --lr 0.01 --follow --segment-shards 2 "
    "--val-fraction 0",
    # Four SAEs shared by two processes, and each batch shared by two.
    "modules": "--num-latents 32 --k 4 --lr 0.01 --optimizer adam --optimizer signum --seed 3 "
    "--parallel modules",
    "ddp": "--num-latents 32 --k 4 --lr 0.01 --val-every 10 --grad-acc-steps 2 --parallel ddp",
}
RUNS_V2 = {
    # Nothing that has a formula: rates, warm-up, AuxK, which begins with the second epoch.
    "defaults": "--hookpoint h.0 --num-latents 64 --k 2 --optimizer adam --optimizer signum "
    "--optimizer muon --val-every 20",
    # Every activation that runs-v1 has not, or with another optimiser; their penalties' defaults.
    "dense": "--hookpoint h.0 --num-latents 32 --k 4 --lr 0.005 --input-scale rms --dead-after 64 "
    "--activation relu --activation gated --activation jumprelu --activation groupmax",
    "multi": "--hookpoint h.0 --num-latents 32 --k 2 --lr 0.01 --dead-after 64 --multi-topk "
    "--val-every 20",
    "nested": "--hookpoint h.0 --num-latents 32 --k 4 --lr 0.01 --dead-after 64 --matryoshka 8 "
    "--matryoshka 16 --optimizer adamw --optimizer muon --input-scale unit",
    "halves": "--hookpoint h.0 --num-latents 32 --k 4 --lr 0.005 --dead-after 64 "
    "--weights-dtype bfloat16 --optimizer adam --optimizer signum",
    # Without AuxK and dense activations: how their products of strided rows round is not promised.
    "transcoder": "--hookpoint h.0 --num-latents 32 --k 4 --lr 0.01 --transcode --auxk-alpha 0 "
    "--activation topk --activation batchtopk",
    "skip": "--hookpoint h.0 --num-latents 32 --k 4 --lr 0.01 --transcode --auxk-alpha 0 "
    "--skip-connection --input-scale rms",
    "crosscoder": "--num-latents 32 --k 4 --lr 0.01 --dead-after 64 --crosscode "
    "--activation topk --activation batchtopk --activation jumprelu",
}
RUNS = {"runs-v1": RUNS_V1, "runs-v2": RUNS_V2}

TOGETHER = ("modules", "ddp")
"""Those of two processes."""
VARIES = ("timings.jsonl", "fit.lock", "run.json")
"""Files of a run that record when and where it was made; run.json is compared by itself."""


def fit_line(folder: str, name: str) -> list[str]:
    """The command line of a run, without the program, in a folder that holds `cache`."""
    common = COMMON[folder]
    if name == "kinds":
        common = common.replace("--lr-warmup-steps 4", "")
    return f"fit cache --out {name} {common} {RUNS[folder][name]}".split()


def harvest_line(folder: str, name: str) -> list[str]:
    return f"{HARVEST} {HOOKPOINTS[folder]} {HARVESTS[name]} --out {name}".split()


# --- how it is compared ---------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the last bits of a run depend on."""
    import torch

    facts = {}
    with contextlib.suppress(OSError):  # not on every system
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    named = [facts.get(key, "") for key in ("vendor_id", "cpu family", "model")]
    return {
        "processor": " ".join([platform.machine(), *named]),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),  # conftest.py and torchrun set 1
        **{name: version(name) for name in ("torch", "numpy")},
    }


def files_below(root: Path, varies: tuple[str, ...] = VARIES) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file that is a function of the options."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in varies]
    found = {str(path.relative_to(root)): path.read_bytes() for path in paths}
    return {
        name: [len(data), hashlib.sha256(data).hexdigest()]
        for name, data in found.items()
        if not name.startswith("logs/")
    }


def record_of(root: Path) -> dict[str, Any]:
    """run.json without the cache's path, the seal over it, and what a change of libraries adds."""
    record: dict[str, Any] = json.loads((root / "run.json").read_text())
    left_out = ("cache", "seal", "history")
    return {name: value for name, value in record.items() if name not in left_out}


def figures(lines: list[Any]) -> Iterator[tuple[str, float]]:
    """Every number of some lines of metrics.jsonl, by its place there."""

    def below(value: Any, place: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, (dict, list)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                yield from below(item, f"{place}.{key}")
        else:
            yield place, math.nan if value is None else float(value)

    for number, line in enumerate(lines):
        yield from below(line, str(number))


def lines_of(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> str:
    """The folder of golden files, where a test is not of several."""
    return "runs-v1"


@functools.cache
def contents(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / folder / "expected.json").read_text())
    return found


@pytest.fixture
def expected(folder: str) -> dict[str, Any]:
    return contents(folder)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """Runs `actcache` or `saetrain` here, as their console scripts do."""

    def run(name: str, line: list[str]) -> None:
        (script,) = entry_points(group="console_scripts", name=name)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *line])
            with pytest.raises(SystemExit) as ended:
                script.load()()
        assert ended.value.code in (None, 0)

    return run


@pytest.fixture
def here(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of what was left, and the working directory."""
    shutil.copytree(GOLDEN / folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HARVESTS)
def test_a_harvest_that_an_earlier_version_began_is_finished_in_the_same_bytes(
    name: str, here: Path, program: Callable[..., None], expected: dict[str, Any]
) -> None:
    begun = files_below(here / name)
    assert 2 <= len(list((here / name / "shards").iterdir())) < 7
    program("actcache", harvest_line("runs-v1", name))
    found = files_below(here / name)
    assert found == expected["files"][name]
    receipts = {file for file in begun if Path(file).name[0] != "."}
    assert {file: found[file] for file in receipts} == {file: begun[file] for file in receipts}
    program("actcache", ["verify", name])


def test_the_finished_harvest_of_an_earlier_version_is_whole(
    here: Path, program: Callable[..., None], expected: dict[str, Any]
) -> None:
    assert files_below(here / "cache") == expected["files"]["harvest"]
    program("actcache", ["verify", "cache"])
    program("actcache", ["inspect", "cache"])
    program("actcache", [*harvest_line("runs-v1", "harvest")[:-1], "cache"])
    assert files_below(here / "cache") == expected["files"]["harvest"]


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, runs in RUNS.items() for name in runs]
)
def test_a_run_that_an_earlier_version_began_is_finished_in_the_same_bytes(
    folder: str,
    name: str,
    here: Path,
    program: Callable[..., None],
    fork_server: Any,
    expected: dict[str, Any],
) -> None:
    begun = (here / name / "metrics.jsonl").read_text()
    record = record_of(here / name)
    line = [*fit_line(folder, name), "--resume"]
    if name in TOGETHER:
        for rank in fork_server.start_ranks(2, "saetrain", *line):
            assert rank.wait(SECONDS) == 0, rank.stderr
    elif name == "grid":  # its own record holds its options
        program("saetrain", ["fit", "--config", "grid/run.json", "--resume"])
    else:
        program("saetrain", line)

    assert record_of(here / name) == record
    assert (here / name / "metrics.jsonl").read_text().startswith(begun)
    require_end(here / name, expected)


@pytest.mark.parametrize(("folder", "name"), [("runs-v2", name) for name in RUNS_V2])
def test_a_run_begun_anew_with_the_options_of_an_earlier_version_ends_in_the_same_bytes(
    folder: str, name: str, here: Path, program: Callable[..., None], expected: dict[str, Any]
) -> None:
    shutil.rmtree(here / name)
    program("saetrain", [*fit_line(folder, name), "--defaults", "1"])
    (checkpoint,) = (here / name).glob("checkpoint-*.json")  # of today's format
    require_end(here / name, expected, but=checkpoint.name)


def require_end(root: Path, expected: dict[str, Any], *, but: str = "") -> None:
    """Refuse a finished run that differs from the expected one by more than machines do.

    Args:
        root: folder of the run.
        expected: contents of expected.json.
        but: name of a file that may differ.
    """
    wanted, found = expected["files"][root.name], files_below(root, (*VARIES, but))
    wanted = {file: size for file, size in wanted.items() if file != but}
    if found == wanted:
        return
    differ = sorted(file for file in wanted | found if wanted.get(file) != found.get(file))
    assert machine() != expected["machine"], differ
    # Another kind of machine: the same files, and numbers that are close.
    kept = [file for file in wanted if "best-" not in file]  # a near tie has two bests
    assert kept == [file for file in found if "best-" not in file]
    for file in kept:
        if file.endswith(".safetensors"):
            assert found[file][0] == wanted[file][0], file  # as many bytes: the same tensors
        elif not (file == "metrics.jsonl" or file.startswith("checkpoint-")):
            assert found[file] == wanted[file], file
    metrics = (root / "metrics.jsonl").read_text()
    close(lines_of(metrics), lines_of(expected["metrics"][root.name]))


def close(found: list[Any], wanted: list[Any]) -> None:
    """Refuse lines of metrics.jsonl that rounding does not explain."""
    for (place, mine), (other, theirs) in zip(figures(found), figures(wanted), strict=True):
        assert place == other
        if place.endswith((".step", ".epoch", ".rows")):
            assert mine == theirs, place
        elif ".histogram" not in place and "dead" not in place:
            assert mine == pytest.approx(theirs, rel=0.02, abs=0.005, nan_ok=True), place


# --- how it was made ------------------------------------------------------------------------------


def write_model(folder: Path, *, adds: bool) -> None:
    """A GPT-2 with embeddings of small integers, and its tokenizer.

    Its block adds nothing to them, or one row of small integers.
    """
    import numpy as np
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    state = np.random.RandomState(0)
    words = "the a of to in row shard model text cache window lane block small large every last"
    texts = [
        " ".join(words.split()[i] for i in state.randint(17, size=state.randint(20, 60))) + "."
        for _ in range(60)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=300, special_tokens=["</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    config = GPT2Config(
        vocab_size=300,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    directions = state.randint(-4, 5, (24, 16))
    for name, parameter in model.named_parameters():
        numbers = np.zeros(parameter.shape)
        if "wte" in name or "wpe" in name:
            for row in numbers:
                row += directions[state.permutation(24)[:3]].sum(0)
        if adds and "attn.c_proj.bias" in name:
            numbers += 2 * directions[0]
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(numbers))
    model.save_pretrained(folder / "model")


def newest(root: Path) -> int:
    return max((int(path.name[11:20]) for path in root.glob("checkpoint-*.json")), default=0)


def command(name: str, line: list[str]) -> list[str]:
    program = [str(BIN / ("actcache" if line[0] == "harvest" else "saetrain")), *line]
    if name not in TOGETHER:
        return program
    launch = [str(BIN / "torchrun"), "--no-python", "--standalone", "--nproc_per_node", "2"]
    return [*launch, *program]


def stop(name: str, line: list[str], number: signal.Signals, due: Callable[[], bool]) -> None:
    """Start a command, and send it a signal once something is there."""
    process = subprocess.Popen(command(name, line))
    deadline = time.monotonic() + SECONDS
    while not due():
        assert process.poll() is None, "it has ended already"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(number)
    code = process.wait(SECONDS)
    ends = {signal.SIGKILL: -9, signal.SIGTERM: 1 if name in TOGETHER else 143}
    assert code == ends[number], code


def finish(name: str, line: list[str]) -> None:
    subprocess.run(command(name, line), check=True, timeout=SECONDS)


def relocate(path: Path, cache: Path) -> None:
    """Let a run.json name its cache relative to the working directory, and seal it again."""
    import xxhash

    text = path.read_text().replace(str(cache), "cache")
    if seal := re.search(r'(?<=\n  "seal": ")[0-9a-f]+', text):  # from format 2 on
        before, after = text[: seal.start()], text[seal.end() :]
        text = before + xxhash.xxh3_128_hexdigest((before + after).encode()) + after
    path.write_text(text)


def write_golden(folder: str, at: Path) -> None:
    """Make everything in a folder, which is the working directory."""
    harvests, runs = (HARVESTS if folder == "runs-v1" else {}), RUNS[folder]
    write_model(at, adds=folder != "runs-v1")
    for name in harvests:
        shards, line = at / name / "shards", harvest_line(folder, name)
        stop(name, line, signal.SIGKILL, (shards / "00002.json").exists)
        assert not (shards / "END.json").exists()
        shutil.copytree(at / name, at / "half" / name)
        finish(name, line)
        whole = f"whole-{name}"
        finish(whole, [*line[:-1], whole])
        assert files_below(at / whole) == files_below(at / name)
    if not harvests:
        finish("harvest", harvest_line(folder, "harvest"))
    for name in runs:
        root, line = at / name, fit_line(folder, name)
        shutil.copytree(at / ("half/harvest" if name == "follow" else "harvest"), at / "cache")
        # A checkpoint a step is slow, so that the signal finds it at work.
        hit = [*line, "--save-every", "1"]
        if name == "follow":
            waits = lambda root=root: newest(root) >= 15 and not time.sleep(2)  # noqa: E731
        else:
            waits = lambda root=root: newest(root) >= 40  # noqa: E731
        stop(name, hit, signal.SIGTERM, waits)
        ended = json.loads((root / "exit.json").read_text())
        assert (ended["code"], ended["reason"]) == (143, "SIGTERM")
        shutil.rmtree(at / "cache")
        shutil.copytree(at / "harvest", at / "cache")
        half = shutil.copytree(root, at / "half" / name)
        relocate(half / "run.json", at / "cache")
        finish(name, [*line, "--resume"])
        shutil.move(root, at / "resumed")
        finish(name, line)
        assert files_below(at / "resumed") == files_below(root)
        print(f"{name}: stopped at {ended['step']} of {newest(root)} steps")
        shutil.rmtree(at / "cache")
        shutil.rmtree(at / "resumed")
    made = {
        "machine": machine(),
        "files": {name: files_below(at / name) for name in (*harvests, *runs)},
        "metrics": {name: (at / name / "metrics.jsonl").read_text() for name in runs},
    }
    golden = GOLDEN / folder
    shutil.rmtree(golden, ignore_errors=True)
    shutil.copytree(at / "half", golden)
    shutil.copytree(at / "harvest", golden / "cache")
    if harvests:
        shutil.copytree(at / "model", golden / "model")
        shutil.copy(at / "text.jsonl", golden)
    for name in ("cache", *harvests):
        shutil.rmtree(golden / name / "logs")
    for path in golden.rglob("*.lock"):
        path.unlink()
    expected = json.dumps(made, indent=1, sort_keys=True) + "\n"
    (golden / "expected.json").write_text(expected)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        write_golden(sys.argv[1], Path(made).resolve())
