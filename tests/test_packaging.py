"""Contents of the wheel, and imports allowed between packages."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = {"actcache": "actcache", "saetrain": "saetrain", "cli": "actcache_cli"}
"""Import name of each package folder."""

MAY_IMPORT = {
    "actcache": {"actcache"},
    "saetrain": {"saetrain", "actcache"},
    "cli": {"actcache_cli", "saetrain", "actcache"},
}


def imports_of(path):
    """Return full names of the modules that a file imports, without relative imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", HOUSE)
def test_packages_import_only_allowed_packages(folder):
    ours = {*HOUSE.values(), "cli"}
    for path in sources(folder):
        found = {name.partition(".")[0] for name in imports_of(path)} & ours
        assert found <= MAY_IMPORT[folder], path


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("saetrain/kernels", {"torch", "triton", "saetrain.kernels"}),
        ("saetrain/model/activations", {"torch", "saetrain.kernels", "saetrain.model.activations"}),
        (
            "saetrain/model/sae.py",
            {
                "torch",
                "actcache.errors",
                "saetrain.config.sae",
                "saetrain.kernels",
                "saetrain.model.activations",
            },
        ),
    ],
)
def test_kernels_and_sae_import_torch_only(path, allowed):
    files = [ROOT / path] if path.endswith(".py") else sources(path)
    for file in files:
        for name in imports_of(file):
            known = name.partition(".")[0] in sys.stdlib_module_names
            assert known or any(name == a or name.startswith(f"{a}.") for a in allowed), file


def test_a_training_step_needs_torch_and_numpy_only():
    """Check a plain checkout on a machine without the other dependencies."""
    others = {"xxhash", "zarr", "safetensors", "transformers", "huggingface_hub", "typer", "tqdm"}
    program = f"""
import sys
sys.modules |= dict.fromkeys({others | {"datasets", "wandb", "yaml", "fsspec"}!r})
import saetrain.optim, saetrain.training.step
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", ["config", "format/manifest", "errors", "core/json_codec"])
def test_modules_of_help_import_the_standard_library_only(module):
    tree = ast.parse((ROOT / "actcache" / f"{module}.py").read_text())
    for node in tree.body:  # what is imported with the module
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        top = str(name).partition(".")[0]
        assert top in sys.stdlib_module_names or top == "actcache"


def test_the_wheel_contains_exactly_the_three_packages_and_their_data(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    # A copy of the tree: the build leaves folders of its own behind.
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tree = tmp_path / "tree"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(tree)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(HOUSE.values())
    data = ("actcache/inspection/html/page.css", "actcache/py.typed")
    for needed in data:
        assert needed in names
    for folder, package in HOUSE.items():
        for path in sources(folder):
            assert f"{package}/{path.relative_to(ROOT / folder)}" in names


def test_every_direct_dependency_is_pinned_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    for requirement in wanted:
        match = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert match
        assert match[0].lower().replace("_", "-") in pins
    assert {"demo", "report", "peers", "dev"} <= set(extras)
