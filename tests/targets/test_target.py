"""Target files: their schema, hostile ones, unknown names, this machine, and that a new board is one file."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from ingot import target as module
from ingot.architectures import FEATURES
from ingot.errors import IngotError, TargetError
from ingot.native import cpu_features, describe_machine
from ingot.target import FIELDS, Target, list_targets, load_target, native_target

BOARD = """\
name = "my-board"
description = "A board of mine"
sources = ["its datasheet"]
triple = "aarch64-unknown-linux-gnu"
cpu = "cortex-a53"
features = ["neon"]
libc = "gnu"
libc_version = "2.31"
ram_mib = 1024
gpu = "a GPU"

[cache]
l1d_kib = 32
l2_kib = 512
l3_kib = 0

[[cores]]
count = 4
name = "Cortex-A53"
cpu = "cortex-a53"
freq_mhz = 1200
"""

# The boards and servers that the manual promises.
PROMISED = {
    "x86-64-v2",
    "x86-64-v3",
    "x86-64-v4",
    "sapphirerapids",
    "znver4",
    "raspberry-pi-zero-2-w",
    "raspberry-pi-3",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "raspberry-pi-zero-2-w-32bit",
    "raspberry-pi-3-32bit",
    "raspberry-pi-4-32bit",
    "raspberry-pi-5-32bit",
    "jetson-nano",
    "jetson-xavier-nx",
    "jetson-orin-nano",
    "jetson-agx-orin",
    "rk3399",
    "rk3588",
    "imx-8m-mini",
    "imx-8m-plus",
    "imx-93",
    "beaglebone-black",
    "beagleplay",
    "stm32mp157",
    "stm32mp257",
    "odroid-n2-plus",
    "khadas-vim3",
    "coral-dev-board",
    "kria-kv260",
    "intel-n100",
    "graviton-2",
    "graviton-3",
    "graviton-4",
    "ampere-altra",
    "visionfive-2",
}


def write(folder: Path, text: str = BOARD, name: str = "my-board") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def refusal(path: Path | str) -> TargetError:
    with pytest.raises(TargetError) as caught:
        load_target(str(path))
    error = caught.value
    assert error.what
    assert error.where
    assert error.found
    assert error.allowed
    assert len(str(error)) < 3000
    assert isinstance(error, IngotError)
    assert error.exit_code == 2
    return error


# ---- the shipped files


def test_every_promised_target_is_there_and_sorted() -> None:
    names = [target.name for target in list_targets()]
    assert set(names) >= PROMISED
    assert names == sorted(names)
    assert module.NATIVE not in names


@pytest.mark.parametrize("target", list_targets(), ids=lambda t: t.name)
def test_a_shipped_target_is_consistent(target: Target) -> None:
    assert target == load_target(target.name)
    assert target.triple.count("-") == 3
    assert target.cores[0].cpu == target.cpu
    assert list(target.features) == [f for f in FEATURES[target.arch] if f in target.features], "canonical order"
    assert target.zig_triple.startswith(f"{target.arch}-linux-")
    assert target.zig_triple.endswith(target.libc_version if target.libc == "gnu" else "musl")
    assert target.vector_bits in (128, 256, 512)
    assert target.llvm()["mtriple"] == target.triple
    assert not {"aes", "sha2"} & set(target.features), "kernels need none, many boards have none"
    clocks = [c.freq_mhz for c in target.cores if c.freq_mhz]
    assert clocks == sorted(clocks, reverse=True), "fastest cluster first"


def test_no_two_targets_share_a_description() -> None:
    assert max(Counter(t.description for t in list_targets()).values()) == 1


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("raspberry-pi-3", "neon", "crc aes sha2 dotprod lse fullfp16"),
        ("raspberry-pi-4", "neon", "crc aes sha2 dotprod lse fullfp16"),
        ("raspberry-pi-5", "neon dotprod lse fullfp16 rcpc", "i8mm bf16 sve fp16fml"),
        ("jetson-xavier-nx", "lse fullfp16", "dotprod i8mm"),
        ("rk3588", "dotprod fullfp16", "i8mm bf16 sve"),  # the A55 cores share the A76's list
        ("imx-93", "dotprod fullfp16", "i8mm"),
        ("graviton-2", "dotprod", "i8mm sve"),
        ("graviton-3", "i8mm bf16 sve fp16fml", "sve2"),
        ("graviton-4", "i8mm bf16 sve sve2", ""),
        ("beaglebone-black", "neon vfp3 thumb2", "vfp4 hwdiv"),
        ("stm32mp157", "neon vfp4 hwdiv", ""),
        ("visionfive-2", "m a f d c", "v"),
        ("intel-n100", "avx2 fma avxvnni", "avx512f"),
        ("x86-64-v2", "sse4.2 popcnt", "avx"),
        ("x86-64-v3", "avx2 fma f16c bmi2", "avx512f"),
        ("x86-64-v4", "avx512f avx512vl avx512bw avx512dq avx512cd", "avx512vnni amx-tile"),
        ("sapphirerapids", "amx-tile amx-int8 amx-bf16 avx512fp16 avx512vnni avxvnni", ""),
        ("znver4", "avx512vnni avx512bf16", "avxvnni avx512fp16 amx-tile"),
    ],
)
def test_known_facts(name: str, has: str, lacks: str) -> None:
    features = set(load_target(name).features)
    assert set(has.split()) <= features
    assert not set(lacks.split()) & features


def test_properties_schedules_and_the_linker_use() -> None:
    pi, pi32, v4, v3 = map(load_target, ("raspberry-pi-4", "raspberry-pi-4-32bit", "x86-64-v4", "x86-64-v3"))
    v2, star = load_target("x86-64-v2"), load_target("visionfive-2")
    assert [t.vector_bits for t in (pi, pi32, v4, v3, v2, star)] == [128, 128, 512, 256, 128, 128]
    assert [t.vector_registers for t in (pi, pi32, v4, v3, v2, star)] == [32, 16, 32, 16, 16, 8]
    assert [t.has_vectors for t in (pi, pi32, v4, v3, v2, star)] == [True, True, True, True, True, False]
    assert [t.elf_machine for t in (pi, pi32, v4, star)] == [183, 40, 62, 243]
    assert [t.elf_class for t in (pi, pi32, v4, star)] == [2, 1, 2, 2]
    assert [t.pointer_bytes for t in (pi, pi32)] == [8, 4]
    assert [t.page_bytes for t in (pi, pi32, v4, star)] == [65536, 65536, 4096, 4096]
    assert pi32.zig_triple == "arm-linux-gnueabihf.2.28"
    assert load_target("jetson-nano").zig_triple == "aarch64-linux-gnu.2.27"
    assert load_target("armv8.0-a-musl").zig_triple == "aarch64-linux-musl"
    assert load_target("rk3588").core_count == 8


@pytest.mark.parametrize(
    ("name", "binary", "cpu"),
    [
        ("raspberry-pi-4", "qemu-aarch64", "cortex-a72"),
        ("raspberry-pi-3", "qemu-aarch64", "cortex-a53"),
        ("raspberry-pi-5", "qemu-aarch64", "cortex-a76"),
        ("imx-93", "qemu-aarch64", "cortex-a76"),
        ("graviton-3", "qemu-aarch64", "max"),
        ("beaglebone-black", "qemu-arm", "cortex-a8"),
        ("raspberry-pi-4-32bit", "qemu-arm", "cortex-a7"),
        ("visionfive-2", "qemu-riscv64", "sifive-u54"),
        ("x86-64-v3", "qemu-x86_64", "max"),
    ],
)
def test_the_emulator_that_stands_in(name: str, binary: str, cpu: str) -> None:
    qemu = load_target(name).qemu
    assert qemu is not None
    assert qemu.command()[:3] == [binary, "-cpu", cpu]


def test_no_emulator_has_avx512() -> None:
    assert load_target("x86-64-v4").qemu is None


# ---- unknown names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("raspberry-pi4", "raspberry-pi-4"),
        ("Raspberry Pi 4", "raspberry-pi-4"),
        ("RASPBERRY_PI_5", "raspberry-pi-5"),
        ("rk3558", "rk3588"),
        ("graviton4", "graviton-4"),
        ("natve", "native"),
        ("sapphire-rapids", "sapphirerapids"),
        ("x86_64_v3", "x86-64-v3"),
    ],
)
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    error = refusal(typed)
    assert error.what == "unknown target"
    assert error.hint is not None
    assert meant in error.hint


@pytest.mark.parametrize(
    "name", ["", "..", "../targets/rk3588", "/etc/passwd", "rk3588\n", "rk3588\0", "é", "x" * 9999]
)
def test_a_name_never_leaves_the_folder(name: str) -> None:
    assert refusal(name).what == "unknown target"


# ---- a new board is one file


def test_a_new_board_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm

    path = write(tmp_path)
    monkeypatch.setenv("INGOT_TARGETS", os.pathsep.join(["", str(tmp_path)]))
    target = load_target("my-board")
    assert target in list_targets()
    assert load_target(str(path)) == target
    assert (target.arch, target.zig_triple, target.core_count) == ("aarch64", "aarch64-linux-gnu.2.31", 4)
    assert tvm.target.Target(target.llvm()).attrs["mcpu"] == "cortex-a53"
    assert "did you mean my-board" in (refusal("my-bord").hint or "")


def test_optional_lines_can_be_left_out(tmp_path: Path) -> None:
    text = "".join(line for line in BOARD.splitlines(True) if not line.startswith(("ram_mib", "gpu", "freq_mhz")))
    target = load_target(str(write(tmp_path, text)))
    assert (target.ram_mib, target.gpu, target.cores[0].freq_mhz) == (None, None, None)


def test_a_users_file_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, BOARD.replace("my-board", "rk3588"), "rk3588")
    monkeypatch.setenv("INGOT_TARGETS", str(tmp_path))
    assert load_target("rk3588").description == "A board of mine"
    assert sum(t.name == "rk3588" for t in list_targets()) == 1


def test_an_installed_package_carries_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ingot" / "targets").mkdir(parents=True)
    write(tmp_path / "ingot" / "targets")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "ingot" / "target.py"))
    assert [target.name for target in list_targets()] == ["my-board"]


def test_a_missing_folder_in_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_TARGETS", str(tmp_path / "gone"))
    assert "INGOT_TARGETS" in (refusal("rk3588").where or "")


def test_targets_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_target("rk3588").name = "other"  # type: ignore[misc]


# ---- files that are not valid: each message names file, field, value found and values allowed


def change(old: str, new: str) -> str:
    assert old in BOARD
    return BOARD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "field", "found"),
    [
        (change('name = "my-board"', 'name = "other"'), "name", "other"),
        (change('name = "my-board"', 'name = "../up"'), "name", "../up"),
        (change('name = "my-board"', "name = 5"), "name", "5"),
        (change('name = "my-board"\n', ""), "name", "nothing"),
        (change("A board of mine", ""), "description", "''"),
        (change("A board of mine", "x" * 201), "description", "xxx"),
        (change("A board of mine", "red \\u001b[31m"), "description", "\\x1b"),
        (change("A board of mine", "two\\nlines"), "description", "\\n"),
        (change("A board of mine", "right \\u202e to left"), "description", "\\u202e"),
        (change('["its datasheet"]', "[]"), "sources", "()"),
        (change('["its datasheet"]', '"its datasheet"'), "sources", "its datasheet"),
        (change('["its datasheet"]', "[1]"), "sources", "1"),
        (change('["its datasheet"]', "[" + '"a",' * 13 + "]"), "sources", "('a', 'a'"),
        (change("aarch64-unknown-linux-gnu", "aarch64-linux-gnu"), "triple", "aarch64-linux-gnu"),
        (change("aarch64-unknown-linux-gnu", "armv7-linux-gnueabihf"), "triple", "armv7-linux-gnueabihf"),
        (change("aarch64-unknown-linux-gnu", "mips-unknown-linux-gnu"), "triple", "mips"),
        (change("aarch64-unknown-linux-gnu", "aarch64-unknown-linux-musl"), "libc", "gnu"),
        (change('cpu = "cortex-a53"\nfeatures', 'cpu = "-mattr=+x"\nfeatures'), "cpu", "-mattr=+x"),
        (change('cpu = "cortex-a53"\nfeatures', 'cpu = "a b"\nfeatures'), "cpu", "a b"),
        (change('["neon"]', '["neon", "dotprot"]'), "features", "dotprot"),
        (change('["neon"]', '["neon", "avx2"]'), "features", "avx2"),
        (change('["neon"]', '["neon", "neon"]'), "features", "neon"),
        (change('["neon"]', '["crc"]'), "features", "crc"),
        (change('["neon"]', "[]"), "features", "an empty list"),
        (change('["neon"]', '["neon", "sve2"]'), "features", "sve2"),
        (change('["neon"]', '"neon"'), "features", "neon"),
        (change('libc = "gnu"', 'libc = "bionic"'), "libc", "bionic"),
        (change('"2.31"', "2.31"), "libc_version", "2.31"),
        (change('"2.31"', '"2"'), "libc_version", "2"),
        (change('"2.31"', '"2.5"'), "libc_version", "2.5"),
        (change('"2.31"', '"2.99"'), "libc_version", "2.99"),
        (change("ram_mib = 1024", "ram_mib = -1"), "ram_mib", "-1"),
        (change("ram_mib = 1024", "ram_mib = 1.5"), "ram_mib", "1.5"),
        (change("ram_mib = 1024", 'ram_mib = "1024"'), "ram_mib", "1024"),
        (change("ram_mib = 1024", "ram_mib = true"), "ram_mib", "True"),
        (change("ram_mib = 1024", "ram_mib = 99999999999999999999"), "ram_mib", "9999"),
        (change("ram_mib = 1024", "ram_mib = 2024-01-01"), "ram_mib", "2024"),
        (change("l1d_kib = 32\n", ""), "cache.l1d_kib", "nothing"),
        (change("l1d_kib = 32", "l1d_kib = 0"), "cache.l1d_kib", "0"),
        (change("l3_kib = 0", "l3_kib = 0\nl4_kib = 1"), "cache.l4_kib", "l4_kib"),
        (change("count = 4", "count = 0"), "cores.0.count", "0"),
        (change("count = 4", "count = nan"), "cores.0.count", "nan"),
        (BOARD[: BOARD.index("[[cores]]")], "cores", "nothing"),
        (BOARD[: BOARD.index("[[cores]]")].replace("[cache]", "cores = []\n[cache]"), "cores", "()"),
        (BOARD + BOARD[BOARD.index("[[cores]]") :] * 8, "cores", "count"),
        (change("[cache]", "cache = 1\n[cash]"), "cash", "cash"),
        (change("[cache]\nl1d_kib = 32\nl2_kib = 512\nl3_kib = 0\n", "cache = 1\n"), "cache", "1"),
        (change("gpu =", "gpus ="), "gpus", "gpus"),
        (change("gpu =", '"\\u001b[31m" ='), "", "\\x1b"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, text: str, field: str, found: str) -> None:
    path = write(tmp_path, text)
    error = refusal(path)
    assert (error.where or "").startswith(f"{path}, {field}")
    assert found in (error.found or "")
    assert "\x1b" not in str(error)


def test_a_misspelt_field_gets_the_nearest(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, change("libc_version", "libc-version")))
    assert error.what == "unknown field"
    assert (error.hint or "").startswith("did you mean libc_version")


def test_every_field_of_the_model_is_explained() -> None:
    fields = set(Target.model_fields)
    fields |= {f"cache.{name}" for name in module.Cache.model_fields}
    fields |= {f"cores.{name}" for name in module.CoreCluster.model_fields}
    assert set(FIELDS) == fields


@pytest.mark.parametrize(
    "data",
    [
        b"name = ",
        b"\xff\xfe\x00",
        b"a = " + b"[" * 30000,
        b"a = " + b"9" * 6000,
        b"a" * 200 + b" = {" * 5000,
        b"name = 'x'\nname = 'y'\n",
        b"\0",
        b"[" * 60000,
    ],
)
def test_what_is_not_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "my-board.toml"
    path.write_bytes(data)
    assert refusal(path).what == "not a TOML file"


def test_an_empty_file_lacks_a_field(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "")).what == "a field is missing"


@pytest.mark.parametrize(("size", "ok"), [(module.MAX_FILE_BYTES, True), (module.MAX_FILE_BYTES + 1, False)])
def test_a_large_file_is_not_read(tmp_path: Path, size: int, ok: bool) -> None:
    path = write(tmp_path, BOARD + "#" * (size - len(BOARD)))
    if ok:
        assert load_target(str(path)).name == "my-board"
    else:
        assert str(size) in (refusal(path).found or "")


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in (refusal(tmp_path / "gone.toml").found or "")
    assert refusal("nul\0.toml").what == "cannot read the target file"
    (tmp_path / "folder.toml").mkdir()
    assert refusal(tmp_path / "folder.toml")
    os.mkfifo(tmp_path / "fifo.toml")
    assert refusal(tmp_path / "fifo.toml").what == "not a file"
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    assert refusal(tmp_path / "endless.toml").what == "not a file"


def test_native_is_no_file_name(tmp_path: Path) -> None:
    path = write(tmp_path, BOARD.replace("my-board", "native"), "native")
    assert refusal(path).what == "this name is taken"


def test_a_cpu_llvm_does_not_know_is_refused_with_those_near(tmp_path: Path) -> None:
    target = load_target(str(write(tmp_path, change('cpu = "cortex-a53"\nfeatures', 'cpu = "cortex-a5x"\nfeatures'))))
    with pytest.raises(TargetError) as caught:
        target.llvm()
    assert "cortex-a53" in (caught.value.allowed or "")


# ---- this machine

ZEN = "flags : fpu sse sse2 pni ssse3 sse4_1 sse4_2 cx16 popcnt avx avx2 fma f16c bmi1 bmi2 abm movbe"
AVX512 = " avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16"


def test_native_describes_this_machine() -> None:
    target = native_target()
    assert target == load_target("native")
    assert target.name == "native"
    assert target.core_count >= 1
    assert target.ram_mib is not None
    assert "prefer-256-bit" not in " ".join(target.llvm()["mattr"]).replace("-prefer-256-bit", "")


@pytest.mark.parametrize(
    ("flags", "cpu"),
    [
        ("flags : fpu sse sse2", "x86-64"),
        ("flags : pni ssse3 sse4_1 sse4_2 cx16 popcnt", "x86-64-v2"),
        (ZEN, "x86-64-v3"),
        (ZEN + AVX512, "x86-64-v4"),
        (ZEN + " avx512f", "x86-64-v3"),
        (ZEN.replace("movbe", "") + AVX512, "x86-64-v2"),
        ("", "x86-64"),
    ],
)
def test_native_x86_goes_by_flags(flags: str, cpu: str) -> None:
    fields = describe_machine("x86_64", f"model name : Sapphire Rapids\n{flags}\n")
    assert fields["cpu"] == cpu


def test_a_feature_that_one_core_lacks_is_not_used() -> None:
    big = "Features : fp asimd atomics asimdrdm asimddp fphp asimdhp crc32\n"
    little = "Features : fp asimd crc32\n"
    assert cpu_features("aarch64", big) == ["neon", "crc", "lse", "rdm", "fullfp16", "dotprod"]
    assert cpu_features("aarch64", big + little) == ["neon", "crc"]


def test_a_feature_whose_ground_is_hidden_is_not_used() -> None:
    # Some hypervisors hide AVX and forget AVX-512.
    hidden = ZEN.replace(" avx ", " ") + AVX512
    assert not {"avx2", "fma", "avx512f", "avx512vnni"} & set(cpu_features("x86_64", hidden))


@pytest.mark.parametrize(
    ("words", "features"),
    [
        ("half thumb vfp edsp neon vfpv3 tls vfpd32", "neon vfp3 thumb2"),  # Cortex-A8
        ("half thumb vfp edsp vfpv3 vfpv3d16 tls", "thumb2"),  # no NEON, 16 registers
        ("half thumb vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae crc32", "neon vfp4 vfp3 thumb2 hwdiv"),
        ("fp asimd evtstrm crc32 cpuid", "neon vfp4 vfp3 thumb2 hwdiv"),  # a 64-bit kernel's words
    ],
)
def test_native_arm(words: str, features: str) -> None:
    assert cpu_features("arm", f"Features : {words}\n") == features.split()


@pytest.mark.parametrize(
    ("isa", "features"),
    [
        ("rv64imafdc", "m a f d c"),
        ("rv64gc_zba_zbb", "m a f d c zba zbb"),
        ("rv64imafdcv_zicsr_zba", "m a f d c v zba"),
    ],
)
def test_native_riscv(isa: str, features: str) -> None:
    assert cpu_features("riscv64", f"hart : 0\nisa : {isa}\n") == features.split()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(TargetError, match="not supported as a target"):
        describe_machine("s390x", "")


def test_a_hypervisors_strange_model_name_is_harmless() -> None:
    fields = describe_machine("x86_64", "model name : \x1b[31mEvil\x07" + "x" * 500 + "\nflags : pni\n")
    assert re.fullmatch(r"[ -~]{1,80}", fields["cores"][0]["name"])
