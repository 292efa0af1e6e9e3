"""TFLite_Detection_PostProcess: boxes decoded from anchors, then non-maximum suppression with a fixed row count.

The rules are those of TFLite's reference kernel: a box is kept if its score reaches the threshold and no better kept
box overlaps it by more than the allowed intersection over union; ties go to the box that comes first. Rows past the
number of detections are zero.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter

_MAX_DETECTIONS = 10_000


@dataclass(frozen=True)
class _Options:
    """The operator's options, which it stores as a FlexBuffer."""

    detections: int
    classes: int
    classes_per_detection: int
    per_class: int
    regular: bool
    score: float
    overlap: float
    scales: tuple[float, float, float, float]


def _options(operator: Operator) -> _Options:
    flexbuffers = importlib.import_module("flatbuffers.flexbuffers")  # by name: it has no type information

    try:
        found = flexbuffers.Loads(bytes(operator.CustomOptionsAsNumpy()))
        options = _Options(
            detections=int(found["max_detections"]),
            classes=int(found["num_classes"]),
            classes_per_detection=int(found["max_classes_per_detection"]),
            per_class=int(found.get("detections_per_class", 100)),
            regular=bool(found.get("use_regular_nms", False)),
            score=float(found["nms_score_threshold"]),
            overlap=float(found["nms_iou_threshold"]),
            scales=tuple(float(found[f"{name}_scale"]) for name in "yxhw"),  # type: ignore[arg-type]
        )
    except Exception as error:  # a damaged FlexBuffer raises anything
        raise ModelError(
            "an operator's options cannot be read", where="TFLite_Detection_PostProcess", found=str(error)[:100]
        ) from None
    counts = (options.detections, options.classes, options.classes_per_detection, options.per_class)
    if min(counts) < 1 or max(counts) > _MAX_DETECTIONS or min(options.scales) <= 0:
        raise UnsupportedError(
            "these options are not supported",
            where="TFLite_Detection_PostProcess",
            found=str(options),
            allowed=f"counts from 1 to {_MAX_DETECTIONS}, positive scales",
        )
    return options


@handles("custom TFLite_Detection_PostProcess")
def _detections(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    options = _options(operator)
    real = []
    for tensor in converter.get_input_tensors(operator):
        value = converter.get_tensor_expr(tensor)
        real.append(value if tensor.qnn_params is None else converter.dequantize(value, tensor))
    boxes, scores, anchors = (converter.bb.emit(value) for value in real)
    shape, wide = converter.bb.normalize(boxes).ty.shape, converter.bb.normalize(scores).ty.shape
    if len(shape) != 3 or int(shape[0]) != 1 or int(shape[2]) != 4 or int(wide[2]) < options.classes:
        found = f"{list(map(int, shape))} boxes, {list(map(int, wide))} scores"
        raise UnsupportedError(
            "these boxes are not supported", where="TFLite_Detection_PostProcess", found=found, allowed="one picture"
        )
    count = int(shape[1])
    decoded = converter.bb.emit(_decode(converter, boxes, anchors, options, count))
    first = int(wide[2]) - options.classes  # the background, where there is one
    kept = relax.op.strided_slice(scores, [2], [first], [int(wide[2])], [1])
    kept = converter.bb.emit(relax.op.reshape(kept, (count, options.classes)))
    if options.regular:
        return _by_class(converter, decoded, kept, options, count)
    best = converter.bb.emit(relax.op.max(kept, 1))
    return _by_box(converter, decoded, kept, best, options, count)


def _decode(converter: TfliteConverter, boxes: Expr, anchors: Expr, options: _Options, count: int) -> Expr:
    """Corners [count, 4] (y, x, y, x) from centres and sizes relative to the anchors'."""
    from tvm import te, tirx

    def define(code: Any, anchor: Any) -> Any:  # noqa: ANN401
        def at(row: Any, column: Any) -> Any:  # noqa: ANN401
            axis = column % 2  # y or x
            place = tirx.if_then_else(axis == 0, tirx.const(options.scales[0]), tirx.const(options.scales[1]))
            size = tirx.if_then_else(axis == 0, tirx.const(options.scales[2]), tirx.const(options.scales[3]))
            centre = code[0, row, axis] / place * anchor[row, axis + 2] + anchor[row, axis]
            half = tirx.const(0.5, "float32") * tirx.exp(code[0, row, axis + 2] / size) * anchor[row, axis + 2]
            return tirx.if_then_else(column < 2, centre - half, centre + half)

        return te.compute((count, 4), at, name="decoded")

    return converter.bb.call_te(define, boxes, anchors, primfunc_name_hint="decode_boxes")


def _overlaps(boxes: Any, one: Any, other: Any, limit: float) -> Any:  # noqa: ANN401 - TIR expressions
    """Whether two boxes' intersection over union exceeds the limit."""
    from tvm import tirx

    def area(row: Any) -> Any:  # noqa: ANN401
        return (boxes[row, 2] - boxes[row, 0]) * (boxes[row, 3] - boxes[row, 1])

    zero = tirx.const(0.0, "float32")
    height = tirx.max(tirx.min(boxes[one, 2], boxes[other, 2]) - tirx.max(boxes[one, 0], boxes[other, 0]), zero)
    width = tirx.max(tirx.min(boxes[one, 3], boxes[other, 3]) - tirx.max(boxes[one, 1], boxes[other, 1]), zero)
    both = height * width
    valid = tirx.all(area(one) > zero, area(other) > zero)
    return tirx.all(valid, both / (area(one) + area(other) - both) > tirx.const(limit, "float32"))


def _outputs(rows: int) -> list[tuple[tuple[int, ...], str]]:
    return [((1, rows, 4), "float32"), ((1, rows), "float32"), ((1, rows), "float32"), ((1,), "float32")]


def _clear(outs: Any, rows: int) -> None:  # noqa: ANN401
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    with T.serial(0, rows) as i:
        with T.serial(0, 4) as j:
            outs[0][0, i, j] = T.float32(0)
        outs[1][0, i] = T.float32(0)
        outs[2][0, i] = T.float32(0)


def _greatest(values: Any, count: int, at: Any, best: Any, place: Any) -> None:  # noqa: ANN401
    """Statements: best[0] = the greatest values[at(i)] for i below `count`, place[0] = the first such i."""
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    place[0] = T.int64(0)
    best[0] = values[at(T.int64(0))]
    with T.serial(0, count) as i, T.If(values[at(i)] > best[0]), T.Then():
        best[0] = values[at(i)]
        place[0] = T.Cast("int64", i)


_NEVER = -3.0e38  # the score of a box that is out


def _by_box(
    converter: TfliteConverter, boxes: Expr, scores: Expr, best: Expr, options: _Options, count: int
) -> list[Expr]:
    """Suppression on each box's best class; a kept box is reported with its best classes."""
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    per_box = min(options.classes_per_detection, options.classes)
    rows = options.detections * per_box

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        corners, classes, likeliest = ins
        left, mine = outs[4], outs[5]
        top, place, chosen, number = scalar("float32"), scalar("int64"), scalar("int64"), scalar("int64")
        _clear(outs, rows)
        number[0] = T.int64(0)
        with T.serial(0, count) as i:
            left[i] = likeliest[i]
        with T.serial(0, options.detections):
            _greatest(left, count, lambda i: i, top, place)
            with T.If(top[0] >= T.float32(options.score)), T.Then():
                with T.serial(0, count) as i, T.If(_overlaps(corners, place[0], i, options.overlap)), T.Then():
                    left[i] = T.float32(_NEVER)
                left[place[0]] = T.float32(_NEVER)
                with T.serial(0, options.classes) as c:
                    mine[c] = classes[place[0], c]
                with T.serial(0, per_box):
                    _greatest(mine, options.classes, lambda c: c, top, chosen)
                    with T.serial(0, 4) as j:
                        outs[0][0, number[0], j] = corners[place[0], j]
                    outs[1][0, number[0]] = T.Cast("float32", chosen[0])
                    outs[2][0, number[0]] = top[0]
                    mine[chosen[0]] = T.float32(_NEVER)
                    number[0] = number[0] + T.int64(1)
        outs[3][0] = T.Cast("float32", number[0])

    scratch = [((count,), "float32"), ((options.classes,), "float32")]
    made = call_loops(converter.bb, "detections", [boxes, scores, best], [*_outputs(rows), *scratch], body)
    return made[:4]


def _by_class(converter: TfliteConverter, boxes: Expr, scores: Expr, options: _Options, count: int) -> list[Expr]:
    """Suppression within each class, then the best of all classes."""
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    rows, classes, per_class = options.detections, options.classes, min(options.per_class, count)

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        corners, given = ins
        left, kept, which = outs[4], outs[5], outs[6]
        top, place, number = scalar("float32"), scalar("int64"), scalar("int64")
        _clear(outs, rows)
        with T.serial(0, classes) as c:
            with T.serial(0, count) as i:
                left[i] = given[i, c]
            with T.serial(0, per_class) as k:
                kept[c * per_class + k] = T.float32(_NEVER)
                which[c * per_class + k] = T.int64(0)
                _greatest(left, count, lambda i: i, top, place)
                with T.If(top[0] >= T.float32(options.score)), T.Then():
                    with T.serial(0, count) as i, T.If(_overlaps(corners, place[0], i, options.overlap)), T.Then():
                        left[i] = T.float32(_NEVER)
                    left[place[0]] = T.float32(_NEVER)
                    kept[c * per_class + k] = top[0]
                    which[c * per_class + k] = place[0]
        number[0] = T.int64(0)
        with T.serial(0, min(rows, classes * per_class)):
            _greatest(kept, classes * per_class, lambda i: i, top, place)
            with T.If(top[0] > T.float32(_NEVER)), T.Then():
                with T.serial(0, 4) as j:
                    outs[0][0, number[0], j] = corners[which[place[0]], j]
                outs[1][0, number[0]] = T.Cast("float32", place[0] // T.int64(per_class))
                outs[2][0, number[0]] = top[0]
                kept[place[0]] = T.float32(_NEVER)
                number[0] = number[0] + T.int64(1)
        outs[3][0] = T.Cast("float32", number[0])

    total = classes * per_class
    scratch = [((count,), "float32"), ((total,), "float32"), ((total,), "int64")]
    made = call_loops(converter.bb, "detections", [boxes, scores], [*_outputs(rows), *scratch], body)
    return made[:4]
