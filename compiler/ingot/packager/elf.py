"""A small, bounds-checked ELF reader: sections, symbols, libraries needed. Reads data, never maps or runs it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ingot.errors import LoadError

SHT_NOBITS = 8
_SHT_SYMTAB, _SHT_DYNAMIC, _SHT_DYNSYM, _SHT_VERNEED = 2, 6, 11, 0x6FFFFFFE
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
_STB_LOCAL, _STT_SECTION, _STT_FILE = 0, 3, 4
STV_HIDDEN = 2
_DT_NEEDED = 1
_MAX_SECTIONS = 100_000
_MAX_SYMBOLS = 2_000_000
# A damaged or hostile file may name every symbol by the same endless string.
_MAX_NAME, _MAX_ALL_NAMES = 4096, 256 << 20


@dataclass(frozen=True)
class Section:
    """One row of the section table. `offset` and `size` are bytes in the file, `address` in memory."""

    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    alignment: int

    @property
    def in_file(self) -> bool:
        """Whether the section's bytes are in the file (as opposed to zeros made at load time)."""
        return self.kind not in (0, SHT_NOBITS)


@dataclass(frozen=True)
class Symbol:
    """One symbol. `section` is 0 for a symbol defined elsewhere; `position` is where its row lies in the file."""

    name: str
    section: int
    binding: int
    kind: int
    visibility: int
    position: int

    @property
    def defined(self) -> bool:
        """Whether this file defines the symbol."""
        return self.section != 0

    @property
    def is_global(self) -> bool:
        """Global or weak, and no bookkeeping row."""
        return self.binding != _STB_LOCAL and self.kind not in (_STT_SECTION, _STT_FILE) and bool(self.name)


class Elf:
    """A parsed little-endian ELF file, 32 or 64 bits.

    Attributes: `bits` (32 or 64), `machine` (the ELF number), `kind` (1 relocatable, 3 shared library), `sections`,
    `symbols` (static table), `dynamic_symbols`, `needed` (library names), `versions` (library -> version names it
    must provide). Raises LoadError where the bytes are not such a file or contradict themselves.
    """

    def __init__(self, data: bytes, where: str = "ELF file") -> None:
        self._data = memoryview(data)
        self._where = where
        self._tables: dict[int, bytes] = {}
        self._name_bytes = 0
        if len(data) < 52 or bytes(data[:4]) != b"\x7fELF":
            raise LoadError("this is not an ELF file", where=where)
        if data[4] not in (1, 2) or data[5] != 1:
            raise self._damaged("unknown class or byte order")
        self.bits = 32 * data[4]
        wide = self.bits == 64
        layout = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
        self.kind, self.machine, _, _, _, offset, self.flags, _, _, _, size, count, names = self._unpack(layout, 16)
        if count and size != (64 if wide else 40):
            raise self._damaged("unexpected size of a section header")
        if count > _MAX_SECTIONS:
            raise self._damaged("too many sections")
        row = "<IIQQQQIIQQ" if wide else "<IIIIIIIIII"
        rows = [self._unpack(row, offset + i * size) for i in range(count)]
        raw = [Section("", r[1], r[2], r[3], r[4], r[5], r[6], r[8]) for r in rows]
        if count and names >= count:
            raise self._damaged("no section names")
        self.sections = tuple(
            Section(self._string(raw[names], r[0]), s.kind, s.flags, s.address, s.offset, s.size, s.link, s.alignment)
            for r, s in zip(rows, raw, strict=True)
        )
        self.symbols = self._read_symbols(_SHT_SYMTAB)
        self.dynamic_symbols = self._read_symbols(_SHT_DYNSYM)
        self.needed = self._read_needed()
        self.versions = self._read_versions()

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return next((s for s in self.sections if s.name == name), None)

    def contents(self, section: Section) -> memoryview:
        """The section's bytes in the file; empty for one that has none."""
        if not section.in_file:
            return self._data[:0]
        if section.offset + section.size > len(self._data):
            raise self._damaged(f"section '{section.name}' ends beyond the file")
        return self._data[section.offset : section.offset + section.size]

    def exported(self) -> list[str]:
        """Names a shared library offers to others, sorted."""
        return sorted(s.name for s in self.dynamic_symbols if s.defined and s.is_global)

    def undefined(self) -> list[str]:
        """Names that must come from elsewhere (of the static table, or the dynamic one where there is no other)."""
        table = self.symbols or self.dynamic_symbols
        return sorted({s.name for s in table if not s.defined and s.is_global})

    def _damaged(self, why: str) -> LoadError:
        return LoadError(f"the ELF file is damaged: {why}", where=self._where)

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        if offset + struct.calcsize(layout) > len(self._data):
            raise self._damaged(f"it ends at byte {len(self._data)}, a table goes on")
        return struct.unpack_from(layout, self._data, offset)

    def _string(self, table: Section, offset: int) -> str:
        if offset == 0:
            return ""
        data = self._tables.get(table.offset)
        if data is None or len(data) != table.size:
            data = self._tables[table.offset] = bytes(self.contents(table))
        end = data.find(b"\0", offset, offset + _MAX_NAME)
        if end < 0:
            raise self._damaged("a name lies outside its table, or has no end")
        self._name_bytes += end - offset
        if self._name_bytes > _MAX_ALL_NAMES:
            raise self._damaged("too many names")
        return data[offset:end].decode("utf-8", "replace")

    def _linked(self, section: Section) -> Section:
        if section.link >= len(self.sections):
            raise self._damaged(f"section '{section.name}' has no string table")
        return self.sections[section.link]

    def _read_symbols(self, kind: int) -> tuple[Symbol, ...]:
        layout, size = ("<IBBHQQ", 24) if self.bits == 64 else ("<IIIBBH", 16)
        result: list[Symbol] = []
        for section in (s for s in self.sections if s.kind == kind):
            count = len(self.contents(section)) // size
            if count > _MAX_SYMBOLS:
                raise self._damaged("too many symbols")
            names = self._linked(section)
            for i in range(count):
                position = section.offset + i * size
                row = self._unpack(layout, position)
                name, info, other, index = (row[0], *row[1:4]) if self.bits == 64 else (row[0], *row[3:6])
                result.append(Symbol(self._string(names, name), index, info >> 4, info & 15, other & 3, position))
        return tuple(result)

    def _read_needed(self) -> tuple[str, ...]:
        layout, size = ("<qQ", 16) if self.bits == 64 else ("<iI", 8)
        result: list[str] = []
        for section in (s for s in self.sections if s.kind == _SHT_DYNAMIC):
            for i in range(len(self.contents(section)) // size):
                tag, value = self._unpack(layout, section.offset + i * size)
                if tag == 0:
                    break
                if tag == _DT_NEEDED:
                    result.append(self._string(self._linked(section), value))
        return tuple(result)

    def _read_versions(self) -> dict[str, tuple[str, ...]]:
        result: dict[str, tuple[str, ...]] = {}
        for section in (s for s in self.sections if s.kind == _SHT_VERNEED):
            names, offset = self._linked(section), section.offset
            for _ in range(len(self.contents(section)) // 16):
                _, count, library, first, following = self._unpack("<HHIII", offset)
                at, found = offset + first, []
                for _ in range(count):
                    _, _, _, name, step = self._unpack("<IHHII", at)
                    found.append(self._string(names, name))
                    at += step
                result[self._string(names, library)] = tuple(sorted(found))
                if not following:
                    break
                offset += following
        return result


def hide_symbols(data: bytes, where: str = "object") -> bytes:
    """The same relocatable object with every symbol it defines hidden, so that no artifact exports it."""
    elf = Elf(data, where)
    result = bytearray(data)
    other = 5 if elf.bits == 64 else 13  # st_other within a row
    for symbol in elf.symbols:
        if symbol.defined and symbol.is_global:
            result[symbol.position + other] = (result[symbol.position + other] & ~3) | STV_HIDDEN
    return bytes(result)
