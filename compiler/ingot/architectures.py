"""Facts about the four architectures: features, LLVM's names for them, words for linker and emulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Architecture = Literal["x86_64", "aarch64", "arm", "riscv64"]

#: The features a target may list, per architecture, in the order they are shown. Names are LLVM's.
FEATURES: Mapping[str, tuple[str, ...]] = {
    "x86_64": (
        *("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt"),
        *("movbe", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni", "avxvnni", "avx512bf16"),
        *("avx512fp16", "amx-tile", "amx-int8", "amx-bf16"),
    ),
    "aarch64": (
        *("neon", "crc", "aes", "sha2", "lse", "rdm", "fullfp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "rcpc"),
        "fp16fml",
    ),
    "arm": ("neon", "vfp4", "vfp3", "thumb2", "hwdiv"),
    "riscv64": ("m", "a", "f", "d", "c", "v", "zba", "zbb", "zbs", "zfh"),
}

#: Every CPU of the architecture has these (`Target.baseline` uses them), so every target must list them.
MANDATORY: Mapping[str, tuple[str, ...]] = {
    "x86_64": (),
    "aarch64": ("neon",),
    "arm": ("thumb2",),
    "riscv64": ("m", "a", "f", "d", "c"),
}

#: A feature that cannot be used without others: LLVM would switch those on silently, so they must be listed too.
NEEDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "ssse3": ("sse3",),
        "sse4.1": ("ssse3",),
        "sse4.2": ("sse4.1",),
        "avx": ("sse4.2",),
        "avx2": ("avx",),
        "fma": ("avx",),
        "f16c": ("avx",),
        "avx512f": ("avx2", "fma", "f16c"),
        "avx512bw": ("avx512f",),
        "avx512cd": ("avx512f",),
        "avx512dq": ("avx512f",),
        "avx512vl": ("avx512f",),
        "avx512vnni": ("avx512f",),
        "avxvnni": ("avx2",),
        "avx512bf16": ("avx512bw",),
        "avx512fp16": ("avx512bw",),
        "amx-int8": ("amx-tile",),
        "amx-bf16": ("amx-tile",),
    },
    "aarch64": {"sve": ("fullfp16",), "sve2": ("sve",), "fp16fml": ("fullfp16",)},
    "arm": {"neon": ("vfp3",), "vfp4": ("vfp3",)},
    "riscv64": {"v": ("d",), "zfh": ("f",)},
}

#: Where one feature of ours is several of LLVM's. ARM divides in two instruction sets, Thumb and ARM; VFPv3 is the one
#: with 32 registers, which LLVM keeps when VFPv3 is switched off.
LLVM_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "arm": {"hwdiv": ("hwdiv", "hwdiv-arm"), "vfp3": ("vfp3", "d32")},
}

#: Extensions beyond FEATURES that LLVM's CPU models switch on and its code generator could use unasked. They have no
#: name here because no kernel needs them; they are always switched off. (Switching one off also switches off the
#: architecture level that contains it, which is a mere bundle: the listed features are switched on again, by name.)
NEVER: Mapping[str, tuple[str, ...]] = {
    "x86_64": (
        *("aes", "pclmul", "vaes", "vpclmulqdq", "gfni", "sha", "sha512", "sm3", "sm4", "adx", "sse4a", "xop", "fma4"),
        *("tbm", "lwp", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq"),
        *("avx512vp2intersect", "avxifma", "avxneconvert", "avxvnniint8", "avxvnniint16", "cmpccxadd", "avx10.1"),
        *("avx10.2", "amx-fp16", "amx-complex", "amx-fp8", "amx-tf32", "amx-avx512", "amx-movrs", "movrs", "egpr"),
        *("ccmp", "cf", "ndd", "nf", "ppx", "push2pop2", "zu", "prfchw", "movdiri", "movdir64b", "raoint"),
    ),
    "aarch64": (
        *("sha3", "sm4", "complxnum", "jsconv", "fptoint", "lse2", "lse128", "rcpc-immo", "rcpc3", "flagm", "altnzcv"),
        *("mops", "cssc", "hbc", "rand", "pauth", "mte", "f32mm", "f64mm", "sve-bitperm", "sve2-aes", "sve2-sha3"),
        *("sve2-sm4", "sve2p1", "sve-b16b16", "sme", "faminmax", "lut", "fp8", "cpa", "cmpbr"),
    ),
    # What a 64-bit core adds to the 32-bit instruction set. A 32-bit userland promises none of it.
    "arm": (
        *("v8", "fp-armv8d16sp", "acquire-release", "crc", "crypto", "aes", "sha2", "dotprod", "fullfp16", "fp16fml"),
        *("i8mm", "bf16"),
    ),
    "riscv64": (
        *("b", "h", "q", "zacas", "zabha", "zbc", "zbkb", "zbkc", "zbkx", "zfa", "zfhmin", "zfbfmin", "zicond", "zcb"),
        *("zcmp", "zcmt", "zicbop", "zve32x", "xtheadba", "xtheadbb", "xtheadbs", "xtheadmac", "xtheadmemidx"),
        *("xtheadmempair", "xtheadcondmov", "xtheadfmemidx", "xventanacondops"),
    ),
}

#: LLVM prefers 256-bit vectors on the first AVX-512 CPUs, whose clock fell under 512-bit load. Schedules decide here.
TUNING: Mapping[str, tuple[str, ...]] = {"x86_64": ("-prefer-256-bit",), "aarch64": (), "arm": (), "riscv64": ()}

#: Triples have FOUR parts: with the vendor left out ("armv7-linux-gnueabihf") LLVM takes "linux" for the vendor,
#: sees no operating system, and emits calls to helpers (__divsi3) that the board's libraries do not have.
TRIPLES: Mapping[str, Architecture] = {
    "x86_64-unknown-linux-gnu": "x86_64",
    "x86_64-unknown-linux-musl": "x86_64",
    "aarch64-unknown-linux-gnu": "aarch64",
    "aarch64-unknown-linux-musl": "aarch64",
    "armv7-unknown-linux-gnueabihf": "arm",
    "armv7-unknown-linux-musleabihf": "arm",
    "riscv64-unknown-linux-gnu": "riscv64",
    "riscv64-unknown-linux-musl": "riscv64",
}

BASELINES: Mapping[str, str] = {
    "x86_64": "x86_64",
    "aarch64": "generic",
    # zig's ARMv7 has NEON, the architecture does not promise it: VFPv3 with 16 registers is what hard float needs.
    "arm": "generic+v7a+vfp3d16-neon-vfp3",
    "riscv64": "baseline_rv64",
}

#: glibc versions the pinned zig can link against; riscv64 entered glibc with 2.27.
OLDEST_GLIBC: Mapping[str, tuple[int, int]] = {
    "x86_64": (2, 17),
    "aarch64": (2, 17),
    "arm": (2, 17),
    "riscv64": (2, 27),
}
NEWEST_GLIBC = (2, 43)

#: qemu-user CPUs (present since qemu 7.2) and their features; the smallest that has a target's features stands in.
QEMU_CPUS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "aarch64": {
        "cortex-a72": frozenset({"neon", "crc", "aes", "sha2"}),
        "cortex-a35": frozenset({"neon", "crc", "aes", "sha2"}),
        "cortex-a53": frozenset({"neon", "crc", "aes", "sha2"}),
        "cortex-a57": frozenset({"neon", "crc", "aes", "sha2"}),
        "cortex-a76": frozenset({"neon", "crc", "aes", "sha2", "lse", "rdm", "fullfp16", "dotprod", "rcpc"}),
        "neoverse-n1": frozenset({"neon", "crc", "aes", "sha2", "lse", "rdm", "fullfp16", "dotprod", "rcpc"}),
        "max": frozenset(FEATURES["aarch64"]),
    },
    "arm": {
        "cortex-a9": frozenset({"neon", "vfp3", "thumb2"}),
        "cortex-a8": frozenset({"neon", "vfp3", "thumb2"}),
        "cortex-a7": frozenset({"neon", "vfp3", "vfp4", "thumb2", "hwdiv"}),
        "cortex-a15": frozenset({"neon", "vfp3", "vfp4", "thumb2", "hwdiv"}),
    },
    "riscv64": {
        "sifive-u54": frozenset({"m", "a", "f", "d", "c"}),
        "rv64": frozenset({"m", "a", "f", "d", "c", "zba", "zbb", "zbs"}),
        "rv64,v=true,zfh=true": frozenset(FEATURES["riscv64"]),
    },
    # qemu has no AVX-512 and no AMX.
    "x86_64": {"max": frozenset(FEATURES["x86_64"][:14])},
}
SYSROOTS: Mapping[str, str] = {
    "x86_64": "/",
    "aarch64": "/usr/aarch64-linux-gnu",
    "arm": "/usr/arm-linux-gnueabihf",
    "riscv64": "/usr/riscv64-linux-gnu",
}
