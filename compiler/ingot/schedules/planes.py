"""Depthwise convolution and pooling of NCHW images, for layers that no NHWC layer stands next to.

Between two transposes such a layer would take longer to move than to compute. So here the columns of one plane (one
channel of one image) are the lanes. A task computes some rows of one plane, and copies what it reads into lines on the
stack first:

    line[phase][i] = padded row[i * stride + phase]

Whatever the stride, every load of a window is then contiguous, and no window asks where the border is. A convolution
keeps one line for each input row it reads. A pool keeps one for each output row, in which the rows of a window are
combined on the way; then it combines columns. (All lines come first: a load that spans two vectors just stored waits.)

Vectors that do not divide a row overlap: the last one ends with the row, and computes some values again. A row shorter
than a vector is stored in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from ingot.schedules import pieces, written
from ingot.schedules.statements import (
    Expr,
    Stmt,
    float_buffer,
    integer,
    lanes_of,
    loop_over,
    named,
    with_buffers,
)
from ingot.schedules.vector import annotate_block, ceil_div, registers
from ingot.target import Target

#: Lines take so much of the stack, at most: half of a small first-level cache.
LINE_BYTES = 16 * 1024
#: Windows are written out; larger ones would be too much code.
MAX_WINDOW = 64
#: A sum is made in so many parts: its products wait for each other, and a core does not see far enough to the next sum.
PARTS = 2
#: There are about so many tasks, if the image has as many rows: enough for an even share of any board's cores.
_TASKS = 32


@dataclass(frozen=True)
class PlaneWorkload:
    """A layer of NCHW float32 images. kind: "max" or "mean" (a pool) or "depthwise" (multiplier 1).

    padding: above and to the left; what lies beyond the image on the other sides follows from the output's size.
    """

    kind: str
    batch: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def span(self) -> tuple[int, int]:
        """Return the rows and columns of the image that a window covers."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return (kh - 1) * dh + 1, (kw - 1) * dw + 1

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of one inference; a pool has none."""
        values = self.batch * self.channels * self.out_height * self.out_width
        return values * self.kernel[0] * self.kernel[1] if self.kind == "depthwise" else 0

    @property
    def line(self) -> int:
        """Return the elements of one phase of a line."""
        needed = (self.out_width - 1) * self.strides[1] + self.span[1]
        return ceil_div(max(needed, self.padding[1] + self.width), self.strides[1])

    @property
    def line_bytes(self) -> int:
        """Return the bytes of one line."""
        return self.line * self.strides[1] * 4


@dataclass(frozen=True)
class PlaneConfig:
    """`rows` of the output a task; `lanes` columns a vector."""

    rows: int
    lanes: int


def supports(workload: PlaneWorkload) -> bool:
    """Say whether the template covers a layer: its window can be written out, and its lines fit the stack."""
    w = workload
    lines = w.span[0] if w.kind == "depthwise" else 1
    window = w.kernel[0] * w.kernel[1] if w.kind == "depthwise" else max(w.kernel)
    empty = 0 in (w.batch, w.channels, w.height, w.width, w.out_height, w.out_width)
    return not empty and window <= MAX_WINDOW and lines * w.line_bytes <= LINE_BYTES


def default_config(workload: PlaneWorkload, target: Target) -> PlaneConfig:
    """Return tasks of as many rows as their lines and an even share allow."""
    w = workload
    rows = max(1, w.batch * w.channels * w.out_height // _TASKS)
    lines = LINE_BYTES // w.line_bytes
    rows = min(rows, (lines - w.span[0]) // w.strides[0] + 1 if w.kind == "depthwise" else lines)
    rows = ceil_div(w.out_height, ceil_div(w.out_height, min(rows, w.out_height)))
    return PlaneConfig(rows, registers(target).lanes)


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """Pack OIHW weights with I = 1 to [C][KH * KW]."""
    return np.ascontiguousarray(weight.reshape(weight.shape[0], -1))


def primitive(workload: PlaneWorkload, config: PlaneConfig, scale: float = 1.0, *, table: bool = False) -> Expr:
    """Return the PrimFunc (data NCHW, [weight], output NCHW) of one layer, all float32.

    weight: of a convolution [C, KH * KW] (`pack_weight`); of a mean with `table` what each sum is multiplied by,
    [out_height, out_width]; without, that is `scale`, and there is no weight.
    """
    w = workload
    data = float_buffer((w.batch, w.channels, w.height, w.width), "data")
    result = float_buffer((w.batch, w.channels, w.out_height, w.out_width), "planes")
    given = [data]
    if w.kind == "depthwise":
        given.append(float_buffer((w.channels, w.kernel[0] * w.kernel[1]), "weight"))
    elif table:
        given.append(float_buffer((w.out_height, w.out_width), "weight"))
    nest = _Plane(w, config, given, result, scale).nest()
    notes = annotate_block("planes", "planes", config)
    return written.primitive(given, [written.nest(given, [result], "planes", nest, notes)], result)


def _tree(values: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine the values in pairs: the longest chain is short."""
    items = list(values)
    while len(items) > 1:
        items = [combine(*items[i : i + 2]) if i + 1 < len(items) else items[i] for i in range(0, len(items), 2)]
    return items[0]


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _maximum(a: Expr, b: Expr) -> Expr:
    return tirx.max(a, b)


def _fill(value: float, lanes: int) -> Expr:
    return tirx.const(value, f"float32x{lanes}" if lanes > 1 else "float32")


def _span(first: Expr, lanes: int) -> Expr:
    """Return the indices first, first + 1, ... of one vector."""
    return tirx.Ramp(first, integer(1), lanes) if lanes > 1 else first


class _Plane:
    """Writes the nest; `given` are the buffers read, `result` the one written."""

    def __init__(
        self, workload: PlaneWorkload, config: PlaneConfig, given: Sequence[Expr], result: Expr, scale: float
    ) -> None:
        self.workload, self.config, self.scale = workload, config, scale
        self.data, self.weight, self.result = given[0], given[1] if len(given) > 1 else None, result
        self.filler = float("-inf") if workload.kind == "max" else 0.0
        self.combine = _maximum if workload.kind == "max" else _add
        self.is_pool = workload.kind != "depthwise"
        count = config.rows if self.is_pool else (config.rows - 1) * workload.strides[0] + workload.span[0]
        # A row that is no vector is computed as one anyway, beyond its end; then as much of it is stored as there is.
        self.wide = 1 << (workload.out_width - 1).bit_length()
        if self.wide > config.lanes or (self.is_pool and self.weight is not None):
            self.wide = workload.out_width
        line = max(workload.line, self.wide + ceil_div(workload.span[1], workload.strides[1]))
        self.lines = float_buffer((count, workload.strides[1], line), "lines")

    def nest(self) -> Stmt:
        """Return the loop over tasks: parts of each plane in order; the last may compute rows of the one before."""
        w, rows = self.workload, self.config.rows
        parts = ceil_div(w.out_height, rows)

        def task(index: Expr) -> Stmt:
            plane, part = index // parts, index % parts
            first = part * rows if w.out_height % rows == 0 else tirx.min(part * rows, integer(w.out_height - rows))
            names = {"n": plane // w.channels, "c": plane % w.channels, "first": first}
            return with_buffers([self.lines], named(names, self._rows), "lines")

        return loop_over(w.batch * w.channels * parts, task, "task", tirx.ForKind.PARALLEL)

    def _rows(self, n: Expr, c: Expr, first: Expr) -> Stmt:
        """Return the rows of one task."""
        w = self.workload
        rows, top = self.config.rows, first * w.strides[0] - w.padding[0]
        if self.is_pool:

            def combine(r: Expr) -> Stmt:
                return named({"top": top + r * w.strides[0]}, lambda top: self._window_rows(n, c, top, r))

            def pool(r: Expr) -> Stmt:
                return self._pool(n, c, first + r, r)

            return tirx.SeqStmt([loop_over(rows, combine, "slot"), loop_over(rows, pool, "row")])
        slots = int(self.lines.shape[0])

        def copy(slot: Expr) -> Stmt:
            return named({"row": top + slot}, lambda row: self._image_row(n, c, row, slot))

        def convolve(r: Expr) -> Stmt:
            return self._convolve(n, c, first + r, r * w.strides[0])

        return tirx.SeqStmt([loop_over(slots, copy, "slot"), loop_over(rows, convolve, "row")])

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _image_row(self, n: Expr, c: Expr, row: Expr, slot: Expr) -> Stmt:
        """Return the copy of a row of the image, or of zeros outside it, to the line `slot`."""
        w = self.workload

        def element(x: Expr, lanes: int) -> Expr:
            return tirx.BufferLoad(self.data, [n, c, row, _span(x, lanes)])

        line = self._line(slot, element)
        if w.padding[0] == 0 and (w.out_height - 1) * w.strides[0] + w.span[0] <= w.height:
            return line
        inside = tirx.all(row >= 0, row < w.height)
        return tirx.IfThenElse(inside, line, self._line(slot, lambda x, lanes: _fill(0.0, lanes)))

    def _window_rows(self, n: Expr, c: Expr, top: Expr, slot: Expr) -> Stmt:
        """Return the combination of the rows of a window into the line `slot`."""
        w = self.workload

        def rows(guarded: bool) -> Stmt:
            def element(x: Expr, lanes: int) -> Expr:
                loads = []
                for ky in range(w.kernel[0]):
                    row = top + ky * w.dilation[0]
                    load = tirx.BufferLoad(self.data, [n, c, row, _span(x, lanes)])
                    if guarded:
                        load = tirx.if_then_else(tirx.all(row >= 0, row < w.height), load, _fill(self.filler, lanes))
                    loads.append(load)
                return _tree(loads, self.combine)

            return self._line(slot, element)

        below = (w.out_height - 1) * w.strides[0] - w.padding[0] + w.span[0]
        if w.padding[0] == 0 and below <= w.height:
            return rows(guarded=False)
        inside = tirx.all(top >= 0, top + w.span[0] <= w.height)
        return tirx.IfThenElse(inside, rows(guarded=False), rows(guarded=True))

    def _line(self, slot: Expr, element: Callable[[Expr, int], Expr]) -> Stmt:
        """Return the stores of a padded row; element(x, lanes) are its values from column x of the image on."""
        w = self.workload
        stride, left = w.strides[1], w.padding[1]

        def put(phase: int, index: Expr, value: Expr, lanes: int) -> Stmt:
            return tirx.BufferStore(self.lines, value, [slot, integer(phase), _span(index, lanes)])

        def padding(phase: int, begin: int, end: int) -> Stmt:
            """Fill the columns [begin, end) of the padded row that have this phase."""
            first, last = ceil_div(begin - phase, stride), ceil_div(end - phase, stride)
            return loop_over(last - first, lambda i: put(phase, i + first, _fill(self.filler, 1), 1), "pad")

        def scalars(phase: int, begin: int, end: int) -> Stmt:
            """Store the columns [begin, end) of the image whose place in the padded row has this phase."""
            first, last = ceil_div(begin + left - phase, stride), ceil_div(end + left - phase, stride)

            def one(i: Expr) -> Stmt:
                place = i + first
                return put(phase, place, element(place * stride + (phase - left), 1), 1)

            return loop_over(last - first, one, "x")

        def covers(begin: int, end: int, phase: int) -> bool:
            return ceil_div(end - phase, stride) > ceil_div(begin - phase, stride)

        statements = []
        whole = (w.out_width - 1) * stride + w.span[1]
        for begin, end in ((0, left), (left + w.width, whole)):
            statements += [padding(phase, begin, end) for phase in range(stride) if covers(begin, end, phase)]
        begin, end = 0, 0
        if stride <= 2:
            vectors, begin, end = self._vectors(put, element)
            statements += vectors
        for first, last in ((0, begin), (end, w.width)):
            inside = (first + left, last + left)
            statements += [scalars(phase, first, last) for phase in range(stride) if covers(*inside, phase)]
        return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]

    def _vectors(
        self, put: Callable[[int, Expr, Expr, int], Stmt], element: Callable[[Expr, int], Expr]
    ) -> tuple[list[Stmt], int, int]:
        """Return the vector stores of a line whose stride is 1 or 2, and the columns [begin, end) they store.

        With stride 2 the even and the odd elements of two vectors become one vector each.
        """
        w, stride = self.workload, self.workload.strides[1]
        begin = -w.padding[1] % stride
        count = (w.width - begin) // stride
        lanes = self.config.lanes
        while lanes > max(count, 1):
            lanes //= 2
        if count < 1:
            return [], 0, 0
        end = begin + count * stride

        def tile(start: Expr) -> Stmt:
            x, place = start * stride + begin, start + (begin + w.padding[1]) // stride
            if stride == 1:
                return put(0, place, element(x, lanes), lanes)
            if lanes == 1:
                return tirx.SeqStmt([put(phase, place, element(x + phase, 1), 1) for phase in (0, 1)])
            halves = [tirx.Var("v", f"float32x{lanes}") for _ in (0, 1)]
            loads = [tirx.Bind(v, element(x + k * lanes, lanes)) for k, v in enumerate(halves)]
            split = [tirx.Shuffle(halves, [integer(2 * i + phase) for i in range(lanes)]) for phase in (0, 1)]
            return tirx.SeqStmt([*loads, *(put(phase, place, v, lanes) for phase, v in enumerate(split))])

        return [_across(count, lanes, tile)], begin, end

    # -- windows -------------------------------------------------------------------------------------------------------

    def _columns(self, place: Sequence[Expr], value: Callable[[Expr, Expr], Expr]) -> Stmt:
        """Return the stores of the output row at `place`; value takes a vector's first column and the lane."""

        width, wide = self.workload.out_width, self.wide
        if wide > width:
            row = float_buffer((wide,), "row")
            made = lanes_of(wide, lambda lane: tirx.BufferStore(row, value(integer(0), lane), [lane]))

            def part(begin: int, lanes: int) -> Stmt:
                def one(lane: Expr) -> Stmt:
                    return tirx.BufferStore(self.result, tirx.BufferLoad(row, [lane + begin]), [*place, lane + begin])

                return lanes_of(lanes, one)

            stores = [part(begin, lanes) for begin, lanes in pieces.spans(width, wide, 1, overlap=False)]
            return with_buffers([row], tirx.SeqStmt([made, *stores]), "row")
        lanes = self.config.lanes
        while lanes > width:
            lanes //= 2

        def vector(x: Expr) -> Stmt:
            return lanes_of(lanes, lambda lane: tirx.BufferStore(self.result, value(x, lane), [*place, x + lane]))

        return _across(width, lanes, vector)

    def _at(self, slot: Expr, kx: int, x: Expr) -> Expr:
        """Return the load of element kx of the window row of output column x."""
        place, stride = kx * self.workload.dilation[1], self.workload.strides[1]
        return tirx.BufferLoad(self.lines, [slot, integer(place % stride), x + place // stride])

    def _pool(self, n: Expr, c: Expr, y: Expr, slot: Expr) -> Stmt:
        """Return the combination of columns of the line `slot`."""
        w = self.workload

        def element(x: Expr, lane: Expr) -> Expr:
            loads = [self._at(slot, kx, x + lane) for kx in range(w.kernel[1])]
            value = _tree(loads, self.combine)
            if self.weight is not None:
                value = value * tirx.BufferLoad(self.weight, [y, x + lane])
            elif self.scale != 1.0:
                value = value * tirx.const(self.scale, "float32")
            return value

        return self._columns([n, c, y], element)

    def _convolve(self, n: Expr, c: Expr, y: Expr, slot: Expr) -> Stmt:
        """Return a row of the convolution; its first window row is the line `slot`."""
        w = self.workload

        def element(x: Expr, lane: Expr) -> Expr:
            sums: list[Expr] = [None] * PARTS
            for k in range(w.kernel[0] * w.kernel[1]):
                ky, kx = divmod(k, w.kernel[1])
                product = self._at(slot + ky * w.dilation[0], kx, x + lane)
                product = product * tirx.BufferLoad(self.weight, [c, integer(k)])
                sums[k % PARTS] = product if sums[k % PARTS] is None else sums[k % PARTS] + product
            return _tree([value for value in sums if value is not None], _add)

        return self._columns([n, c, y], element)


def _across(count: int, lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """Return the loop over vectors that cover [0, count); body takes the first element, and the last ends at count."""

    def tile(index: Expr) -> Stmt:
        if count % lanes == 0:
            return body(index * lanes)
        return named({"x": tirx.min(index * lanes, integer(count - lanes))}, body)

    return loop_over(ceil_div(count, lanes), tile, "tile")
