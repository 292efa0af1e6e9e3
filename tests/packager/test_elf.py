"""The ELF reader: right on real files, and no surprise on damaged ones."""

from __future__ import annotations

import random
import struct

import pytest

from handmade import handmade
from ingot.errors import LoadError
from ingot.packager.elf import STV_HIDDEN, Elf, hide_symbols


def objects() -> dict[str, bytes]:
    return {target: handmade(target)[0].objects[0] for target in ("x86-64-v2", "raspberry-pi-3-32bit")}


@pytest.mark.parametrize(("target", "bits", "machine"), [("x86-64-v2", 64, 62), ("raspberry-pi-3-32bit", 32, 40)])
def test_reads_an_object(target: str, bits: int, machine: int) -> None:
    elf = Elf(objects()[target])
    assert (elf.bits, elf.machine, elf.kind) == (bits, machine, 1)
    defined = {s.name for s in elf.symbols if s.defined and s.is_global}
    assert defined == {"ingot_demo_scale", "ingot_demo_tanh", "ingot_demo_add_index"}
    assert "tanhf" in elf.undefined()
    text = elf.section(".text")
    assert text is not None
    assert len(elf.contents(text)) == text.size
    assert elf.section(".nothing") is None
    assert elf.needed == ()
    assert elf.versions == {}


@pytest.mark.parametrize("target", ["x86-64-v2", "raspberry-pi-3-32bit"])
def test_hides_what_is_defined_and_nothing_else(target: str) -> None:
    data = objects()[target]
    hidden = hide_symbols(data)
    assert len(hidden) == len(data)
    for before, after in zip(Elf(data).symbols, Elf(hidden).symbols, strict=True):
        assert (before.name, before.section, before.binding) == (after.name, after.section, after.binding)
        assert after.visibility == (STV_HIDDEN if before.defined and before.is_global else before.visibility)
    assert hide_symbols(hidden) == hidden


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"not an ELF file" * 10, b"\x7fELF" + bytes(60), bytes(4096)])
def test_refuses_what_is_no_elf_file(data: bytes) -> None:
    with pytest.raises(LoadError, match="ELF"):
        Elf(data, "a.so")


@pytest.mark.parametrize("target", ["x86-64-v2", "raspberry-pi-3-32bit"])
def test_damaged_files_give_only_load_errors(target: str) -> None:
    data = objects()[target]
    rng = random.Random(1)
    refused = 0
    for trial in range(1500):
        damaged = bytearray(data[: rng.randrange(len(data))] if trial % 3 == 0 else data)
        for _ in range(rng.randrange(1, 8) if damaged else 0):
            # The interesting bytes: header, section table, symbol table.
            low, high = rng.choice([(0, 64), (max(0, len(damaged) - 2000), len(damaged)), (0, len(damaged))])
            value = rng.choice([0, 0xFF, 0x7F, rng.randrange(256)])
            damaged[rng.randrange(low, max(low + 1, min(high, len(damaged))))] = value
        try:
            elf = Elf(bytes(damaged))
            for section in elf.sections:
                elf.contents(section)
        except LoadError:
            refused += 1
    assert refused > 500


def test_huge_offsets_are_refused() -> None:
    data = bytearray(objects()["x86-64-v2"])
    for offset in (2**63, 2**64 - 1, len(data) - 1):
        struct.pack_into("<Q", data, 40, offset)
        with pytest.raises(LoadError, match="damaged"):
            Elf(bytes(data))


def test_an_endless_name_is_refused() -> None:
    data = bytearray(objects()["x86-64-v2"])
    names = next(s for s in Elf(bytes(data)).sections if s.name == ".strtab")
    data[names.offset : names.offset + names.size] = b"x" * names.size
    with pytest.raises(LoadError, match="no end"):
        Elf(bytes(data))
