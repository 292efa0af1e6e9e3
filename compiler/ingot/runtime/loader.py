"""Load and run a model that ingot compiled.

This ONE file needs Python >= 3.8 and numpy, nothing else: copy it next to the artifact, on the board too.

    model = load("model.so", threads=2)
    y = model(x)                      # arrays in the model's order, or by name; one array, or a tuple in order
    outs = model.run({"x": x})        # dict in, dict out

The checks come before the code: the file is opened once, its ELF headers and metadata are read as data and compared
with this machine, and only then is that very descriptor given to dlopen. A file that is not an ingot artifact is
refused before any of its constructors could run.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import weakref
from _thread import allocate_lock
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Array = np.ndarray[Any, Any]

FORMAT = 1
ABI_VERSION = 1
MAX_NOTE_BYTES = 16 << 20
MAX_NDIM = 8
MAX_THREADS = 64

# In the order of `ingot_dtype` in ingot.h; bytes per element.
_DTYPES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip


class IngotError(Exception):
    """Base of every error ingot raises on purpose: what went wrong, where, the value found, those allowed, what to do.

    `str()` gives one to five short lines. The command line ends with `exit_code`.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        where: str | None = None,
        found: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        # All five as args, so that the error survives pickling between processes.
        super().__init__(what, where, found, allowed, hint)
        self.what, self.where, self.found, self.allowed, self.hint = what, where, found, allowed, hint

    def __str__(self) -> str:
        pairs = (("where", self.where), ("found", self.found), ("allowed", self.allowed), ("do", self.hint))
        lines = [self.what] + [f"  {label + ':':<8} {text}" for label, text in pairs if text]
        return "\n".join(_one_line(line) for line in lines)


class LoadError(IngotError):
    """The artifact is missing, damaged, not ours, or not made for this machine."""


class InputError(IngotError):
    """An argument of a call does not fit the model: missing, extra, wrong dtype or shape."""


class RunError(IngotError):
    """The model failed while running, its selftest failed, or it is closed."""

    exit_code = 1


def _one_line(text: str) -> str:
    """Escape what a file name or a damaged artifact could use to break a terminal or an encoder."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------- the file, as data

_MACHINES = {(62, 2): "x86_64", (183, 2): "aarch64", (40, 1): "arm", (243, 2): "riscv64", (3, 1): "i386"}
# Bits of e_flags that name the float calling convention; both sides must agree where both say it.
_FLOAT_ABI = {"arm": 0x600, "riscv64": 0x6}
_PT_LOAD, _PT_DYNAMIC, _PT_NOTE, _PT_PHDR, _PT_TLS = 1, 2, 4, 6, 7
_PT_EH_FRAME, _PT_STACK, _PT_RELRO, _PT_PROPERTY = 0x6474E550, 0x6474E551, 0x6474E552, 0x6474E553
_PT_ARM_EXIDX, _PT_RISCV_ATTRIBUTES = 0x70000001, 0x70000003
_SHT_DYNAMIC, _SHT_NOTE, _SHT_NOBITS = 6, 7, 8
_SHF_WRITE, _SHF_ALLOC, _SHF_EXEC, _SHF_TLS = 1, 2, 4, 0x400
_PF_X, _PF_W = 1, 2


class _File:
    """An open artifact: the descriptor that is checked and later loaded, and what its headers say."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.fd = -1
        try:
            self.path = os.fsdecode(path)
            # stat first, so that no device or FIFO is opened; O_NONBLOCK for the race between the two.
            if stat.S_ISREG(os.stat(self.path).st_mode):
                self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self.stat = os.fstat(self.fd)
        except (OSError, TypeError, ValueError) as error:
            raise LoadError("cannot open the artifact", _quoted(path), str(error), "a model.so made by ingot") from None
        if self.fd < 0 or not stat.S_ISREG(self.stat.st_mode):
            self.close()
            raise LoadError("the artifact is not a regular file", self.path, allowed="a model.so made by ingot")
        self.size = self.stat.st_size

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def damaged(self, what: str) -> NoReturn:
        raise LoadError(
            f"the artifact is damaged: {what}", self.path, hint="copy it again, or compile it again with ingot"
        )

    def read(self, offset: int, count: int, what: str) -> bytes:
        """Exactly `count` bytes at `offset`; a LoadError where the file does not hold them."""
        if offset + count > self.size:
            self.damaged(f"truncated, its {what} ends at byte {offset + count} of {self.size}")
        try:
            data = os.pread(self.fd, count, offset)
        except OSError as error:
            raise LoadError("cannot read the artifact", self.path, str(error)) from None
        if len(data) != count:
            self.damaged(f"truncated inside its {what}")
        return data

    def parse(self) -> None:
        """Read and check the ELF headers, and find the metadata. Only a file that dlopen can map passes."""
        head = self.read(0, min(64, self.size), "ELF header")
        if head[:4] != b"\x7fELF":
            raise LoadError("this is not a shared library", self.path, _quoted(head[:8]), "an ELF file made by ingot")
        if len(head) < 64:
            self.damaged("truncated inside its ELF header")
        bits = head[4]
        if bits not in (1, 2) or head[5] != 1 or head[6] != 1:
            self.damaged("unknown ELF class or byte order")
        layout = "<HHIQQQIHHHHHH" if bits == 2 else "<HHIIIIIHHHHHH"
        kind, machine, _, _, phoff, shoff, flags, _, phsize, phnum, shsize, shnum, _ = struct.unpack_from(
            layout, head, 16
        )
        if (machine, bits) not in _MACHINES:
            raise LoadError("unknown machine type", self.path, f"ELF machine {machine}", "x86_64, aarch64, arm, riscv64")
        self.arch = _MACHINES[machine, bits]
        self.float_abi = flags & _FLOAT_ABI.get(self.arch, 0)
        if kind != 3:
            raise LoadError("this ELF file is not a shared library", self.path, f"ELF type {kind}", "3 (ET_DYN)")
        if (phsize, shsize) != ((56, 64) if bits == 2 else (32, 40)) or phnum > 256 or shnum > 4096:
            self.damaged("impossible header sizes")
        table = self.read(phoff, phnum * phsize, "program headers")
        # type, flags, offset, vaddr, filesz, memsz, align
        order = (0, 1, 2, 3, 5, 6, 7) if bits == 2 else (0, 6, 1, 2, 4, 5, 7)
        rows = struct.iter_unpack("<IIQQQQQQ" if bits == 2 else "<IIIIIIII", table)
        segments = [tuple(row[i] for i in order) for row in rows]
        table = self.read(shoff, shnum * shsize, "section headers")
        # type, flags, addr, offset, size, name
        sections = [row[1:6] + row[:1] for row in struct.iter_unpack("<IIQQQQIIQQ" if bits == 2 else "<IIIIIIIIII", table)]
        self._check_layout(segments, sections)
        self.note = self._find_note(sections)

    def _check_layout(self, segments: list[Any], sections: list[Any]) -> None:
        """Sections and segments tell the same story twice; a flipped bit in either shows as a contradiction."""
        loads = [s for s in segments if s[0] == _PT_LOAD]
        end = 0
        for _, _, offset, vaddr, filesz, memsz, align in loads:
            if offset + filesz > self.size:
                self.damaged(f"truncated, a segment ends at byte {offset + filesz} of {self.size}")
            power = align >= 4096 and align & (align - 1) == 0
            if not power or (vaddr - offset) % align or vaddr < end or not filesz <= memsz <= filesz + (1 << 30):
                self.damaged("impossible segment")
            end = vaddr + memsz
        if not loads or end >= 1 << 47:
            self.damaged("no loadable segment" if not loads else "impossible segment")
        self.align = min(s[6] for s in loads)

        def home(offset: int, addr: int, filesz: int, memsz: int) -> int:
            """Flags of the loaded segment that holds this range, at the same distance in file and memory."""
            for _, flags, start, vaddr, file_bytes, mem_bytes, _ in loads:
                if vaddr <= addr and addr + memsz <= vaddr + mem_bytes and (addr - vaddr) == (offset - start):
                    if addr + filesz <= vaddr + file_bytes:
                        return int(flags)
            self.damaged("a section or table lies outside the loaded segments")

        known = (_PT_NOTE, _PT_PHDR, _PT_TLS, _PT_EH_FRAME, _PT_RELRO, _PT_PROPERTY, _PT_ARM_EXIDX, _PT_DYNAMIC)
        for kind, _, offset, vaddr, filesz, memsz, _ in segments:
            if kind in known and filesz:
                home(offset, vaddr, filesz, filesz if kind == _PT_TLS else memsz)
            elif kind not in (*known, 0, _PT_LOAD, _PT_STACK, _PT_RISCV_ATTRIBUTES):
                self.damaged(f"unknown segment type {kind:#x}")
        for kind, flags, addr, offset, size in sections:
            if kind not in (0, _SHT_NOBITS) and offset + size > self.size:
                self.damaged(f"truncated, a section ends at byte {offset + size} of {self.size}")
            if not flags & _SHF_ALLOC or not size or (kind == _SHT_NOBITS and flags & _SHF_TLS):
                continue
            if kind == _SHT_NOBITS:
                inside = any(s[3] + s[4] <= addr and addr + size <= s[3] + s[5] and s[1] & _PF_W for s in loads)
                mapped = _PF_W if inside else 0
            else:
                mapped = home(offset, addr, size, size)
            if (flags & _SHF_EXEC and not mapped & _PF_X) or (flags & _SHF_WRITE and not mapped & _PF_W):
                self.damaged("a section's access rights differ from its segment's")
        dynamic = [s[2:6] for s in segments if s[0] == _PT_DYNAMIC]
        if dynamic != [(s[3], s[2], s[4], s[4]) for s in sections if s[0] == _SHT_DYNAMIC] or len(dynamic) != 1:
            self.damaged("its dynamic table is missing or contradictory")

    def _find_note(self, sections: list[Any]) -> bytes:
        """The JSON bytes of the one note of owner "ingot", type 1."""
        notes = []
        for kind, _, _, offset, size in sections:
            if kind != _SHT_NOTE or size < 20 or self.read(offset + 8, 10, "note") != b"\1\0\0\0ingot\0":
                continue
            name_bytes, count = struct.unpack("<II", self.read(offset, 8, "note"))
            if name_bytes != 6 or count > size - 20 or size > MAX_NOTE_BYTES:
                self.damaged("impossible metadata note")
            notes.append(self.read(offset + 20, count, "metadata note"))
        if len(notes) != 1:
            raise LoadError(
                "this library is not a model compiled by ingot",
                self.path,
                f"{len(notes)} ingot notes" if notes else "no .note.ingot section",
                "one .note.ingot section",
                "make an artifact with: ingot compile MODEL --target NAME -o model.so",
            )
        return notes[0]


# ----------------------------------------------------------------------------------------------------- the metadata

_SCHEMA: dict[str, Any] = {
    "name": str, "compiler": str, "precision": str, "weights_sha256": str, "selftest": bool,
    "target": {"name": str, "arch": str, "triple": str, "cpu": str, "libc": str, "libc_version": str, "features": [str]},
    "source": {"format": str, "sha256": str, "peak_bytes": int},
    "inputs": [dict], "outputs": [dict],
    "arena_bytes": int, "memory_bytes": int, "weights_bytes": int, "kernels": int, "steps": int, "macs": int,
}  # fmt: skip


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _small_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number is too large")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _conform(value: Any, schema: Any, key: str) -> None:  # noqa: ANN401 - any JSON value
    """Raise ValueError unless `value` has the types of `schema`; keys beyond the schema are allowed."""
    if isinstance(schema, dict):
        if type(value) is not dict:
            raise ValueError(f"{key} is not an object")
        for name, inner in schema.items():
            if name not in value:
                raise ValueError(f"{key}.{name} is missing")
            _conform(value[name], inner, f"{key}.{name}")
    elif isinstance(schema, list):
        if type(value) is not list or len(value) > 4096:
            raise ValueError(f"{key} is not a list of at most 4096 entries")
        for i, item in enumerate(value):
            _conform(item, schema[0], f"{key}[{i}]")
    elif type(value) is not schema or (schema is int and not 0 <= value < 1 << 63):
        raise ValueError(f"{key} is {_quoted(value)}, not a valid {schema.__name__}")


def _conform_tensor(tensor: dict[str, Any], key: str) -> None:
    _conform(tensor, {"name": str, "dtype": str, "shape": [int]}, key)
    shape = tensor["shape"]
    count = _DTYPES.get(tensor["dtype"], 0)
    for n in shape:
        count *= n
    if tensor["dtype"] not in _DTYPES or len(shape) > MAX_NDIM or count >= 1 << 63:
        raise ValueError(f"{key} has an impossible dtype or shape")
    if "quantization" not in tensor:
        raise ValueError(f"{key}.quantization is missing")
    q = tensor["quantization"]
    if q is None:
        return
    if type(q) is not dict or type(q.get("scales")) is not list or type(q.get("zero_points")) is not list:
        raise ValueError(f"{key}.quantization has the wrong form")
    scales, zeros, axis = q["scales"], q["zero_points"], q.get("axis")
    good = all(type(s) in (int, float) and abs(s) < 3.5e38 for s in scales)
    good = good and all(type(z) is int and abs(z) < 1 << 31 for z in zeros) and type(axis) is int
    if not good or len(scales) != len(zeros) or not (len(scales) == 1 or 0 <= axis < len(shape) == len(shape)):
        raise ValueError(f"{key}.quantization has the wrong form")
    if len(scales) != 1 and len(scales) != shape[axis]:
        raise ValueError(f"{key}.quantization does not fit the shape")


def _metadata(file: _File) -> dict[str, Any]:
    """The note's JSON with every field type-checked."""
    import json

    try:
        text = file.note.decode("utf-8")
        meta = json.loads(text, object_pairs_hook=_unique, parse_int=_small_int, parse_constant=_no_constant)
        if type(meta) is not dict or type(meta.get("format")) is not int or type(meta.get("abi")) is not int:
            raise ValueError("no format and abi numbers")
        if meta["format"] != FORMAT:
            raise LoadError(
                f"the artifact has format {meta['format']}; this loader reads format {FORMAT}",
                file.path,
                hint="use the loader of the ingot version that compiled it, or compile it again",
            )
        _conform(meta, _SCHEMA, "metadata")
        for side in ("inputs", "outputs"):
            for i, tensor in enumerate(meta[side]):
                _conform_tensor(tensor, f"{side}[{i}]")
            if len({t["name"] for t in meta[side]}) != len(meta[side]):
                raise ValueError(f"two {side} have the same name")
        name = meta["name"]
        plain = name.isascii() and name.replace("_", "0").isalnum() and name == name.lower() and not name[0].isdigit()
        if not plain or len(name) > 200:
            raise ValueError(f"{_quoted(name)} is not a model name")
        if meta["target"]["arch"] != file.arch:
            raise ValueError(f"it says {_quoted(meta['target']['arch'])}, the code is {file.arch}")
    except (ValueError, RecursionError) as error:
        file.damaged(f"its metadata is not valid ({error})")
    return dict(meta)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an artifact for any machine, read as data: nothing of the file is executed or mapped.

    Raises LoadError where the file is missing, truncated, damaged, not ours or of another format.
    """
    with _File(path) as file:
        file.parse()
        return _metadata(file)


# ------------------------------------------------------------------------------------------------------ this machine

# Canonical feature (LLVM's name) -> alternatives, each a set of flags in /proc/cpuinfo; same name where not listed.
_FLAGS: dict[str, dict[str, str]] = {
    "x86_64": {
        "sse3": "pni", "ssse3": "", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "", "cx16": "", "avx": "",
        "avx2": "", "fma": "", "f16c": "", "bmi": "bmi1", "bmi2": "", "lzcnt": "abm", "movbe": "", "avx512f": "",
        "avx512bw": "", "avx512cd": "", "avx512dq": "", "avx512vl": "", "avx512vnni": "avx512_vnni",
        "avxvnni": "avx_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16", "amx-tile": "amx_tile",
        "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
    },
    "aarch64": {
        "neon": "asimd", "crc": "crc32", "aes": "", "sha2": "", "lse": "atomics", "rdm": "asimdrdm",
        "fullfp16": "fphp asimdhp", "dotprod": "asimddp", "i8mm": "", "bf16": "", "sve": "", "sve2": "",
        "rcpc": "lrcpc", "fp16fml": "asimdfhm",
    },
    # A 64-bit kernel shows a 32-bit program its own flags: asimd there means all of these. VFPv3 came with ARMv7.
    "arm": {
        "neon": "neon|asimd", "vfp4": "vfpv4|asimd", "vfp3": "vfpv3|vfpv3d16|vfpv4|asimd",
        "thumb2": "vfpv3|vfpv3d16|vfpv4|neon|asimd", "hwdiv": "idivt|asimd",
    },
    "riscv64": dict.fromkeys("m a f d c v zba zbb zbs zfh".split(), ""),
}  # fmt: skip
_ARM_LEVEL = {"lse": 1, "rdm": 1, "fullfp16": 2, "dotprod": 2, "sve": 2, "rcpc": 3, "fp16fml": 2, "i8mm": 6, "bf16": 6}


def _process_machine() -> tuple[str, int]:
    """Architecture and float ABI bits of this very process: a 32-bit Python on a 64-bit kernel is a 32-bit machine."""
    try:
        with open("/proc/self/exe", "rb") as exe:
            head = exe.read(64)
        bits, machine = head[4], head[18] | head[19] << 8
        arch = _MACHINES.get((machine, bits), f"ELF machine {machine}")
        flags = struct.unpack_from("<I", head, 48 if bits == 2 else 36)[0]
        return arch, flags & _FLOAT_ABI.get(arch, 0)
    except (OSError, IndexError, struct.error):
        name, wide = os.uname().machine, struct.calcsize("P") == 8
        table = {"arm64": "aarch64"} if wide else {"x86_64": "i386", "i686": "i386"}
        return ("arm" if not wide and name[:3] in ("arm", "aar") else table.get(name, name)), 0


def _cpu_flags() -> set[str]:
    """The flags /proc/cpuinfo gives for the first CPU (the kernel shows what all cores share); empty if unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as cpuinfo:
            for line in cpuinfo:
                key, _, value = line.partition(":")
                key = key.strip()
                if key in ("flags", "Features"):
                    return set(value.split())
                if key == "isa":
                    base, *extensions = value.strip().lower().split("_")
                    letters = base[4:].replace("g", "imafd")
                    return set(extensions) | set(letters)
    except OSError:
        pass
    return set()


def _check_machine(file: _File, meta: dict[str, Any]) -> str:
    arch, float_abi = _process_machine()
    target = meta["target"]
    if file.arch != arch:
        kernel = os.uname().machine
        this = f"this is a 32-bit {arch} Python on a {kernel} kernel" if struct.calcsize("P") == 4 else f"this is {arch}"
        raise LoadError(f"built for {file.arch} ({target['name']}); {this}", file.path, file.arch, arch, _RECOMPILE)
    if file.float_abi and float_abi and file.float_abi != float_abi:
        raise LoadError(
            f"built for another float calling convention ({target['triple']}) than this system's", file.path,
            hint=_RECOMPILE,
        )  # fmt: skip
    page = os.sysconf("SC_PAGE_SIZE")
    if file.align < page:
        raise LoadError(f"built for pages of {file.align} bytes; this kernel has pages of {page}", file.path)
    return arch


_RECOMPILE = "compile it for this machine: ingot compile MODEL --target native, or one of `ingot targets`"


def _check_abi(file: _File, meta: dict[str, Any]) -> str:
    if meta["abi"] != ABI_VERSION:
        raise LoadError(
            f"the artifact has ABI {meta['abi']}; this loader speaks ABI {ABI_VERSION}",
            file.path,
            hint="use the loader of the ingot version that compiled it, or compile it again",
        )
    return f"format {meta['format']}, ABI {meta['abi']}"


def _check_cpu(file: _File, meta: dict[str, Any]) -> str:
    needed, table, have = meta["target"]["features"], _FLAGS[file.arch], _cpu_flags()

    def present(feature: str) -> bool:
        if feature not in table:
            return False
        options = (table[feature] or feature).split("|")
        # An unreadable cpuinfo says nothing: `create` asks the CPU itself.
        return not have or any(have.issuperset(option.split()) for option in options)

    missing = [f for f in needed if not present(f)]
    if missing:
        level = file.arch
        if level == "aarch64":
            level = "armv9" if "sve2" in needed else f"armv8.{max((_ARM_LEVEL.get(f, 0) for f in needed), default=0)}"
        raise LoadError(
            f"built for {level} {' '.join(map(str, missing))} ({meta['target']['name']}); "
            f"this CPU has no {', '.join(missing)}",
            file.path,
            hint=_RECOMPILE,
        )
    return " ".join(needed) if needed else "no special features needed"


def _check_libc(file: _File, meta: dict[str, Any]) -> str:
    try:
        here = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        here = ""
    libc, version = meta["target"]["libc"], meta["target"]["libc_version"]
    mine = "gnu" if here.startswith("glibc ") else "musl"
    text = here or "no glibc"
    if libc != mine:
        raise LoadError(f"built for {libc} libc {version}; this system has {text}", file.path, hint=_RECOMPILE)
    if libc == "gnu" and _version(version) > _version(here[6:]):
        raise LoadError(f"built for glibc {version} or later; this system has {text}", file.path, hint=_RECOMPILE)
    return f"{libc} {version}".strip() + f" needed, {text} here"


def _version(text: str) -> tuple[int, ...]:
    parts = text.split(".")
    return tuple(int(p) for p in parts if p.isdigit() and len(p) < 9)


def _check_memory(file: _File, meta: dict[str, Any]) -> str:
    need = meta["memory_bytes"] + meta["weights_bytes"]
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            free = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return f"{need / 2**20:.1f} MiB needed"
    text = f"{need / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB available"
    if need > free:
        raise LoadError(f"not enough memory: {text}", file.path)
    return text


_CHECKS = (("machine", _check_machine), ("ABI", _check_abi), ("CPU", _check_cpu), ("libc", _check_libc))


def check(path: str | os.PathLike[str]) -> list[tuple[str, bool, str]]:
    """Will this artifact run on this machine? Rows of (what, ok, detail), without loading anything.

    Never raises for a bad artifact: the row that fails says why. A file that cannot be read gives one row.
    """
    try:
        with _File(path) as file:
            file.parse()
            meta = _metadata(file)
            rows = [("file", True, f"{file.size / 2**20:.1f} MiB, {meta['name']} for {meta['target']['name']}")]
            for what, function in (*_CHECKS, ("memory", _check_memory)):
                try:
                    rows.append((what, True, function(file, meta)))
                except LoadError as error:
                    rows.append((what, False, error.what))
            return rows
    except LoadError as error:
        return [("file", False, error.what)]


# ------------------------------------------------------------------------------------- the ABI: ingot.h, in ctypes


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("dtype", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("device", ctypes.c_int32), ("reserved", ctypes.c_int32),
    ]  # fmt: skip


class _Info(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("abi_version", ctypes.c_uint32), ("name", ctypes.c_char_p),
        ("compiler", ctypes.c_char_p), ("target", ctypes.c_char_p), ("triple", ctypes.c_char_p),
        ("features", ctypes.c_char_p), ("source_sha256", ctypes.c_char_p), ("precision", ctypes.c_char_p),
        ("n_inputs", ctypes.c_int32), ("n_outputs", ctypes.c_int32), ("inputs", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p), ("arena_bytes", ctypes.c_uint64), ("memory_bytes", ctypes.c_uint64),
        ("weights_bytes", ctypes.c_uint64),
    ]  # fmt: skip


class _Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("threads", ctypes.c_int32), ("memory", ctypes.c_void_p),
        ("memory_bytes", ctypes.c_uint64), ("error", ctypes.c_char_p), ("error_bytes", ctypes.c_uint64),
    ]  # fmt: skip


# CFUNCTYPE calls release the GIL.
_Handle, _Status = ctypes.c_void_p, ctypes.c_int


class _Api(ctypes.Structure):
    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("struct_size", ctypes.c_uint32),
        ("create", ctypes.CFUNCTYPE(_Status, ctypes.POINTER(_Options), ctypes.POINTER(_Handle))),
        ("run", ctypes.CFUNCTYPE(_Status, _Handle, ctypes.POINTER(_Tensor), ctypes.c_int32,
                                 ctypes.POINTER(_Tensor), ctypes.c_int32)),
        ("destroy", ctypes.CFUNCTYPE(_Status, _Handle)),
        ("describe", ctypes.CFUNCTYPE(_Status, ctypes.POINTER(ctypes.POINTER(_Info)))),
        ("last_error", ctypes.CFUNCTYPE(ctypes.c_char_p, _Handle)),
        ("version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        ("selftest", ctypes.CFUNCTYPE(_Status, _Handle, ctypes.POINTER(ctypes.c_double))),
    ]  # fmt: skip


_ERR_CPU, _ERR_ABI, _ERR_UNAVAILABLE = 8, 11, 13
_ERRS_OF_INPUT = range(1, 8)


# ------------------------------------------------------------------------------------------------------------ loading

# (device, inode) -> loaded file. glibc finds a library again by its name, and the name is the descriptor's number:
# so a descriptor that gave its name to a library stays open for good (artifacts are never unmapped anyway).
_LOADED: dict[tuple[int, int], tuple[_File, ctypes.CDLL]] = {}
_LOAD_LOCK = allocate_lock()


def _identity(s: os.stat_result) -> tuple[int, int, int, int]:
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def _dlopen(file: _File) -> ctypes.CDLL:
    """Load the very file that was checked. Takes the descriptor over; the caller holds _LOAD_LOCK."""
    key = file.stat.st_dev, file.stat.st_ino
    if key in _LOADED:
        first, library = _LOADED[key]
        if _identity(first.stat) == _identity(file.stat):
            return library
        raise LoadError(
            "the artifact was changed in place after this process loaded it",
            file.path,
            hint="write a new artifact to a new file and rename it over the old one, then start the process again",
        )
    # A program that closes descriptors it does not know would let a number come back: never use a name twice.
    while any(file.fd == other.fd for other, _ in _LOADED.values()):
        file.fd = os.dup(file.fd)
    name = f"/proc/self/fd/{file.fd}"
    try:
        now = os.fstat(file.fd)
        if not os.path.exists(name):  # no /proc: the path must still mean the file that was checked
            name = os.path.abspath(file.path)
            now = os.stat(name)
            if any(os.path.abspath(other.path) == name for other, _ in _LOADED.values()):
                raise OSError("another artifact was loaded from this path, and without /proc it is found again by name")
        if _identity(now) != _identity(file.stat):
            raise OSError("it changed while it was being checked")
        library = ctypes.CDLL(name)
    except OSError as error:
        text = str(error).replace(name, file.path)
        hint = "is the file on a file system mounted noexec?" if "not permitted" in text else None
        raise LoadError("the artifact cannot be loaded", file.path, text, hint=hint) from None
    kept, kept.fd, kept.stat, kept.path = _File.__new__(_File), file.fd, file.stat, file.path
    file.fd = -1
    _LOADED[key] = kept, library
    return library


def load(path: str | os.PathLike[str], threads: int | None = None, verify: bool | str | None = None) -> Model:
    """Load a compiled model and make an instance of it.

    `threads`: 1 to 64, 1 starts none; None lets the runtime take what CPU affinity and cgroup allow.
    `verify`: True checks the weights against the hash in the metadata, a SHA-256 in hex checks the whole file. Either
    loads a private, sealed copy in memory, which nobody can change between check and use.
    Raises LoadError where the file is not an ingot artifact or not for this machine.
    """
    if threads is not None and (type(threads) is not int or not 0 <= threads <= MAX_THREADS):
        raise InputError("threads is out of range", found=_quoted(threads), allowed=f"None, or 1 to {MAX_THREADS}")
    with _File(path) as file:
        if verify:
            _seal(file)
        file.parse()
        meta = _metadata(file)
        for _, function in _CHECKS:
            function(file, meta)
        if verify:
            _verify(file, meta, verify)
        with _LOAD_LOCK:
            library = _dlopen(file)
        return Model(library, meta, file.path, threads or 0)


def _seal(file: _File) -> None:
    """Replace the descriptor by a sealed copy in memory."""
    import fcntl

    try:
        copy = os.memfd_create("ingot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            offset = 0
            while offset < file.size:
                block = file.read(offset, min(1 << 20, file.size - offset), "content")
                offset += os.write(copy, block)
            # F_ADD_SEALS; seal, shrink, grow, write. Older Pythons do not name them.
            fcntl.fcntl(copy, 1033, 1 | 2 | 4 | 8)
            copied = os.fstat(copy)
        except BaseException:
            os.close(copy)
            raise
    except (OSError, AttributeError) as error:
        raise LoadError("verify needs a sealed memory file, and this system gives none", file.path, str(error)) from None
    os.close(file.fd)
    file.fd, file.stat = copy, copied


def _verify(file: _File, meta: dict[str, Any], verify: bool | str) -> None:
    import hashlib

    if isinstance(verify, str):
        offset, count, expected, what = 0, file.size, verify.strip().lower(), "file"
    else:
        offset, count, expected, what = file.weights[0], file.weights[1], meta["weights_sha256"], "weights"
    digest = hashlib.sha256()
    for start in range(offset, offset + count, 1 << 20):
        digest.update(file.read(start, min(1 << 20, offset + count - start), what))
    if digest.hexdigest() != expected:
        raise LoadError(f"the {what} of the artifact do not have the expected hash", file.path,
                        digest.hexdigest(), _quoted(expected))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the model


class TensorSpec:
    """What an input or output looks like.

    `dtype` is the NumPy dtype of the arrays that pass; NumPy has no bfloat16, so such a tensor is uint16 there (the
    raw bits) and `type` says "bfloat16". `quantization` is None or {"scales", "zero_points", "axis"}:
    real = scale * (q - zero_point).
    """

    __slots__ = ("dtype", "name", "nbytes", "quantization", "shape", "type")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.name: str = fields["name"]
        self.type: str = fields["dtype"]
        self.dtype = np.dtype("uint16" if self.type == "bfloat16" else self.type)
        self.shape: tuple[int, ...] = tuple(fields["shape"])
        self.quantization: dict[str, Any] | None = fields["quantization"]
        self.nbytes = self.dtype.itemsize
        for n in self.shape:
            self.nbytes *= n

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}{list(self.shape)}"

    def _tensor(self) -> _Tensor:
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        return _Tensor(None, self.nbytes, list(_DTYPES).index(self.type), len(self.shape), shape, 0, 0)


class Model:
    """An instance of a compiled model; `load` makes it.

    Calls from several threads are safe and take turns; for calls side by side load one Model per thread (the weights
    are shared). A Model works after a fork. It cannot be pickled.

    Arrays must have exactly the dtype and shape of the model: nothing is cast or reshaped. What is not an array (a
    list, a torch tensor) goes through `np.asarray` and must then fit as exactly. Arrays that are not contiguous or
    not aligned are copied. bfloat16 goes as uint16 (raw bits) or as ml_dtypes.bfloat16, and comes back as uint16.
    Results are new arrays, aligned to 64 bytes, which no later call overwrites.
    """

    def __init__(self, library: ctypes.CDLL, metadata: dict[str, Any], path: str, threads: int) -> None:
        self._handle: Any = _Handle()
        self._lock = allocate_lock()
        self._where = f"model {metadata['name']} ({path})"
        self.metadata = metadata
        self.inputs = tuple(TensorSpec(t) for t in metadata["inputs"])
        self.outputs = tuple(TensorSpec(t) for t in metadata["outputs"])
        self._api = self._bind(library)
        self._in = (_Tensor * len(self.inputs))(*(s._tensor() for s in self.inputs))
        self._out = (_Tensor * len(self.outputs))(*(s._tensor() for s in self.outputs))
        # Elements of a ctypes array are views made on access: made once here, they make a call cheaper.
        self._in_slots, self._out_slots = list(self._in), list(self._out)
        error = ctypes.create_string_buffer(512)
        options = _Options(ctypes.sizeof(_Options), threads, None, 0, ctypes.addressof(error), len(error))
        status = self._api.create(ctypes.byref(options), ctypes.byref(self._handle))
        if status or not self._handle:
            raise LoadError("the model cannot be created", self._where, _text(error.value) or f"status {status}")
        _MODELS.add(self)

    def _bind(self, library: ctypes.CDLL) -> _Api:
        """The artifact's table of functions, once it agrees with the metadata that was checked."""
        symbol, meta = f"ingot_{self.metadata['name']}_api", self.metadata
        try:
            getter = library[symbol]
        except AttributeError:
            raise LoadError(f"the artifact does not export {symbol}", self._where) from None
        getter.restype = ctypes.POINTER(_Api)
        api, info = getter().contents, ctypes.POINTER(_Info)()
        if api.abi_version != ABI_VERSION or api.struct_size < ctypes.sizeof(_Api):
            raise LoadError("the artifact's code has another ABI than its metadata", self._where)
        status = api.describe(ctypes.byref(info))
        code = [] if status else [info.contents.n_inputs, info.contents.n_outputs, info.contents.memory_bytes]
        if code != [len(self.inputs), len(self.outputs), meta["memory_bytes"]]:
            raise LoadError("the artifact's code and metadata do not belong together", self._where)
        return api

    def __call__(self, /, *arrays: Any, **by_name: Any) -> Any:  # noqa: ANN401 - one array or a tuple of them
        """Run on arrays in the model's order and/or by name; one array, or a tuple in the model's order.

        Raises InputError for a missing, extra or unfitting input, RunError where the model fails.
        """
        if by_name or len(arrays) != len(self.inputs):
            if len(arrays) > len(self.inputs):
                self._refuse("too many inputs", str(len(arrays)), f"{len(self.inputs)}: {self._names(self.inputs)}")
            names = [s.name for s in self.inputs[: len(arrays)]]
            twice = [n for n in names if n in by_name]
            if twice:
                self._refuse(f"input {twice[0]!r} is given twice, by position and by name")
            arrays = self._in_order({**dict(zip(names, arrays)), **by_name}, self.inputs, "input")
        results = self._execute(arrays, None)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on {name: array}; {name: array} of all outputs.

        `outputs` gives arrays of the caller's to write into: exact dtype and shape, C-contiguous, writeable, sharing
        no memory with each other or an input; outputs left out are allocated.
        Raises InputError for a missing, extra or unfitting array, RunError where the model fails.
        """
        arrays = self._in_order(inputs, self.inputs, "input")
        targets = self._in_order(outputs, self.outputs, "output", partial=True) if outputs else None
        return dict(zip((s.name for s in self.outputs), self._execute(arrays, targets)))

    def selftest(self) -> float:
        """Run the stored input and compare with the stored outputs of an independent interpreter.

        Returns max|error| / max|expected|; raises RunError where it is too large or the artifact holds no selftest.
        """
        error = ctypes.c_double(float("nan"))
        with self._lock:
            status = self._api.selftest(self._open(), ctypes.byref(error))
            text = _text(self._api.last_error(self._handle)) if status else ""
        if status == _ERR_UNAVAILABLE:
            raise RunError("the artifact holds no selftest", self._where, hint="compile without --no-selftest")
        if status:
            raise RunError("the selftest failed", self._where, text or f"status {status}")
        return error.value

    def close(self) -> None:
        """Free the instance's memory and threads; a second close does nothing. The file itself stays mapped."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle:
                self._api.destroy(handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A half-made object, or an interpreter that is going down, has nothing to free.
        if getattr(self, "_handle", None):
            self.close()

    def __repr__(self) -> str:
        state = "" if self._handle else " (closed)"
        return f"<ingot.Model {self.metadata['name']}{state}: {list(self.inputs)} -> {list(self.outputs)}>"

    def __reduce__(self) -> NoReturn:
        raise RunError(
            "a loaded Model cannot be pickled or copied", self._where, hint="load the file in the other process"
        )

    def _open(self) -> Any:  # noqa: ANN401
        if not self._handle:
            raise RunError("the model is closed", self._where)
        return self._handle

    def _refuse(self, what: str, found: str | None = None, allowed: str | None = None, hint: str | None = None) -> NoReturn:
        raise InputError(what, self._where, found, allowed, hint)

    @staticmethod
    def _names(specs: Iterable[TensorSpec]) -> str:
        return ", ".join(s.name for s in specs)

    def _in_order(self, given: Any, specs: Sequence[TensorSpec], side: str, partial: bool = False) -> Any:  # noqa: ANN401
        """The values of a mapping in the model's order; None for those left out, where that is allowed."""
        if not hasattr(given, "keys"):
            self._refuse(f"{side}s are not a dict", type(given).__name__, f"a dict with {self._names(specs)}")
        names = [s.name for s in specs]
        for name in given.keys():  # noqa: SIM118 - an npz file iterates, too, but any mapping will do
            if name not in names:
                import difflib

                near = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {near[0]!r}?" if near else None
                self._refuse(f"there is no {side} {name!r}", allowed=self._names(specs), hint=hint)
        missing = [s for s in specs if s.name not in given]
        if missing and not partial:
            self._refuse(f"{side} missing: {', '.join(map(repr, missing))}", ", ".join(map(str, given)) or "none")
        return [given[n] if n in given else None for n in names]

    def _fit(self, spec: TensorSpec, value: Any, side: str) -> Array:  # noqa: ANN401
        """`value` as an array of exactly the model's dtype and shape; InputError where it is not one."""
        array = value
        if not isinstance(value, np.ndarray) and side == "input":
            try:
                array = np.asarray(value)
            except Exception as error:  # noqa: BLE001 - objects with __array__ raise what they like
                self._refuse(f"{side} {spec.name!r} is not an array", str(error).split("\n")[0], repr(spec))
        if not isinstance(array, np.ndarray):
            self._refuse(f"{side} {spec.name!r} is not an array", type(value).__name__, repr(spec))
        if array.dtype != spec.dtype:
            if spec.type == "bfloat16" and array.dtype.name == "bfloat16":
                array = array.view(np.uint16)
            else:
                cast = f"{'x.astype(' if array is value else 'np.asarray(x, '}np.{spec.type})"
                if spec.type == "bfloat16":
                    cast = "x.astype(ml_dtypes.bfloat16), or its raw bits as np.uint16"
                self._refuse(f"{side} {spec.name!r} has the wrong dtype", str(array.dtype), spec.type, cast)
        if array.shape != spec.shape:
            self._refuse(
                f"{side} {spec.name!r} has the wrong shape", str(array.shape), str(spec.shape), _advice(array, spec)
            )
        return array

    def _execute(self, values: Sequence[Any], targets: Sequence[Any] | None) -> list[Array]:
        arrays, results = [], []
        for spec, value in zip(self.inputs, values):
            if not (type(value) is np.ndarray and value.dtype == spec.dtype and value.shape == spec.shape):
                value = self._fit(spec, value, "input")
            flags = value.flags
            arrays.append(value if flags.c_contiguous and flags.aligned else value.copy(order="C"))
        for i, spec in enumerate(self.outputs):
            if targets is not None and targets[i] is not None:
                results.append(self._target(spec, targets[i], (*arrays, *results)))
            else:
                raw = np.empty(spec.nbytes + 63, np.uint8)
                results.append(np.ndarray(spec.shape, spec.dtype, raw, -raw.__array_interface__["data"][0] % 64))
        with self._lock:
            handle = self._open()
            for slot, array in zip(self._in_slots, arrays):
                slot.data = array.__array_interface__["data"][0]
            for slot, array in zip(self._out_slots, results):
                slot.data = array.__array_interface__["data"][0]
            status = self._api.run(handle, self._in, len(arrays), self._out, len(results))
            text = _text(self._api.last_error(handle)) if status else ""
        if status:
            kind = InputError if status in _ERRS_OF_INPUT else RunError
            raise kind("the model refused to run", self._where, text or f"status {status}")
        return results

    def _target(self, spec: TensorSpec, value: Any, others: Sequence[Array]) -> Array:  # noqa: ANN401
        """An array of the caller's that the model may write into."""
        array = self._fit(spec, value, "output")
        if not array.flags.carray:
            self._refuse(f"output {spec.name!r} is not C-contiguous, aligned and writeable", str(array.strides))
        if any(np.may_share_memory(array, other) for other in others):
            self._refuse(f"output {spec.name!r} shares memory with another array of this call")
        return array


def _advice(array: Array, spec: TensorSpec) -> str | None:
    """What to do about a shape, for the two mistakes people make: no batch dimension, and channels on the other side."""
    if (1, *array.shape) == spec.shape:
        return "x[np.newaxis]"
    for axes in ((0, 3, 1, 2), (0, 2, 3, 1)):
        if array.ndim == 4 and tuple(array.shape[a] for a in axes) == spec.shape:
            return f"x.transpose{axes}"
    return None


def _text(message: bytes | None) -> str:
    return (message or b"").decode("utf-8", "replace")


# A lock held by another thread at a fork would stay locked in the child for ever.
_MODELS: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    global _LOAD_LOCK
    _LOAD_LOCK = allocate_lock()
    for model in _MODELS:
        model._lock = allocate_lock()


os.register_at_fork(after_in_child=_after_fork)
