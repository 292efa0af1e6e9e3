"""Find machine instructions that a target's feature list does not allow.

`foreign_instructions(elf_bytes, target)` disassembles every executable section of an object or shared library:

* AArch64, ARM and RISC-V: llvm-objdump decodes with exactly the target's features; what they do not cover prints as
  <unknown>. ARM needs the symbols $a, $t and $d (constants lie between the code there): a stripped file is refused.
* x86-64: no disassembler checks features, but GNU as does. The disassembly is assembled again with exactly the
  target's features (`as -march=generic64+avx2+...`), and what as refuses is foreign. An EVEX prefix (62) is foreign
  without AVX-512 whatever its text says.

Both tools are independent of the LLVM that wrote the code.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from ingot.architectures import FEATURES, LLVM_NAMES
from ingot.target import Target

#: Our x86-64 names -> those of GNU as, where they differ.
_GAS_NAMES = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "avx512bf16": "avx512_bf16"}
_GAS_NAMES |= {"avx512fp16": "avx512_fp16", "amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16"}
#: Always allowed: prefixes and no-ops that old CPUs ignore (control-flow marks).
_GAS_ALWAYS = ("ibt", "shstk")

#: What LLVM's decoder knows beyond FEATURES and would accept by the file's own build attributes. They are switched off
#: explicitly. ("v8" first: the rest are parts of it.)
_OFF = {
    "arm": ("v8", "fp-armv8", "fullfp16", "crc", "aes", "sha2", "dotprod", "i8mm", "bf16", "fp16fml", "mve"),
    "aarch64": ("sme", "complxnum", "jsconv", "flagm", "pauth", "mte", "f32mm", "f64mm", "sve2-bitperm", "sha3", "sm4"),
    "riscv64": ("v", "zba", "zbb", "zbc", "zbs", "zbkb", "zfh", "zfhmin"),
}
#: Old coprocessor space, which new extensions were encoded into: decodes as these words without the extension.
_ARM_COPROCESSOR = re.compile(r"(stc|ldc|cdp|mcr|mrc|mcrr|mrrc)2?l?\b")
#: Reading the thread pointer, which every ARMv7 has.
_ARM_ALLOWED = re.compile(r"mrc\s+p15, #(0x)?0, \w+, c13, c0, #(0x)?3$")

_BRANCH = re.compile(r"^((?:bnd |notrack )?(?:j\w+|call\w*|loop\w*|xbegin)(?:,p[nt])?)\s+([0-9a-f]+)$")
_LINE = re.compile(r"^\s*([0-9a-f]+):\s*((?:[0-9a-f]{2,8} )+)?\s*\t?(.*)$")


def llvm_objdump() -> str | None:
    """The newest llvm-objdump on PATH."""
    names = ["llvm-objdump", *(f"llvm-objdump-{v}" for v in range(30, 13, -1))]
    return next(filter(None, map(shutil.which, names)), None)


@lru_cache
def gnu_x86(tool: str) -> str | None:
    """GNU `as` or `objdump` that knows x86-64, native or cross."""
    for name in (f"x86_64-linux-gnu-{tool}", tool):
        path = shutil.which(name)
        flag, word = ("--version", "x86_64") if tool == "as" else ("--info", "elf64-x86-64")
        if path and word in subprocess.run([path, flag], capture_output=True, text=True, check=False).stdout:
            return path
    return None


def missing_tools(arch: str) -> list[str]:
    """Debian packages that must be installed before code of `arch` can be checked."""
    if arch == "x86_64":
        return [] if gnu_x86("as") and gnu_x86("objdump") else ["binutils-x86-64-linux-gnu"]
    return [] if llvm_objdump() else ["llvm"]


def foreign_instructions(elf: bytes, target: Target) -> list[str]:
    """Return the instructions in `elf` (bytes of a file) outside the target's features, as "section+offset: text".

    Raises ValueError for a file of another machine, one without code, or a stripped ARM file.
    """
    machine = struct.unpack_from("<H", elf, 18)[0]
    if elf[:4] != b"\x7fELF" or (machine, elf[4]) != (target.elf_machine, target.elf_class):
        raise ValueError(f"not an ELF file for {target.arch}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        path.write_bytes(elf)
        instructions, foreign = (_x86_64 if target.arch == "x86_64" else _llvm)(path, target)
    if not instructions:
        raise ValueError("no instructions in this file")
    return foreign


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stderr[:500]}")
    if "not a recognized feature" in done.stderr:
        # A feature the tool does not know would silently not be checked.
        raise ValueError(done.stderr[:500])
    return done.stdout


def _llvm(path: Path, target: Target) -> tuple[int, list[str]]:
    names = LLVM_NAMES.get(target.arch, {})
    off = [n for f in FEATURES[target.arch] if f not in target.features for n in names.get(f, (f,))]
    on = [n for f in FEATURES[target.arch] if f in target.features for n in names.get(f, (f,))]
    switches = [f"-{n}" for n in (*_OFF[target.arch], *off) if n not in on] + [f"+{n}" for n in on]
    tool = llvm_objdump() or "llvm-objdump"
    if target.arch == "arm" and not re.search(r"\$[at](\.\d+)?$", _run(tool, "--syms", str(path)), re.MULTILINE):
        raise ValueError("a stripped ARM file: without the symbols $a, $t and $d code cannot be told from data")
    text = _run(tool, "-d", f"--triple={target.triple}", f"--mattr={','.join(switches)}", str(path))
    count, foreign, section = 0, [], ""
    for line in text.splitlines():
        if line.startswith("Disassembly of section "):
            section = line.split()[-1].rstrip(":")
        match = _LINE.match(line)
        if not match or match[2] is None or match[3].lstrip().startswith("."):
            continue  # headings, and data between ARM code (".word")
        count += 1
        words = " ".join(match[3].split())
        coprocessor = target.arch == "arm" and _ARM_COPROCESSOR.match(words) and not _ARM_ALLOWED.match(words)
        if words.startswith("<unknown>") or coprocessor:
            foreign.append(f"{section}+0x{match[1]}: {words} ({match[2].strip()})")
    return count, foreign


def _x86_64(path: Path, target: Target) -> tuple[int, list[str]]:
    text = _run(gnu_x86("objdump") or "objdump", "-d", "-w", str(path))
    places, codes, section = [], [], ""
    foreign = []
    for line in text.splitlines():
        if line.startswith("Disassembly of section "):
            section = line.split()[-1].rstrip(":")
        parts = line.split("\t")
        if len(parts) < 3:
            continue
        # Comments and symbolic addresses are for people; branch targets need their 0x back.
        code = re.sub(r"\s*(#.*|<[^>]*>)", "", parts[2]).strip()
        # Without BMI, LLVM writes bsf with the prefix that makes it a (faster) tzcnt on CPUs that have it: the same
        # answer either way, as it does so only where the operand is not zero.
        code = re.sub(r"^tzcnt", "bsf", code)
        code = _BRANCH.sub(r"\1 0x\2", code)
        # as writes only nops of its own making with these prefixes.
        code = re.sub(r"^((data16|cs) )+(?=nop)", "", code)
        place = f"{section}+0x{parts[0].strip().rstrip(':')}: {' '.join(parts[2].split())} ({parts[1].strip()})"
        places.append(place)
        codes.append(code)
        evex = parts[1].lstrip().startswith("62 ") and "avx512f" not in target.features
        popcnt = code.startswith("popcnt") and "popcnt" not in target.features  # as thinks SSE4.2 brings it
        if evex or popcnt or "(bad)" in code:
            foreign.append(place)
    march = "+".join(["generic64", *_GAS_ALWAYS, *(_GAS_NAMES.get(f, f) for f in target.features)])
    source = path.with_suffix(".s")
    source.write_text("\n".join(codes) + "\n")
    command = [gnu_x86("as") or "as", "--64", f"-march={march}", "-o", "/dev/null", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Fatal error" in done.stderr:
        raise ValueError(done.stderr[:500])
    refused = {int(n) for n in re.findall(r"\.s:(\d+): Error:", done.stderr)}
    if done.returncode and not refused:
        raise ValueError(f"as failed: {done.stderr[:500]}")
    foreign.extend(places[n - 1] for n in sorted(refused) if places[n - 1] not in foreign)
    return len(places), foreign
