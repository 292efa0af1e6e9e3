"""The house rules that a machine can check: which room imports which, how long files are, what the wheel holds."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "compiler" / "ingot"

ROOMS = {"runtime", "errors", "architectures", "native", "target", "program", "frontend", "schedules", "passes"}
ROOMS |= {"arrays", "images", "autotune", "quantize", "packager", "emulator", "diagnosis"}
# Each room and the rooms it may import, besides itself. The order is the data flow's.
ALLOWED: dict[str, set[str]] = {
    "runtime": set(),
    "errors": {"runtime"},
    "architectures": {"errors"},
    # Data files of users: untrusted, read only as far as they fit.
    "arrays": {"errors", "runtime"},
    "images": {"errors", "runtime"},
    "native": {"errors", "architectures"},
    "target": {"errors", "architectures", "native"},
    "program": {"errors"},
    "frontend": {"errors", "target"},
    "schedules": {"errors", "target", "frontend"},
    # The lowering step asks schedules for each kernel, so this is the one edge that looks upside down.
    "passes": {"errors", "target", "frontend", "schedules", "program"},
    # Builds and links candidates, and runs them.
    "autotune": {
        *("errors", "architectures", "native", "target", "frontend", "schedules", "passes", "program"),
        *("packager", "runtime", "emulator"),
    },
    # Which nodes fail, and where: imports again and again, with builds that the driver gives it.
    "diagnosis": {"errors", "frontend"},
    # Runs the float model on samples; the driver gives it the function that compiles and loads a model.
    "quantize": {"errors", "target", "frontend", "schedules", "passes", "arrays", "images", "runtime"},
    "packager": {"errors", "architectures", "native", "target", "program", "frontend", "schedules", "runtime"},
    # Builds a program that runs an artifact under qemu-user: for the command line and for tests.
    "emulator": {"errors", "architectures", "target", "packager", "runtime"},
    # These two call the rooms in order; driver may use all of them, cli also driver and the emulator.
    "driver": ROOMS,
    "cli": ROOMS | {"driver", "emulator"},
    # `import ingot` itself: light names at once, the driver and the artifact only when first used.
    "__init__": {"errors", "runtime", "driver", "frontend", "packager"},
}
# The package itself, for __version__ and for the public functions that the command line calls.
ROOT_USERS = {"packager", "driver", "cli"}
LINE_LIMIT = 600
# One file by contract: it is copied alone next to an artifact, checks it as untrusted data, and may import nothing.
# The limit grew with what it has to check: states, counted outputs, and the shapes of every bucket.
LONG = {"compiler/ingot/runtime/loader.py": 1022}
CODE = (".py", ".c", ".h", ".cpp", ".sh")
RUNTIME_LINE_LIMIT = 1000  # what goes into every artifact


def sources(*suffixes: str) -> list[Path]:
    folders = ("compiler", "tests", "scripts", "examples")
    return sorted(
        p
        for folder in folders
        for s in suffixes
        for p in (REPO / folder).rglob(f"*{s}")
        if "__pycache__" not in p.parts
    )


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(source: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """The modules below `ingot.` that a source imports: (line, "room.module..."), "" for the package itself.

    `package` is the dotted path, as parts, of the package that the source is in.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}" if module == "ingot" else module) for alias in node.names]
    names = [
        (line, name.removeprefix("ingot").removeprefix(".")) for line, name in found if name.split(".")[0] == "ingot"
    ]
    # `from ingot import compile` names an attribute, not a room.
    return [(line, name if name.split(".")[0] in ALLOWED else "") for line, name in names]


def allowed(room: str, name: str) -> bool:
    if not name:
        return room in ROOT_USERS
    target = name.split(".")[0]
    return target == room or target in ALLOWED[room] or any(f"{name}.".startswith(f"{a}.") for a in ALLOWED[room])


def violations(path: Path, source: str) -> list[str]:
    room = room_of(path)
    if room not in ALLOWED:
        return [f"{path}: a room that tests/test_layout.py does not know: {room}"]
    package = ("ingot", *path.relative_to(PACKAGE).parent.parts)
    return [
        f"{path}:{line}: {room} may not import ingot{'.' if name else ''}{name}"
        for line, name in imports_of(source, package)
        if not allowed(room, name)
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    assert not violations(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("frontend/onnx.py", "from ingot.passes import pipeline"),
        ("frontend/onnx.py", "import ingot.cli.main"),
        ("schedules/conv.py", "from ingot.passes.lower import lower"),
        ("schedules/conv.py", "from ..passes import lower"),
        ("passes/lower.py", "from ingot.packager.link import link"),
        ("passes/lower.py", "from ingot import compile"),
        ("runtime/loader.py", "from ingot.errors import IngotError"),
        ("driver.py", "from ingot.cli import main"),
        ("serving/main.py", "import os"),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(file: str, line: str) -> None:
    assert len(violations(PACKAGE / file, f"def f():\n    {line}\n")) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("passes/lower.py", "from ingot.schedules.conv import schedule"),
        ("passes/lower.py", "from ingot.program import Program"),
        ("passes/lower.py", "from . import pipeline"),
        ("cli/compile.py", "import ingot"),
        ("schedules/conv.py", "import numpy"),
    ],
)
def test_an_import_in_the_right_direction_passes(file: str, line: str) -> None:
    assert not violations(PACKAGE / file, line)


def test_the_loader_needs_only_numpy_and_the_standard_library() -> None:
    tree = ast.parse((PACKAGE / "runtime" / "loader.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy"}


def test_no_file_is_too_long() -> None:
    lines = {str(p.relative_to(REPO)): len(p.read_text("utf-8").splitlines()) for p in sources(*CODE)}
    too_long = {name: n for name, n in lines.items() if n > LONG.get(name, LINE_LIMIT)}
    assert not too_long, f"split them: the limit is {LINE_LIMIT} lines"


def test_the_runtime_stays_small() -> None:
    """Lines of what is compiled into every artifact, comments too, blank ones not; ingot.h is the interface."""
    from ingot.packager.link import RUNTIME_FILES

    names = [name for name in RUNTIME_FILES if name != "ingot.h"]
    texts = {name: (PACKAGE / "runtime" / name).read_text("utf-8") for name in names}
    lines = {name: sum(bool(line.strip()) for line in text.splitlines()) for name, text in texts.items()}
    assert sum(lines.values()) < RUNTIME_LINE_LIMIT, lines


def test_no_assert_in_the_product() -> None:
    found = [
        f"{path.relative_to(REPO)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not found, "python -O removes assert; raise an error of ingot.errors"


def test_nothing_is_left_unfinished() -> None:
    # Spelled with hyphens so that this file passes its own test.
    words = [word.replace("-", "") for word in ("TO-DO", "FIX-ME", "NotImplemented-Error")]
    texts = {str(p.relative_to(REPO)): p.read_text("utf-8") for p in sources(*CODE)}
    assert not [(name, word) for name, text in texts.items() for word in words if word in text]
