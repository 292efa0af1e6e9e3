"""Targets: one TOML file per board, read here and nowhere else, checked into a frozen `Target`.

A `Target` answers what the rest of the compiler asks about the machine the artifact will run on: which instructions
LLVM may use, which libc the linker must satisfy, how many vector registers a schedule may fill, and which emulator
stands in for the board in a test. A new board is one file in `targets/`, or in a folder named by the environment
variable `INGOT_TARGETS`; no Python changes.

The list `features` is a promise in both directions: the loader refuses a CPU that lacks one of them, and LLVM is told
to leave alone every extension that is not listed, even where its own idea of the CPU has it (LLVM gives the
Cortex-A72 AES; the Raspberry Pi 4 has none).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ingot.architectures import (
    BASELINES,
    FEATURES,
    LLVM_NAMES,
    MANDATORY,
    NEEDS,
    NEVER,
    NEWEST_GLIBC,
    OLDEST_GLIBC,
    QEMU_CPUS,
    SYSROOTS,
    TRIPLES,
    TUNING,
    Architecture,
)
from ingot.errors import TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: No honest target file is larger; a hostile or mistaken one is not read at all.
MAX_FILE_BYTES = 64 * 1024
#: Environment variable: more folders of target files, separated like PATH, searched before the shipped ones.
FOLDERS_VARIABLE = "INGOT_TARGETS"
#: The name that means "this machine".
NATIVE = "native"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")

#: What each field of a target file may hold: the text of error messages and of the manual.
FIELDS: Mapping[str, str] = {
    "name": "the file's name without .toml: a-z, 0-9, '.' and '-', starting with a letter or digit, at most 64",
    "description": "one line of printable text, 1 to 200 characters",
    "sources": "a list of 1 to 12 names of documents the facts come from, one line each",
    "triple": "one of " + ", ".join(TRIPLES),
    "cpu": "LLVM's name of the CPU (a-z, 0-9, '.', '-'), like cortex-a72 or x86-64-v3",
    "features": "a list of feature names of the architecture, each once",
    "libc": "gnu or musl, agreeing with the triple",
    "libc_version": 'two numbers in quotes: the oldest libc to run on, like "2.28" (gnu) or "1.2" (musl)',
    "gpu": "one line of printable text, 1 to 200 characters; leave the line out if there is none",
    "ram_mib": "a whole number of MiB, 16 to 16777216; leave the line out if it differs from machine to machine",
    "cache": "a table with l1d_kib, l2_kib and l3_kib",
    "cache.l1d_kib": "KiB of level 1 data cache of one core of the first cluster, 1 to 1024",
    "cache.l2_kib": "KiB of level 2 cache that core can use, 0 (none) to 1048576",
    "cache.l3_kib": "KiB of level 3 cache that core can use, 0 (none) to 4194304",
    "cores": "1 to 8 [[cores]] tables, fastest cluster first",
    "cores.count": "a whole number of cores, 1 to 1024",
    "cores.name": "one line of printable text, 1 to 200 characters",
    "cores.cpu": "LLVM's name of the cluster's CPU, like cortex-a53",
    "cores.freq_mhz": "highest clock in MHz, 1 to 10000; leave the line out if unknown",
}

# Printable only: these strings go to terminals, where a control character is a command. Letters of Latin scripts and
# common punctuation, without the marks that reverse or hide text.
_PRINTABLE = r"^[\x20-\x7e\u00a0-\u00ac\u00ae-\u024f\u2010-\u2027\u2030-\u205e\u20a0-\u2122]+$"
_Line = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_PRINTABLE)]
_Cpu = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]


class _Strict(BaseModel):
    """Frozen, no unknown fields, no conversions between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CoreCluster(_Strict):
    """`count` equal cores: `name` for people, `cpu` in LLVM's words, `freq_mhz` the highest clock in MHz."""

    count: int = Field(ge=1, le=1024)
    name: _Line
    cpu: _Cpu
    freq_mhz: int | None = Field(default=None, ge=1, le=10_000)


class Cache(_Strict):
    """KiB of cache one core of the first (fastest) cluster can use; 0 where there is no such level."""

    l1d_kib: int = Field(ge=1, le=1024)
    l2_kib: int = Field(ge=0, le=1 << 20)
    l3_kib: int = Field(ge=0, le=1 << 22)


class Qemu(_Strict):
    """The qemu-user command that stands in for a target: `binary -cpu cpu -L sysroot program`."""

    binary: str
    cpu: str
    sysroot: str

    def command(self) -> list[str]:
        """Return the words that go before a program's own command line."""
        return [self.binary, "-cpu", self.cpu, "-L", self.sysroot]


class Target(_Strict):
    """One machine an artifact can be built for. Fields are those of its TOML file; see `FIELDS`."""

    name: Annotated[str, StringConstraints(pattern=rf"^{_NAME.pattern}$")]
    description: _Line
    sources: Annotated[tuple[_Line, ...], Field(min_length=1, max_length=12)]
    triple: str
    cpu: _Cpu
    features: tuple[str, ...]
    cores: Annotated[tuple[CoreCluster, ...], Field(min_length=1, max_length=8)]
    cache: Cache
    libc: Literal["gnu", "musl"]
    libc_version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,2}\.[0-9]{1,3}$")]
    ram_mib: int | None = Field(default=None, ge=16, le=1 << 24)
    gpu: _Line | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        """Check what one field alone cannot show. Raise TargetError without the file, which the reader adds."""
        if self.triple not in TRIPLES:
            raise TargetError(
                "the triple is not one of those supported",
                where="triple",
                found=repr(self.triple),
                allowed=", ".join(TRIPLES),
                hint="triples have four parts: ARCH-unknown-linux-LIBC",
            )
        environment = self.triple.rsplit("-", 1)[1]
        if not environment.startswith(self.libc):
            raise TargetError(
                "libc disagrees with the triple",
                where="libc",
                found=repr(self.libc),
                allowed=environment[:4].strip("e"),
            )
        version = tuple(map(int, self.libc_version.split(".")))
        if self.libc == "gnu" and not OLDEST_GLIBC[self.arch] <= version <= NEWEST_GLIBC:
            oldest, newest = OLDEST_GLIBC[self.arch], NEWEST_GLIBC
            raise TargetError(
                "no linker support for this glibc version",
                where="libc_version",
                found=repr(self.libc_version),
                allowed=f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} on {self.arch}",
            )
        self._check_features()
        return self

    def _check_features(self) -> None:
        known = FEATURES[self.arch]
        for i, feature in enumerate(self.features):
            if feature not in known:
                raise TargetError(
                    f"unknown {self.arch} feature",
                    where="features",
                    found=repr(feature),
                    allowed=", ".join(known),
                    hint=_nearest_hint(feature, known),
                )
            if feature in self.features[:i]:
                raise TargetError("a feature is listed twice", where="features", found=repr(feature), allowed="once")
        for feature in MANDATORY[self.arch]:
            if feature not in self.features:
                raise TargetError(
                    f"every {self.arch} target needs the feature {feature!r}",
                    where="features",
                    found=", ".join(self.features) or "an empty list",
                    allowed="lists that hold " + ", ".join(MANDATORY[self.arch]),
                )
        for feature in self.features:
            for needed in NEEDS[self.arch].get(feature, ()):
                if needed not in self.features:
                    raise TargetError(
                        f"the feature {feature!r} needs {needed!r}, which is not listed",
                        where="features",
                        found=", ".join(self.features),
                        allowed=f"lists that hold both {feature} and {needed}",
                    )

    @property
    def arch(self) -> Architecture:
        """x86_64, aarch64, arm or riscv64."""
        return TRIPLES[self.triple]

    @property
    def log_name(self) -> str:
        """The name tuning logs know the target by: its own, or for "native" one that only machines like this share."""
        if self.name != NATIVE:
            return self.name
        cores = [(cluster.count, cluster.name, cluster.cpu) for cluster in self.cores]
        facts = repr((self.triple, self.cpu, sorted(self.features), cores, tuple(self.cache)))
        return f"{NATIVE}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    @property
    def zig_triple(self) -> str:
        """The linker's `-target`, with the glibc version: aarch64-linux-gnu.2.28."""
        environment = self.triple.rsplit("-", 1)[1]
        version = f".{self.libc_version}" if self.libc == "gnu" else ""
        return f"{self.arch}-linux-{environment}{version}"

    @property
    def core_count(self) -> int:
        """Cores of all clusters together."""
        return sum(cluster.count for cluster in self.cores)

    @property
    def has_vectors(self) -> bool:
        """Whether the CPU has vector instructions at all (a RISC-V without V, an ARMv7 without NEON have none)."""
        return self.arch in ("x86_64", "aarch64") or "neon" in self.features or "v" in self.features

    @property
    def vector_bits(self) -> int:
        """Bits of the vectors a schedule should use: 512, 256 or 128.

        128 on a CPU without vector instructions too: LLVM then makes scalars of them, which is the unrolling one would
        ask for anyway. SVE's own width is not counted; schedules use NEON's 128 bits.
        """
        if "avx512f" in self.features:
            return 512
        return 256 if "avx2" in self.features else 128

    @property
    def vector_registers(self) -> int:
        """How many values of `vector_bits` fit into registers at once."""
        if self.arch == "x86_64":
            return 32 if "avx512f" in self.features else 16
        if self.arch == "arm":
            return 16 if "neon" in self.features else 4
        # 32 scalar registers hold 8 times 4 floats.
        return 32 if self.has_vectors else 8

    @property
    def page_bytes(self) -> int:
        """Largest page in bytes that kernels of this architecture are built with: what segments must align to."""
        return 65536 if self.arch in ("aarch64", "arm") else 4096

    @property
    def elf_machine(self) -> int:
        """`e_machine` of the target's ELF files."""
        return {"x86_64": 62, "aarch64": 183, "arm": 40, "riscv64": 243}[self.arch]

    @property
    def elf_class(self) -> int:
        """`EI_CLASS` of the target's ELF files: 1 for 32-bit, 2 for 64-bit."""
        return 1 if self.arch == "arm" else 2

    @property
    def pointer_bytes(self) -> int:
        """Bytes of a pointer."""
        return 4 * self.elf_class

    def mattr(self) -> list[str]:
        """Return LLVM's feature switches: off for everything not listed, then on for what is listed."""
        names = LLVM_NAMES.get(self.arch, {})
        off = [n for f in FEATURES[self.arch] if f not in self.features for n in names.get(f, (f,))]
        on = [n for f in FEATURES[self.arch] if f in self.features for n in names.get(f, (f,))]
        # "Off" first: it takes with it all that builds upon it, and "on" must have the last word.
        return [f"-{n}" for n in (*NEVER[self.arch], *off)] + [f"+{n}" for n in on] + list(TUNING[self.arch])

    def llvm(self) -> dict[str, str | list[str]]:
        """Return the dictionary for `tvm.target.Target`. Raise TargetError if LLVM does not know the CPU."""
        import tvm  # takes a second, which listing targets must not
        from tvm.target import codegen

        if not codegen.llvm_is_valid_cpu(self.cpu, self.triple):
            anything = tvm.target.Target({"kind": "llvm", "mtriple": self.triple})
            known = [str(n) for n in codegen.llvm_get_cpu_archlist(anything)]
            raise TargetError(
                f"LLVM has no CPU of this name for {self.arch}",
                where=f"target {self.name}, cpu",
                found=repr(self.cpu),
                allowed="a CPU LLVM knows, like " + ", ".join(difflib.get_close_matches(self.cpu, known, 5, 0.0)),
            )
        target: dict[str, str | list[str]] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        target["mattr"] = self.mattr()
        if self.arch == "arm":
            target["mfloat-abi"] = "hard"
        if self.arch == "riscv64":
            target["mabi"] = "lp64d"
        return target

    def baseline(self) -> str:
        """Return zig's `-mcpu` for code that must run on every CPU of the architecture (it checks the features)."""
        return BASELINES[self.arch]

    @property
    def qemu(self) -> Qemu | None:
        """The emulator that stands in for this target, with the fewest features beyond its own; None if none does."""
        cpus = QEMU_CPUS[self.arch]
        able = [cpu for cpu, features in cpus.items() if features.issuperset(self.features)]
        if not able:
            return None
        cpu = self.cpu if self.cpu in able else min(able, key=lambda c: len(cpus[c]))
        return Qemu(binary=f"qemu-{self.arch}", cpu=cpu, sysroot=SYSROOTS[self.arch])


def load_target(name: str) -> Target:
    """Return the target called `name`: "native", a file in the target folders, or a path that ends in .toml.

    Raises TargetError: unknown name (with the nearest known ones), or a file that is missing or not valid.
    """
    if name == NATIVE:
        return native_target()
    if name.endswith(".toml"):
        return _read(Path(name))
    if _NAME.fullmatch(name):
        for folder in _folders():
            path = folder / f"{name}.toml"
            if path.exists():
                return _read(path)
    known = [NATIVE, *_paths()]
    raise TargetError(
        "unknown target",
        where="--target",
        found=repr(name[:80]),
        allowed=f"{len(known)} names, listed by: ingot targets; or a path to a .toml file",
        hint=_nearest_hint(name, known) or "see: ingot targets",
    )


def list_targets() -> list[Target]:
    """Return every target of the target folders by name, without "native". Raises TargetError for a file not valid."""
    return [_read(path) for _, path in sorted(_paths().items())]


def native_target() -> Target:
    """Return the machine this process runs on, by its CPU's feature flags. Raises TargetError where unsupported."""
    from ingot.native import describe_machine

    return _validate(describe_machine(), "this machine")


def _nearest_hint(name: str, known: Iterable[str]) -> str | None:
    lowered = name.lower().replace("_", "-").replace(" ", "-")[:80]
    nearest = difflib.get_close_matches(lowered, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(nearest)}?" if nearest else None


def _folders() -> Iterator[Path]:
    """Yield the folders of target files: the user's own first, so that they can correct a shipped board."""
    for entry in filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)):
        folder = Path(entry)
        if not folder.is_dir():
            raise TargetError(
                "not a folder",
                where=f"environment variable {FOLDERS_VARIABLE}",
                found=entry,
                allowed=f"folders that exist, separated by {os.pathsep!r}",
            )
        yield folder
    package = Path(__file__).resolve().parent
    shipped = package / "targets"
    # A wheel carries the folder inside the package; a working copy has it at the top.
    yield shipped if shipped.is_dir() else package.parents[1] / "targets"


def _paths() -> dict[str, Path]:
    """Return target name -> file, the first folder winning."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def _read(path: Path) -> Target:
    """Return the target in one file, or raise TargetError naming file, field, value found and values allowed."""
    where = str(path)
    try:
        table = tomllib.loads(_read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise TargetError("not a TOML file", where=where, found=reason, allowed="UTF-8 text in TOML 1.0") from None
    target = _validate(table, where)
    if target.name != path.stem:
        raise TargetError(
            "the name is not the file's name", where=f"{where}, name", found=repr(target.name), allowed=repr(path.stem)
        )
    if target.name == NATIVE:
        raise TargetError("this name is taken", where=f"{where}, name", found=repr(NATIVE), allowed="any other name")
    return target


def _read_bytes(path: Path) -> bytes:
    try:
        # Not blocking: a FIFO under this name must not hang the compiler.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        found = getattr(error, "strerror", None) or str(error)
        raise TargetError("cannot read the target file", str(path), found, allowed="a readable file") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise TargetError("not a file", where=str(path), found="a folder or device", allowed="a regular file")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TargetError(
            "the target file is too large",
            where=str(path),
            found=f"{max(status.st_size, len(data))} bytes",
            allowed=f"at most {MAX_FILE_BYTES} bytes",
        )
    return data


def _validate(table: Mapping[str, Any], where: str) -> Target:
    try:
        return Target.model_validate(_tuples(table))
    except TargetError as error:
        # The model knows the field, only this function knows the file.
        place = f"{where}, {error.where}" if error.where else where
        raise TargetError(error.what, place, error.found, error.allowed, error.hint) from None
    except ValidationError as error:
        raise _explain(error, where) from None


def _tuples(value: Any) -> Any:  # noqa: ANN401 - whatever TOML holds
    """Return `value` with every list as a tuple: strict validation takes no list where a frozen model has a tuple."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _explain(error: ValidationError, where: str) -> TargetError:
    """Return pydantic's most telling complaint in our words: a misspelt field before the one that is missing for it."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    path = [part for part in first["loc"] if isinstance(part, str)]
    field = ".".join(path)
    shown = ".".join(str(part) for part in first["loc"])
    kind = first["type"]
    if kind == "extra_forbidden":
        siblings = [f.rpartition(".")[2] for f in FIELDS if f.rpartition(".")[0] == ".".join(path[:-1])]
        return TargetError(
            "unknown field",
            where=f"{where}, {shown}"[:300],
            found=repr(path[-1])[:80],
            allowed=", ".join(siblings),
            hint=_nearest_hint(path[-1], siblings),
        )
    what = "a field is missing" if kind == "missing" else "a field holds a value that is not allowed"
    found = "nothing" if kind == "missing" else repr(first["input"])[:80]
    return TargetError(what, where=f"{where}, {shown}"[:300], found=found, allowed=FIELDS.get(field, first["msg"]))
