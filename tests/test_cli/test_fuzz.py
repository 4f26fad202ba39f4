"""Hostile values of every option, and of every key of the files of options and of runs.

Each must end in one of our exit codes, with a sentence: never in a traceback, never in an escape
sequence on the terminal. The soak makes 20,000 trials, the default suite a sample of them.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from actcache import errors
from actcache.core.terminal import SafeStream
from actcache_cli import convert, fit, harvest, plan
from actcache_cli.fit import print_estimate
from actcache_cli.programs import actcache_app, saetrain_app
from saetrain.config.fit_config import FitConfig

CODES = {0, 1, *(kind.exit_code for kind in errors.ActcacheError.__subclasses__())}
TRIALS = 20_000
SAMPLE = 100

TEXTS = [
    "-1", "0", "1", "2", "1e308", "nan", "inf", "-inf", "1000000000000000000", "9" * 30,
    "9" * 5000, "", " ", "٣", "\uff11\uff12", "0x10", "1_000", "1e3", "0.5", "-0.0", "x",
    "A" * 10_000, "\udce4", "../..", "\x1b[2J", "a\nb", "http://x.invalid/y", "file:///etc", "-",
    "--", "\0", "a\0b", "*", "[", "layers.0", "all", "s3://", "\u202e",
]  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400, "",
    "x", "..", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "A" * 10_000, [], {}, [[]], [None],
    {"": 0}, "NaN", float("nan"), float("inf"), [0] * 500,
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names such as `x` are files that a command may write, in the folder where it runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=3, sequences=2, ctx_len=4, hookpoints={"layers.0": 4})


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Any]]:
    """The programs as click groups. What a harvest, conversion or run would do ends before it."""

    def keep(config: Any, *_flags: bool) -> None:
        del config

    def estimate(config: FitConfig, *_flags: bool) -> None:
        print_estimate(config, as_json=True)

    with pytest.MonkeyPatch.context() as patch:
        for module in (harvest, plan, convert):
            patch.setattr(module, "run", keep)
        patch.setattr(fit, "run", estimate)
        apps = {"actcache": actcache_app(), "saetrain": saetrain_app()}
        yield {name: typer.main.get_command(app) for name, app in apps.items()}


def code_of(program: Any, arguments: list[str]) -> int:
    """Run a command in this process, with the streams that it has, and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", SafeStream(sys.stdout, is_result=True))
        patch.setattr(sys, "stderr", SafeStream(sys.stderr, is_result=False))
        try:
            program.main(arguments, prog_name="program")
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0


def command_lines(programs: dict[str, Any], cache: Path, out: Path) -> list[tuple[Any, list[str]]]:
    """List a command line for every pair of an option, or argument, and a hostile text."""
    known = {
        "harvest": ["model", "text.jsonl", "--out", str(out)],
        "plan": ["model", "text.jsonl"],
        "convert": [str(cache), "--out", str(out)],
        "inspect": [str(cache)],
        "verify": [str(cache)],
        "bench": [str(cache), "--max-bytes", "1000", "--batch-size", "4", "--threads", "1"],
        "fit": [str(cache), "--out", str(out), "--k", "2"],
        "kernels": ["--device", "cpu"],
    }
    lines = []
    for program in programs.values():
        for name, command in program.commands.items():
            for parameter in command.params if name in known else ():
                if getattr(parameter, "is_flag", False) or parameter.name == "html":
                    continue
                for text in TEXTS:
                    given = list(known[name])
                    if parameter.param_type_name == "argument":
                        given[0] = text
                    else:
                        given += [max(parameter.opts, key=len), text]
                    lines.append((program, [name, *given]))
    return lines


def check_lines(
    lines: list[tuple[Any, list[str]]], capsys: pytest.CaptureFixture[str]
) -> dict[str, int]:
    outcomes = {"accepted": 0, "refused": 0}
    for program, arguments in lines:
        code = code_of(program, arguments)
        printed = "".join(capsys.readouterr())
        assert code in CODES, (arguments, printed)
        assert "\x1b" not in printed, arguments
        assert "Traceback" not in printed, arguments
        outcomes["refused" if code else "accepted"] += 1
    return outcomes


def pairs_of_lines(lines: list[tuple[Any, list[str]]], seed: int) -> Iterator[Any]:
    """Yield each line, then lines of one command with the options of two, without end."""
    yield from lines
    state = random.Random(seed)
    while True:
        program, first = state.choice(lines)
        _, second = state.choice([line for line in lines if line[1][0] == first[0]])
        yield program, [*first, *second[-2:]]


def offsets(obj: Any) -> Iterator[tuple[Any, Any]]:
    """List every (container, key) within a decoded value."""
    for key, value in list(obj.items() if isinstance(obj, dict) else enumerate(obj)):
        yield obj, key
        if isinstance(value, dict | list):
            yield from offsets(value)


def hostile_json(text: str, state: random.Random) -> str:
    """Change, remove, repeat or nest one value of a JSON document."""
    obj = json.loads(text)
    container, key = state.choice(list(offsets(obj)))
    action = state.randrange(8)
    if action < 4:
        container[key] = state.choice(VALUES)
    elif action == 4:
        del container[key]
    elif action == 5:
        return json.dumps(obj)[:-1] + f", {json.dumps(str(key))}: {json.dumps(container[key])}}}"
    elif action == 6:
        container[key] = "HERE"
        number = state.choice(["1e999", "-1e999", "9" * 5000, "NaN", "Infinity", "1" * 400, "-0"])
        return json.dumps(obj).replace('"HERE"', number)
    else:
        container[key] = "HERE"
        depth = state.choice([50, 900, 990, 100_000])
        return json.dumps(obj).replace('"HERE"', "[" * depth + "]" * depth)
    return json.dumps(obj)


OPTIONS = {
    "k": [2, 3], "lr": 1e-3, "num_latents": 8, "seed": [0, 1], "batch_size": 4, "epochs": 1,
    "activation": "topk", "matryoshka": [2, 4], "val_fraction": 0.1, "hookpoint": ["layers.0"],
    "hookpoints": {"layers.*": {"k": 2, "lr": 1e-3}}, "device": "cpu", "plan": True,
    "wandb_tags": [],
}  # fmt: skip


def check_option_files(
    program: Any, cache: Path, out: Path, seed: int, trials: int, capsys: Any
) -> None:
    """Run fit with hostile JSON and YAML files of options (JSON is YAML, too)."""
    state = random.Random(seed)
    for number in range(trials):
        file = out.with_name(f"options.{state.choice(['json', 'yaml'])}")
        file.write_text(hostile_json(json.dumps(OPTIONS), state), encoding="utf-8")
        code = code_of(program, ["fit", str(cache), "--out", str(out), "--config", str(file)])
        printed = "".join(capsys.readouterr())
        assert code in CODES, (number, printed)
        assert "\x1b" not in printed, number


def check_runs(program: Any, run: Path, seed: int, trials: int, capsys: Any) -> int:
    """Evaluate runs whose JSON files are hostile; return how many were refused."""
    state, refused = random.Random(seed), 0
    files = sorted(run.rglob("*.json"))
    originals = {file: file.read_text() for file in files}
    for number in range(trials):
        file = files[number % len(files)]
        file.write_text(hostile_json(originals[file], state), encoding="utf-8")
        code = code_of(program, ["eval", str(run)])
        printed = "".join(capsys.readouterr())
        assert code in CODES, (number, file, printed)
        assert "\x1b" not in printed, (number, file)
        refused += code > 0
        file.write_text(originals[file])
    return refused


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Path:
    """A finished run of one SAE."""
    from saetrain.launch.run import fit as train

    train(
        FitConfig(
            cache=str(cache), out=str(tmp_path / "run"), k=2, num_latents=8, batch_size=2,
            val_fraction=0.4, device="cpu",
        )
    )  # fmt: skip
    return tmp_path / "run"


def test_a_sample_of_hostile_command_lines_ends_in_our_exit_codes(
    programs: dict[str, Any],
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = command_lines(programs, cache, tmp_path / "out")
    assert len(lines) > 3000
    outcomes = check_lines(random.Random(0).sample(lines, SAMPLE), capsys)
    assert sum(outcomes.values()) == SAMPLE
    assert min(outcomes.values()) > 0


def test_a_sample_of_hostile_files_of_options_and_runs_ends_in_our_exit_codes(
    programs: dict[str, Any],
    cache: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saetrain = programs["saetrain"]
    check_option_files(saetrain, cache, tmp_path / "out", 0, SAMPLE, capsys)
    assert check_runs(saetrain, run, 0, SAMPLE // 5, capsys) > 0


@pytest.mark.soak
@pytest.mark.parametrize("batch", range(8))
def test_20_000_hostile_values_end_in_our_exit_codes(
    programs: dict[str, Any],
    cache: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch: int,
) -> None:
    share = TRIALS // 8
    lines = command_lines(programs, cache, tmp_path / "out")
    own = itertools.islice(pairs_of_lines(lines[batch::8], batch), share * 3 // 5)
    done = sum(check_lines(list(own), capsys).values())
    saetrain = programs["saetrain"]
    check_option_files(saetrain, cache, tmp_path / "out", batch, share * 3 // 10, capsys)
    assert check_runs(saetrain, run, batch, share // 10, capsys) > 0
    assert done + share * 3 // 10 + share // 10 == share


def test_a_copy_of_a_run_is_evaluated_like_the_run(
    programs: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    """The trials above start from a run that is sound."""
    shutil.copytree(run, tmp_path / "copy")
    assert code_of(programs["saetrain"], ["eval", str(tmp_path / "copy")]) == 0
