"""Runs initialised from weights of runs, of sparsify, and of the Hub."""

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

import saetrain.launch.finetune
import saetrain.launch.setup
import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import ActcacheError, ConfigError, FormatError, RunError
from actcache.filesystem.atomic import digest_file
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.config.sae import PENALISED, SaeOptions
from saetrain.launch.estimate import estimate_fit
from saetrain.launch.run import fit
from saetrain.runs.record import RUN, PretrainedSource, read_run

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

NOTHING = {"lr": 1e-30, "max_tokens": 32, "auxk_alpha": 0.0}
"""Options of one step that changes nothing: the exports are the initial weights."""


class Killed(BaseException):
    """Stands in for a signal."""


def weights(root: Path | str, name: str = "layers.0") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(Path(root) / name / "sae.safetensors")
    return tensors


def no_sizes(options: Options, **changes: Any) -> FitConfig:
    """Return options without sizes, which the pretrained SAEs give."""
    return options(**{"num_latents": None, "k": 32} | changes)


@pytest.fixture(scope="module")
def first(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of two SAEs of 48 latents and k 3 with --save-best. Tests must not change it."""
    out = tmp_path_factory.mktemp("first") / "run"
    small = {"batch_size": 32, "lr": 0.01, "val_every": 5, "save_best": True, "device": "cpu"}
    fit(FitConfig(num_latents=48, k=3, cache=str(cache_path), out=str(out), **small))  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, sparsify: ModuleType) -> Path:
    """Make a folder of sparsify: per hookpoint an SAE of 40 latents and k 5, and other files."""
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
    """Exit the process when unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


# --- where weights come from ---------------------------------------------------------------------


@pytest.mark.parametrize("source", ["run", "published"])
def test_a_run_starts_from_the_weights_of_each_hookpoint(
    options: Options, first: Path, published: Path, source: str
) -> None:
    root = first if source == "run" else published
    config = no_sizes(options, finetune=str(root), decoder_norm="free", optimizer="adam", **NOTHING)
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


def test_the_folder_of_one_sae_initialises_any_one_hookpoint(options: Options, first: Path) -> None:
    (best,) = (first / "layers.0").glob("best-*")
    for path in (first / "layers.0", best):
        out = f"{options().out}-{path.name}"
        config = no_sizes(options, finetune=str(path), out=out, hookpoint=("layers.1",), **NOTHING)
        config = dataclasses.replace(config, decoder_norm="free", optimizer="adam")
        fit(config)  # of another hookpoint
        assert torch.equal(weights(out, "layers.1")["W_dec"], weights(path, ".")["W_dec"])
    with pytest.raises(RunError, match=r"is one SAE(.|\n)*layers\.0, layers\.1(.|\n)*--hookpoint"):
        fit(no_sizes(options, finetune=str(best)))
    assert not Path(options().out).exists()


def test_a_grid_starts_from_the_same_grid_or_from_one_sae_per_hookpoint(
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
    rates = vary(no_sizes(options, finetune=str(first), out=options().out + "-r"), lr=(0.01, 0.02))
    fit(rates)
    assert {source.path for source in read_run(Path(rates.out)).origins} == {
        str(first / "layers.0"),
        str(first / "layers.1"),
    }
    with pytest.raises(RunError, match=r"several SAEs of layers\.0(.|\n)*k2-seed0 \| (.|\n)*name"):
        fit(no_sizes(options, finetune=grid.out, out=options().out + "-none"))


def test_a_missing_hookpoint_is_refused_with_a_list_of_those_present(
    options: Options, first: Path, tmp_path: Path
) -> None:
    shutil.copytree(first, tmp_path / "copy")
    (tmp_path / "copy" / "layers.1").rename(tmp_path / "copy" / "layers.7")
    with pytest.raises(RunError) as caught:
        fit(no_sizes(options, finetune=str(tmp_path / "copy")))
    text = str(caught.value)
    assert "no SAE of layers.1" in text
    assert "layers.0 | " in text
    assert "layers.7" in text
    assert not Path(options().out).exists()


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("{}/nothing/there", ConfigError, "is no folder, and no repository"),
        ("{}/cache", FormatError, "holds no SAE"),
        ("some/repository", RunError, "cannot be downloaded from the Hub"),
        ("https://example.org/x", ConfigError, "is no folder, and no repository"),
    ],
)
def test_a_path_without_saes_is_refused(
    options: Options, tmp_path: Path, path: str, error: type[ActcacheError], words: str
) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(error, match=words):
        fit(no_sizes(options, finetune=path.format(tmp_path)))
    assert not Path(options().out).exists()


# --- what begins anew ----------------------------------------------------------------------------


def test_fresh_b_dec_and_fresh_decoder_use_the_initial_values(
    options: Options, published: Path, cache_path: Path
) -> None:
    config = no_sizes(options, finetune=str(published), decoder_norm="free", **NOTHING)
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
def test_every_activation_keeps_all_its_tensors(options: Options, activation: str) -> None:
    trained = options(activation=activation, out=options().out + "-first")
    fit(trained)
    config = no_sizes(
        options, finetune=trained.out, decoder_norm="free", optimizer="adam", **NOTHING
    )
    fit(config)
    assert read_run(Path(config.out)).saes[0].config.activation == activation
    old, new = weights(trained.out), weights(config.out)
    assert old.keys() == new.keys()
    # The threshold of BatchTopK is an average that every batch changes.
    same = [name for name in old if activation != "batchtopk" or name != "threshold"]
    assert all(torch.equal(old[name], new[name]) for name in same)


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_a_target_of_l0_is_steered_to_from_weights_that_were_trained_without_a_penalty(
    options: Options, activation: str
) -> None:
    trained = options(activation=activation, sparsity=0.0, out=options().out + "-first")
    fit(trained)
    config = no_sizes(
        options,
        finetune=trained.out,
        activation=activation,
        decoder_norm="free",
        optimizer="adam",
        target_l0=5.0,
    )
    fit(config)
    record = read_run(Path(config.out))
    assert record.saes[0].config.sparsity == PENALISED[activation]
    line = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["saes"]["layers.0"]["penalty"] > 0
    assert fit(dataclasses.replace(config, resume=True)).new_steps == 0


def test_a_finetuned_run_has_a_lower_loss_from_the_first_line(
    options: Options, first: Path
) -> None:
    def first_fvu(config: FitConfig) -> float:
        fit(config)
        line = (Path(config.out) / "metrics.jsonl").read_text().splitlines()[0]
        return float(json.loads(line)["saes"]["layers.0"]["fvu"])

    new = first_fvu(options(out=options().out + "-new"))
    assert first_fvu(no_sizes(options, finetune=str(first))) < 0.9 * new


# --- exact, all the same -------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 7])
def test_a_stopped_finetuned_run_resumes_to_the_same_bytes(
    options: Options,
    first: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    tmp_path: Path,
) -> None:
    """It reads the pretrained weights again before its first checkpoint, and not after it."""
    source = shutil.copytree(first, tmp_path / "source")
    whole = no_sizes(options, finetune=str(source), out=options().out + "-whole")
    stopped = no_sizes(options, finetune=str(source), resume=True)
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == stop_at:
            raise Killed
        real(trainer, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(stopped)
    path = source / "layers.0" / "sae.safetensors"
    if stop_at == 1:
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(RunError, match="differs from the file that its run names"):
            fit(stopped)
        path.write_bytes(kept)
    else:
        shutil.rmtree(source)
    fit(stopped)
    assert snapshot(Path(whole.out)) == snapshot(Path(stopped.out))
    assert fit(dataclasses.replace(stopped, lr=0.5, force_config=True)).new_steps == 0


def test_the_estimate_has_the_sizes_of_the_pretrained_saes(options: Options, first: Path) -> None:
    plan = estimate_fit(no_sizes(options, finetune=str(first)), torch.device("cpu"))
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
        config = no_sizes(options, finetune=str(first), **changes)
    with pytest.raises(ConfigError, match=rf"contradict the SAE in (.|\n)*{words}"):
        fit(config)
    assert not Path(options().out).exists()
    assert fit(options(finetune=str(first))).steps == 12  # equal options are accepted


def test_rows_of_another_width_are_refused(
    options: Options, first: Path, make_cache: Callable[..., Path]
) -> None:
    cache = make_cache(hookpoints={"layers.0": 8})
    with pytest.raises(ConfigError, match=r"d_in 16(.|\n)*d_in 8"):
        fit(no_sizes(options, finetune=str(first), cache=str(cache)))


def test_decoder_rows_of_other_norms_are_refused_with_unit_norm(options: Options) -> None:
    trained = options(decoder_norm="free", out=options().out + "-free")
    fit(trained)
    with pytest.raises(ConfigError, match=r"of any norm(.|\n)*--decoder-norm free or fold"):
        fit(no_sizes(options, finetune=trained.out))
    assert fit(no_sizes(options, finetune=trained.out, decoder_norm="fold")).steps == 12


@pytest.mark.parametrize("option", ["fresh_b_dec", "fresh_decoder"])
def test_fresh_options_need_finetune(option: str) -> None:
    with pytest.raises(ConfigError, match="needs --finetune"):
        FitConfig("c", "r", **{option: True})


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Replace the header of a safetensors file."""
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
def test_damaged_weights_are_refused(
    options: Options, first: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    source = shutil.copytree(first, tmp_path / "source")
    (source / RUN).unlink()  # its checkpoint would name another file
    damage(source / "layers.1" / "sae.safetensors")
    with pytest.raises(FormatError, match=r"layers\.1"):
        fit(no_sizes(options, finetune=str(source)))
    assert not Path(options().out).exists()


@pytest.mark.parametrize("name", ["layers.1/sae.safetensors", "layers.1/cfg.json"])
def test_an_sae_of_a_run_that_differs_from_the_checkpoint_is_refused(
    options: Options, first: Path, tmp_path: Path, name: str
) -> None:
    source = shutil.copytree(first, tmp_path / "source")
    for path in (source / name, *source.glob(name.replace("/", "/best-*/"))):
        data = path.read_bytes()
        # cfg.json: other bytes of the same values
        config = path.name == "cfg.json"
        path.write_bytes(data.replace(b"false", b" false", 1) if config else data[:-1] + b"?")
        folder = source if path.parent.parent == source else path.parent
        with pytest.raises(RunError, match=f"{path.name} is not what the last checkpoint"):
            fit(no_sizes(options, finetune=str(folder), hookpoint=("layers.1",)))
        path.write_bytes(data)
    fit(no_sizes(options, finetune=str(source), hookpoint=("layers.1",)))


def test_sizes_of_a_config_are_compared_with_the_header_before_anything_is_allocated(
    options: Options, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(first / "layers.0", tmp_path / "layers.0").parent
    path = source / "layers.0" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_latents": 2**30}))
    monkeypatch.setattr(saetrain.launch.setup, "make_trainers", None)
    with pytest.raises(FormatError, match=r"tensor encoder\.weight"):
        fit(no_sizes(options, finetune=str(source), hookpoint=("layers.0",)))


@pytest.mark.parametrize(
    "origin",
    [
        {"path": "x", "revision": "0" * 40},
        {"path": "someone/saes", "revision": "main"},
        {"path": "someone/saes", "revision": "0" * 40},
        {"path": "someone/saes/../../..", "revision": "0" * 40},
        {"path": "someone/saes/./layers.0", "revision": "0" * 40},
        {"path": "/etc/someone", "revision": "0" * 40},
        {"path": "/etc", "revision": None},
        {"path": "{source}/../elsewhere", "revision": None},
        {"path": "layers.0", "revision": None},
        {"path": "{source}/a\0b", "revision": None},
        {"path": "", "revision": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("finetuned", [True, False])
def test_a_run_json_leads_to_no_repository_or_folder_but_that_of_finetune(
    options: Options,
    first: Path,
    monkeypatch: pytest.MonkeyPatch,
    origin: dict[str, str | None],
    finetuned: bool,
) -> None:
    one = {"hookpoint": ("layers.0",), "max_tokens": 32}
    config = no_sizes(options, finetune=str(first), **one) if finetuned else options(**one)
    fit(config)
    for path in Path(config.out).glob("checkpoint-*"):
        path.unlink()
    path = Path(config.out) / RUN
    run = json.loads(path.read_text())
    del run["seal"]
    file = dataclasses.asdict(digest_file(path))
    named = str(origin["path"]).replace("{source}", str(first))
    run["origins"] = [origin | {"path": named, "file": file}]
    path.write_bytes(to_json(run, sealed=True))
    monkeypatch.setattr(saetrain.launch.finetune, "_download", None)
    monkeypatch.setattr(saetrain.launch.finetune, "read_sae", None)
    with pytest.raises(FormatError, match=r"run\.json"):
        fit(dataclasses.replace(config, resume=True))


# --- the Hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(root: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """Serve the Hub's download API locally, and record the requested files."""
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    requested: list[str] = []

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
                requested.append(path.removeprefix(resolve))
                body = files[requested[-1]]
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
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command_starts_from_a_repository_of_the_hub(
    options: Options, published: Path, tmp_path: Path
) -> None:
    config = options()
    program = str(Path(sys.executable).with_name("saetrain"))
    command = [program, "fit", config.cache, "--out", config.out, "--finetune", "someone/saes"]
    command += ["--batch-size", "32", "--device", "cpu", "--hookpoint", "layers.1", "--resume"]
    with hub(published, "someone/saes") as (endpoint, requested):
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layers.1 starts from someone/saes/layers.1 (40 latents, k 5)" in done.stderr
    record = read_run(Path(config.out))
    file = digest_file(published / "layers.1" / "sae.safetensors")
    assert record.origins == (PretrainedSource("someone/saes/layers.1", COMMIT, file),)
    assert {name for name in requested if not name.endswith("cfg.json")} == {
        "layers.1/sae.safetensors"
    }
    assert (Path(config.out) / RUN).exists()
