"""From sources and kernel objects to model.so and libmodel.a, with the C compiler and linker of `ziglang`.

Every tool runs in a fresh folder, on relative names, with a cache of its own for what it compiles there: the result
depends on the input bytes alone. The toolchain's global cache holds only libc's stubs and the like, the same for
every model.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.errors import CompilerError, LoadError, OptionError, OutputError, ToolchainError
from ingot.packager.elf import SHF_ALLOC, Elf, hide_symbols

if TYPE_CHECKING:
    from ingot.target import Target

_RUNTIME = Path(__file__).resolve().parent.parent / "runtime"
#: What entry.c includes.
RUNTIME_FILES = ("ingot.h", "ingot_features.h", "rt.h", "cpu.c", "pool.c", "model.c", "selftest.c")
_COMPILE = (
    "-std=c11",
    "-O2",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-sanitize=undefined",
    "-Wall",
    "-Wextra",
    "-Werror",
)
_PROGRAM = tuple(flag for flag in _COMPILE if flag != "-fPIC")
_LINK = (
    "-shared",
    "-s",
    "-Wl,-z,defs",
    "-Wl,-z,nodelete",
    "-Wl,--build-id=none",
    "-Wl,--gc-sections",
    "-Wl,--version-script=exports.map",
)
_TIME_LIMIT_S = 900
#: Variables by which a user's environment would reach into the compilation.
_FOREIGN = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "CCC_OVERRIDE_OPTIONS")

_LIBM = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs fdim floor"
    " fma fmax fmin fmod hypot ldexp lgamma llrint llround log log10 log1p log2 lrint lround modf nearbyint nextafter"
    " pow remainder rint round scalbn sin sinh sqrt tan tanh tgamma trunc"
)
#: All that a kernel may call: libc's memory functions, libm, and the compiler's own helpers, which are linked in.
KERNEL_SYMBOLS = frozenset(
    ["memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_"]
    + [name + suffix for name in _LIBM.split() for suffix in ("", "f")]
)
_COMPILER_HELPER = re.compile(
    r"__(u?(div|mod|divmod)[sdt]i[34]|(mul|ashl|ashr|lshr|neg)[dt]i[23]|u?cmp[dt]i2|(clz|ctz|popcount)[sdt]i2"
    r"|(trunc|extend)[hsdxt]f[bhsdxt]f2|truncsfbf2|truncdfbf2|gnu_[hf]2[hf]_ieee|fix(uns)?[hsd]f[sdt]i|float(un)?[sdt]i[hsd]f"
    r"|(add|sub|mul|div|neg|eq|ne|lt|le|gt|ge|unord)[sd]f[23]|aeabi_[a-z0-9_]+)"
)


def runtime_source(name: str) -> bytes:
    """The bytes of a file of the runtime, as installed with the package."""
    try:
        return (_RUNTIME / name).read_bytes()
    except OSError as error:
        raise ToolchainError(
            "a file of the runtime is missing", where=str(_RUNTIME / name), found=str(error), hint="install ingot again"
        ) from None


@dataclass(frozen=True)
class Sources:
    """Everything the linker needs. `files` are written as they are; `objects` are the kernels' relocatable objects."""

    name: str
    entry_c: str
    weights_s: str
    files: Mapping[str, bytes] = field(repr=False)
    objects: tuple[bytes, ...] = field(repr=False)


def check_kernels(objects: Sequence[bytes], symbols: Sequence[str], machine: int) -> None:
    """Raise CompilerError unless the objects define every kernel and call nothing but what every target has."""
    defined: set[str] = set()
    undefined: set[str] = set()
    for i, data in enumerate(objects):
        try:
            elf = Elf(data, f"kernel object {i}")
        except LoadError as error:
            raise CompilerError("LLVM's object file cannot be read", where=error.where, found=error.what) from None
        if elf.kind != 1 or elf.machine != machine:
            raise CompilerError(
                "LLVM's object file is for another machine",
                where=f"kernel object {i}",
                found=f"ELF type {elf.kind}, machine {elf.machine}",
                allowed=f"ELF type 1, machine {machine}",
            )
        defined.update(s.name for s in elf.symbols if s.defined and s.is_global)
        undefined.update(elf.undefined())
    missing = [s for s in symbols if s not in defined]
    if missing:
        raise CompilerError("kernels are missing from the object files", where="packager", found=", ".join(missing[:5]))
    foreign = sorted(s for s in undefined - defined if s not in KERNEL_SYMBOLS and not _COMPILER_HELPER.fullmatch(s))
    if foreign:
        raise CompilerError(
            "a kernel calls functions that the target does not have",
            where="packager",
            found=", ".join(foreign[:5]),
            allowed="memcpy, memmove, memset, libm, compiler helpers",
        )


def link(sources: Sources, target: Target) -> bytes:
    """model.so. Raises ToolchainError where the toolchain fails, OutputError where the disk is full."""
    with _workspace() as folder:
        objects = _compile(sources, target, folder)
        (folder / "exports.map").write_text(f"{{ global: ingot_{sources.name}_api; local: *; }};\n", encoding="ascii")
        _link([*_machine(target), *_LINK, "-o", "model.so"], objects, ["-lm", "-lpthread"], folder)
        library = (folder / "model.so").read_bytes()
    _check_library(library, sources, target)
    return library


def archive(sources: Sources, target: Target) -> bytes:
    """libmodel.a, with the same objects as model.so. Raises as `link` does."""
    with _workspace() as folder:
        objects = _compile(sources, target, folder)
        _zig(["ar", "rcsD", "libmodel.a", *objects], folder)
        return (folder / "libmodel.a").read_bytes()


def build_program(main: str, triple: str, cpu: str) -> bytes:
    """An executable from one C file of the runtime folder that uses ingot.h and libc only.

    `triple` and `cpu` are zig's (`Target.zig_triple`, `Target.baseline()`). Raises as `link` does.
    """
    with _workspace() as folder:
        try:
            for name in (main, "ingot.h"):
                (folder / name).write_bytes(runtime_source(name))
        except OSError as error:
            raise _disk_error(error, folder) from None
        machine = ["-target", triple, f"-mcpu={cpu}"]
        _zig(["cc", *machine, *_PROGRAM, "-c", main, "-o", "main.o"], folder)
        _link([*machine, "-s", "-Wl,--build-id=none", "-o", "program"], ["main.o"], ["-ldl"], folder)
        return (folder / "program").read_bytes()


def build_object(source: str, target: Target) -> bytes:
    """A relocatable object from a C file of a user's; OptionError with the compiler's words if it is not valid."""
    with _workspace() as folder:
        try:
            (folder / "operator.c").write_text(source, encoding="utf-8")
        except OSError as error:
            raise _disk_error(error, folder) from None
        machine = ["-target", target.zig_triple, f"-mcpu={target.baseline()}"]
        flags = [flag for flag in _COMPILE if flag not in ("-Wextra", "-Werror")]
        try:
            _zig(["cc", *machine, *flags, "-c", "operator.c", "-o", "operator.o"], folder)
        except ToolchainError as error:
            raise OptionError("a registered operator's C source does not compile", found=error.found) from None
        return (folder / "operator.o").read_bytes()


def build_plugin(source: bytes, triple: str, cpu: str, defines: Sequence[str] = ()) -> bytes:
    """A shared library from one C file, for a program that is there already and has what the file leaves undefined.

    `triple` and `cpu` as for `build_program`. Raises as `link` does.
    """
    with _workspace() as folder:
        try:
            (folder / "plugin.c").write_bytes(source)
        except OSError as error:
            raise _disk_error(error, folder) from None
        machine = ["-target", triple, f"-mcpu={cpu}", *(f"-D{define}" for define in defines)]
        _zig(["cc", *machine, *_COMPILE, "-c", "plugin.c", "-o", "plugin.o"], folder)
        _link([*machine, "-shared", "-s", "-Wl,--build-id=none", "-o", "plugin.so"], ["plugin.o"], [], folder)
        return (folder / "plugin.so").read_bytes()


def link_program(
    main: str, sources: Mapping[str, bytes], objects: Sequence[bytes], target: Target, output: Path
) -> None:
    """Write an executable of the C file `main`, which may include `sources` and the runtime's files, and of objects.

    For kernels that are not part of a model. Raises as `link` does.
    """
    with _workspace() as folder:
        names = [f"kernels_{i}.o" for i in range(len(objects))]
        try:
            for name in RUNTIME_FILES:
                (folder / name).write_bytes(runtime_source(name))
            for name, data in (*sources.items(), *zip(names, objects, strict=True)):
                (folder / name).write_bytes(data)
        except OSError as error:
            raise _disk_error(error, folder) from None
        _zig(["cc", *_machine(target), *_PROGRAM, "-c", main, "-o", "main.o"], folder)
        flags = ["-s", "-Wl,--build-id=none", "-Wl,-z,defs", "-o", "program"]
        _link([*_machine(target), *flags], ["main.o", *names], ["-lm", "-lpthread"], folder)
        try:
            shutil.move(folder / "program", output)
        except OSError as error:
            raise _disk_error(error, output.parent) from None


def _machine(target: Target) -> list[str]:
    return ["-target", target.zig_triple, f"-mcpu={target.baseline()}"]


def _compile(sources: Sources, target: Target, folder: Path) -> list[str]:
    """Names of the objects, weights first: what lies behind them must not be addressed from before them."""
    try:
        for name in RUNTIME_FILES:
            (folder / name).write_bytes(runtime_source(name))
        for name, data in sources.files.items():
            (folder / name).write_bytes(data)
        (folder / "entry.c").write_text(sources.entry_c, encoding="utf-8")
        (folder / "weights.S").write_text(sources.weights_s, encoding="utf-8")
        kernels = [f"kernels_{i}.o" for i in range(len(sources.objects))]
        for name, data in zip(kernels, sources.objects, strict=True):
            (folder / name).write_bytes(hide_symbols(data, name))
    except OSError as error:
        raise _disk_error(error, folder) from None
    _zig(["cc", *_machine(target), "-c", "weights.S", "-o", "weights.o"], folder)
    _zig(["cc", *_machine(target), *_COMPILE, "-c", "entry.c", "-o", "entry.o"], folder)
    return ["weights.o", "entry.o", *kernels]


def _link(flags: Sequence[str], objects: Sequence[str], libraries: Sequence[str], folder: Path) -> None:
    """Link objects of `folder`.

    Zig builds its library of compiler helpers and that of its sanitizer the first time they are asked for, which takes
    13 s on a slow machine: neither is asked for without need.
    """
    undefined = {name for o in objects for name in Elf((folder / o).read_bytes(), o).undefined()}
    helpers = [] if any(_COMPILER_HELPER.fullmatch(name) for name in undefined) else ["-rtlib=none"]
    _zig(["cc", *flags, "-fno-sanitize=undefined", *helpers, *objects, *libraries], folder)


def _check_library(library: bytes, sources: Sources, target: Target) -> None:
    """What the design promises of every artifact, checked on the artifact itself."""
    elf = Elf(library, "model.so")
    exported = elf.exported()
    if exported != [f"ingot_{sources.name}_api"]:
        raise CompilerError("the artifact exports more than its one function", found=", ".join(exported[:5]))
    section = elf.section(".ingot.weights")
    weights = sources.files["weights.bin"]
    found = elf.contents(section) if section else memoryview(b"")
    if found != memoryview(weights) or (section and section.offset % target.page_bytes):
        raise CompilerError("the linker did not place the weights as asked", where=".ingot.weights")
    note = elf.section(".note.ingot")
    if note is None or note.flags & SHF_ALLOC or sources.files["metadata.json"] not in bytes(elf.contents(note)):
        raise CompilerError("the linker lost the metadata", where=".note.ingot")


# ------------------------------------------------------------------------------------------------------ the toolchain


@functools.cache
def zig_path() -> Path:
    """The `zig` program of the installed `ziglang` package. Raises ToolchainError where there is none."""
    spec = importlib.util.find_spec("ziglang")
    path = Path(spec.origin).parent / "zig" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise ToolchainError(
            "the linker is missing",
            where=f"Python package ziglang{f' ({path})' if path else ''}",
            hint="install it: pip install ziglang",
        )
    return path


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A fresh folder, gone afterwards."""
    try:
        with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
            yield Path(folder)
    except OSError as error:
        raise _disk_error(error, Path(tempfile.gettempprefix())) from None


def _disk_error(error: OSError, where: Path) -> OutputError:
    hint = "set TMPDIR to a folder with more room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return OutputError("cannot write temporary files", where=str(where), found=error.strerror or str(error), hint=hint)


def _cache_folder(fallback: Path) -> Path:
    """Where the toolchain keeps libc's stubs between runs: in the user's cache, else for this run only."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingot" / "zig"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return fallback


def _environment(folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in _FOREIGN}
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(_cache_folder(folder / ".zig-global")))
    # The cache of what is compiled here must not outlive the folder: it does not see changes in included binaries.
    environment["ZIG_LOCAL_CACHE_DIR"] = str(folder / ".zig")
    environment.update(SOURCE_DATE_EPOCH="0", LC_ALL="C", TZ="UTC")
    return environment


def _zig(arguments: Sequence[str], folder: Path) -> None:
    """Run one tool of zig in `folder`."""
    what = f"zig {arguments[0]}"
    try:
        done = subprocess.run(
            [str(zig_path()), *arguments],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolchainError("the linker took too long", where=what, allowed=f"{_TIME_LIMIT_S} s") from None
    except OSError as error:
        raise ToolchainError("the linker cannot be started", where=str(zig_path()), found=str(error)) from None
    if done.returncode == 0:
        return
    if "NoSpaceLeft" in done.stderr or "No space left on device" in done.stderr:
        raise OutputError(
            "the disk is full",
            where=f"{folder} or {_environment(folder)['ZIG_GLOBAL_CACHE_DIR']}",
            hint="free some space, or set TMPDIR and ZIG_GLOBAL_CACHE_DIR to folders with more room",
        )
    raise ToolchainError(f"{what} failed with status {done.returncode}", found=_first_errors(done.stderr))


def _first_errors(stderr: str) -> str:
    """The lines of a tool's output that say what is wrong: at most three, on one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    useful = [line for line in lines if "error" in line.lower() or "undefined" in line.lower()] or lines
    return "; ".join(line[:200] for line in useful[:3]) or "no message"
