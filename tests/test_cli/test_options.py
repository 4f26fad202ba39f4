"""Command lines generated from configurations."""

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from actcache.config import HarvestConfig
from actcache_cli.options import command, field_docs
from saetrain.config.fit_config import FitConfig


@pytest.mark.parametrize("config_class", [HarvestConfig, FitConfig])
def test_every_field_of_a_configuration_has_its_docstring_as_help(config_class):
    docs = field_docs(config_class)
    for field in dataclasses.fields(config_class):
        assert len(docs[field.name]) > 10


def parse(config_class, positional, arguments):
    """Parse arguments; returns the configuration and --json."""
    parsed = []
    app = typer.Typer()
    app.command()(command(config_class, lambda *given: parsed.append(given), positional))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return parsed[0]


def test_a_bare_command_line_gives_the_defaults():
    config, as_json = parse(HarvestConfig, ["model", "dataset"], ["m", "d", "--out", "o"])
    assert config == HarvestConfig("m", "d", "o")
    assert not as_json


def test_options_of_every_type_set_their_fields():
    arguments = ["m", "d", "--out", "o", "--layers", "3", "--layers", "7", "--keep-order"]
    arguments += ["--bos", "never", "--max-tokens", "5000", "--dtype", "float32", "--json"]
    config, as_json = parse(HarvestConfig, ["model", "dataset"], arguments)
    expected = HarvestConfig(
        "m",
        "d",
        "o",
        layers=(3, 7),
        keep_order=True,
        bos="never",
        max_tokens=5000,
        dtype="float32",
    )
    assert config == expected
    assert as_json


def test_fit_parses_floats_and_repeated_hookpoints():
    arguments = ["c", "--out", "r", "--lr", "0.01", "--hookpoint", "a", "--hookpoint", "b.*"]
    config, _ = parse(FitConfig, ["cache"], arguments)
    assert config == FitConfig("c", "r", lr=0.01, hookpoint=("a", "b.*"))
