"""Help of every command, and docs/cli.md, which is generated from the same lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from actcache_cli.main import actcache_app, saetrain_app
from actcache_cli.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

COMMANDS = {
    f"{program} {name}": command
    for program, app in (("actcache", actcache_app()), ("saetrain", saetrain_app()))
    for name, command in typer.main.get_command(app).commands.items()
}


def help_of(name: str) -> str:
    command = COMMANDS[name]
    return command.get_help(typer.Context(command, info_name=name))


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "python -m actcache_cli.reference > docs/cli.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_of_the_command(name: str) -> None:
    *_, last = help_of(name).split("\n\n")
    heading, example, *_ = (line.strip() for line in last.splitlines())
    assert heading == "Example:"
    assert example.startswith(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_no_python_type_names(name: str) -> None:
    assert not re.search(r"<(str|int|float|list|.*\|)", help_of(name))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (
            "saetrain fit",
            "Arguments|Main options|SAE|Optimiser|Schedule|Initialisation|Data|Precision and memory"
            "|Validation|Processes|Checkpoints|Logging|Other options",
        ),
        ("actcache harvest", "Arguments|Main options|Data|Rows|Model|Storage|Other options"),
    ],
)
def test_options_are_listed_in_groups_the_main_ones_first(name: str, groups: str) -> None:
    found = re.findall(r"(?m)^(\w[\w ]*):$", help_of(name))
    assert set(found) == set(groups.split("|"))
    assert found[:2] == ["Arguments", "Main options"]
    assert found[-1] == "Other options"


@pytest.mark.parametrize("name", ["saetrain fit", "actcache harvest"])
def test_every_option_belongs_to_a_group(name: str) -> None:
    _, others = help_of(name).split("Other options:")
    options = set(re.findall(r"--[\w-]+", others.partition("Example:")[0]))
    assert options <= {"--plan", "--json", "--help"}
