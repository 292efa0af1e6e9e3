"""scripts/_env.sh: what it refuses, and what it does again after a change or an interruption.

The machine is played by small programs on a PATH that holds nothing else, so every case runs anywhere.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

TOOLS = [
    "bash",
    "cat",
    "cp",
    "cut",
    "date",
    "env",
    "flock",
    "grep",
    "head",
    "mkdir",
    "printf",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "sleep",
    "tail",
    "tr",
]
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-I -c") cat "$MACHINE/python_facts" ;;
    "-m venv") echo venv >>"$MACHINE/calls"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") echo pip >>"$MACHINE/calls"; echo "ERROR: no route to the index"; exit "$(cat "$MACHINE/pip_status")" ;;
esac
"""


class Machine:
    """A folder that plays a machine: its PATH, its facts, and a log of what was asked of Python."""

    def __init__(self, folder: Path, repo: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.repo = folder / "checkout"
        self.bin.mkdir()
        self.repo.mkdir()
        shutil.copy(repo / "scripts" / "_env.sh", folder)
        (self.repo / "pyproject.toml").write_text("[project]\n")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool} here"))
        self.program("python3", PYTHON)
        self.program("uname", '#!/bin/sh\nif [ "$1" = -s ]; then echo Linux; else echo x86_64; fi\n')
        self.program("id", "#!/bin/sh\necho 1000\n")
        self.program("qemu-aarch64", "#!/bin/sh\n")
        self.set("python_facts", "3.11.7|glibc 2.36|yes|64")
        self.set("pip_status", "0")

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def set(self, name: str, value: str) -> None:
        (self.folder / name).write_text(value + "\n")

    def calls(self) -> list[str]:
        """What Python was asked to do since the last call of this method."""
        log = self.folder / "calls"
        calls = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    def set_up(self) -> subprocess.CompletedProcess[str]:
        script = f'set -eu; repo="{self.repo}"; . "{self.folder}/_env.sh"; echo "ready: $python"'
        return subprocess.run(
            [str(self.bin / "bash"), "-c", script, "scripts/test"],
            env={"PATH": str(self.bin), "MACHINE": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path, repo: Path) -> Machine:
    return Machine(tmp_path, repo)


def assert_ready(result: subprocess.CompletedProcess[str], machine: Machine) -> None:
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"ready: {machine.repo}/.venv/bin/python\n"


def assert_refused(result: subprocess.CompletedProcess[str], *texts: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines] == ["ingot", "found:", "needed:", "to"]
    for text in texts:
        assert text in result.stderr
    assert result.stdout == ""


def test_a_first_run_makes_the_environment_and_a_second_does_nothing(machine: Machine) -> None:
    assert_ready(machine.set_up(), machine)
    assert machine.calls() == ["venv", "pip"]
    started = time.monotonic()
    second = machine.set_up()
    assert_ready(second, machine)
    assert time.monotonic() - started < 2
    assert second.stderr == ""
    assert machine.calls() == []


def test_changed_requirements_are_installed_into_the_same_environment(machine: Machine) -> None:
    machine.set_up()
    machine.calls()
    (machine.repo / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert_ready(machine.set_up(), machine)
    assert machine.calls() == ["pip"]


def test_another_python_gets_a_new_environment(machine: Machine) -> None:
    machine.set_up()
    machine.calls()
    machine.set("python_facts", "3.12.1|glibc 2.36|yes|64")
    assert_ready(machine.set_up(), machine)
    assert machine.calls() == ["venv", "pip"]


def test_a_half_made_environment_is_made_again(machine: Machine) -> None:
    machine.set_up()
    machine.calls()
    (machine.repo / ".venv" / ".ingot-ready").unlink()
    (machine.repo / ".venv" / "leftover").touch()
    assert_ready(machine.set_up(), machine)
    assert machine.calls() == ["venv", "pip"]
    assert not (machine.repo / ".venv" / "leftover").exists()


def test_an_environment_whose_python_is_gone_is_made_again(machine: Machine) -> None:
    machine.set_up()
    machine.calls()
    (machine.repo / ".venv" / "bin" / "python").unlink()
    assert_ready(machine.set_up(), machine)
    assert machine.calls() == ["venv", "pip"]


def test_a_failed_install_shows_why_and_the_next_run_starts_over(machine: Machine) -> None:
    machine.set("pip_status", "1")
    result = machine.set_up()
    assert result.returncode == 1
    assert "pip install failed" in result.stderr
    assert "ERROR: no route to the index" in result.stderr
    machine.set("pip_status", "0")
    machine.calls()
    assert_ready(machine.set_up(), machine)
    assert machine.calls() == ["venv", "pip"]


def test_somebody_elses_folder_is_not_deleted(machine: Machine) -> None:
    (machine.repo / ".venv").mkdir()
    (machine.repo / ".venv" / "mine").touch()
    result = machine.set_up()
    assert result.returncode == 2
    assert "which these scripts did not make" in result.stderr
    assert (machine.repo / ".venv" / "mine").exists()


@pytest.mark.parametrize("version", ["3.10.0", "3.11.7", "3.12.11", "3.13.0"])
def test_supported_pythons(machine: Machine, version: str) -> None:
    machine.set("python_facts", f"{version}|glibc 2.28|yes|64")
    assert_ready(machine.set_up(), machine)


@pytest.mark.parametrize(
    ("facts", "texts"),
    [
        ("3.9.2|glibc 2.36|yes|64", ["python3 is 3.9.2", "3.10, 3.11, 3.12 or 3.13"]),
        ("3.14.0|glibc 2.36|yes|64", ["python3 is 3.14.0"]),
        ("3.100.0|glibc 2.36|yes|64", ["python3 is 3.100.0"]),
        ("2.7.18|glibc 2.36|yes|64", ["python3 is 2.7.18"]),
        ("3.11.7|glibc 2.36|yes|32", ["32 bits", "64-bit"]),
        ("3.11.7|glibc 2.27|yes|64", ["glibc 2.27", "2.28 or newer"]),
        ("3.11.7|not glibc|yes|64", ["not glibc", "2.28 or newer"]),
    ],
)
def test_unsupported_pythons_and_c_libraries(machine: Machine, facts: str, texts: list[str]) -> None:
    machine.set("python_facts", facts)
    assert_refused(machine.set_up(), *texts)
    assert machine.calls() == []


def test_no_python(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    assert_refused(machine.set_up(), "no python3 on the PATH")


def test_an_older_python3_is_passed_over_for_a_fitting_one(machine: Machine) -> None:
    machine.program("python3.12", PYTHON)
    machine.program("python3", '#!/bin/sh\necho "3.9.2|glibc 2.36|yes|64"\n')
    machine.set("python_facts", "3.12.1|glibc 2.36|yes|64")
    assert_ready(machine.set_up(), machine)


def test_venv_missing_without_root(machine: Machine) -> None:
    machine.set("python_facts", "3.11.7|glibc 2.36|no|64")
    result = machine.set_up()
    assert result.returncode == 2
    assert "apt-get install python3.11-venv" in result.stderr
    assert machine.calls() == []


def test_venv_missing_with_root_and_apt_is_installed(machine: Machine) -> None:
    machine.set("python_facts", "3.11.7|glibc 2.36|no|64")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("dpkg-query", "#!/bin/sh\necho installed\n")
    machine.program(
        "apt-get",
        '#!/bin/sh\necho "$@" >>"$MACHINE/apt"\necho "3.11.7|glibc 2.36|yes|64" >"$MACHINE/python_facts"\n',
    )
    assert_ready(machine.set_up(), machine)
    assert "install python3.11-venv" in (machine.folder / "apt").read_text()


def test_debian_packages_that_fail_to_install_do_not_stop_the_setup(machine: Machine) -> None:
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("dpkg-query", "#!/bin/sh\nexit 1\n")
    machine.program("apt-get", "#!/bin/sh\nexit 100\n")
    result = machine.set_up()
    assert_ready(result, machine)
    assert "qemu-user" in result.stderr
    assert "reported as skipped" in result.stderr


def test_without_root_the_missing_packages_are_named(machine: Machine) -> None:
    machine.program("dpkg-query", '#!/bin/sh\nfor last; do :; done\n[ "$last" = qemu-user ] || echo installed\n')
    result = machine.set_up()
    assert_ready(result, machine)
    assert "not installed, as that needs root and apt-get: qemu-user\n" in result.stderr


@pytest.mark.parametrize(
    ("system", "architecture", "texts"),
    [("Darwin", "arm64", ["operating system", "Darwin"]), ("Linux", "armv7l", ["processor", "armv7l", "aarch64"])],
)
def test_other_machines(machine: Machine, system: str, architecture: str, texts: list[str]) -> None:
    machine.program("uname", f'#!/bin/sh\nif [ "$1" = -s ]; then echo {system}; else echo {architecture}; fi\n')
    assert_refused(machine.set_up(), *texts)
