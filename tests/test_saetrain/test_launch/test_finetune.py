"""Runs that begin with weights from runs, from sparsify, from the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ActcacheError, ConfigError, FormatError, RunError
from actcache.filesystem.atomic import digest_file
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.config.sae_options import SaeOptions
from saetrain.launch.estimate import estimate_fit
from saetrain.launch.finetune import require_header
from saetrain.launch.run import fit
from saetrain.runs.record import RUN, PretrainedSource, read_run

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

NOTHING = {"lr": 1e-30, "max_tokens": 32, "auxk_alpha": 0.0}
"""One step that changes nothing, so that what is saved is what a run began with."""


class Killed(BaseException):
    """Stands for a signal."""


def weights(root: Path | str, name: str = "layers.0") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(Path(root) / name / "sae.safetensors")
    return tensors


def unsaid(options: Options, **changes: Any) -> FitConfig:
    """Options that leave sizes to the SAEs that are there."""
    return options(**{"num_latents": None, "k": 32} | changes)


@pytest.fixture(scope="module")
def first(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two SAEs of 48 latents and k 3, which keeps its best ones. Nobody may change it."""
    out = tmp_path_factory.mktemp("first") / "run"
    small = {"batch_size": 32, "lr": 0.01, "val_every": 5, "save_best": True, "device": "cpu"}
    fit(FitConfig(num_latents=48, k=3, cache=str(cache_path), out=str(out), **small))  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, sparsify: ModuleType) -> Path:
    """What sparsify leaves: an SAE of 40 latents and k 5 for each hookpoint, and other files."""
    root = tmp_path_factory.mktemp("published")
    for seed, hookpoint in enumerate(("layers.0", "layers.1")):
        torch.manual_seed(seed)
        sae = sparsify.SparseCoder(16, sparsify.SparseCoderConfig(num_latents=40, k=5))
        with torch.no_grad():
            sae.encoder.bias.normal_()
            sae.b_dec.normal_()
        sae.save_to_disk(root / hookpoint)
    (root / "state.pt").write_bytes(pickle.dumps(Bomb()))
    (root / "layers.0" / "optimizer_0.pt").write_bytes(pickle.dumps(Bomb()))
    (root / "config.json").write_text("{}")
    return root


class Bomb:
    """Ends the tests when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


# --- where weights come from ---------------------------------------------------------------------


@pytest.mark.parametrize("source", ["run", "published"])
def test_a_run_begins_with_the_weights_of_each_hookpoint(
    options: Options, first: Path, published: Path, source: str
) -> None:
    root = first if source == "run" else published
    config = unsaid(options, finetune=str(root), decoder_norm="free", optimizer="adam", **NOTHING)
    fit(config)
    record = read_run(Path(config.out))
    latents, k = (48, 3) if source == "run" else (40, 5)
    assert [(s.config.num_latents, s.config.k) for s in record.saes] == [(latents, k)] * 2
    for entry, recorded in zip(record.saes, record.origins, strict=True):
        folder = root / entry.name
        expected = PretrainedSource(str(folder), None, digest_file(folder / "sae.safetensors"))
        assert recorded == expected
        old, new = weights(root, entry.name), weights(config.out, entry.name)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_one_saes_folder_and_its_best_one_serve_one_hookpoint(
    options: Options, first: Path
) -> None:
    (best,) = (first / "layers.0").glob("best-*")
    for place in (first / "layers.0", best):
        out = f"{options().out}-{place.name}"
        config = unsaid(options, finetune=str(place), out=out, hookpoint=("layers.1",), **NOTHING)
        config = dataclasses.replace(config, decoder_norm="free", optimizer="adam")
        fit(config)  # of another hookpoint: who names one SAE means it
        assert torch.equal(weights(out, "layers.1")["W_dec"], weights(place, ".")["W_dec"])
    with pytest.raises(RunError, match=r"is one SAE(.|\n)*layers\.0, layers\.1(.|\n)*--hookpoint"):
        fit(unsaid(options, finetune=str(best)))
    assert not Path(options().out).exists()


def test_a_grid_begins_with_the_same_grid_or_with_one_sae_each(
    options: Options, first: Path
) -> None:
    grid = vary(options(), k=(2, 3), seed=(0, 1))
    fit(grid)
    again = dataclasses.replace(
        vary(options(**NOTHING, out=options().out + "-again"), k=(2, 3), seed=(0, 1)),
        finetune=grid.out,
    )
    fit(again)
    for entry, source in zip(
        read_run(Path(again.out)).saes, read_run(Path(again.out)).origins, strict=True
    ):
        assert source.path == str(Path(grid.out) / entry.name)
    rates = vary(unsaid(options, finetune=str(first), out=options().out + "-r"), lr=(0.01, 0.02))
    fit(rates)
    assert {source.path for source in read_run(Path(rates.out)).origins} == {
        str(first / "layers.0"),
        str(first / "layers.1"),
    }
    with pytest.raises(RunError, match=r"several SAEs of layers\.0(.|\n)*k2-seed0 \| (.|\n)*name"):
        fit(unsaid(options, finetune=grid.out, out=options().out + "-none"))


def test_a_hookpoint_that_is_not_there_is_told_with_all_that_are(
    options: Options, first: Path, tmp_path: Path
) -> None:
    shutil.copytree(first, tmp_path / "copy")
    (tmp_path / "copy" / "layers.1").rename(tmp_path / "copy" / "layers.7")
    with pytest.raises(RunError) as caught:
        fit(unsaid(options, finetune=str(tmp_path / "copy")))
    told = str(caught.value)
    assert "no SAE of layers.1" in told
    assert "layers.0 | " in told
    assert "layers.7" in told
    assert not Path(options().out).exists()


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("{}/nothing/there", ConfigError, "is no folder, and no repository"),
        ("{}/cache", FormatError, "holds no SAE"),
        ("some/repository", RunError, "cannot be had from the Hub"),
        ("https://example.org/x", ConfigError, "is no folder, and no repository"),
    ],
)
def test_a_place_without_saes_is_refused(
    options: Options, tmp_path: Path, place: str, error: type[ActcacheError], words: str
) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(error, match=words):
        fit(unsaid(options, finetune=place.format(tmp_path)))
    assert not Path(options().out).exists()


# --- what begins anew ----------------------------------------------------------------------------


def test_b_dec_and_decoder_begin_anew_where_asked(
    options: Options, published: Path, cache_path: Path
) -> None:
    config = unsaid(options, finetune=str(published), decoder_norm="free", **NOTHING)
    fresh = dataclasses.replace(config, optimizer="adam", fresh_b_dec=True, fresh_decoder=True)
    fit(fresh)
    old, new = weights(published), weights(fresh.out)
    record = read_run(Path(fresh.out))
    mean = Cache.open(cache_path).statistics("layers.0", record.training_shards).mean
    assert torch.equal(new["b_dec"], torch.from_numpy(mean).float())
    rows = old["encoder.weight"] / old["encoder.weight"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(new["W_dec"], rows, rtol=1e-6, atol=1e-7)
    for name in ("encoder.weight", "encoder.bias"):
        assert torch.equal(old[name], new[name])


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "gated", "relu"])
def test_every_kind_keeps_its_kind_and_all_its_tensors(options: Options, activation: str) -> None:
    begun = options(activation=activation, out=options().out + "-first")
    fit(begun)
    config = unsaid(options, finetune=begun.out, decoder_norm="free", optimizer="adam", **NOTHING)
    fit(config)
    assert read_run(Path(config.out)).saes[0].config.activation == activation
    old, new = weights(begun.out), weights(config.out)
    assert old.keys() == new.keys()
    # A batch's threshold is an average that every batch moves.
    same = [name for name in old if activation != "batchtopk" or name != "threshold"]
    assert all(torch.equal(old[name], new[name]) for name in same)


def test_a_run_that_goes_on_learning_is_better_from_the_start(
    options: Options, first: Path
) -> None:
    def first_fvu(config: FitConfig) -> float:
        fit(config)
        line = (Path(config.out) / "metrics.jsonl").read_text().splitlines()[0]
        return float(json.loads(line)["saes"]["layers.0"]["fvu"])

    new = first_fvu(options(out=options().out + "-new"))
    assert first_fvu(unsaid(options, finetune=str(first))) < 0.9 * new


# --- exact, all the same -------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 7])
def test_a_finetuned_run_that_was_stopped_equals_one_that_was_not(
    options: Options,
    first: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    tmp_path: Path,
) -> None:
    """Before its first checkpoint it needs its source again; after it, no more."""
    source = shutil.copytree(first, tmp_path / "source")
    whole = unsaid(options, finetune=str(source), out=options().out + "-whole")
    stopped = unsaid(options, finetune=str(source), resume=True)
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int, alpha: float) -> None:
        if number == stop_at:
            raise Killed
        real(trainer, rows, number, alpha)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(stopped)
    path = source / "layers.0" / "sae.safetensors"
    if stop_at == 1:
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(RunError, match="is not what this run began with"):
            fit(stopped)
        path.write_bytes(kept)
    else:
        shutil.rmtree(source)
    fit(stopped)
    assert snapshot(Path(whole.out)) == snapshot(Path(stopped.out))
    assert fit(dataclasses.replace(stopped, lr=0.5, force_config=True)).new_steps == 0


def test_the_plan_of_a_run_has_the_sizes_of_what_it_begins_with(
    options: Options, first: Path
) -> None:
    plan = estimate_fit(unsaid(options, finetune=str(first)), torch.device("cpu"))
    assert [(sae.num_latents, sae.k) for sae in plan.saes] == [(48, 3)] * 2


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 4}, r"--k 3(.|\n)*--k 4"),
        ({"num_latents": 64}, r"--num-latents 48(.|\n)*64"),
        ({"expansion_factor": 2}, r"--num-latents 48(.|\n)*32"),
        ({"activation": "relu"}, r"--activation topk(.|\n)*relu"),
        ({"input_scale": "rms"}, r"none(.|\n)*rms"),
        ({"encoder_scale": "auto"}, r"--encoder-scale 1(.|\n)*auto"),
        ({"saes": (SaeOptions(k=3), SaeOptions(k=4, seed=1))}, r"--k 4"),
    ],
    ids=str,
)
def test_options_that_contradict_the_weights_are_refused(
    options: Options, first: Path, changes: dict[str, Any], words: str
) -> None:
    if "saes" in changes:
        config = FitConfig(options().cache, options().out, finetune=str(first), **changes)
    else:
        config = unsaid(options, finetune=str(first), **changes)
    with pytest.raises(ConfigError, match=rf"contradict the SAE in (.|\n)*{words}"):
        fit(config)
    assert not Path(options().out).exists()
    assert fit(options(finetune=str(first))).steps == 12  # who says what is so is not refused


def test_rows_of_another_width_are_refused(
    options: Options, first: Path, make_cache: Callable[..., Path]
) -> None:
    cache = make_cache(hookpoints={"layers.0": 8})
    with pytest.raises(ConfigError, match=r"d_in 16(.|\n)*d_in 8"):
        fit(unsaid(options, finetune=str(first), cache=str(cache)))


def test_decoder_rows_of_any_norm_are_not_scaled_unasked(options: Options) -> None:
    begun = options(decoder_norm="free", out=options().out + "-free")
    fit(begun)
    with pytest.raises(ConfigError, match=r"of any norm(.|\n)*--decoder-norm free or fold"):
        fit(unsaid(options, finetune=begun.out))
    assert fit(unsaid(options, finetune=begun.out, decoder_norm="fold")).steps == 12


@pytest.mark.parametrize("option", ["fresh_b_dec", "fresh_decoder"])
def test_what_is_fresh_needs_something_that_is_not(option: str) -> None:
    with pytest.raises(ConfigError, match="needs --finetune"):
        FitConfig("c", "r", **{option: True})


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a file's header anew."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
        lambda path: header(path, lambda h: h["W_dec"].update(shape=[48, 2**60])),
        lambda path: header(path, lambda h: h["W_dec"].update(data_offsets=[0, 2**62])),
        lambda path: header(path, lambda h: h["b_dec"].update(dtype="I32")),
        lambda path: header(path, lambda h: h.pop("encoder.bias")),
        lambda path: save_file(load_file(path) | {"b_dec": torch.full((16,), torch.nan)}, path),
        lambda path: path.unlink(),
    ],
    ids=["cut", "empty", "length", "pickle", "shape", "offsets", "type", "lacks", "nan", "missing"],
)
def test_damaged_weights_are_refused_before_anything_is_mapped(
    options: Options, first: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    source = shutil.copytree(first, tmp_path / "source")
    damage(source / "layers.1" / "sae.safetensors")
    with pytest.raises(FormatError, match=r"layers\.1"):
        fit(unsaid(options, finetune=str(source)))
    assert not Path(options().out).exists()


def test_a_sound_header_passes(first: Path) -> None:
    path = first / "layers.0" / "sae.safetensors"
    require_header(path, {"W_dec": (48, 16), "b_dec": (16,)})
    with pytest.raises(FormatError, match="tensor W_dec"):
        require_header(path, {"W_dec": (48, 17)})


# --- the Hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(root: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """The Hub, as far as downloads ask it, on this machine; and the files it was asked for."""
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            resolve = f"/{repository}/resolve/{COMMIT}/"
            path, headers = self.path.partition("?")[0], {}
            if path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
                if "/tree/" in path:
                    body = json.dumps(
                        [
                            {"type": "file", "path": n, "size": len(d), "oid": ""}
                            for n, d in files.items()
                        ]
                    ).encode()
            elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                asked.append(path.removeprefix(resolve))
                body = files[asked[-1]]
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_program_begins_with_a_repository_of_the_hub(
    options: Options, published: Path, tmp_path: Path
) -> None:
    config = options()
    program = str(Path(sys.executable).with_name("saetrain"))
    command = [program, "fit", config.cache, "--out", config.out, "--finetune", "someone/saes"]
    command += ["--batch-size", "32", "--device", "cpu", "--hookpoint", "layers.1", "--resume"]
    with hub(published, "someone/saes") as (endpoint, asked):
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layers.1 begins with someone/saes/layers.1 (40 latents, k 5)" in done.stderr
    record = read_run(Path(config.out))
    file = digest_file(published / "layers.1" / "sae.safetensors")
    assert record.origins == (PretrainedSource("someone/saes/layers.1", COMMIT, file),)
    assert {name for name in asked if not name.endswith("cfg.json")} == {"layers.1/sae.safetensors"}
    assert (Path(config.out) / RUN).exists()
