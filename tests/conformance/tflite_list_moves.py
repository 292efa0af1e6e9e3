"""Cases of TFLite operators that move elements."""

from __future__ import annotations

import numpy as np

from conformance.tflite_cases import ALL, HYBRID, KINDS, NUMBERS, Out, V
from conformance.tflite_listing import SAME, add, ints, scalar


def moves() -> None:
    x = (2, 4, 6)
    q = {"kinds": ALL}
    add("RESHAPE", [x, ints(3, -1)], SAME, "ReshapeOptions", {"NewShape": np.array([3, -1], np.int32)}, **q)
    add("RESHAPE", [x], SAME, "ReshapeOptions", {"NewShape": np.array([8, 6], np.int32)}, form="option", **q)
    add("SQUEEZE", [(2, 1, 3, 1)], SAME, "SqueezeOptions", {"SqueezeDims": np.array([1], np.int32)}, **q)
    add("SQUEEZE", [(2, 1, 3, 1)], SAME, "SqueezeOptions", {}, form="all", **q)
    add("EXPAND_DIMS", [x, scalar(-1)], SAME, **q)
    add("TRANSPOSE", [x, ints(2, 0, 1)], SAME, **q)
    add("TRANSPOSE", [(2, 3, 2, 2, 3), ints(4, 2, 0, 1, 3)], SAME, form="5-d", kinds=("float32", "int8"))
    for axis in (0, -1):
        add("CONCATENATION", [x, x], SAME, "ConcatenationOptions", {"Axis": axis}, form=f"axis {axis}", **q)
        add("PACK", [x, x], SAME, "PackOptions", {"Axis": axis, "ValuesCount": 2}, form=f"axis {axis}", **q)
        add("UNPACK", [x], (SAME,) * x[axis], "UnpackOptions", {"Axis": axis, "Num": x[axis]}, form=f"axis {axis}", **q)
        add(
            "GATHER",
            [x, V((2, 3), "int32", limits=(0, 1))],
            SAME,
            "GatherOptions",
            {"Axis": axis},
            form=f"axis {axis}",
            **q,
        )
        add("SPLIT", [scalar(axis), x], (SAME, SAME), "SplitOptions", {"NumSplits": 2}, form=f"axis {axis}", **q)
        add(
            "SPLIT_V",
            [x, ints(1, -1), scalar(axis)],
            (SAME, SAME),
            "SplitVOptions",
            {"NumSplits": 2},
            form=f"axis {axis}",
            **q,
        )
        add("REVERSE_V2", [x, ints(axis)], SAME, form=f"axis {axis}", **q)
    add(
        "CONCATENATION",
        [x, V(x, limits=(-2, 3))],
        Out(),
        "ConcatenationOptions",
        {"Axis": 1},
        ("int8", "uint8"),
        "three scales",
    )
    add("GATHER", [x, V((2, 3), "int64", limits=(0, 1))], SAME, "GatherOptions", {"Axis": 1}, form="int64")
    add(
        "GATHER",
        [x, V((2, 3), "int32", limits=(0, 3))],
        SAME,
        "GatherOptions",
        {"Axis": 1, "BatchDims": 1},
        form="batch",
        kinds=("float32", "int8"),
    )
    add("GATHER_ND", [x, V((3, 2), "int32", limits=(0, 1))], SAME, **q)
    add("GATHER_ND", [x, V((2, 2, 3), "int64", limits=(0, 1))], SAME, form="full", **q)
    add(
        "SCATTER_ND",
        [V((4, 2), data=np.array([[0, 1], [2, 0], [0, 1], [3, 3]], np.int32)), (4, 3), ints(4, 5, 3)],
        SAME,
        "ScatterNdOptions",
        **q,
    )
    add(
        "SCATTER_ND",
        [V((3, 1), "int32", limits=(0, 6)), (3,), ints(7)],
        SAME,
        "ScatterNdOptions",
        form="computed",
        kinds=("float32", "int32"),
    )
    add(
        "SPARSE_TO_DENSE",
        [V((3, 2), "int32", limits=(0, 3)), ints(4, 5), V((3,)), V((), constant=True)],
        SAME,
        "SparseToDenseOptions",
        kinds=("float32", "int32", "int64", "int8", "uint8"),
    )
    add(
        "SPARSE_TO_DENSE",
        [V((3,), "int32", limits=(0, 3)), ints(4), V(()), V((), constant=True)],
        SAME,
        "SparseToDenseOptions",
        form="scalar",
    )
    widths = V((3, 2), data=np.array([[0, 1], [2, 0], [1, 1]], np.int32))
    add("PAD", [x, widths], SAME, "PadOptions", **q)
    add("PADV2", [x, widths, V((), constant=True)], SAME, "PadV2Options", kinds=("float32", "int32", "int64"))
    add("PADV2", [x, widths, V((), limits=(-4, 4))], SAME, "PadV2Options", kinds=KINDS, form="computed value")
    for mode in (0, 1):
        add("MIRROR_PAD", [x, widths], SAME, "MirrorPadOptions", {"Mode": mode}, form=f"mode {mode}", **q)
    add("SLICE", [x, ints(0, 1, 2), ints(2, -1, 3)], SAME, "SliceOptions", **q)
    add("TILE", [x, ints(2, 1, 3)], SAME, **q)
    add("BROADCAST_TO", [(1, 4, 1), ints(2, 3, 4, 5)], SAME, **q)
    add("BROADCAST_ARGS", [ints(1, 4, 1), ints(3, 1, 5)], Out("int32"))
    add("BROADCAST_ARGS", [ints(3, dtype="int64"), ints(2, 1, dtype="int64")], Out("int64"), form="int64")
    add("SELECT", [V(x, "bool"), x, x], SAME, "SelectOptions", **q)
    add("SELECT", [V((2,), "bool"), x, x], SAME, "SelectOptions", form="rows", kinds=("float32", "int8"))
    add("SELECT_V2", [V((4, 1), "bool"), x, (6,)], SAME, "SelectV2Options", **q)
    y = (2, 4, 6, 8)
    add("DEPTH_TO_SPACE", [y], SAME, "DepthToSpaceOptions", {"BlockSize": 2}, **q)
    add("SPACE_TO_DEPTH", [y], SAME, "SpaceToDepthOptions", {"BlockSize": 2}, **q)
    add("SPACE_TO_BATCH_ND", [y, ints(2, 3), V((2, 2), data=np.array([[1, 1], [0, 3]], np.int32))], SAME, **q)
    add(
        "BATCH_TO_SPACE_ND", [(8, 2, 3, 2), ints(2, 2), V((2, 2), data=np.array([[0, 1], [1, 0]], np.int32))], SAME, **q
    )
    add(
        "SPACE_TO_BATCH_ND",
        [(2, 4, 3), ints(2), V((1, 2), data=np.array([[0, 2]], np.int32))],
        SAME,
        form="3-d",
        kinds=("float32", "int8"),
    )
    add(
        "REVERSE_SEQUENCE",
        [(3, 4, 5), ints(2, 4, 1)],
        SAME,
        "ReverseSequenceOptions",
        {"SeqDim": 1, "BatchDim": 0},
        **q,
    )
    add(
        "REVERSE_SEQUENCE",
        [(3, 4, 5), V((3,), "int32", limits=(1, 5))],
        SAME,
        "ReverseSequenceOptions",
        {"SeqDim": 2, "BatchDim": 0},
        form="computed",
    )
    add("MATRIX_DIAG", [(2, 3)], SAME, "MatrixDiagOptions", kinds=NUMBERS)
    add("MATRIX_SET_DIAG", [(2, 3, 4), (2, 3)], SAME, "MatrixSetDiagOptions", kinds=NUMBERS)
    add("DYNAMIC_UPDATE_SLICE", [x, (1, 2, 3), V((3,), "int32", limits=(-1, 5))], SAME, **q)
    add("DYNAMIC_UPDATE_SLICE", [x, (1, 2, 3), V((3,), "int64", limits=(-1, 5))], SAME, form="int64")
    add(
        "EMBEDDING_LOOKUP",
        [V((5,), "int32", limits=(0, 6)), V((7, 4), constant=True, weights=True)],
        Out(limits=None),
        kinds=("float32", "int8", HYBRID),
    )
    for half, corners in ((0, 0), (1, 0), (0, 1)):
        fields = {"AlignCorners": corners, "HalfPixelCenters": half}
        for form, shape, size in (
            ("up", (1, 4, 5, 3), (9, 7)),
            ("down", (2, 8, 9, 2), (3, 4)),
            ("twice", (1, 4, 4, 3), (8, 8)),
        ):
            kinds = KINDS if form == "up" else ("float32",)
            for name, options in (
                ("BILINEAR", "ResizeBilinearOptions"),
                ("NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions"),
            ):
                add(f"RESIZE_{name}", [shape, ints(*size)], SAME, options, fields, kinds, f"{form} {half}{corners}")
    add(
        "ONE_HOT",
        [V((2, 3), "int32", limits=(-1, 4)), scalar(4), V((), constant=True), V((), constant=True)],
        SAME,
        "OneHotOptions",
        {"Axis": -1},
        ("float32", "int32", "int64", "bool", "int8", "uint8"),
    )
    add(
        "ONE_HOT",
        [V((2, 3), "int32", limits=(-1, 4)), scalar(4), V((), constant=True), V((), constant=True)],
        SAME,
        "OneHotOptions",
        {"Axis": 1},
        form="axis 1",
    )
    for form, begin, end, stride, masks in (
        ("plain", (0, 1, 2), (2, 4, 6), (1, 2, 3), {}),
        ("backwards", (-1, 3, -1), (-3, -5, 0), (-1, -1, -2), {}),
        ("masks", (1, 1, 1), (1, 1, 1), (1, 1, 1), {"BeginMask": 3, "EndMask": 6}),
        ("shrink", (1, -2, 0), (0, 0, 6), (1, 1, 1), {"ShrinkAxisMask": 3}),
        ("ellipsis", (0, 1), (0, 4), (1, 1), {"EllipsisMask": 1}),
        ("new axis", (0, 0, 1), (0, 2, 3), (1, 1, 1), {"NewAxisMask": 1}),
        ("mixed", (0, 0, 1, 0), (0, 0, 3, 0), (1, 1, 1, 1), {"EllipsisMask": 1, "NewAxisMask": 2, "ShrinkAxisMask": 8}),
        ("offset", (0, 1, 2), (2, 2, 3), (1, 1, 1), {"Offset": 1}),
        ("few", (1,), (2,), (1,), {}),
    ):
        add(
            "STRIDED_SLICE",
            [x, ints(*begin), ints(*end), ints(*stride)],
            SAME,
            "StridedSliceOptions",
            masks,
            form=form,
            **({"kinds": ALL} if form in ("plain", "backwards") else {}),
        )
    add("SHAPE", [x], Out("int32"), "ShapeOptions", {"OutType": 2}, ("float32", "int8"))
    add("SHAPE", [x], Out("int64"), "ShapeOptions", {"OutType": 4}, form="int64")
    add("RANK", [x], Out("int32"), "RankOptions")
    add("FILL", [ints(2, 3), V((), constant=True)], SAME, "FillOptions", **q)
    add("FILL", [ints(2, 3, dtype="int64"), ()], SAME, "FillOptions", form="computed", **q)
    add("RANGE", [scalar(2), scalar(11), scalar(3)], Out("int32"), "RangeOptions")
    add(
        "RANGE",
        [scalar(2.0, "float32"), scalar(-1.0, "float32"), scalar(-0.5, "float32")],
        Out("float32"),
        "RangeOptions",
        form="floats",
    )
    add(
        "RANGE",
        [scalar(2, "int64"), scalar(7, "int64"), scalar(2, "int64")],
        Out("int64"),
        "RangeOptions",
        form="int64",
    )
    add("WHERE", [V((3, 4), "bool")], Out("int64"), "WhereOptions")
    add("WHERE", [V((2, 3, 2))], Out("int64"), "WhereOptions", kinds=("float32", "int32"), form="numbers")
    add(
        "UNIQUE",
        [V((12,), limits=(0, 5))],
        (SAME, Out("int32")),
        "UniqueOptions",
        {"IdxOutType": 2},
        ("int32", "int64", "float32", "int8", "uint8", "int16"),
    )
    add("DILATE", [(3, 4), ints(2, 3), V((), constant=True)], SAME)
    boxes, scores, ends = (
        V((12, 4), limits=(0, 1)),
        V((12,), limits=(0, 1)),
        (Out("int32"), Out("float32"), Out("int32")),
    )
    limits = (scalar(0.4, "float32"), scalar(0.2, "float32"))
    add("NON_MAX_SUPPRESSION_V4", [boxes, scores, scalar(5), *limits], ends[::2])
    for sigma in (0.0, 0.5):
        soft = scalar(sigma, "float32")
        add("NON_MAX_SUPPRESSION_V5", [boxes, scores, scalar(8), *limits, soft], ends, form=f"sigma {sigma}")
