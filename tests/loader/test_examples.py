"""The C and C++ examples, built by their own Makefile, classify the digit that lies beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
STRICT = "-O1 -g -Wall -Wextra -Werror -pedantic -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/ with the digits model trained and compiled in build/."""
    for tool in ("make", "cc", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    folder = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(REPO / "examples", folder, ignore=shutil.ignore_patterns("build"))
    subprocess.run([sys.executable, REPO / "scripts" / "train_digits.py", folder], check=True, capture_output=True)
    program = folder / "ingot"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = {sys.path!r}\nfrom ingot.cli.main import main\nmain()\n"
    )
    program.chmod(0o755)
    make(folder, f"INGOT={program}", "build/digits.so", "build/libdigits.a", "build/digits.h")
    return folder


def make(folder: Path, *arguments: str) -> str:
    runtime = REPO / "compiler" / "ingot" / "runtime"
    command = ["make", f"RUNTIME={runtime}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_examples_build_and_classify(examples: Path) -> None:
    output = make(examples, f"CFLAGS=-std=c11 {STRICT}", f"CXXFLAGS=-std=c++17 {STRICT}", "check")
    answers = [line for line in output.splitlines() if line.startswith("class ")]
    assert len([a for a in answers if a.startswith("class 3 ")]) == 4
    assert len(answers) == 6  # one of them prints the best three


@pytest.mark.slow
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_the_commands_in_the_sources_are_true(examples: Path, tmp_path: Path, language: str) -> None:
    """Each source begins with the commands that build and run it; those that need no compiler run here, as written."""
    runtime = REPO / "compiler" / "ingot" / "runtime"
    for source in sorted((examples / language).iterdir()):
        work = tmp_path / source.stem
        shutil.copytree(examples / "build", work / language)
        for name in ("three.txt", f"{language}/{source.name}"):
            shutil.copy(examples / name, work / name)
        commands = []
        for line in source.read_text().splitlines():
            words = line.lstrip("*/ ").split()
            if words and words[0] in ("cc", "c++", "./classify", "./classify_static"):
                commands.append(" ".join(words))
        assert len(commands) >= 2
        script = "set -e\n" + "\n".join(commands)
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=work / language,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "RUNTIME": str(runtime)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("class 3 ") == sum("./" in c for c in commands)


@pytest.mark.slow
def test_the_examples_say_what_is_wrong(examples: Path) -> None:
    make(examples, "all")
    build = examples / "build"
    (examples / "few.txt").write_text("1 2 3")
    for command, given, message in (
        ([build / "c_opened", "absent.so", "three.txt"], "", "absent.so: cannot be opened: No such file"),
        ([build / "c_opened", "three.txt", "three.txt"], "", "this is not a shared library"),
        ([build / "c_opened", build / "digits.so", "few.txt"], "", "holds too few numbers"),
        ([build / "c_opened"], "", "usage"),
        ([build / "c_linked"], "1 2 3", "64 numbers are needed, 3 were given"),
        ([build / "cpp_opened"], "", "usage"),
        ([build / "cpp_opened", "absent.so"], "", "No such file"),
        ([build / "cpp_opened", build / "digits.so"], "1 2", "needs 64 numbers"),
        ([build / "cpp_linked"], "", "needs 64 numbers"),
    ):
        done = subprocess.run(command, cwd=examples, input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 1, command
        assert message in done.stderr
        assert done.stdout == ""
