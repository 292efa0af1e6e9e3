"""What the machine this process runs on is, in the fields of a target file.

The CPU is described by its feature flags, never by its model name: on virtual machines the name (and LLVM's own
detection, which goes by it) claims or omits features that the hypervisor decided otherwise.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

from ingot.architectures import FEATURES, MANDATORY, NEEDS, NEWEST_GLIBC
from ingot.errors import TargetError

#: Feature -> the words /proc/cpuinfo must show for it (all of them), or alternatives after "|"; the feature's own name
#: where it is not listed. The loader has a table of the same content, which must stand alone.
_CPUINFO = {
    "x86_64": {
        "sse3": "pni",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "bmi": "bmi1",
        "lzcnt": "abm",
        "avx512vnni": "avx512_vnni",
        "avxvnni": "avx_vnni",
        "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16",
        "amx-tile": "amx_tile",
        "amx-int8": "amx_int8",
        "amx-bf16": "amx_bf16",
    },
    "aarch64": {
        "neon": "asimd",
        "aes": "aes pmull",
        "sha2": "sha1 sha2",
        "crc": "crc32",
        "lse": "atomics",
        "rdm": "asimdrdm",
        "fullfp16": "fphp asimdhp",
        "dotprod": "asimddp",
        "rcpc": "lrcpc",
        "fp16fml": "asimdfhm",
    },
    # A 64-bit kernel shows a 32-bit program its own words: asimd then stands for all of these. LLVM's VFPv3 and v4 have
    # 32 registers, Linux says "vfpv3" of the kind with 16 too.
    "arm": {
        "neon": "neon|asimd",
        "vfp3": "vfpv3 neon|vfpv3 vfpd32|asimd",
        "vfp4": "vfpv4 neon|vfpv4 vfpd32|asimd",
        "hwdiv": "idiva idivt|asimd",
    },
    "riscv64": {},
}

_TRIPLES = {
    "x86_64": "x86_64-unknown-linux-",
    "aarch64": "aarch64-unknown-linux-",
    "arm": "armv7-unknown-linux-",
    "riscv64": "riscv64-unknown-linux-",
}

#: x86-64 levels, highest first: the features LLVM's generic CPU of that level assumes.
_X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "bmi2", "lzcnt", "movbe"}),
    ("x86-64-v3", {"avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"}),
    ("x86-64-v2", {"sse4.2", "popcnt", "cx16"}),
)

#: "CPU part" of Arm Limited's cores -> LLVM's CPU. Only instruction scheduling depends on it; features come from flags.
_ARM_PARTS = {
    "0xc07": "cortex-a7",
    "0xc08": "cortex-a8",
    "0xc09": "cortex-a9",
    "0xc0f": "cortex-a15",
    "0xd03": "cortex-a53",
    "0xd04": "cortex-a35",
    "0xd05": "cortex-a55",
    "0xd07": "cortex-a57",
    "0xd08": "cortex-a72",
    "0xd09": "cortex-a73",
    "0xd0a": "cortex-a75",
    "0xd0b": "cortex-a76",
    "0xd0c": "neoverse-n1",
    "0xd40": "neoverse-v1",
    "0xd41": "cortex-a78",
    "0xd42": "cortex-a78ae",
    "0xd49": "neoverse-n2",
    "0xd4f": "neoverse-v2",
}


def describe_machine(arch: str | None = None, cpuinfo: str | None = None) -> dict[str, Any]:
    """Return the fields of a target file for this machine.

    `arch` and the text of /proc/cpuinfo are read from the system if not given. Raises TargetError on a machine that is
    none of the supported architectures.
    """
    arch = arch or _machine()
    if arch not in _TRIPLES:
        raise TargetError(
            "this machine's architecture is not supported as a target",
            where="target native",
            found=arch,
            allowed=", ".join(_TRIPLES),
            hint="name a board: ingot targets",
        )
    if cpuinfo is None:
        cpuinfo = _text(Path("/proc/cpuinfo"))
    features = cpu_features(arch, cpuinfo)
    libc, version = _libc()
    suffix = "eabihf" if arch == "arm" else ""
    return {
        "name": "native",
        "description": "this machine, by the feature flags of its CPU",
        "sources": ["/proc/cpuinfo", "/sys/devices/system/cpu"],
        "triple": _TRIPLES[arch] + libc + suffix,
        "cpu": _llvm_cpu(arch, features, cpuinfo),
        "features": features,
        "cores": _cores(arch, features, cpuinfo),
        "cache": _cache(),
        "libc": libc,
        "libc_version": version,
        "ram_mib": max(16, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20),
    }


def cpu_features(arch: str, cpuinfo: str) -> list[str]:
    """Return the features that EVERY core in the text of /proc/cpuinfo has, in canonical order.

    An architecture's mandatory features are returned whatever the text says. A feature whose prerequisite is hidden
    (some hypervisors hide one of a pair) is left out.
    """
    per_core = [_flags(line) for line in cpuinfo.splitlines() if _key(line) in ("flags", "features", "isa")]
    common = set.intersection(*per_core) if per_core else set()

    def present(feature: str) -> bool:
        return any(common.issuperset(words.split()) for words in _CPUINFO[arch].get(feature, feature).split("|"))

    found = {feature for feature in FEATURES[arch] if present(feature)}
    found.update(MANDATORY[arch])
    while broken := {f for f in found if not found.issuperset(NEEDS[arch].get(f, ()))}:
        found -= broken
    return [feature for feature in FEATURES[arch] if feature in found]


def _machine() -> str:
    name, narrow = os.uname().machine, struct.calcsize("P") == 4
    # A 32-bit Python on a 64-bit kernel is a 32-bit machine.
    return "arm" if narrow and name.startswith(("arm", "aarch64")) else f"32-bit {name}" if narrow else name


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _key(line: str) -> str:
    return line.partition(":")[0].strip().lower()


def _flags(line: str) -> set[str]:
    value = line.partition(":")[2].strip().lower()
    if _key(line) != "isa":
        return set(value.split())
    base, *extensions = value.split("_")  # rv64imafdc_zba_zbb
    return set(base[4:].replace("g", "imafd")) | set(extensions)


def _field(cpuinfo: str, *keys: str) -> str | None:
    for line in cpuinfo.splitlines():
        if _key(line) in keys and line.partition(":")[2].strip():
            return line.partition(":")[2].strip()
    return None


def _llvm_cpu(arch: str, features: list[str], cpuinfo: str) -> str:
    if arch == "x86_64":
        return next((cpu for cpu, level in _X86_LEVELS if level.issubset(features)), "x86-64")
    if arch == "riscv64":
        return "generic-rv64"
    arm_limited = _field(cpuinfo, "cpu implementer") == "0x41"
    return _ARM_PARTS.get(_field(cpuinfo, "cpu part") or "", "generic") if arm_limited else "generic"


def _cores(arch: str, features: list[str], cpuinfo: str) -> list[dict[str, Any]]:
    name = _field(cpuinfo, "model name", "uarch", "hardware") or f"{arch} CPU"
    # A hypervisor may write anything here.
    name = " ".join("".join(c for c in name if " " <= c <= "~").split())[:80] or f"{arch} CPU"
    # Not the count of the process's own CPUs: the target describes the machine, threads are chosen at run time.
    return [{"count": min(os.cpu_count() or 1, 1024), "name": name, "cpu": _llvm_cpu(arch, features, cpuinfo)}]


def _cache() -> dict[str, int]:
    sizes = {1: 0, 2: 0, 3: 0}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _text(index / "type").strip(), _text(index / "level").strip()
        size = re.fullmatch(r"(\d{1,8})K", _text(index / "size").strip())
        if size and kind in ("Data", "Unified") and level in ("1", "2", "3"):
            sizes[int(level)] = int(size[1])
    # Small boards' kernels often do not say; these are what the smallest of them have.
    return {"l1d_kib": min(sizes[1] or 32, 1024), "l2_kib": sizes[2] or 256, "l3_kib": sizes[3]}


def _libc() -> tuple[str, str]:
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        text = ""
    match = re.match(r"glibc (\d+)\.(\d+)", text)
    if not match:
        return "musl", "1.2"
    # The linker's newest is enough on a newer system: glibc keeps old versions of its symbols.
    major, minor = min((int(match[1]), int(match[2])), NEWEST_GLIBC)
    return "gnu", f"{major}.{minor}"
