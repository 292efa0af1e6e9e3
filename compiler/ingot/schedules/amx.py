"""Products of tiles with Intel AMX: each instruction's meaning and machine form.

    sums[i][j] += data[i] x weight[j]        for i < down, j < across

`sums[i][j]` is a tile of rows x n, `data[i]` of rows x k and `weight[j]` of k x n, stored as [k/g][n][g], where the g
values of four bytes lie together. Products are summed in int32, or, of bfloat16, in float32. The meaning is a TIR
function (`meaning`). The machine form is LLVM text (`_text`): the sums stay in tile registers from `zero` over every
`step` to `store`. On a machine without tiles the three do the same on memory.

The bfloat16 instruction flushes denormals and sums the even and the odd products of a step apart: its results differ
from the meaning by about 2^-24 of the largest product, so that the meaning fixes no order.

Encodings, limits of the tile configuration and rounding: Intel 64 and IA-32 Architectures Software Developer's Manual,
volume 2, and volume 1, chapter 18.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import tvm_ffi
from tvm import ir, te, tirx

from ingot.errors import CompilerError
from ingot.schedules.half import widen_bf16
from ingot.schedules.llvm_forms import name_of, register
from ingot.schedules.statements import Expr, Stmt, integer
from ingot.schedules.vector import DTYPE_BYTES
from ingot.target import Target

#: What palette 1 has: tile registers, rows of one, bytes of a row.
TILES, TILE_ROWS, TILE_BYTES = 8, 16, 64
_FAMILY = "amx"
#: Cycles from one product into a tile to the next into the same one (Intel's optimisation manual).
LATENCY = 52


@dataclass(frozen=True)
class Tdp:
    """An instruction. data, weight, total: dtypes of the factors and of the sums. feature: what the CPU must have."""

    name: str
    data: str
    weight: str
    total: str
    feature: str

    @property
    def group(self) -> int:
        """Return the values that lie together in four bytes of a row."""
        return 4 // DTYPE_BYTES[self.data]

    @property
    def widest(self) -> int:
        """Return the most values one row of a tile holds."""
        return TILE_BYTES // DTYPE_BYTES[self.data]


TDPBF16 = Tdp("tdpbf16ps", "uint16", "uint16", "float32", "amx-bf16")
#: Of integers: one for every two kinds of bytes, so that data are read as they are stored.
INTEGERS: tuple[Tdp, ...] = (
    Tdp("tdpbssd", "int8", "int8", "int32", "amx-int8"),
    Tdp("tdpbsud", "int8", "uint8", "int32", "amx-int8"),
    Tdp("tdpbusd", "uint8", "int8", "int32", "amx-int8"),
    Tdp("tdpbuud", "uint8", "uint8", "int32", "amx-int8"),
)
ALL = (TDPBF16, *INTEGERS)


@dataclass(frozen=True)
class Block:
    """What one step multiplies: `down` tiles of data, rows x k, with `across` tiles of weights, k x n."""

    down: int
    across: int
    rows: int
    k: int
    n: int

    @property
    def tiles(self) -> int:
        """Return how many tile registers it takes."""
        return self.down * self.across + self.down + self.across

    @property
    def cycles(self) -> int:
        """Return the cycles of a step: a row of sums each, or until the sums of the step before are there."""
        return max(self.down * self.across * self.rows, LATENCY)


def tdp_named(name: str) -> Tdp:
    """Return the instruction of that name."""
    return next(tdp for tdp in ALL if tdp.name == name)


def meaning(tdp: Tdp, block: Block, steps: int) -> Expr:
    """Return the PrimFunc (data [down][rows][steps * k], weight [across][steps][k/g][n][g], sums) of some steps."""
    b, g = block, tdp.group
    data = te.placeholder((b.down, b.rows, steps * b.k), tdp.data, "data")
    weight = te.placeholder((b.across, steps, b.k // g, b.n, g), tdp.weight, "weight")
    at = te.reduce_axis((0, steps * b.k), "k")

    def wide(value: Expr) -> Expr:
        return widen_bf16(value) if tdp is TDPBF16 else value.astype(tdp.total)

    sums = te.compute(
        (b.down, b.across, b.rows, b.n),
        lambda i, j, r, c: te.sum(
            wide(data[i, r, at]) * wide(weight[j, at // b.k, at % b.k // g, c, at % g]),
            axis=at,
        ),
        "sums",
    )
    return te.create_prim_func([data, weight, sums], index_dtype_override="int64")


# -- machine form: statements that work on tile registers --------------------------------------------------------------


def zero(tdp: Tdp, block: Block, sums: Expr) -> Stmt:
    """Return the statement that clears all sums; `sums` is the buffer [down][across][rows][n] of all three statements.

    It is written by `store`, or by each of them on a machine without tiles.
    """
    return _run("zero", tdp, block, _begin(sums))


def step(tdp: Tdp, block: Block, sums: Expr, data: Sequence[Expr], stride: int, weights: Sequence[Expr]) -> Stmt:
    """Return the statement that loads tiles and adds their products.

    data, weights: a pointer for each tile. stride: bytes between the rows of one of data.
    """
    return _run("step", tdp, block, _begin(sums), integer(stride), *data, *weights)


def store(tdp: Tdp, block: Block, sums: Expr) -> Stmt:
    """Return the statement after which all sums are in memory."""
    return _run("store", tdp, block, _begin(sums))


def _begin(sums: Expr) -> Expr:
    return address(sums, [integer(0)] * 4)


def address(buffer: Expr, place: Sequence[Expr]) -> Expr:
    """Return the pointer to one element of a buffer."""
    return tirx.address_of(tirx.BufferLoad(buffer, list(place)))


def _run(action: str, tdp: Tdp, block: Block, *args: Expr) -> Stmt:
    return tirx.Evaluate(tirx.call_extern("int32", name_of(_FAMILY, action, tdp.name, *astuple(block)), *args))


def configured(body: Stmt) -> Stmt:
    """Return the body of a kernel; one that works on tiles configures them first and releases them last.

    The threads that run kernels are shared, and a thread's state is only small to save while its tiles are released.
    """
    used = {(tdp, block) for tdp, block, _ in _forms_of(body)}
    if not used:
        return body
    if len(used) > 1:
        raise CompilerError("a kernel uses tiles of several sizes", found=str(sorted(map(str, used))), allowed="one")
    ((tdp, block),) = used
    return tirx.SeqStmt([_run("configure", tdp, block), body, _run("release", tdp, block)])


def cycles_of(call: Expr) -> int:
    """Return the cycles of a call if it is a step, else 0."""
    return sum(block.cycles for _, block, action in _forms_of(call) if action == "step")


def _forms_of(node: Expr) -> list[tuple[Tdp, Block, str]]:
    found: list[tuple[Tdp, Block, str]] = []

    def visit(call: Expr) -> None:
        if len(call.args) > 0 and isinstance(call.args[0], ir.StringImm):
            name = str(call.args[0].value)
            if name.startswith(name_of(_FAMILY, "")):
                action, tdp, block = _parse(name)
                found.append((tdp, block, action))

    tvm_ffi.structural_walk(node, [(ir.Call, visit)])
    return found


def _parse(name: str) -> tuple[str, Tdp, Block]:
    action, instruction, *sizes = name.removeprefix(name_of(_FAMILY, "")).split("_")
    return action, tdp_named(instruction), Block(*map(int, sizes))


def _text(target: Target, name: str) -> str:
    action, tdp, block = _parse(name)
    forms = _MACHINE if tdp.feature in target.features else _PORTABLE
    params, lines, outside = forms[action](tdp, block, name)
    return "\n".join([f"define i32 @{name}({params}) alwaysinline {{", *lines, "ret i32 0", "}", *outside])


#: What a form is written as: its parameters, its lines, and what stands beside it.
_Written = tuple[str, list[str], list[str]]


def configuration(tdp: Tdp, block: Block) -> bytes:
    """Return the 64 bytes that LDTILECFG reads: palette 1, then the bytes of a row and the rows of each tile."""
    b, size = block, DTYPE_BYTES[tdp.data]
    tiles = [(b.rows, b.n * 4)] * (b.down * b.across)
    tiles += [(b.rows, b.k * size)] * b.down + [(b.k * size // 4, b.n * 4)] * b.across
    if b.tiles > TILES or any(rows > TILE_ROWS or width > TILE_BYTES or width % 4 for rows, width in tiles):
        raise CompilerError("a block does not fit the tile registers", found=str(block))
    raw = bytearray(64)
    raw[0] = 1
    for i, (rows, width) in enumerate(tiles):
        raw[16 + 2 * i] = width
        raw[48 + i] = rows
    return bytes(raw)


def _configure(tdp: Tdp, block: Block, name: str) -> _Written:
    data = "".join(f"\\{byte:02x}" for byte in configuration(tdp, block))
    table = f'@{name}_table = private unnamed_addr constant [64 x i8] c"{data}", align 64'
    return "", [f"call void @llvm.x86.ldtilecfg(ptr @{name}_table)"], [table, "declare void @llvm.x86.ldtilecfg(ptr)"]


def _release(tdp: Tdp, block: Block, name: str) -> _Written:
    return "", ["call void @llvm.x86.tilerelease()"], ["declare void @llvm.x86.tilerelease()"]


def _zero(tdp: Tdp, block: Block, name: str) -> _Written:
    lines = [f"call void @llvm.x86.tilezero(i8 {tile})" for tile in range(block.down * block.across)]
    return "ptr %c", lines, ["declare void @llvm.x86.tilezero(i8 immarg)"]


def _step_params(block: Block) -> str:
    pointers = [f"ptr %a{i}" for i in range(block.down)] + [f"ptr %b{j}" for j in range(block.across)]
    return ", ".join(["ptr %c", "i64 %stride", *pointers])


def _step(tdp: Tdp, block: Block, name: str) -> _Written:
    """Every tile is loaded once, right before its first product."""
    sums, lines = block.down * block.across, []

    def load(tile: int, pointer: str, stride: str) -> None:
        lines.append(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {pointer}, i64 {stride})")

    for i in range(block.down):
        load(sums + i, f"%a{i}", "%stride")
        for j in range(block.across):
            if i == 0:
                load(sums + block.down + j, f"%b{j}", str(block.n * 4))
            tiles = (i * block.across + j, sums + i, sums + block.down + j)
            lines.append(f"call void @llvm.x86.{tdp.name}({', '.join(f'i8 {tile}' for tile in tiles)})")
    declared = ["tileloadd64(i8 immarg, ptr, i64)", f"{tdp.name}(i8 immarg, i8 immarg, i8 immarg)"]
    return _step_params(block), lines, [f"declare void @llvm.x86.{item}" for item in declared]


def _sums_of(tile: int, block: Block) -> str:
    """Return the line that points %cN at the sums of a tile."""
    return f"%c{tile} = getelementptr i8, ptr %c, i64 {tile * block.rows * block.n * 4}"


def _store(tdp: Tdp, block: Block, name: str) -> _Written:
    lines = []
    for tile in range(block.down * block.across):
        lines.append(_sums_of(tile, block))
        lines.append(f"call void @llvm.x86.tilestored64(i8 {tile}, ptr %c{tile}, i64 {block.n * 4})")
    return "ptr %c", lines, ["declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)"]


# -- the same on memory, for a machine without tiles -------------------------------------------------------------------


def _nothing(tdp: Tdp, block: Block, name: str) -> _Written:
    return "", [], []


def _stored_already(tdp: Tdp, block: Block, name: str) -> _Written:
    return "ptr %c", [], []


def _zero_memory(tdp: Tdp, block: Block, name: str) -> _Written:
    size = block.down * block.across * block.rows * block.n * 4
    memset = "@llvm.memset.p0.i64(ptr %c, i8 0, i64"
    return (
        "ptr %c",
        [f"call void {memset} {size}, i1 false)"],
        ["declare void @llvm.memset.p0.i64(ptr, i8, i64, i1 immarg)"],
    )


def _step_on_memory(tdp: Tdp, block: Block, name: str) -> _Written:
    lines = []
    for i in range(block.down):
        for j in range(block.across):
            tile = i * block.across + j
            lines.append(_sums_of(tile, block))
            lines.append(f"call void @{name}_tile(ptr %c{tile}, i64 %stride, ptr %a{i}, ptr %b{j})")
    return _step_params(block), lines, _tile_on_memory(tdp, block, f"{name}_tile")


def _tile_on_memory(tdp: Tdp, block: Block, name: str) -> list[str]:
    """Return the function that adds the product of one tile with one: a row of sums at a time, in one vector."""
    n, g, size = block.n, tdp.group, DTYPE_BYTES[tdp.data]
    bits, real = f"i{8 * size}", tdp is TDPBF16
    total = f"<{n} x {'float' if real else 'i32'}>"
    body = []

    def widened(value: str, dtype: str, count: int) -> str:
        """Write the conversion of `count` values and return its name."""
        kind, wide = f"<{count} x {bits}>", f"<{count} x i32>"
        if not real:
            body.append(f"{value}w = {'sext' if dtype == 'int8' else 'zext'} {kind} {value} to {wide}")
            return f"{value}w"
        body.append(f"{value}z = zext {kind} {value} to {wide}")
        body.append(f"{value}s = shl {wide} {value}z, splat (i32 16)")
        body.append(f"{value}w = bitcast {wide} {value}s to <{count} x float>")
        return f"{value}w"

    sums = "%old"
    for q in range(g):
        spread, every = ", ".join([f"i32 {q}"] * n), ", ".join(f"i32 {c * g + q}" for c in range(n))
        body.append(f"%x{q} = shufflevector <{g} x {bits}> %x, <{g} x {bits}> poison, <{n} x i32> <{spread}>")
        body.append(f"%y{q} = shufflevector <{n * g} x {bits}> %y, <{n * g} x {bits}> poison, <{n} x i32> <{every}>")
        x, y = widened(f"%x{q}", tdp.data, n), widened(f"%y{q}", tdp.weight, n)
        if real:
            body.append(f"%t{q} = call {total} @llvm.fmuladd.v{n}f32({total} {x}, {total} {y}, {total} {sums})")
        else:
            body += [f"%m{q} = mul {total} {x}, {y}", f"%t{q} = add {total} {sums}, %m{q}"]
        sums = f"%t{q}"
    text = f"""define internal void @{name}(ptr %c, i64 %stride, ptr %a, ptr %b) {{
        start:
        br label %row
        row:
        %r = phi i64 [0, %start], [%r1, %stored]
        %offset = mul i64 %r, %stride
        %arow = getelementptr i8, ptr %a, i64 %offset
        %place = mul i64 %r, {4 * n}
        %crow = getelementptr i8, ptr %c, i64 %place
        %first = load {total}, ptr %crow, align 4
        br label %depth
        depth:
        %k = phi i64 [0, %row], [%k1, %depth]
        %old = phi {total} [%first, %row], [{sums}, %depth]
        %aoff = mul i64 %k, 4
        %ap = getelementptr i8, ptr %arow, i64 %aoff
        %x = load <{g} x {bits}>, ptr %ap, align 1
        %boff = mul i64 %k, {4 * n}
        %bp = getelementptr i8, ptr %b, i64 %boff
        %y = load <{n * g} x {bits}>, ptr %bp, align 1"""
    end = f"""%k1 = add i64 %k, 1
        %more = icmp ult i64 %k1, {block.k // g}
        br i1 %more, label %depth, label %stored
        stored:
        store {total} {sums}, ptr %crow, align 4
        %r1 = add i64 %r, 1
        %again = icmp ult i64 %r1, {block.rows}
        br i1 %again, label %row, label %done
        done:
        ret void
        }}"""
    declared = [f"declare {total} @llvm.fmuladd.v{n}f32({total}, {total}, {total})"] if real else []
    return [text, *body, end, *declared]


_MACHINE = {"configure": _configure, "release": _release, "zero": _zero, "step": _step, "store": _store}
_PORTABLE = {
    "configure": _nothing,
    "release": _nothing,
    "zero": _zero_memory,
    "step": _step_on_memory,
    "store": _stored_already,
}
register(_FAMILY, _text)
