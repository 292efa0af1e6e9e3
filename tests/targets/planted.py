"""One instruction per feature, as bytes, and the smallest object file that can hold it.

Bytes and not assembler text, so that no assembler's idea of features comes between: the checker must see exactly this.
"""

from __future__ import annotations

import struct

from ingot.target import Target

#: Instructions every CPU of the architecture executes.
PLAIN: dict[str, list[tuple[str, str]]] = {
    "x86_64": [("0f 58 c1", "addps"), ("f3 0f 1e fa", "endbr64, a no-op on old CPUs"), ("f3 0f bc c8", "bsf as tzcnt")],
    "aarch64": [("20 d4 22 4e", "fadd v0.4s, v1.4s, v2.4s"), ("5f 24 03 d5", "bti c, a no-op on old CPUs")],
    "arm": [("02 00 81 e0", "add r0, r1, r2"), ("70 0f 1d ee", "mrc p15, 0, r0, c13, c0, 3: the thread pointer")],
    "riscv64": [("53 f5 c5 02", "fadd.d fa0, fa1, fa2"), ("2e 95", "c.add a0, a1")],
}

#: (feature, bytes, text): foreign exactly where the feature is not listed.
LISTED: dict[str, list[tuple[str, str, str]]] = {
    "x86_64": [
        ("sse3", "f2 0f 7c c1", "haddps %xmm1, %xmm0"),
        ("ssse3", "66 0f 38 00 c1", "pshufb %xmm1, %xmm0"),
        ("sse4.1", "66 0f 38 40 c1", "pmulld %xmm1, %xmm0"),
        ("sse4.2", "66 0f 38 37 c1", "pcmpgtq %xmm1, %xmm0"),
        ("popcnt", "f3 0f b8 c8", "popcnt %eax, %ecx"),
        ("cx16", "48 0f c7 0f", "cmpxchg16b (%rdi)"),
        ("avx", "c5 fc 58 d1", "vaddps %ymm1, %ymm0, %ymm2"),
        ("avx2", "c5 fd fe d1", "vpaddd %ymm1, %ymm0, %ymm2"),
        ("fma", "c4 e2 7d b8 d1", "vfmadd231ps %ymm1, %ymm0, %ymm2"),
        ("f16c", "c4 e2 7d 13 c1", "vcvtph2ps %xmm1, %ymm0"),
        ("bmi", "c4 e2 70 f2 d0", "andn %eax, %ecx, %edx"),
        ("bmi2", "c4 e2 79 f7 d1", "shlx %eax, %ecx, %edx"),
        ("lzcnt", "f3 0f bd c8", "lzcnt %eax, %ecx"),
        ("movbe", "0f 38 f0 07", "movbe (%rdi), %eax"),
        ("avx512f", "62 f1 7c 48 58 d1", "vaddps %zmm1, %zmm0, %zmm2"),
        ("avx512f", "62 b1 7e 08 58 d1", "vaddss %xmm17, %xmm0, %xmm2"),
        ("avx512vl", "62 b1 7c 28 58 d1", "vaddps %ymm17, %ymm0, %ymm2"),
        ("avx512bw", "62 f1 7d 48 fd d1", "vpaddw %zmm1, %zmm0, %zmm2"),
        ("avx512cd", "62 f2 7d 48 44 c1", "vplzcntd %zmm1, %zmm0"),
        ("avx512dq", "62 f2 fd 48 40 d1", "vpmullq %zmm1, %zmm0, %zmm2"),
        ("avx512vnni", "62 f2 7d 48 50 d1", "vpdpbusd %zmm1, %zmm0, %zmm2"),
        ("avxvnni", "c4 e2 7d 50 d1", "{vex} vpdpbusd %ymm1, %ymm0, %ymm2"),
        ("avx512bf16", "62 f2 7e 48 52 d1", "vdpbf16ps %zmm1, %zmm0, %zmm2"),
        ("avx512fp16", "62 f5 7c 48 58 d1", "vaddph %zmm1, %zmm0, %zmm2"),
        ("amx-tile", "c4 e2 7b 4b 04 37", "tileloadd (%rdi,%rsi,1), %tmm0"),
        ("amx-int8", "c4 e2 69 5e c1", "tdpbusd %tmm2, %tmm1, %tmm0"),
        ("amx-bf16", "c4 e2 6a 5c c1", "tdpbf16ps %tmm2, %tmm1, %tmm0"),
    ],
    "aarch64": [
        ("crc", "20 40 c2 1a", "crc32b w0, w1, w2"),
        ("aes", "20 48 28 4e", "aese v0.16b, v1.16b"),
        ("sha2", "20 40 02 5e", "sha256h q0, q1, v2.4s"),
        ("lse", "41 00 20 b8", "ldadd w0, w1, [x2]"),
        ("rdm", "20 84 82 6e", "sqrdmlah v0.4s, v1.4s, v2.4s"),
        ("fullfp16", "20 0c 42 4e", "fmla v0.8h, v1.8h, v2.8h"),
        ("dotprod", "20 94 82 4e", "sdot v0.4s, v1.16b, v2.16b"),
        ("i8mm", "20 a4 82 4e", "smmla v0.4s, v1.16b, v2.16b"),
        ("bf16", "20 ec 42 6e", "bfmmla v0.4s, v1.8h, v2.8h"),
        ("sve", "20 00 a2 65", "fmla z0.s, p0/m, z1.s, z2.s"),
        ("sve2", "20 40 82 44", "smlalb z0.s, z1.h, z2.h"),
        ("rcpc", "20 c0 bf b8", "ldapr w0, [x1]"),
        ("fp16fml", "20 ec 22 4e", "fmlal v0.4s, v1.4h, v2.4h"),
    ],
    "arm": [
        ("neon", "44 0d 02 f2", "vadd.f32 q0, q1, q2"),
        ("vfp3", "a3 1b 72 ee", "vadd.f64 d17, d18, d19"),
        ("vfp4", "81 0a a0 ee", "vfma.f32 s0, s1, s2"),
        ("vfp4", "60 0a b3 ee", "vcvtb.f16.f32 s0, s1"),
        ("hwdiv", "11 f2 10 e7", "sdiv r0, r1, r2"),
    ],
    "riscv64": [
        ("v", "57 00 11 02", "vadd.vv v0, v1, v2"),
        ("zba", "33 a5 c5 20", "sh1add a0, a1, a2"),
        ("zbb", "13 95 05 60", "clz a0, a1"),
        ("zbs", "33 95 c5 28", "bset a0, a1, a2"),
        ("zfh", "53 f5 c5 04", "fadd.h fa0, fa1, fa2"),
    ],
}

#: (extension, bytes, text): foreign on every target, as no feature of ours stands for it.
NEVER: dict[str, list[tuple[str, str, str]]] = {
    "x86_64": [
        ("aes", "66 0f 38 dc c1", "aesenc %xmm1, %xmm0"),
        ("pclmul", "66 0f 3a 44 c1 00", "pclmulqdq $0, %xmm1, %xmm0"),
        ("gfni", "66 0f 38 cf c1", "gf2p8mulb %xmm1, %xmm0"),
        ("avx512vbmi", "62 f2 7d 48 8d d1", "vpermb %zmm1, %zmm0, %zmm2"),
        ("avx512ifma", "62 f2 fd 48 b4 d1", "vpmadd52luq %zmm1, %zmm0, %zmm2"),
        ("avx512vpopcntdq", "62 f2 7d 48 55 c1", "vpopcntd %zmm1, %zmm0"),
        ("sse4a", "66 0f 79 c1", "extrq %xmm1, %xmm0"),
        ("adx", "66 0f 38 f6 c8", "adcx %eax, %ecx"),
    ],
    "aarch64": [
        ("complxnum", "20 c4 82 6e", "fcmla v0.4s, v1.4s, v2.4s, #0"),
        ("jsconv", "00 00 7e 1e", "fjcvtzs w0, d0"),
        ("mops", "40 04 01 19", "cpyfp [x0]!, [x1]!, x2!"),
        ("flagm", "02 84 00 ba", "rmif x0, #1, #2"),
    ],
    "arm": [
        ("v8", "42 04 ba f3", "vrintn.f32 q0, q1"),
        ("v8", "81 0a 80 fe", "vmaxnm.f32 s0, s1, s2"),
        ("v8", "9f 0c 91 e1", "lda r0, [r1]"),
        ("crc", "42 00 01 e1", "crc32b r0, r1, r2"),
        ("aes", "02 03 b0 f3", "aese.8 q0, q1"),
        ("dotprod", "44 0d 22 fc", "vsdot.s8 q0, q1, q2"),
        ("fullfp16", "44 0d 12 f2", "vadd.f16 q0, q1, q2"),
        ("i8mm", "44 0c 22 fc", "vsmmla.s8 q0, q1, q2"),
    ],
    "riscv64": [("custom-0", "0b 00 00 00", "an instruction no standard defines")],
}

_RETURN = {"x86_64": "c3", "aarch64": "c0 03 5f d6", "arm": "1e ff 2f e1", "riscv64": "82 80"}
_MARK = {"x86_64": b"", "aarch64": b"$x", "arm": b"$a", "riscv64": b"$x"}
#: e_flags: EABI version 5 with hard float; compressed instructions and double floats in registers.
_FLAGS = {"x86_64": 0, "aarch64": 0, "arm": 0x5000400, "riscv64": 0x5}


def elf_object(target: Target, *instructions: str, mark: bool = True) -> bytes:
    """Return a relocatable ELF file whose .text holds the instructions (hexadecimal) and a return.

    `mark=False` leaves out the symbol that says code begins here, as a stripped file does.
    """
    text = bytes.fromhex(" ".join([*instructions, _RETURN[target.arch]]))
    wide = target.elf_class == 2
    names = b"\0.text\0.symtab\0.strtab\0"
    strings = b"\0" + _MARK[target.arch] + b"\0f\0"
    mark_name, f_name = (1 if _MARK[target.arch] and mark else 0), len(_MARK[target.arch]) + 2

    def symbol(name: int, info: int, section: int) -> bytes:
        if wide:
            return struct.pack("<IBBHQQ", name, info, 0, section, 0, 0)
        return struct.pack("<IIIBBH", name, 0, 0, info, 0, section)

    symbols = symbol(0, 0, 0) + symbol(mark_name, 0, 1 if mark_name else 0) + symbol(f_name, 0x12, 1)
    head, entry = (64, 64) if wide else (52, 40)
    offsets, body = [], b""
    for part in (text, symbols, strings + names):
        body += b"\0" * (-(head + len(body)) % 8)
        offsets.append(head + len(body))
        body += part
    body += b"\0" * (-(head + len(body)) % 8)
    word = "Q" if wide else "I"

    def section(name: bytes, kind: int, flags: int, place: tuple[int, int], link: int, info: int, size: int) -> bytes:
        at = names.index(b"\0" + name + b"\0") + 1 if name else 0
        offset, length = place
        return struct.pack(
            f"<II4{word}II2{word}", at, kind, flags, 0, offset, length, link, info, 8 if name else 0, size
        )

    table = section(b"", 0, 0, (0, 0), 0, 0, 0)
    table += section(b".text", 1, 6, (offsets[0], len(text)), 0, 0, 0)
    table += section(b".symtab", 2, 0, (offsets[1], len(symbols)), 3, 2, 24 if wide else 16)
    table += section(b".strtab", 3, 0, (offsets[2], len(strings)), 0, 0, 0)
    table += section(b".strtab", 3, 0, (offsets[2] + len(strings), len(names)), 0, 0, 0)
    ident = b"\x7fELF" + bytes([target.elf_class, 1, 1]) + b"\0" * 9
    header = struct.pack(
        f"<HHI3{word}I6H",
        *(1, target.elf_machine, 1, 0, 0, head + len(body), _FLAGS[target.arch], head, 0, 0, entry, 5, 4),
    )
    return ident + header + body + table
