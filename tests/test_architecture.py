"""The architecture: which part may import which, how large a folder is, how a part is described.

Imports are read from the source, those inside functions and under TYPE_CHECKING among them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"actcache": "actcache", "saetrain": "saetrain", "actcache_cli": "cli"}
"""Installed name to folder."""

ARROWS = {
    "actcache.errors": "",
    "actcache.filesystem": "errors",
    "actcache.core": "errors filesystem",
    "actcache.config": "errors filesystem core",
    "actcache.format": "errors core filesystem",
    "actcache.storage": "errors core filesystem format",
    "actcache.data": "errors config core filesystem",
    "actcache.model": "errors config core format",
    "actcache.cache": "errors config core filesystem format storage",
    "actcache.stream": "errors cache core filesystem format storage",
    "actcache.inspection": "errors cache core filesystem format storage",
    "actcache.harvester": "errors cache config core data filesystem format model storage",
    "actcache.adapters": "errors cache core format stream",
    "saetrain.kernels": "",
    "saetrain.config": "",
    "saetrain.model": "config kernels",
    "saetrain.formats": "config model runs",
    "saetrain.optim": "config kernels",
    "saetrain.runs": "config",
    "saetrain.tracking": "config runs",
    "saetrain.distributed": "config runs tracking",
    "saetrain.training": "config kernels model formats optim runs tracking distributed",
    "saetrain.evaluation": "config formats kernels model runs tracking training",
    "saetrain.launch": "config kernels model formats optim runs tracking distributed training",
}
"""Each part of a package, and the parts of the same package that it may import."""

SAETRAIN_READS = {"errors", "core", "filesystem", "format", "cache", "stream"}
"""Parts of actcache that saetrain may import: what reads caches, and nothing that makes them."""

STANDARD_LIBRARY_ONLY = ["config", "errors", "core.json_codec", "core.options", "format.manifest"]
"""Modules of actcache that `--help` or a bare interpreter reads."""

NOUNS = {
    "training",
    "tracking",
    "loading",
    "shuffling",
    "sharding",
    "checkpointing",
    "metric_gathering",
    "error_handling",
}
"""Names in -ing that are nouns of the field; no other module ends so."""

MOST_MODULES = 20
MOST_AT_THE_TOP = 4


def modules() -> dict[str, Path]:
    """Every module of the product, by its full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports_of(name: str) -> Iterator[str]:
    """Every module that a module imports, ours by their full names, others by their first."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


GRAPH = {name: {i for i in imports_of(name) if i in MODULES and i != name} for name in MODULES}


FILE_FUNCTIONS = {
    "": "open load_file safe_open",
    "io": "open FileIO",
    "os": "open remove unlink rename replace rmdir removedirs mkdir makedirs link symlink "
    "truncate listdir scandir walk fwalk mkfifo mknod chmod chown utime",
    "shutil": "copy copy2 copyfile copytree move rmtree unpack_archive",
    "tempfile": "mkstemp mkdtemp NamedTemporaryFile TemporaryFile TemporaryDirectory",
    "np": "memmap fromfile load save savez",
    "torch": "load save",
}
"""Functions that reach files by themselves, by the name they are called on."""

FILE_METHODS = {"glob", "rglob", "rename", "touch", "symlink_to", "hardlink_to", "chmod"}
"""Methods of `pathlib.Path` that `RootedPath` does not make safe."""

FILES_OF_OTHERS = {
    "actcache.core.terminal os.open": "/dev/null",
    "actcache.data.datasets glob": "a text that the user names",
    "actcache.data.json_lines os.open": "a text that the user names",
    "actcache.data.parquet_rows tempfile.TemporaryFile": "its own new file, without a name",
    "actcache.data.plain_files glob": "a text that the user names",
    "actcache.data.plain_files os.walk": "a text that the user names",
    "actcache.data.watched_files os.open": "a text that the user names",
    "actcache.model.loading glob": "a model that the user names",
    "actcache.harvester.estimate shutil.rmtree": "its own new folder",
    "actcache.harvester.estimate tempfile.mkdtemp": "its own new folder",
    "saetrain.launch.finetune glob": "a run or an SAE that the user names",
    "saetrain.tracking.wandb_mirror glob": "the folder of W&B",
    "saetrain.tracking.wandb_mirror rename": "the folder of W&B",
}
"""Exceptions: calls that reach no file of a cache or run by its path, and what they reach."""


def file_calls(module: str) -> Iterator[str]:
    """Calls of a module that reach files without `actcache.filesystem`."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FILE_FUNCTIONS[""].split():
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, node.func.value
            known = FILE_FUNCTIONS.get(owner.id, "") if isinstance(owner, ast.Name) else ""
            if isinstance(owner, ast.Name) and name in known.split():
                yield f"{owner.id}.{name}"
            elif name in FILE_METHODS:
                yield name


def part_of(module: str) -> str:
    """actcache.cache.reader -> actcache.cache."""
    return ".".join(module.split(".")[:2])


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that reach themselves."""
    found = []
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        if start in seen:
            found.append(start)
    return found


@pytest.mark.parametrize("part", ARROWS)
def test_a_part_imports_only_what_its_arrows_allow(part: str) -> None:
    package = part.partition(".")[0]
    allowed = {part, *(f"{package}.{name}" for name in ARROWS[part].split())}
    for module, imported in GRAPH.items():
        if part_of(module) == part:
            ours = {part_of(i) for i in imported if i.startswith(f"{package}.")}
            assert ours <= allowed, module


def test_every_part_has_its_arrows() -> None:
    parts = {part_of(module) for module in MODULES if not module.startswith("actcache_cli")}
    assert parts - set(PACKAGES) == set(ARROWS)


def test_no_circle_of_imports_between_files() -> None:
    # A package's public names are imported on first use: no arrow of its __init__ is an import.
    graph = {name: edges for name, edges in GRAPH.items() if name not in PACKAGES}
    assert not circles(graph)


def test_no_circle_of_imports_between_folders() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        if module not in PACKAGES:
            parts = {part_of(i) for i in imported} - {part_of(module)}
            graph.setdefault(part_of(module), set()).update(parts)
    assert not circles(graph)


def test_files_are_reached_through_the_filesystem_part() -> None:
    # test_file_access.py asserts the same of what runs: nothing is opened by its path.
    found = {
        f"{module} {call}"
        for module in MODULES
        if part_of(module) != "actcache.filesystem"
        for call in file_calls(module)
    }
    assert found == set(FILES_OF_OTHERS)


def test_saetrain_reads_caches_and_makes_none() -> None:
    for module, imported in GRAPH.items():
        if module.startswith("saetrain"):
            reached = {i.split(".")[1] for i in imported if i.startswith("actcache.")}
            assert reached <= SAETRAIN_READS, module
            assert "actcache" not in imported, module


def test_nothing_imports_the_command_line_and_actcache_nothing_of_saetrain() -> None:
    for module, imported in GRAPH.items():
        package = module.partition(".")[0]
        others = {i.partition(".")[0] for i in imported} - {package}
        assert (
            others
            <= {
                "actcache": set(),
                "saetrain": {"actcache"},
                "actcache_cli": {"actcache", "saetrain"},
            }[package]
        ), module


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_what_help_reads_needs_the_standard_library_only(name: str) -> None:
    seen, todo = set(), [f"actcache.{name}"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            tree = ast.parse(MODULES[module].read_text())
            todo += sorted(GRAPH[module] - set(PACKAGES)) if module.endswith(name) else []
            for node in tree.body:  # those at the top: what is imported with the module
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for top in (n.partition(".")[0] for n in names):
                    assert top in sys.stdlib_module_names or top == "actcache", module


def test_folders_are_small() -> None:
    for package, folder in PACKAGES.items():
        for place in [ROOT / folder, *(p for p in (ROOT / folder).rglob("*") if p.is_dir())]:
            names = [path for path in place.glob("*.py") if path.name != "__init__.py"]
            at_the_top = place == ROOT / folder and package != "actcache_cli"
            assert len(names) <= (MOST_AT_THE_TOP if at_the_top else MOST_MODULES), place


def test_every_part_is_described_in_one_paragraph_and_lists_its_names() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py" and not module.startswith("actcache_cli"):
            tree = ast.parse(path.read_text())
            assert len(ast.get_docstring(tree) or "") > 60, module
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            assert "__all__" in names, module


def test_an_init_that_lists_modules_lists_all_of_them() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            inside = {m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == module}
            listed = set(getattr(__import__(module, fromlist=["__all__"]), "__all__", ()))
            if listed & inside and not listed - inside:
                assert listed == inside, module


def test_modules_are_named_by_nouns() -> None:
    for module in MODULES:
        last = module.rpartition(".")[2]
        assert not last.endswith("ing") or last in NOUNS, module


@pytest.mark.parametrize(("program", "command"), [("actcache", "harvest"), ("saetrain", "fit")])
def test_help_takes_less_than_half_a_second_of_a_processor_and_no_torch(
    program: str, command: str
) -> None:
    code = f"""
import sys
from actcache_cli import main
sys.argv = [{program!r}, {command!r}, "--help"]
try:
    main.{program}()
finally:
    print({{"torch", "numpy", "transformers", "zarr", "wandb"}} & set(sys.modules), file=sys.stderr)
"""

    def seconds() -> float:
        before = os.times()
        arguments = [sys.executable, "-c", code]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        after = os.times()
        assert done.stderr.splitlines()[-1] == "set()"
        user, system = after.children_user - before.children_user, after.children_system
        return user + system - before.children_system

    # One of ten: other work on the machine makes caches cold, and never makes it faster.
    assert any(seconds() < 0.5 for _ in range(10))


def test_the_listed_packages_are_the_folders_with_modules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(n for n, p in MODULES.items() if p.name == "__init__.py")
    assert len(listed) == len(set(listed))


def test_the_architecture_page_names_every_part() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for part in ARROWS:
        assert re.search(rf"\b{part.partition('.')[2]}\b", page), part
