"""NonMaxSuppression: the best boxes of each class, without those that overlap a better one of it too much.

The candidates of a class are a heap, the best of them at its root. One after the other leaves it and is compared with
the boxes that were kept before: so the work grows with what is looked at, not with the square of what there is.
"""

from __future__ import annotations

from typing import Any

from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.counted import integer
from ingot.frontend.tvm_types import Expr

# Scores that are compared with the limit at once, since most are below it: a vector or two.
_TOGETHER = 16


@converts("NonMaxSuppression")
def _non_max_suppression(ctx: Context) -> list[Expr]:
    from tvm import relax

    batches, boxes = ctx.shape(0)[:2]
    classes, (bound, _) = ctx.shape(1)[1], ctx.out_shape()
    most = bound // (batches * classes)
    centred = bool(ctx.attr("center_point_box", 0))
    given = [ctx.inputs[i] if ctx.has(i) else None for i in (3, 4)]
    overlap = ctx.const(0.0, "float32") if given[0] is None else given[0]
    inputs = [*ctx.inputs[:2], ctx.emit(relax.op.reshape(overlap, (1,)))]
    if given[1] is not None:
        inputs.append(ctx.emit(relax.op.reshape(given[1], (1,))))

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        _suppress(ins, outs, (batches, classes, boxes), most, centred=centred)

    # The results and their number; then the heap's scores and places, and the boxes kept of a class.
    outputs = [((bound, 3), "int64"), ((1,), "int64"), ((boxes,), "float32"), ((boxes,), "int64")]
    outputs.append(((5, most), "float32"))
    return call_loops(ctx.bb, "non_max_suppression", inputs, outputs, body)[:2]


def _suppress(ins: Any, outs: Any, sizes: tuple[int, int, int], most: int, *, centred: bool) -> None:  # noqa: ANN401
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    box, score, limit, *floor = ins
    chosen, count, heap, places, kept = outs
    batches, classes, boxes = sizes
    zero = integer(0)
    left, picked, met, winner, place, hole, child = (scalar("int64") for _ in range(7))
    value, common, union, *corners = (scalar("float32") for _ in range(8))  # corners: y and x, y and x, the area
    free, settled = scalar("bool"), scalar("bool")

    def ahead(at: Any, value: Any, place: Any) -> Any:  # noqa: ANN401
        """Whether the candidate at a place of the heap comes before another one: of equals the first."""
        return tirx.Or(heap[at] > value, tirx.And(heap[at].equal(value), places[at] < place))

    def sift() -> None:
        """Put value and place into the heap, whose entry at `hole` is free, at or below it."""
        settled[0] = tirx.const(False, "bool")
        with T.While(tirx.And(hole[0] * 2 + 1 < left[0], tirx.Not(settled[0]))):
            child[0] = hole[0] * 2 + 1
            right = tirx.min(child[0] + 1, left[0] - 1)  # or the same one again
            with T.If(ahead(right, heap[child[0]], places[child[0]])), T.Then():
                child[0] = right
            settled[0] = tirx.Not(ahead(child[0], value[0], place[0]))
            with T.If(tirx.Not(settled[0])), T.Then():
                heap[hole[0]] = heap[child[0]]
                places[hole[0]] = places[child[0]]
                hole[0] = child[0]
        heap[hole[0]] = value[0]
        places[hole[0]] = place[0]

    def consider(b: Any, c: Any, i: Any) -> None:  # noqa: ANN401
        with T.If(score[b, c, i] > floor[0][0] if floor else tirx.const(True, "bool")), T.Then():
            heap[left[0]] = score[b, c, i]
            places[left[0]] = i
            left[0] = left[0] + 1

    def collect(b: Any, c: Any) -> None:  # noqa: ANN401
        """Make the candidates of a class a heap."""
        left[0] = zero
        blocks = boxes // _TOGETHER if floor else 0
        with T.serial(0, integer(blocks)) as block:
            above = [score[b, c, block * _TOGETHER + k] > floor[0][0] for k in range(_TOGETHER if floor else 0)]
            while len(above) > 1:  # a tree, which becomes a few vectors
                above = [tirx.Or(x, y) for x, y in zip(above[::2], above[1::2], strict=True)]
            found = above[0] if floor else tirx.const(True, "bool")
            with T.If(found), T.Then(), T.serial(0, integer(_TOGETHER)) as k:
                consider(b, c, block * _TOGETHER + k)
        with T.serial(integer(blocks * _TOGETHER), integer(boxes)) as i:
            consider(b, c, i)
        with T.serial(0, left[0] // 2) as k:
            hole[0] = left[0] // 2 - 1 - k
            value[0], place[0] = heap[hole[0]], places[hole[0]]
            sift()

    def pop() -> None:
        left[0] = left[0] - 1
        hole[0] = zero
        value[0], place[0] = heap[left[0]], places[left[0]]
        sift()

    def measure(b: Any, i: Any) -> None:  # noqa: ANN401
        v = [box[b, i, k] for k in range(4)]
        if centred:  # x, y of the centre, width, height
            half = tirx.const(0.5, "float32")
            ends = (v[1] - v[3] * half, v[0] - v[2] * half, v[1] + v[3] * half, v[0] + v[2] * half)
        else:
            ends = (tirx.min(v[0], v[2]), tirx.min(v[1], v[3]), tirx.max(v[0], v[2]), tirx.max(v[1], v[3]))
        for corner, end in zip(corners, ends, strict=False):
            corner[0] = end
        corners[4][0] = (corners[2][0] - corners[0][0]) * (corners[3][0] - corners[1][0])

    def compare(k: Any) -> None:  # noqa: ANN401
        """Clear `free` if the measured box overlaps the k-th one that is kept too much."""
        (y0, x0, y1, x1, area), none = (corner[0] for corner in corners), tirx.const(0.0, "float32")
        height = tirx.max(tirx.min(y1, kept[2, k]) - tirx.max(y0, kept[0, k]), none)
        width = tirx.max(tirx.min(x1, kept[3, k]) - tirx.max(x0, kept[1, k]), none)
        common[0] = height * width
        # As ONNX Runtime: a box without area overlaps nothing. The quotient, not a product, rounds as it does.
        with T.If(tirx.all(common[0] > none, area > none, kept[4, k] > none)), T.Then():
            union[0] = kept[4, k] + area - common[0]
            with T.If(union[0] > none), T.Then(), T.If(common[0] / union[0] > limit[0]), T.Then():
                free[0] = tirx.const(False, "bool")

    def choose(b: Any, c: Any) -> None:  # noqa: ANN401
        """Keep the candidate at the heap's root if it overlaps none that is kept, and take it from the heap."""
        winner[0] = places[0]
        measure(b, winner[0])
        free[0], met[0] = tirx.const(True, "bool"), zero
        with T.While(tirx.And(free[0], met[0] < picked[0])):
            compare(met[0])
            met[0] = met[0] + 1
        with T.If(free[0]), T.Then():
            for k, corner in enumerate(corners):
                kept[k, picked[0]] = corner[0]
            for column, number in enumerate((b, c, winner[0])):
                chosen[count[0], column] = number
            count[0] = count[0] + 1
            picked[0] = picked[0] + 1
        pop()

    count[0] = zero
    with T.serial(0, integer(batches)) as b, T.serial(0, integer(classes)) as c:
        collect(b, c)
        picked[0] = zero
        with T.While(tirx.And(left[0] > 0, picked[0] < most)):
            choose(b, c)
    with T.serial(count[0], integer(batches * classes * most)) as i, T.serial(0, integer(3)) as k:
        chosen[i, k] = zero
