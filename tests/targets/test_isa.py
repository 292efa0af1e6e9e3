"""Every target's code holds only instructions of its feature list, and the checker that says so can fail."""

from __future__ import annotations

import re
import subprocess

import pytest

from ingot.architectures import FEATURES, LLVM_NAMES, MANDATORY, NEEDS, NEVER
from ingot.target import Target, list_targets, load_target, native_target
from targets import isa, kernels, planted

TARGETS = [target.name for target in list_targets()]
EXAMPLES = {"x86_64": "x86-64-v2", "aarch64": "armv8.0-a", "arm": "beaglebone-black", "riscv64": "visionfive-2"}
ARCHITECTURES = sorted(EXAMPLES)


def need_tools(arch: str) -> None:
    if missing := isa.missing_tools(arch):
        pytest.skip(f"no disassembler for {arch}: apt-get install {' '.join(missing)}")


def with_features(arch: str, features: set[str]) -> Target:
    ordered = tuple(f for f in FEATURES[arch] if f in features)
    return load_target(EXAMPLES[arch]).model_copy(update={"features": ordered})


def closure(arch: str, feature: str) -> set[str]:
    """The smallest list a target file may hold that has `feature`."""
    found = {feature, *MANDATORY[arch]}
    while more := {n for f in found for n in NEEDS[arch].get(f, ())} - found:
        found |= more
    return found


def without(arch: str, feature: str) -> set[str]:
    """The largest list a target file may hold that lacks `feature`."""
    return {f for f in FEATURES[arch] if feature not in closure(arch, f)}


@pytest.mark.parametrize("name", TARGETS)
def test_llvm_sees_exactly_the_listed_features(name: str) -> None:
    import tvm
    from tvm.target import codegen

    target = load_target(name)
    effective = {str(f) for f in codegen.llvm_get_cpu_features(tvm.target.Target(target.llvm()))}
    names = LLVM_NAMES.get(target.arch, {})
    listed = {n for f in target.features for n in names.get(f, (f,))}
    known = {n for f in FEATURES[target.arch] for n in names.get(f, (f,))}
    assert effective & known == listed
    assert not effective & set(NEVER[target.arch])
    assert "prefer-256-bit" not in effective


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_hold_no_foreign_instruction(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    target = load_target(name)
    need_tools(target.arch)
    code = kernels.object_for(target)
    # LLVM only warns about a CPU or feature it does not know, and then ignores it.
    assert "not a recognized" not in capfd.readouterr().err
    assert isa.foreign_instructions(code, target) == []


def test_native_code_holds_no_foreign_instruction() -> None:
    target = native_target()
    need_tools(target.arch)
    assert isa.foreign_instructions(kernels.object_for(target), target) == []


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("graviton-4", "graviton-3"),
        ("graviton-3", "graviton-2"),
        ("graviton-2", "raspberry-pi-4"),
        ("raspberry-pi-4-32bit", "beaglebone-black"),
        ("sapphirerapids", "znver4"),
        ("znver4", "x86-64-v4"),
        ("x86-64-v4", "x86-64-v3"),
        ("x86-64-v3", "x86-64-v2"),
    ],
)
def test_code_for_a_larger_cpu_is_foreign_to_a_smaller(more: str, less: str) -> None:
    need_tools(load_target(more).arch)
    assert isa.foreign_instructions(kernels.object_for(load_target(more)), load_target(less))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_plain_instructions_are_at_home_everywhere(arch: str) -> None:
    need_tools(arch)
    target = with_features(arch, set(MANDATORY[arch]))
    for code, text in planted.PLAIN[arch]:
        assert isa.foreign_instructions(planted.elf_object(target, code), target) == [], text


@pytest.mark.parametrize(
    ("arch", "feature", "code", "text"), [(a, *row) for a in ARCHITECTURES for row in planted.LISTED[a]]
)
def test_one_planted_instruction_is_found_exactly_without_its_feature(
    arch: str, feature: str, code: str, text: str
) -> None:
    need_tools(arch)
    plain = planted.PLAIN[arch][0][0]
    small, large = with_features(arch, closure(arch, feature)), with_features(arch, without(arch, feature))
    assert isa.foreign_instructions(planted.elf_object(small, plain, code, plain), small) == [], text
    assert len(isa.foreign_instructions(planted.elf_object(large, plain, code, plain), large)) == 1, text


@pytest.mark.parametrize(
    ("arch", "extension", "code", "text"), [(a, *row) for a in ARCHITECTURES for row in planted.NEVER[a]]
)
def test_one_planted_instruction_of_no_feature_is_always_found(arch: str, extension: str, code: str, text: str) -> None:
    need_tools(arch)
    target = with_features(arch, set(FEATURES[arch]))
    assert len(isa.foreign_instructions(planted.elf_object(target, code), target)) == 1, (extension, text)


def test_evex_is_found_though_its_text_is_that_of_avx() -> None:
    need_tools("x86_64")
    target = load_target("x86-64-v3")
    code = planted.elf_object(target, "62 f1 7c 08 58 d1")  # {evex} vaddps %xmm1, %xmm0, %xmm2
    assert len(isa.foreign_instructions(code, target)) == 1


def test_every_feature_has_a_planted_instruction() -> None:
    for arch, features in FEATURES.items():
        tested = {row[0] for row in planted.LISTED[arch]}
        assert set(features) - tested == set(MANDATORY[arch]), arch


@pytest.mark.parametrize("name", ["sapphirerapids", "znver4", "x86-64-v4"])
def test_sixteen_lanes_are_one_zmm_register(name: str) -> None:
    need_tools("x86_64")
    code = kernels.object_for(load_target(name))
    text = disassemble(code)
    body = re.search(r"<fma_f32>:\n(.*?)\n\n", text, re.DOTALL)
    assert body
    assert len(re.findall(r"vfm\w+ps\s.*%zmm", body[1])) >= 4
    assert not re.findall(r"vfm\w+ps\s.*%ymm", body[1])
    plain = re.search(r"<plain_f32>:\n(.*?)\n\n", text, re.DOTALL)
    assert plain
    assert "%zmm" in plain[1], "LLVM's own vectorizer prefers narrower vectors"


@pytest.mark.parametrize(
    ("name", "kernel", "instruction"),
    [
        ("raspberry-pi-4", "fma_f32", r"fmla\s+v\d+\.4s"),
        ("raspberry-pi-4-32bit", "fma_f32", r"vfma\.f32\s+q"),
        ("raspberry-pi-5", "dot_s8", r"\bsdot\s"),
        ("raspberry-pi-5", "add_f16", r"\.8h"),
        ("beaglebone-black", "fma_f32", r"vm(la|ul)\.f32"),
        ("visionfive-2", "fma_f32", r"fmadd\.s"),
    ],
)
def test_listed_features_are_used(name: str, kernel: str, instruction: str) -> None:
    target = load_target(name)
    need_tools(target.arch)
    text = disassemble(kernels.object_for(target), ",".join(f"+{f}" for f in target.features))
    body = re.search(rf"<{kernel}>:\n(.*?)(\n\n|$)", text, re.DOTALL)
    assert body
    assert re.search(instruction, body[1])


def test_a_file_of_another_machine_is_refused() -> None:
    pi, pc = load_target("raspberry-pi-4"), load_target("x86-64-v2")
    with pytest.raises(ValueError, match="not an ELF file for x86_64"):
        isa.foreign_instructions(planted.elf_object(pi, "20 d4 22 4e"), pc)


def test_a_stripped_arm_file_is_refused() -> None:
    need_tools("arm")
    target = load_target("raspberry-pi-3-32bit")
    with pytest.raises(ValueError, match="stripped"):
        isa.foreign_instructions(planted.elf_object(target, "02 00 81 e0", mark=False), target)


def disassemble(code: bytes, features: str = "") -> str:
    import tempfile

    tool = isa.llvm_objdump()
    if not tool:
        pytest.skip("no llvm-objdump: apt-get install llvm")
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        file.write(code)
        file.flush()
        command = [tool, "-d", "--no-show-raw-insn", *([f"--mattr={features}"] if features else []), file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
