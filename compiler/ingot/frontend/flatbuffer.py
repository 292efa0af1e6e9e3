"""A bounds verifier for flatbuffers, driven by a table of fields: nothing is read before it is known to be inside.

The buffer is hostile until proven otherwise: every offset, vtable, vector and string is checked against the file's
size, nesting and the number of visited tables are bounded, and unknown (newer) fields are left unread.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from ingot.errors import ModelError

_SCALARS = {"bool": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "f32": 4, "i64": 8, "u64": 8, "f64": 8}
_MAX_DEPTH = 32
_MAX_TABLES = 4_000_000


@dataclass(frozen=True)
class FieldType:
    """One field of a table: a scalar ("u32"), "string", a vector of scalars ("[i32]") or of strings ("[string]"),
    a table (its name), a vector of tables ("[Tensor]"), or "?" for a table whose fields are not known here.

    "|A,B" is a union: a table of the kind that the field before it numbers, from 1 on; "" or beyond the last: as "?".
    """

    name: str
    type: str


Schema = Mapping[str, Mapping[int, FieldType]]


@dataclass
class Verifier:
    """Verifies one buffer against one schema."""

    data: bytes
    schema: Schema
    tables: int = 0
    seen: set[tuple[int, str]] = field(default_factory=set)

    def verify(self, root_table: str) -> None:
        """Raise ModelError unless the buffer's root is a well-formed `root_table`."""
        root = self._u32(0, "the root offset")
        self._table(root, root_table, root_table, 0)

    def _fail(self, where: str, found: str) -> ModelError:
        return ModelError(
            "the file is truncated or damaged",
            where=where,
            found=found,
            allowed=f"offsets inside the file of {len(self.data)} bytes",
            hint="fetch or export the file again",
        )

    def _inside(self, at: int, size: int, where: str) -> None:
        if at < 0 or size < 0 or at + size > len(self.data):
            raise self._fail(where, f"{size} bytes at {at}")

    def _u32(self, at: int, where: str) -> int:
        self._inside(at, 4, where)
        return int.from_bytes(self.data[at : at + 4], "little")

    def _table(self, at: int, kind: str, where: str, depth: int) -> None:
        if (at, kind) in self.seen:
            return
        self.seen.add((at, kind))
        self.tables += 1
        if depth > _MAX_DEPTH or self.tables > _MAX_TABLES:
            raise ModelError("the file nests too deeply or has too many tables", where=where, found=f"at byte {at}")
        self._inside(at, 4, where)
        vtable = at - struct.unpack_from("<i", self.data, at)[0]
        self._inside(vtable, 4, f"{where}, vtable")
        vtable_size, table_size = struct.unpack_from("<HH", self.data, vtable)
        if vtable_size < 4 or vtable_size % 2 or table_size < 4:
            raise self._fail(f"{where}, vtable", f"sizes {vtable_size} and {table_size}")
        self._inside(vtable, vtable_size, f"{where}, vtable")
        self._inside(at, table_size, where)
        fields = self.schema.get(kind, {})
        for index in range((vtable_size - 4) // 2):
            offset = struct.unpack_from("<H", self.data, vtable + 4 + 2 * index)[0]
            if offset == 0:
                continue
            if not 4 <= offset < table_size:
                raise self._fail(f"{where}, field {index}", f"offset {offset} in a table of {table_size} bytes")
            if index in fields:
                known = fields[index]
                kind = known.type
                if kind.startswith("|"):
                    kind = self._member(at, vtable, index - 1, kind[1:].split(","))
                self._value(at + offset, table_size - offset, kind, f"{where}.{known.name}", depth)

    def _member(self, at: int, vtable: int, index: int, kinds: list[str]) -> str:
        """The kind of a union's table, by the u8 in field `index`."""
        offset = struct.unpack_from("<H", self.data, vtable + 4 + 2 * index)[0]
        number = self.data[at + offset] if offset else 0
        return kinds[number - 1] or "?" if 1 <= number <= len(kinds) else "?"

    def _value(self, at: int, room: int, kind: str, where: str, depth: int) -> None:
        size = _SCALARS.get(kind, 4)
        if size > room:
            raise self._fail(where, f"{size} bytes where the table has {room}")
        if kind in _SCALARS:
            return
        target = at + self._u32(at, where)
        if kind == "string":
            self._vector(target, 1, where)
        elif kind.startswith("["):
            self._elements(target, kind[1:-1], where, depth)
        else:
            self._table(target, kind, where, depth + 1)

    def _vector(self, at: int, element: int, where: str) -> int:
        count = self._u32(at, where)
        self._inside(at + 4, count * element, where)
        return count

    def _elements(self, at: int, kind: str, where: str, depth: int) -> None:
        if kind in _SCALARS:
            self._vector(at, _SCALARS[kind], where)
            return
        count = self._vector(at, 4, where)
        for index in range(count):
            slot = at + 4 + 4 * index
            target = slot + self._u32(slot, where)
            if kind == "string":
                self._vector(target, 1, f"{where}[{index}]")
            else:
                self._table(target, kind, f"{where}[{index}]", depth + 1)
