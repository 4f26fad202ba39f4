"""Help of every command, and docs/cli.md, which is made of the same lines.

python tests/test_cli/test_reference.py > docs/cli.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer

from actcache_cli.options import GroupedCommand
from actcache_cli.programs import actcache_app, saetrain_app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

_HEAD = """# Command line

Every command and option of the two programs, as `--help` prints them. This page is generated from
the options' own descriptions: `python tests/test_cli/test_reference.py`. Give a repeatable option
once for each value.
"""


def reference() -> str:
    """Render the page: one section for each command, one table for each group of options."""
    parts = [_HEAD]
    for program, app in (("actcache", actcache_app()), ("saetrain", saetrain_app())):
        group = typer.main.get_command(app)
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            assert isinstance(command, GroupedCommand)
            parts.append(_section(f"{program} {name}", command))
    return "\n".join(parts)


def _section(name: str, command: GroupedCommand) -> str:
    context = typer.Context(command, info_name=name)
    text = "\n".join(line.strip() for line in (command.help or "").splitlines())
    lines = [f"## {name}", "", text, ""]
    for heading, records in command.groups(context).items():
        what = "argument" if heading == "Arguments" else "option"
        lines += [f"### {name}: {heading.lower()}", "", f"| {what} | meaning |", "| --- | --- |"]
        lines += [f"| `{_cell(left)}` | {_cell(right)} |" for left, right in records]
        lines.append("")
    example = (command.epilog or "").partition("\n")[2].partition("\n")[2]
    example = "\n".join(line.removeprefix("  ") for line in example.splitlines())
    return "\n".join([*lines, "Example:", "", "```text", example, "```", ""])


def _cell(text: str) -> str:
    """Escape characters that are markup in Markdown tables or HTML."""
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return re.sub(r"([*<])", r"\\\1", text) if "`" not in text else text


COMMANDS = {
    f"{program} {name}": command
    for program, app in (("actcache", actcache_app()), ("saetrain", saetrain_app()))
    for name, command in typer.main.get_command(app).commands.items()
}


def help_of(name: str) -> str:
    command = COMMANDS[name]
    return command.get_help(typer.Context(command, info_name=name))


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "python tests/test_cli/test_reference.py > docs/cli.md"


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


if __name__ == "__main__":
    sys.stdout.write(reference())
