"""Load and run a model that ingot compiled.

This ONE file needs Python >= 3.8 and numpy, nothing else: copy it next to the artifact, on the board too.

    model = load("model.so", threads=2)
    y = model(x)                      # arrays in the model's order, or by name; one array, or a tuple in order
    outs = model.run({"x": x})        # dict in, dict out

The checks come before the code: the file is opened once, its ELF headers and metadata are read as data and compared
with this machine, and only then is that very descriptor given to dlopen. A file that is not an ingot artifact is
refused before any of its constructors could run.
"""

# Python 3.8 has no strict zip, pathlib costs import time.
# ruff: noqa: B905, D105, PTH100, PTH110, PTH116, PTH123

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
    from collections.abc import Mapping, Sequence

    Array = np.ndarray[Any, Any]
    Maybe = str | None
    Path = str | os.PathLike[str]

FORMAT = 2
ABI_VERSION = 1
MAX_NOTE_BYTES = 16 << 20
MAX_NDIM = 8
MAX_THREADS = 64
# In the order of `ingot_dtype` in ingot.h.
_DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
_DTYPES += ["float16", "bfloat16", "float32", "float64"]


class IngotError(Exception):
    """Base of every error ingot raises on purpose: what went wrong, where, the value found, those allowed, what to do.

    `str()` gives one to five short lines. The command line ends with `exit_code`.
    """

    exit_code = 2

    def __init__(
        self, what: str, where: Maybe = None, found: Maybe = None, allowed: Maybe = None, hint: Maybe = None
    ) -> None:
        super().__init__(what, where, found, allowed, hint)  # all of them as args: the error survives pickling
        self.what, self.where, self.found, self.allowed, self.hint = what, where, found, allowed, hint

    def __str__(self) -> str:
        pairs = (("where", self.where), ("found", self.found), ("allowed", self.allowed), ("do", self.hint))
        return "\n".join(_one_line(s) for s in [self.what] + [f"  {k + ':':<8} {v}" for k, v in pairs if v])


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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------- the file, as data

_MACHINES = {(62, 2): "x86_64", (183, 2): "aarch64", (40, 1): "arm", (243, 2): "riscv64", (3, 1): "i386"}
_FLOAT_ABI = {"arm": 0x600, "riscv64": 0x6}  # bits of e_flags that name the float calling convention
_LOAD, _DYNAMIC, _TLS, _RISCV = 1, 2, 7, 0x70000003
_NULL_STACK = (0, 0x6474E551, _RISCV)  # segment types that do not lie in memory
# Note, program headers, .eh_frame_hdr, RELRO, property, ARM's exception index: they lie inside a loaded segment.
_INSIDE = (_DYNAMIC, 4, 6, _TLS, 0x6474E550, 0x6474E552, 0x6474E553, 0x70000001)
_SHT_DYNAMIC, _SHT_NOTE, _SHT_NOBITS = 6, 7, 8
_RECOMPILE = "compile it for this machine: --target native, or one of `ingot targets`"


class _File:
    """An open artifact: the descriptor that is checked and later loaded, and what its headers say."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        try:
            self.path = os.fsdecode(path)
            # stat first, so that no device or FIFO is opened; O_NONBLOCK for the race between the two.
            if stat.S_ISREG(os.stat(self.path).st_mode):
                self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self.stat = os.fstat(self.fd)
        except (OSError, TypeError, ValueError) as error:
            raise LoadError("cannot open the artifact", _short(path), str(error), "a model.so made by ingot") from None
        if self.fd < 0 or not stat.S_ISREG(self.stat.st_mode):
            self.close()
            self.refuse("the artifact is not a regular file", allowed="a model.so made by ingot")
        self.size = self.stat.st_size

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def refuse(self, what: str, found: Maybe = None, allowed: Maybe = None, hint: Maybe = None) -> NoReturn:
        raise LoadError(what, self.path, found, allowed, hint)

    def damaged(self, why: str) -> NoReturn:
        self.refuse(f"the artifact is damaged: {why}", hint="copy it again, or compile it again with ingot")

    def read(self, offset: int, count: int, what: str) -> bytes:
        """Exactly `count` bytes at `offset`; a LoadError where the file does not hold them."""
        if offset + count > self.size:
            self.damaged(f"truncated, its {what} would end at byte {offset + count} of {self.size}")
        try:
            data = os.pread(self.fd, count, offset)
        except OSError as error:
            self.refuse("cannot read the artifact", str(error))
        if len(data) != count:
            self.damaged(f"truncated inside its {what}")
        return data

    def parse(self) -> None:
        """Read and check the ELF headers, and find the metadata. Only a file that dlopen can map passes."""
        head = self.read(0, min(64, self.size), "ELF header")
        if head[:4] != b"\x7fELF":
            self.refuse("this is not a shared library", _short(head[:8]), "an ELF file made by ingot")
        if len(head) < 64 or head[4] not in (1, 2) or head[5:7] != b"\1\1":
            self.damaged("its ELF header is truncated, or of an unknown class or byte order")
        wide = head[4] == 2
        fields = struct.unpack_from("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH", head, 16)
        kind, machine, _, _, phoff, shoff, flags, _, phsize, phnum, shsize, shnum, shstrndx = fields
        if (machine, head[4]) not in _MACHINES:
            self.refuse("unknown machine type", f"ELF machine {machine}", "x86_64, aarch64, arm, riscv64")
        self.arch = _MACHINES[machine, head[4]]
        self.float_abi = flags & _FLOAT_ABI.get(self.arch, 0)
        if kind != 3:
            self.refuse("this ELF file is not a shared library", f"ELF type {kind}", "3 (ET_DYN)")
        if (phsize, shsize) != ((56, 64) if wide else (32, 40)) or phnum > 256 or not shstrndx < shnum <= 4096:
            self.damaged("impossible header sizes")
        table = self.read(phoff, phnum * phsize, "program headers")
        order = (0, 1, 2, 3, 5, 6, 7) if wide else (0, 6, 1, 2, 4, 5, 7)  # type flags offset vaddr filesz memsz align
        rows = struct.iter_unpack("<IIQQQQQQ" if wide else "<IIIIIIII", table)
        segments = [tuple(row[i] for i in order) for row in rows]
        table = self.read(shoff, shnum * shsize, "section headers")
        # name type flags addr offset size
        sections = [row[:6] for row in struct.iter_unpack("<IIQQQQIIQQ" if wide else "<IIIIIIIIII", table)]
        self._check_layout(segments, sections)
        names = self.read(sections[shstrndx][4], sections[shstrndx][5], "section names")
        self.note = self._find_note(sections)
        start = names.find(b"\0.ingot.weights\0") + 1
        self.weights = [s[4:6] for s in sections if start and s[0] == start]

    def _check_layout(self, segments: list[Any], sections: list[Any]) -> None:
        """Sections and segments tell the same story twice: a flipped bit in either shows as a contradiction."""
        loads = [s for s in segments if s[0] == _LOAD]
        end = 0
        for _, _, offset, vaddr, filesz, memsz, align in loads:
            if offset + filesz > self.size:
                self.damaged(f"truncated, a segment would end at byte {offset + filesz} of {self.size}")
            aligned = align >= 4096 and align & (align - 1) == 0 and (vaddr - offset) % align == 0
            if not aligned or vaddr < end or not filesz <= memsz <= filesz + (1 << 30) or memsz >= 1 << 46:
                self.damaged("impossible segment")
            end = vaddr + memsz

        def inside(offset: int, addr: int, filesz: int, memsz: int, rights: int = 0) -> None:
            """The range lies in one loaded segment with these rights, at the same distance in file and memory."""
            for _, flags, start, base, in_file, in_memory, _ in loads:
                fits = base <= addr and addr + memsz <= base + in_memory and not rights & ~flags
                if filesz:
                    fits = fits and addr - base == offset - start and addr + filesz <= base + in_file
                if fits and (filesz or addr >= base + in_file):
                    return
            self.damaged("a section or table lies outside the loaded segments, or has other rights")

        for kind, _, offset, vaddr, filesz, memsz, _ in segments:
            if kind in _INSIDE and filesz:
                inside(offset, vaddr, filesz, filesz if kind == _TLS else memsz)
            elif kind not in (_LOAD, *_INSIDE, *_NULL_STACK):
                self.damaged(f"unknown segment type {kind:#x}")
        for _, kind, flags, addr, offset, size in sections:
            filesz = 0 if kind == _SHT_NOBITS else size
            if kind and offset + filesz > self.size:
                self.damaged(f"truncated, a section would end at byte {offset + size} of {self.size}")
            if flags & 2 and size and (filesz or not flags & 0x400):  # allocated, and no thread-local zeros
                inside(offset, addr, filesz, size, 4 | (flags & 1) << 1 | flags >> 2 & 1)  # read, write, execute
        dynamic = [s[2:6] for s in segments if s[0] == _DYNAMIC]
        if (
            not loads
            or len(dynamic) != 1
            or dynamic != [(s[4], s[3], s[5], s[5]) for s in sections if s[1] == _SHT_DYNAMIC]
        ):
            self.damaged("its dynamic table is missing or contradictory")
        self.align = min(s[6] for s in loads)

    def _find_note(self, sections: list[Any]) -> bytes:
        """The JSON bytes of the one note of owner "ingot", type 1."""
        notes = []
        for _, kind, _, _, offset, size in sections:
            if kind == _SHT_NOTE and size >= 20:
                name_bytes, count, number, owner = struct.unpack("<III6s", self.read(offset, 18, "note"))
                if (name_bytes, number, owner) == (6, 1, b"ingot\0"):
                    if count > size - 20 or size > MAX_NOTE_BYTES:
                        self.damaged("impossible metadata note")
                    notes.append(self.read(offset + 20, count, "metadata note"))
        if len(notes) != 1:
            hint = "make an artifact with: ingot compile MODEL --target NAME -o model.so"
            self.refuse(
                "this library is not a model compiled by ingot", f"{len(notes)} .note.ingot sections", "1", hint
            )
        return notes[0]


# ------------------------------------------------------------------------------------------------------ the metadata


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_word(value: object) -> bool:
    return type(value) is str and len(value) <= 200


def _is_size(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return type(value) is int and 0 <= value < 1 << 63


def _is_maybe_size(value: Any) -> bool:  # noqa: ANN401
    return value is None or _is_size(value)


def _is_zero_point(value: Any) -> bool:  # noqa: ANN401
    return type(value) is int and abs(value) < 1 << 31


def _is_scale(value: Any) -> bool:  # noqa: ANN401
    return type(value) in (int, float) and abs(value) < 3.5e38


def _is_numbers(value: Any) -> bool:  # noqa: ANN401
    return value is None or (type(value) is list and all(type(n) in (bool, int, float) for n in value))


_KIND = {"dtype": lambda value: value in _DTYPES, "shape": [_is_size]}
_SWITCHES: dict[str, Any] = {"in_source": lambda value: type(value) is bool}
_PLACES = dict.fromkeys(("input_position", "output_position"), _is_size)
_TENSOR = {
    "name": _is_text,
    **_KIND,
    "quantization": lambda value: value is None or type(value) is dict,
}
_QUANTIZATION = {"scales": [_is_scale], "zero_points": [_is_zero_point], "axis": _is_size}
_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("name", "compiler", "precision", "weights_sha256"), _is_word),
    **dict.fromkeys(
        ("arena_bytes", "state_bytes", "memory_bytes", "weights_bytes", "kernels", "steps", "macs", "integer_macs"),
        _is_size,
    ),
    "selftest": lambda value: type(value) is bool,
    "target": {
        **dict.fromkeys(("name", "arch", "triple", "cpu", "libc", "libc_version"), _is_word),
        "features": [_is_word],
    },
    "source": {"format": _is_word, "sha256": _is_word, "peak_bytes": _is_size},
    "inputs": [_TENSOR],
    "outputs": [{**_TENSOR, "counted": _is_maybe_size}],
    "shapes": [{"inputs": [[_is_size]], "outputs": [[_is_size]]}],
    "bound": [{"name": _is_text, **_KIND, "sha256": _is_text, "position": _is_size, "values": _is_numbers}],
    "states": [{**_KIND, **_PLACES, "input": _is_text, "output": _is_text, "initial": _is_maybe_size, **_SWITCHES}],
    **dict.fromkeys(("cut", "batch"), lambda value: value is None or type(value) is dict),
}
_FAILED = {"failed": [{"node": _is_text, "reason": _is_text}]}
_MAYBE: dict[str, Any] = {
    "cut": {"nodes": _is_size, "left_out": _is_size, "outputs": [_is_text], "opened": [_is_text], **_FAILED},
    "batch": {"smallest": _is_size, "largest": _is_size, "programs": [_is_size]},
}


def _conform(value: Any, schema: Any, key: str) -> None:  # noqa: ANN401
    """Raise ValueError unless `value` has the form of `schema`; keys beyond the schema are allowed."""
    if isinstance(schema, dict):
        for name, inner in schema.items():
            if type(value) is not dict or name not in value:
                raise ValueError(f"{key}.{name} is missing")
            _conform(value[name], inner, f"{key}.{name}")
    elif isinstance(schema, list):
        if type(value) is not list or len(value) > 1 << 16:
            raise ValueError(f"{key} is not a list, or too long")
        for item in value:
            _conform(item, schema[0], f"{key}[]")
    elif not schema(value):
        raise ValueError(f"{key} cannot be {_short(value)}")


def _conform_tensors(tensors: list[Any], side: str) -> None:
    for tensor in tensors:
        shape, bound = tensor["shape"], 16
        for n in shape:
            bound *= n
        if len(shape) > MAX_NDIM or bound >= 1 << 63:
            raise ValueError(f"{side}.shape cannot be {_short(shape)}")
        if (tensor.get("counted") or 0) >= max(len(shape), 1):
            raise ValueError(f"{side}.counted does not fit the shape")
        q = tensor["quantization"]
        if q is not None:
            _conform(q, _QUANTIZATION, f"{side}.quantization")
            count = len(q["scales"])
            channels = shape[q["axis"]] if q["axis"] < len(shape) else 1
            if count != len(q["zero_points"]) or count not in (1, channels):
                raise ValueError(f"{side}.quantization does not fit the shape")
    if len({t["name"] for t in tensors}) != len(tensors):
        raise ValueError(f"two {side} have the same name")


def _reshaped(tensors: list[Any], shapes: list[Any]) -> list[Any]:
    return [{**tensor, "shape": shape} for tensor, shape in zip(tensors, shapes)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number is too large")
    return int(text)


def _metadata(file: _File) -> dict[str, Any]:
    """The note's JSON with every field type-checked."""
    import json

    try:
        # NaN and Infinity are not JSON, and int("NaN") raises ValueError.
        meta = json.loads(file.note.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_integer)
        _conform(meta, {"format": _is_size, "abi": _is_size}, "metadata")
        if meta["format"] != FORMAT:
            hint = "use the loader of the ingot version that compiled it, or compile it again"
            file.refuse(f"the artifact has format {meta['format']}; this loader reads format {FORMAT}", hint=hint)
        _conform(meta, _SCHEMA, "metadata")
        for key in _MAYBE:
            if meta[key] is not None:
                _conform(meta[key], _MAYBE[key], key)
        _conform_tensors(meta["inputs"], "inputs")
        _conform_tensors(meta["outputs"], "outputs")
        for bucket in meta["shapes"]:
            for side in ("inputs", "outputs"):
                ranks = [len(shape) for shape in bucket[side]]
                if ranks != [len(t["shape"]) for t in meta[side]]:
                    raise ValueError(f"a bucket's {side} are not those of the model")
                _conform_tensors(_reshaped(meta[side], bucket[side]), side)
        name, arch = meta["name"], meta["target"]["arch"]
        if not (name.isascii() and name.isidentifier() and name == name.lower()):
            raise ValueError(f"{_short(name)} is not a model name")
        if arch != file.arch:
            raise ValueError(f"it says {_short(arch)}, the code is {file.arch}")
    except (ValueError, RecursionError) as error:
        file.damaged(f"its metadata is not valid ({error})")
    return dict(meta)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of an artifact for any machine, read as data: nothing of the file is mapped or executed.

    Raises LoadError where the file is missing, truncated, damaged, not ours or of another format.
    """
    with _File(path) as file:
        file.parse()
        return _metadata(file)


# ------------------------------------------------------------------------------------------------------ this machine

# Canonical feature (LLVM's name) = flags in /proc/cpuinfo ('+' and, '|' or), where the two differ.
_FLAGS: dict[str, Any] = {
    "x86_64": "sse3=pni ssse3 sse4.1=sse4_1 sse4.2=sse4_2 popcnt cx16 avx avx2 fma f16c bmi=bmi1 bmi2 lzcnt=abm movbe "
    "avx512f avx512bw avx512cd avx512dq avx512vl avx512vnni=avx512_vnni avxvnni=avx_vnni avx512bf16=avx512_bf16 "
    "avx512fp16=avx512_fp16 amx-tile=amx_tile amx-int8=amx_int8 amx-bf16=amx_bf16",
    "aarch64": "neon=asimd crc=crc32 aes=aes+pmull sha2=sha1+sha2 lse=atomics rdm=asimdrdm fullfp16=fphp+asimdhp "
    "dotprod=asimddp i8mm bf16 sve sve2 rcpc=lrcpc fp16fml=asimdfhm",
    # A 64-bit kernel shows a 32-bit program its own flags, and asimd there means all of these; VFPv3 came with ARMv7.
    "arm": "neon=neon|asimd vfp4=vfpv4|asimd vfp3=vfpv3|vfpv3d16|vfpv4|asimd thumb2=vfpv3|vfpv3d16|vfpv4|neon|asimd "
    "hwdiv=idiva+idivt|asimd",
    "riscv64": "m a f d c v zba zbb zbs zfh",
}
_ARMV8 = {"lse": 1, "rdm": 1, "fullfp16": 2, "dotprod": 2, "sve": 2, "fp16fml": 2, "rcpc": 2, "i8mm": 6, "bf16": 6}


def _process_machine() -> tuple[str, int]:
    """Architecture and float ABI bits of this very process: a 32-bit Python on a 64-bit kernel is a 32-bit machine."""
    try:
        with open("/proc/self/exe", "rb") as exe:
            head = exe.read(64)
        arch = _MACHINES.get((head[18] | head[19] << 8, head[4]), "another machine")
        return arch, struct.unpack_from("<I", head, 48 if head[4] == 2 else 36)[0] & _FLOAT_ABI.get(arch, 0)
    except (OSError, IndexError, struct.error):
        name, narrow = os.uname().machine, struct.calcsize("P") == 4
        return ("arm" if name[:3] in ("arm", "aar") else "i386") if narrow else name.replace("arm64", "aarch64"), 0


def _cpu_flags(arch: str) -> set[str]:
    """The flags /proc/cpuinfo gives for the first CPU (the kernel shows what all cores share); empty if unknown."""
    wanted = {"x86_64": "flags", "riscv64": "isa"}.get(arch, "Features")
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as cpuinfo:
            value = next(line.partition(":")[2].lower() for line in cpuinfo if line.split(":")[0].strip() == wanted)
    except (OSError, StopIteration):
        return set()
    if arch != "riscv64" or not value.strip():
        return set(value.split())
    letters, *extensions = value.strip().split("_")  # rv64imafdc_zba_zbb; kernels before 6.4 do not tell of z...
    extensions = extensions if any(e[:1] == "z" for e in extensions) else ["zba", "zbb", "zbs", "zfh"]
    return {*extensions, *letters[4:].replace("g", "imafd")}


def _check_machine(file: _File, meta: dict[str, Any]) -> str:
    (arch, float_abi), page = _process_machine(), os.sysconf("SC_PAGE_SIZE")
    if file.arch != arch:
        kernel = os.uname().machine
        this = f"this machine is {arch}" if arch == kernel else f"this Python is a {arch} program on a {kernel} kernel"
        file.refuse(f"built for {file.arch} ({meta['target']['name']}); {this}", file.arch, arch, _RECOMPILE)
    if file.float_abi and float_abi and file.float_abi != float_abi:
        file.refuse(f"built for {meta['target']['triple']}; this system has another float ABI", hint=_RECOMPILE)
    if file.align < page:
        file.refuse(f"built for memory pages of {file.align} bytes; this kernel has pages of {page}", hint=_RECOMPILE)
    return arch


def _check_abi(file: _File, meta: dict[str, Any]) -> str:
    if meta["abi"] != ABI_VERSION:
        hint = "use the loader of the ingot version that compiled it, or compile it again"
        file.refuse(f"the artifact has ABI {meta['abi']}; this loader speaks ABI {ABI_VERSION}", hint=hint)
    return f"format {meta['format']}, ABI {meta['abi']}"


def _check_cpu(file: _File, meta: dict[str, Any]) -> str:
    target, have = meta["target"], _cpu_flags(file.arch)
    needed: list[str] = target["features"]
    if file.arch != _process_machine()[0]:
        file.refuse(f"built for {file.arch}, another architecture than this one")
    table = dict((item + "=" + item).split("=")[:2] for item in _FLAGS[file.arch].split())
    # An unreadable cpuinfo says nothing; `create` asks the CPU itself in any case.
    known = {
        f for f, flags in table.items() if not have or any(have.issuperset(o.split("+")) for o in flags.split("|"))
    }
    lacking = [f for f in needed if f not in known]
    if lacking:
        missing = " ".join(lacking[:10])
        level = f"armv8.{max(_ARMV8.get(f, 0) for f in needed)}" if file.arch == "aarch64" else file.arch
        file.refuse(f"built for {level} {missing} ({target['name']}); this CPU has no {missing}", hint=_RECOMPILE)
    return " ".join(needed) or "no special features needed"


def _check_libc(file: _File, meta: dict[str, Any]) -> str:
    try:
        here = os.confstr("CS_GNU_LIBC_VERSION") or "musl"  # "glibc 2.36"
    except (ValueError, OSError):
        here = "musl"
    libc, version = meta["target"]["libc"], meta["target"]["libc_version"]
    want = f"{'glibc' if libc == 'gnu' else libc} {version}".strip()
    wanted, mine = ([int(n) for n in v.split(".") if n.isdecimal() and len(n) < 9] for v in (version, here[6:]))
    if libc != ("musl" if here == "musl" else "gnu") or (libc == "gnu" and wanted > mine):
        file.refuse(f"built for {want} or later; this system has {here}", hint=_RECOMPILE)
    return f"{want} or later needed, {here} here"


def _check_memory(file: _File, meta: dict[str, Any]) -> str:
    need, free = (meta["memory_bytes"] + meta["weights_bytes"]) / 2**20, float("inf")
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            free = next(int(line.split()[1]) / 1024 for line in meminfo if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    if need > free:
        file.refuse(f"{need:.1f} MiB of memory needed, {free:.1f} MiB available")
    return f"{need:.1f} MiB needed, {free:.1f} MiB available"


_CHECKS = (("machine", _check_machine), ("ABI", _check_abi), ("CPU", _check_cpu), ("libc", _check_libc))


def check(path: Path) -> list[tuple[str, bool, str]]:
    """Will this artifact run on this machine? Rows of (what, ok, detail); nothing is loaded.

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


def _fields(text: str) -> list[tuple[str, Any]]:
    kinds = {
        "P": ctypes.c_void_p,
        "z": ctypes.c_char_p,
        "i": ctypes.c_int32,
        "I": ctypes.c_uint32,
        "Q": ctypes.c_uint64,
    }
    return [(name, kinds[kind]) for name, kind in (item.split(":") for item in text.split())]


class _Tensor(ctypes.Structure):
    _fields_ = _fields("data:P bytes:Q dtype:i ndim:i shape:P device:i reserved:i")


class _TensorInfo(ctypes.Structure):
    _fields_ = _fields("name:z dtype:i ndim:i shape:P bytes:Q quant_count:i quant_axis:i scales:P zero_points:P")


class _Info(ctypes.Structure):
    _fields_ = _fields(
        "struct_size:I abi_version:I name:z compiler:z target:z triple:z features:z source_sha256:z precision:z "
        "n_inputs:i n_outputs:i inputs:P outputs:P arena_bytes:Q memory_bytes:Q weights_bytes:Q"
    )


class _Options(ctypes.Structure):
    _fields_ = _fields("struct_size:I threads:i memory:P memory_bytes:Q error:P error_bytes:Q")


def _function(result: Any, *arguments: Any) -> Any:  # noqa: ANN401
    return ctypes.CFUNCTYPE(result, *arguments)  # such calls release the GIL


_HANDLE, _STATUS, _I32, _NO_BYTES = ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.c_char * 0
_INPUT_ERRORS = (*range(1, 8), 16)  # INGOT_ERR_NULL to INGOT_ERR_DEVICE, INGOT_ERR_OVERLAP


class _Api(ctypes.Structure):
    _fields_ = [
        *_fields("abi_version:I struct_size:I"),
        ("create", _function(_STATUS, ctypes.POINTER(_Options), ctypes.POINTER(_HANDLE))),
        ("run", _function(_STATUS, _HANDLE, ctypes.c_void_p, _I32, ctypes.c_void_p, _I32)),
        ("destroy", _function(_STATUS, _HANDLE)),
        ("describe", _function(_STATUS, ctypes.POINTER(ctypes.POINTER(_Info)))),
        ("last_error", _function(ctypes.c_char_p, _HANDLE)),
        ("version", _function(ctypes.c_char_p)),
        ("selftest", _function(_STATUS, _HANDLE, ctypes.POINTER(ctypes.c_double))),
        ("reset", _function(_STATUS, _HANDLE)),
        ("output_shape", _function(_STATUS, _HANDLE, _I32, ctypes.POINTER(ctypes.c_int64))),
    ]


# ---------------------------------------------------------------------------------------------------------- loading

# (device, inode) -> loaded file. glibc finds a library again by its name, and the name is the descriptor's number: so
# a descriptor that gave its name to a library stays open for good (a library is never unmapped anyway).
_LOADED: dict[tuple[int, int], tuple[_File, ctypes.CDLL]] = {}
_LOAD_LOCK = allocate_lock()


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _dlopen(file: _File) -> ctypes.CDLL:
    """Load the very file that was checked and keep its descriptor. The caller holds _LOAD_LOCK."""
    key = file.stat.st_dev, file.stat.st_ino
    if key in _LOADED:
        first, library = _LOADED[key]
        if _identity(first.stat) != _identity(file.stat):
            hint = "rename a new file over the old one instead of writing into it, and start this process again"
            file.refuse("the artifact was changed in place after this process loaded it", hint=hint)
        return library
    # A program that closes descriptors it does not know lets numbers come back: never use one as a name twice.
    old = {other.fd for other, _ in _LOADED.values()}
    while file.fd in old:
        file.fd = os.dup(file.fd)
    name = f"/proc/self/fd/{file.fd}"
    try:
        now = os.fstat(file.fd)
        if not os.path.exists(name):  # no /proc: the path must still mean the file that was checked
            name = os.path.abspath(file.path)
            now = os.stat(name)
            if any(os.path.abspath(other.path) == name for other, _ in _LOADED.values()):
                raise OSError("another file was loaded from this path, and without /proc that one would be found again")
        if _identity(now) != _identity(file.stat):
            raise OSError("it changed while it was being checked")
        library = ctypes.CDLL(name)
    except OSError as error:
        text = str(error).replace(name, file.path)
        noexec = "is it on a file system mounted noexec?" if "not permitted" in text else None
        file.refuse("the artifact cannot be loaded", text, hint=noexec)
    kept = _File.__new__(_File)
    kept.fd, kept.stat, kept.path, file.fd = file.fd, file.stat, file.path, -1
    _LOADED[key] = kept, library
    return library


def load(path: Path, threads: int | None = None, verify: bool | str | None = None) -> Model:
    """Load a compiled model and make an instance of it.

    `threads`: 1 to 64, 1 starts none; None takes what the CPU affinity and the cgroup allow, of unlike cores the fast.
    `verify`: True checks the weights against the hash in the metadata, a SHA-256 in hex checks the whole file. Either
    loads a sealed copy in memory, which nobody can change between check and use; it stays until the process ends.
    Raises LoadError where the file is not an ingot artifact, or not one for this machine.
    """
    if threads is not None and (type(threads) is not int or not 0 <= threads <= MAX_THREADS):
        raise InputError("threads is out of range", None, _short(threads), f"None, or 1 to {MAX_THREADS}")
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

    copy = -1
    try:
        copy = os.memfd_create("ingot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        while os.sendfile(copy, file.fd, None, 1 << 30):
            pass
        fcntl.fcntl(copy, 1033, 1 | 2 | 4 | 8)  # F_ADD_SEALS, which Python 3.8 does not name: seal shrink grow write
        file.fd, copy = copy, file.fd
        file.stat = os.fstat(file.fd)
    except (OSError, AttributeError) as error:
        file.refuse("verify needs a sealed file in memory, which this system does not give", str(error))
    finally:
        if copy >= 0:
            os.close(copy)
    file.size = file.stat.st_size


def _verify(file: _File, meta: dict[str, Any], verify: bool | str) -> None:
    import hashlib

    what, expected, ranges = "file", str(verify).strip().lower(), [(0, file.size)]
    if not isinstance(verify, str):
        what, expected, ranges = "weights", meta["weights_sha256"], file.weights
    digest = hashlib.sha256()
    for start, size in ranges:
        for offset in range(start, start + size, 1 << 20):
            digest.update(file.read(offset, min(1 << 20, start + size - offset), what))
    if digest.hexdigest() != expected:
        file.refuse(f"the SHA-256 of the {what} is not the expected one", digest.hexdigest(), _short(expected))


# -------------------------------------------------------------------------------------------------------- the model


class TensorSpec:
    """What an input or output looks like.

    `dtype` is the NumPy dtype of the arrays; NumPy has no bfloat16, so such a tensor is uint16 there (its raw bits)
    and `type` says "bfloat16". `quantization` is None or {"scales", "zero_points", "axis"}:
    real = scale * (q - zero_point), one scale for all or one per index of `axis`.
    """

    __slots__ = ("_code", "_dims", "dtype", "name", "nbytes", "quantization", "shape", "type")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.name: str = fields["name"]
        self.type: str = fields["dtype"]
        self.dtype = np.dtype("uint16" if self.type == "bfloat16" else self.type)
        self.shape: tuple[int, ...] = tuple(fields["shape"])
        self.quantization: dict[str, Any] | None = fields["quantization"]
        self.nbytes = self.dtype.itemsize
        for n in self.shape:
            self.nbytes *= n
        self._code = _DTYPES.index(self.type)
        self._dims = (ctypes.c_int64 * len(self.shape))(*self.shape)

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}{list(self.shape)}"

    def _tensor(self) -> _Tensor:
        dims = ctypes.addressof(self._dims)
        return _Tensor(None, self.nbytes, self._code, len(self.shape), dims, 0, 0)


class _Fresh:
    """New arrays for one output, aligned to 64 bytes; of small ones a block of several is made at once."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec, self._stride = spec, max(64, (spec.nbytes + 63) // 64 * 64)
        self._ready: list[tuple[Array, int]] = []

    def take(self) -> tuple[Array, int]:
        """An array and its address."""
        try:
            return self._ready.pop()
        except IndexError:
            spec, stride = self._spec, self._stride
            count = max(1, min(16, 16384 // stride))
            memory = np.empty(count * stride + 63, np.uint8)
            start = _address(memory)
            places = range(-start % 64, count * stride, stride)
            made = [(np.ndarray(spec.shape, spec.dtype, memory, place), start + place) for place in places]
            self._ready = made[1:]  # calls of other threads may have made some too
            return made[0]


class _Shapes:
    """Inputs and outputs in one set of shapes, and the arrays of `ingot_tensor` that a call fills in."""

    def __init__(self, inputs: Any, outputs: Any) -> None:  # noqa: ANN401 - iterables of TensorSpec
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.shapes = tuple(s.shape for s in self.inputs)
        self.given = (_Tensor * len(self.inputs))(*(s._tensor() for s in self.inputs))
        self.results = (_Tensor * len(self.outputs))(*(s._tensor() for s in self.outputs))
        # Elements of a ctypes array are views, made at each access, and arguments are converted at each call: made once
        # here, a call is cheaper.
        self.slots = [*self.given, *self.results]
        first, second = (ctypes.c_void_p(ctypes.addressof(side)) for side in (self.given, self.results))
        self.fresh = [_Fresh(spec) for spec in self.outputs]
        self.arguments = first, _I32(len(self.inputs)), second, _I32(len(self.outputs))


class Model:
    """An instance of a compiled model; `load` makes it.

    Calls from several threads are safe and take turns; for calls side by side load one Model per thread (they share
    the weights). A Model works after a fork. It cannot be pickled.

    Arrays must have exactly the dtype and shape of the model: nothing is cast or reshaped. What is not an array (a
    list, a torch tensor) goes through `np.asarray` and must then fit as exactly. Arrays that are not contiguous or
    not aligned are copied. bfloat16 goes in as uint16 (raw bits) or ml_dtypes.bfloat16, and comes out as uint16.
    Results are new arrays, aligned to 64 bytes, which no later call overwrites; small ones may share a block of 16 KiB.
    Where the metadata names a `counted` axis, the output's shape is the largest one, and results are cut to the size
    they have. A model compiled for several shapes shows the largest one in `inputs` and `outputs`, and takes all that
    its metadata lists.
    """

    def __init__(self, library: ctypes.CDLL, metadata: dict[str, Any], path: str, threads: int) -> None:
        self._handle: Any = None
        self._lock = allocate_lock()
        self._where = f"model {metadata['name']} ({path})"
        self.metadata = metadata
        self.inputs = tuple(TensorSpec(t) for t in metadata["inputs"])
        self.outputs = tuple(TensorSpec(t) for t in metadata["outputs"])
        counted = [(i, t["counted"]) for i, t in enumerate(metadata["outputs"])]
        self._counted = [(i, axis) for i, axis in counted if axis is not None]
        self._api = self._bind(library)
        self._main = _Shapes(self.inputs, self.outputs)
        others = [
            _Shapes(*(map(TensorSpec, _reshaped(metadata[side], bucket[side])) for side in ("inputs", "outputs")))
            for bucket in metadata["shapes"]
        ]
        self._sets = {s.shapes: s for s in (*others, self._main)}
        handle, text = _HANDLE(), ctypes.create_string_buffer(512)
        options = _Options(ctypes.sizeof(_Options), threads, None, 0, ctypes.addressof(text), len(text))
        status = self._api.create(ctypes.byref(options), ctypes.byref(handle))
        if status or not handle:
            raise LoadError("the model cannot be created", self._where, _text(text.value) or f"status {status}")
        self._handle = handle
        _MODELS.add(self)

    def _bind(self, library: ctypes.CDLL) -> Any:  # noqa: ANN401 - mypy knows no fields of a ctypes structure
        """The artifact's table of functions, once it agrees with the metadata that was checked."""
        symbol = f"ingot_{self.metadata['name']}_api"
        try:
            getter = library[symbol]
        except AttributeError:
            raise LoadError(f"the artifact does not export {symbol}", self._where) from None
        getter.restype = ctypes.POINTER(_Api)
        api, info = getter().contents, ctypes.POINTER(_Info)()
        if api.abi_version != ABI_VERSION or api.struct_size < ctypes.sizeof(_Api):
            raise LoadError("the artifact's code has another ABI than its metadata says", self._where)
        agree = not api.describe(ctypes.byref(info)) and info.contents.memory_bytes == self.metadata["memory_bytes"]
        for specs, side in ((self.inputs, "inputs"), (self.outputs, "outputs")):
            agree = agree and getattr(info.contents, "n_" + side) == len(specs)
            rows = (_TensorInfo * len(specs)).from_address(getattr(info.contents, side) or 0) if agree and specs else ()
            agree = agree and all((t.bytes, t.dtype) == (s.nbytes, s._code) for t, s in zip(rows, specs))
        if not agree:
            raise LoadError("the artifact's code and its metadata do not belong together", self._where)
        return api

    def __call__(self, /, *arrays: Any, **by_name: Any) -> Any:  # noqa: ANN401 - one array, or a tuple of them
        """Run on arrays in the model's order, by name, or both; one array, or a tuple in the model's order.

        Raises InputError for a missing, extra or unfitting input, RunError where the model fails.
        """
        if by_name or len(arrays) != len(self.inputs):
            names = [s.name for s in self.inputs]
            if len(arrays) > len(names):
                self._refuse("too many inputs", str(len(arrays)), f"{len(names)}: {', '.join(names)}")
            given = dict(zip(names, arrays))
            for name in by_name:
                if name in given:
                    self._refuse(f"input {name!r} is given twice, by position and by name")
            arrays = self._in_order({**given, **by_name}, self.inputs, "input")
        results = self._execute(arrays, None)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on {name: array}; gives {name: array} of all outputs.

        `outputs`: arrays of the caller's to write into, of exactly the dtype and shape, C-contiguous, writeable,
        sharing no memory with each other or an input. Outputs not named there are allocated.
        Raises InputError for a missing, extra or unfitting array, RunError where the model fails.
        """
        arrays = self._in_order(inputs, self.inputs, "input")
        targets = None if outputs is None else self._in_order(outputs, self.outputs, "output")
        return dict(zip((s.name for s in self.outputs), self._execute(arrays, targets)))

    def selftest(self) -> float:
        """Run the stored input and compare with the stored outputs of an independent interpreter.

        Returns max|error| / max|expected|; raises RunError where that is too large, or no selftest is stored. Resets
        the state before and after.
        """
        error = ctypes.c_double(float("nan"))
        with self._lock:
            status = self._api.selftest(self._open(), ctypes.byref(error))
            text = _text(self._api.last_error(self._handle)) if status else ""
        if status and not self.metadata["selftest"]:
            raise RunError("the artifact holds no selftest", self._where, hint="compile without --no-selftest")
        if status:
            raise RunError("the selftest failed", self._where, text or f"status {status}")
        return error.value

    def reset(self) -> None:
        """Put what runs leave to the next one (`metadata["states"]`) back to its first value."""
        with self._lock:
            self._api.reset(self._open())

    def close(self) -> None:
        """Free the instance's memory and threads; a second close does nothing. The file stays mapped."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle:
                self._api.destroy(handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):  # half made, or closed: nothing to free
            self.close()

    def __repr__(self) -> str:
        state = "" if self._handle else " (closed)"
        return f"<ingot model {self.metadata['name']}{state}: {list(self.inputs)} -> {list(self.outputs)}>"

    def __reduce__(self) -> NoReturn:
        hint = "send the file's path, and load it in the other process"
        raise RunError("a loaded model cannot be pickled or copied", self._where, hint=hint)

    def _open(self) -> Any:  # noqa: ANN401
        if not self._handle:
            raise RunError("the model is closed", self._where)
        return self._handle

    def _refuse(self, what: str, found: Maybe = None, allowed: Maybe = None, hint: Maybe = None) -> NoReturn:
        raise InputError(what, self._where, found, allowed, hint)

    def _in_order(self, given: Any, specs: Sequence[TensorSpec], side: str) -> Any:  # noqa: ANN401
        """The values of a mapping in the model's order; an output may be left out, which gives None."""
        names = [s.name for s in specs]
        if not hasattr(given, "keys"):
            self._refuse(f"the {side}s are not a dict", type(given).__name__, f"a dict with {', '.join(names)}")
        for name in given.keys():  # noqa: SIM118 - any mapping will do, an npz file too
            if name not in names:
                import difflib

                folded = {n.lower(): n for n in names}
                near = difflib.get_close_matches(str(name).lower(), folded, 1, 0.5)
                hint = f"did you mean {folded[near[0]]!r}?" if near else None
                self._refuse(f"the model has no {side} {name!r}", allowed=", ".join(names), hint=hint)
        missing = [repr(s) for s in specs if s.name not in given]
        if missing and side == "input":
            self._refuse("an input is missing", ", ".join(map(str, given)) or "none", f"also {', '.join(missing)}")
        return [given[n] if n in given else None for n in names]  # noqa: SIM401 - an npz file's get is not old

    def _fit(self, spec: TensorSpec, value: Any, side: str) -> Any:  # noqa: ANN401
        """`value` as an array of exactly the model's dtype and shape; InputError where it is not one."""
        array, name = value, f"{side} {spec.name!r}"
        if not isinstance(value, np.ndarray):
            if side == "output":
                self._refuse(f"{name} is not an array", type(value).__name__, f"a NumPy array, {spec!r}")
            try:
                array = np.asarray(value)
            except Exception as error:  # objects with __array__ raise what they like
                self._refuse(f"{name} is not an array", str(error).split("\n")[0], f"a NumPy array, {spec!r}")
        if spec.type == "bfloat16" and array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        if array.dtype != spec.dtype:
            hint = f"x.astype(np.{spec.type})" if array is value else f"np.asarray(x, np.{spec.type})"
            if spec.type == "bfloat16":
                hint = "x.astype(ml_dtypes.bfloat16), or the raw bits as np.uint16"
            if isinstance(value, dict):
                hint = "model.run(x) takes a dict"
            self._refuse(f"{name} has the wrong dtype", str(array.dtype), spec.type, hint)
        if array.shape != spec.shape:
            self._refuse(f"{name} has the wrong shape", str(array.shape), str(spec.shape), _advice(array, spec))
        if side == "output" and not array.flags.carray:
            self._refuse(f"{name} is not C-contiguous, aligned and writeable", f"strides {array.strides}")
        return array

    def _execute(self, values: Sequence[Any], targets: Sequence[Any] | None) -> list[Array]:
        arrays, addresses, shapes = [], [], self._main
        if len(self._sets) > 1:
            try:
                found = tuple(tuple(np.shape(value)) for value in values)
            except Exception as error:  # rows of different lengths, or what objects with a shape of their own raise
                self._refuse("an input is not an array", str(error).split("\n")[0])
            if found not in self._sets:
                texts = [", ".join(f"{s.name} {list(s.shape)}" for s in one.inputs) for one in self._sets.values()]
                few = texts if len(texts) <= 16 else [texts[0], f"... {len(texts) - 2} more ...", texts[-1]]
                what = "the inputs have none of the compiled shapes"
                self._refuse(what, ", ".join(map(str, found)), "; ".join(few))
            shapes = self._sets[found]
        for spec, value in zip(shapes.inputs, values):
            if not (type(value) is np.ndarray and value.dtype == spec.dtype and value.shape == spec.shape):
                value = self._fit(spec, value, "input")
            flags = value.flags
            arrays.append(value if flags.c_contiguous and flags.aligned else value.copy(order="C"))
            addresses.append(_address(arrays[-1]))
        for i, spec in enumerate(shapes.outputs):
            if targets is not None and targets[i] is not None:
                arrays.append(self._fit(spec, targets[i], "output"))
                addresses.append(_address(arrays[-1]))
            else:
                array, address = shapes.fresh[i].take()
                arrays.append(array)
                addresses.append(address)
        with self._lock:
            handle = self._open()
            for slot, address in zip(shapes.slots, addresses):
                slot.data = address
            status = self._api.run(handle, *shapes.arguments)
            for i, axis in [] if status else self._counted:
                dims = (ctypes.c_int64 * MAX_NDIM)()
                self._api.output_shape(handle, i, dims)
                place = len(self.inputs) + i
                arrays[place] = arrays[place][(slice(None),) * axis + (slice(dims[axis]),)]
            text = _text(self._api.last_error(handle)) if status else ""
        if status:
            kind = InputError if status in _INPUT_ERRORS else RunError
            raise kind("the model refused to run", self._where, text or f"status {status}")
        return arrays[len(self.inputs) :]


def _address(array: Any) -> int:  # noqa: ANN401 - mypy sees no buffer in an array
    """Where the data of a contiguous array lie; __array_interface__ takes thrice the time to say so."""
    if array.flags.writeable:
        return ctypes.addressof(_NO_BYTES.from_buffer(array))
    return int(array.__array_interface__["data"][0])


def _advice(array: Array, spec: TensorSpec) -> str | None:
    """What to do about a shape, for the two usual mistakes: no batch dimension, channels on the other side."""
    if (1, *array.shape) == spec.shape:
        return "x[np.newaxis]"
    for axes in ((0, 3, 1, 2), (0, 2, 3, 1)):
        if array.ndim == 4 and tuple(array.shape[a] for a in axes) == spec.shape:
            return f"x.transpose{axes}"
    return None


def _text(message: bytes | None) -> str:
    return (message or b"").decode("utf-8", "replace")


# A lock that another thread held at the fork would stay locked in the child for ever.
_MODELS: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    global _LOAD_LOCK
    _LOAD_LOCK = allocate_lock()
    for model in _MODELS:
        model._lock = allocate_lock()


os.register_at_fork(after_in_child=_after_fork)
