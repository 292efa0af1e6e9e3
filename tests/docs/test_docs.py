"""Every command and program in the documentation runs.

The fenced blocks of a page run in order, in one folder that holds digits.onnx: `sh` by bash, `python` by Python, and
`c NAME` is written to NAME. What cannot run here (copying to a board, the scripts that CI itself runs) is `text`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = [
    REPO / "README.md",
    REPO / "CHANGELOG.md",
    REPO / "examples" / "README.md",
    *sorted((REPO / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
# Programs that a block of kind `text` may name: they need a board, a network, or are this very test run.
NOT_RUN = {"scp", "ssh", "mv", "python3", "cc", "scripts/quickstart", "scripts/test"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file to write it to (for C), its text and its first line in the page."""

    language: str
    file: str
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, file = match["info"].strip().partition(" ")
        found.append(Block(language, file, match["body"], text.count("\n", 0, match.start()) + 2))
    return found


def runnable(page: Path) -> bool:
    return any(block.language in {"sh", "python"} for block in blocks(page))


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: str(p.relative_to(REPO)))
def test_the_commands_of_a_page_run(page: Path, digits_model: Path, shell: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(digits_model.read_bytes())
    for block in blocks(page):
        if block.language == "c":
            (tmp_path / block.file).write_text(block.body)
            continue
        if block.language not in {"sh", "python"}:
            continue
        command = ["bash", "-eu", "-o", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.body],
            cwd=tmp_path,
            env=shell,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        where = f"{page.relative_to(REPO)}:{block.line}"
        assert done.returncode == 0, f"{where} ended with {done.returncode}\n{block.body}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_each_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.relative_to(REPO)}:{block.line}"
        assert block.language in {"sh", "python", "c", "text"}, (
            f"{where}: language {block.language!r} is not run by any test"
        )
        assert bool(block.file) == (block.language == "c"), f"{where}: a C block names its file, no other does"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_only_what_cannot_run_here_is_text(page: Path) -> None:
    for block in (b for b in blocks(page) if b.language == "text"):
        for line in block.body.splitlines():
            for command in re.split(r"&&|;(?![^']*'(?:[^']*'[^']*')*[^']*$)", line.split(" #")[0]):
                program = (shlex.split(command) or [""])[0]
                assert program in NOT_RUN or program.startswith("./"), f"{page.name}: {program!r} could be run"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: no file {target}"


def test_the_table_of_passes_is_the_pipeline(update_golden: bool) -> None:
    """The table in architecture.md is what the pipeline says of itself; --update-golden writes it."""
    from ingot.passes.pipeline import PIPELINE

    def names(invariants: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in invariants)

    lines = ["| step | requires | ensures | what it does |", "|---|---|---|---|"]
    lines += [f"| `{p.name}` | {names(p.requires)} | {names(p.ensures)} | {p.summary} |" for p in PIPELINE]
    page = REPO / "docs" / "architecture.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- pipeline")
    comment, _, rest = rest.partition("\n")
    table, _, after = rest.partition("\n\n")
    if update_golden:
        wanted = "\n".join(lines)
        page.write_text(f"{before}<!-- pipeline{comment}\n{wanted}\n\n{after}", encoding="utf-8")
        return
    assert table.splitlines() == lines, "write it again with: scripts/test tests/docs --update-golden"


def test_the_table_of_metadata_names_every_field(tmp_path: Path) -> None:
    from ingot.runtime.loader import _SCHEMA

    page = (REPO / "docs" / "artifact-format.md").read_text(encoding="utf-8")
    table = page.split("## The metadata", 1)[1].split("##", 1)[0]
    named = set(re.findall(r"`(\w+)`", table))
    fields = {"format", "abi", *_SCHEMA, *_SCHEMA["target"], *_SCHEMA["source"]}
    assert fields <= named, f"not described: {sorted(fields - named)}"
