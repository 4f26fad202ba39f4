"""Generate docs/cli.md, the reference of every command, from the parsers that print `--help`.

python -m actcache_cli.reference > docs/cli.md
"""

from __future__ import annotations

import re
import sys

import typer

from .main import actcache_app, saetrain_app
from .options import GroupedCommand

_HEAD = """# Command line

Every command and option of the two programs, as `--help` prints them. This page is generated from
the options' own descriptions (`python -m actcache_cli.reference`). A repeatable option is given
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


def main() -> None:
    """Print the page."""
    sys.stdout.write(reference())


if __name__ == "__main__":
    main()
