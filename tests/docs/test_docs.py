"""Holds README and docs to the project: their links, files, figures and commands.

A fenced block behind `<!-- run -->` is run: shell lines one by one, the Python blocks of a page
together. Of all other commands, the module and the recipe's fields are checked.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUN = "<!-- run -->"
FROM_DEMO = "<!-- shortened from benchmarks/results/demo_cpu.txt -->"

README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "dev" / "LOG.md",
    RESULTS / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
GUIDES = sorted((ROOT / "docs").glob("add_a_*.md"))
NEW_IN_GUIDES = {"quantize/formats/fp8_channel.py", "calibrate/sources/csv.py"}
"""Files that a reader of a guide would write."""

SUFFIXES = (".py", ".md", ".json", ".jsonl", ".yaml", ".toml", ".txt", ".jinja")


@dataclass(frozen=True)
class Block:
    """A fenced block: the line before it, its language and its lines."""

    before: str
    language: str
    lines: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    found = []
    before = ""
    opened = None
    lines: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if opened is None and line.startswith("```"):
            opened = line.removeprefix("```")
            lines = []
        elif opened is not None and line == "```":
            found.append(Block(before, opened, tuple(lines)))
            opened = None
            before = ""
        elif opened is not None:
            lines.append(line)
        elif line:
            before = line
    assert opened is None, f"{page}: a fenced block is not closed"
    return found


def marked_lines(page: Path, language: str) -> list[str]:
    """The lines of the blocks that are to be run, those of a page in one list."""
    lines: list[str] = []
    for block in blocks(page):
        if block.before == RUN and block.language == language:
            lines += block.lines
    return lines


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


def command_lines(page: Path) -> list[list[str]]:
    """The shell lines of a page's blocks as words, without comments, continued lines joined."""
    found = []
    for block in blocks(page):
        if block.language not in ("", "bash") or block.before == FROM_DEMO:
            continue
        for line in "\n".join(block.lines).replace("\\\n", " ").splitlines():
            if re.match(r"(?:\S+/)?(?:python|torchrun|hybridquant|accelerate) ", line):
                found.append(shlex.split(line, comments=True))
    return found


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def environment() -> dict[str, str]:
    # One thread: on a busy machine, two threads of torch wait for each other in every convolution.
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugin")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def test_readme_is_read_in_two_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else (page.parent / path).resolve()
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_in_backticks_exist(page):
    missing = []
    for text in re.findall(r"`([\w.\-]+(?:/[\w.\-]+)*/?)`", prose(page)):
        is_file = "/" in text and text.endswith(SUFFIXES)
        if not is_file and not text.endswith("/"):
            continue
        if text.startswith(("vllm/", "out/")) or text in NEW_IN_GUIDES:
            continue
        if not (ROOT / text).exists():
            missing.append(text)
    assert missing == []


def test_every_result_file_is_in_the_index_and_in_the_results():
    files = {path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".txt")}
    index = re.findall(r"^\| \[([\w.]+)\]", prose(RESULTS / "README.md"), flags=re.M)
    assert set(index) == files
    linked = re.findall(r"benchmarks/results/([\w.]+)\)", prose(ROOT / "docs" / "results.md"))
    assert set(linked) - {"README.md"} == files


def test_the_demo_in_the_readme_is_that_of_the_file():
    printed = (RESULTS / "demo_cpu.txt").read_text(encoding="utf-8").splitlines()
    shown = 0
    for block in blocks(README):
        if block.before != FROM_DEMO:
            continue
        position = 0
        for line in block.lines:
            position = printed.index(line, position) + 1  # raises for a line that is not there
            shown += 1
    assert shown > 5


# Figures.


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def told_rows() -> list[str]:
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()


def test_accuracy_table_is_that_of_the_file():
    rows: dict[str, list[str]] = {}
    variants = result("tiny_accuracy_h100.json")["against_bf16"]
    for variant in ("fp8", "nvfp4", "nvfp4_qat", "nvfp4_qad"):
        for row in variants[variant]:
            cells = rows.setdefault(row["task"], [row["task"], percent(row["reference"])])
            cells.append(percent(row["variant"]))
    told = told_rows()
    for cells in rows.values():
        assert table_row(cells) in told


def mean_and_text(rows: list[dict], key: str = "variant") -> str:
    by_task = {row["task"]: percent(row[key]) for row in rows}
    return f"{by_task['mean']} ({by_task['text']})"


def test_served_table_is_that_of_the_file():
    found = result("tiny_served_h100.json")
    in_process = found["against_bf16"]
    served = found["served_against_in_process"]
    first = ["in process", mean_and_text(in_process["fp8"], "reference")]
    second = ["vLLM, with the kernel that it chooses", mean_and_text(served["bf16"])]
    for variant in ("fp8", "nvfp4", "nvfp4_qad"):
        first.append(mean_and_text(in_process[variant]))
        second.append(mean_and_text(served[variant]))
    nvfp4 = mean_and_text(served["nvfp4:emulation"])
    qad = mean_and_text(served["nvfp4_qad:emulation"])
    told = told_rows()
    assert table_row(first) in told
    assert table_row(second) in told
    assert f"| vLLM, `--linear-backend emulation` | | | {nvfp4} | {qad} |" in told


def test_ptq_table_is_that_of_the_files():
    fp8 = result("ptq_fp8_12b_h100_whole.json")["seconds"]
    nvfp4 = result("ptq_nvfp4_12b_h100.json")["seconds"]
    told = told_rows()
    for step in ("calibrate", "export"):
        cells = [step]
        for seconds in (fp8, nvfp4):
            cells += [f"{seconds[f'ours: {step}']:.1f}", f"{seconds[f'stock: {step}']:.1f}"]
        assert table_row(cells) + " |" in told


# Commands.


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_name_what_exists(page):
    from hybridquant import find_module

    unknown = []
    for words in command_lines(page):
        if words[0].endswith("hybridquant"):
            if words[1:] != ["--help"]:
                find_module(words[1:])  # raises for what is not a command
            continue
        module = words[words.index("-m") + 1] if "-m" in words else None
        if module is None:
            script = ROOT / words[1]
            known = script.exists()
        elif module == "pytest":
            known = importlib.util.find_spec("pytest") is not None
        else:
            parts = ROOT.joinpath(*module.split("."))
            known = parts.with_suffix(".py").exists() or (parts / "__main__.py").exists()
        if not known:
            unknown.append(" ".join(words))
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_recipes_take_the_fields_that_are_shown(page):
    from recipes.loading import SHIPPED, load_recipe

    for words in command_lines(page):
        line = " ".join(words)
        if re.search(r"(?:hybridquant |-m )quantize[ .](?:fp8|nvfp4|qad)", line) is None:
            continue
        recipe = SHIPPED / "tiny" / "fp8.yaml"
        fields = []
        for word in words:
            if word.endswith(".yaml"):
                recipe = ROOT / word
            elif re.match(r"[a-z_]+[\w.]*=", word):
                fields.append(word)
        load_recipe(recipe, fields)  # raises for a file or a field that is not there


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_marked_commands_run(page, tmp_path):
    for line in marked_lines(page, language=""):
        command, *arguments = shlex.split(line, comments=True)
        assert command == "hybridquant", line
        done = subprocess.run(
            [sys.executable, "-m", "hybridquant", *arguments],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    """Runs the code of all guides at once, since each spends half of its time on imports."""
    started = {}
    for guide in GUIDES:
        directory = tmp_path_factory.mktemp(guide.stem)
        code = "\n".join(marked_lines(guide, language="python"))
        (directory / "guide.py").write_text(code, encoding="utf-8")
        log = directory / "guide.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "guide.py"],
                cwd=directory,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started[guide] = (process, log)
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_the_code_of_a_guide_runs(guide, guides):
    process, log = guides[guide]
    assert process.wait(timeout=600) == 0, log.read_text(encoding="utf-8")


def test_every_block_of_python_in_a_guide_is_run():
    skipped = []
    for guide in GUIDES:
        for block in blocks(guide):
            if block.language == "python" and block.before != RUN:
                skipped.append((guide.name, block.lines[0]))
    assert skipped == []
