"""Cases of TFLite layers: products, pools, recurrent ones."""

from __future__ import annotations

from conformance.tflite_cases import HYBRID, KINDS, Out, V
from conformance.tflite_listing import FLOAT, SAME, add, ints


def layers() -> None:
    x = (1, 7, 6, 4)
    base = {"StrideH": 1, "StrideW": 1, "DilationHFactor": 1, "DilationWFactor": 1, "FusedActivationFunction": 0}
    for form, change in (
        ("same", {}),
        ("valid", {"Padding": 1}),
        ("stride", {"StrideH": 2, "StrideW": 3}),
        ("dilated", {"DilationHFactor": 2, "DilationWFactor": 2}),
        ("relu6", {"FusedActivationFunction": 3}),
    ):
        fields = {**base, **change}
        kinds = (*KINDS, HYBRID) if form == "same" else ("float32", "int8")
        add(
            "CONV_2D",
            [
                x,
                V((5, 3, 3, 4), constant=True, weights=True, limits=(-1, 1), axis=0),
                V((5,), constant=True, bias=True),
            ],
            Out(limits=(-12, 12)),
            "Conv2DOptions",
            fields,
            kinds,
            form,
        )
        add(
            "DEPTHWISE_CONV_2D",
            [
                x,
                V((1, 3, 3, 8), constant=True, weights=True, limits=(-1, 1), axis=3),
                V((8,), constant=True, bias=True),
            ],
            Out(limits=(-9, 9)),
            "DepthwiseConv2DOptions",
            {**fields, "StrideH": fields["StrideH"], "StrideW": fields["StrideH"], "DepthMultiplier": 2},
            kinds,
            form,
        )
        if form in ("same", "valid", "stride", "relu6"):
            pool = {
                "StrideH": fields["StrideH"],
                "StrideW": fields["StrideW"],
                "FilterHeight": 3,
                "FilterWidth": 2,
                "Padding": fields.get("Padding", 0),
                "FusedActivationFunction": fields["FusedActivationFunction"],
            }
            for name in ("AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_POOL_2D"):
                add(name, [x], SAME, "Pool2DOptions", pool, KINDS if form == "same" else ("float32", "int8"), form)
    add(
        "CONV_2D",
        [
            (1, 7, 6, 4),
            V((6, 3, 3, 2), constant=True, weights=True, limits=(-1, 1), axis=0),
            V((6,), constant=True, bias=True),
        ],
        Out(limits=(-12, 12)),
        "Conv2DOptions",
        base,
        ("float32", "int8"),
        "grouped",
    )
    add(
        "CONV_2D",
        [x, V((5, 3, 3, 4), constant=True, weights=True, limits=(-1, 1), axis=0), None],
        Out(limits=(-12, 12)),
        "Conv2DOptions",
        base,
        KINDS,
        "no bias",
    )
    for form, change in (("same", {}), ("valid", {"Padding": 1}), ("relu", {"FusedActivationFunction": 1})):
        fields = {"StrideH": 2, "StrideW": 2, "Padding": 0, **change}
        size = ints(1, 15, 13, 5) if change.get("Padding") else ints(1, 14, 12, 5)
        turned = [size, V((5, 3, 3, 4), constant=True, weights=True, limits=(-1, 1), axis=0), x]
        kinds = KINDS if form == "same" else ("float32", "int8")
        add(
            "TRANSPOSE_CONV",
            [*turned, V((5,), constant=True, bias=True)],
            Out(limits=(-12, 12)),
            "TransposeConvOptions",
            fields,
            kinds,
            form,
        )
        if form == "same":
            add(
                "TRANSPOSE_CONV",
                turned,
                Out(limits=(-12, 12)),
                "TransposeConvOptions",
                fields,
                ("float32", HYBRID),
                "no bias",
            )
    cube = {"StrideD": 1, "StrideH": 1, "StrideW": 1, "DilationDFactor": 1, "DilationHFactor": 1, "DilationWFactor": 1}
    for form, change in (
        ("same", {}),
        ("valid", {"Padding": 1}),
        ("stride", {"StrideD": 2, "StrideH": 2, "StrideW": 2, "FusedActivationFunction": 1}),
    ):
        add(
            "CONV_3D",
            [(1, 4, 5, 6, 2), V((3, 3, 3, 2, 4), constant=True, weights=True), V((4,), constant=True, bias=True)],
            Out(),
            "Conv3DOptions",
            {**cube, **change},
            FLOAT,
            form,
        )
    add(
        "CONV_3D_TRANSPOSE",
        [
            ints(1, 8, 10, 12, 4),
            V((3, 3, 3, 4, 2), constant=True, weights=True),
            (1, 4, 5, 6, 2),
            V((4,), constant=True, bias=True),
        ],
        Out(),
        "Conv3DOptions",
        {**cube, "StrideD": 2, "StrideH": 2, "StrideW": 2},
    )
    for form, change in (("", {}), ("relu", {"FusedActivationFunction": 1}), ("keep", {"KeepNumDims": 1})):
        shape = (2, 3, 8) if form == "keep" else (3, 8)
        for axis in (None, 0):
            add(
                "FULLY_CONNECTED",
                [
                    shape,
                    V((5, 8), constant=True, weights=True, limits=(-1, 1), axis=axis),
                    V((5,), constant=True, bias=True),
                ],
                Out(limits=(-12, 12)),
                "FullyConnectedOptions",
                change,
                (*KINDS, HYBRID) if not form else ("float32", "int8"),
                f"{form} {'by axis' if axis == 0 else ''}".strip(),
            )
    add(
        "FULLY_CONNECTED",
        [(3, 8), (5, 8), None],
        Out(limits=(-20, 20)),
        "FullyConnectedOptions",
        {},
        ("float32", "int8"),
        "computed weights",
    )
    for form, fields in (("", {}), ("turned", {"AdjX": 1, "AdjY": 1})):
        left, right = ((2, 8, 3), (2, 5, 8)) if form else ((2, 3, 8), (2, 8, 5))
        add("BATCH_MATMUL", [left, right], Out(limits=(-20, 20)), "BatchMatMulOptions", fields, KINDS, form)
        add(
            "BATCH_MATMUL",
            [left, V(right, constant=True, weights=True)],
            Out(limits=(-20, 20)),
            "BatchMatMulOptions",
            fields,
            ("float32", "int8", HYBRID),
            f"{form} constant".strip(),
        )
    add("BATCH_MATMUL", [(3, 1, 4, 6), (2, 6, 5)], Out(limits=(-20, 20)), "BatchMatMulOptions", {}, KINDS, "broadcast")


def recurrent() -> None:
    size, units, batch, steps = 5, 6, 2, 4

    def w(*shape: int) -> V:
        return V(shape, constant=True, weights=True, limits=(-0.7, 0.7))

    def b(count: int) -> V:
        return V((count,), "float32", constant=True, limits=(-0.5, 0.5))

    def state(count: int) -> V:
        return V((batch, count), "float32", state=True)

    def lstm(cifg: bool = False, peephole: bool = False, projection: int = 0, norm: bool = False) -> list[V | None]:
        out = projection or units
        first = [None if cifg else w(units, size), *(w(units, size) for _ in range(3))]
        again = [None if cifg else w(units, out), *(w(units, out) for _ in range(3))]
        peeps = [
            (None if cifg else b(units)) if peephole else None,
            *((b(units) if peephole else None) for _ in range(2)),
        ]
        biases = [None if cifg else b(units), b(units), b(units), b(units)]
        return [*first, *again, *peeps, *biases, w(projection, units) if projection else None, None]

    kinds = ("float32", HYBRID)
    options = {"FusedActivationFunction": 4, "TimeMajor": 0}
    for form, change, fields in (
        ("", {}, {}),
        ("time major", {}, {"TimeMajor": 1}),
        ("cifg", {"cifg": True}, {}),
        ("peephole", {"peephole": True}, {}),
        ("projection", {"projection": 3}, {}),
        ("clip", {}, {"CellClip": 0.3}),
        ("norm", {"norm": True}, {}),
    ):
        out = change.get("projection") or units
        shape = (steps, batch, size) if "TimeMajor" in fields else (batch, steps, size)
        norms = [b(units)] * 4 if form == "norm" else []
        ins = [V(shape, "float32"), *lstm(**change), state(out), state(units), *norms]
        add(
            "UNIDIRECTIONAL_SEQUENCE_LSTM",
            ins,
            Out("float32"),
            "UnidirectionalSequenceLSTMOptions",
            {**options, **fields},
            kinds if not norms else FLOAT,
            form,
        )
    both = [
        *lstm(),
        *lstm(),
        state(units),
        state(units),
        state(units),
        state(units),
        *[None] * 9,
    ]
    # LiteRT's merged output is not the two joined unless time comes first.
    for merged in (0, 1):
        first = V((steps, batch, size) if merged else (batch, steps, size), "float32")
        add(
            "BIDIRECTIONAL_SEQUENCE_LSTM",
            [first, *both],
            (Out("float32"),) * (1 if merged else 2),
            "BidirectionalSequenceLSTMOptions",
            {**options, "MergeOutputs": merged, "TimeMajor": merged},
            kinds,
            f"merged {merged}",
        )
    for activation in (4, 1):
        rnn = [w(units, size), w(units, units), b(units), state(units)]
        add(
            "RNN",
            [V((batch, size), "float32"), *rnn],
            Out("float32"),
            "RNNOptions",
            {"FusedActivationFunction": activation},
            kinds,
            f"activation {activation}",
        )
        add(
            "UNIDIRECTIONAL_SEQUENCE_RNN",
            [V((batch, steps, size), "float32"), *rnn],
            Out("float32"),
            "SequenceRNNOptions",
            {"FusedActivationFunction": activation},
            kinds,
            f"activation {activation}",
        )
        add(
            "BIDIRECTIONAL_SEQUENCE_RNN",
            [V((batch, steps, size), "float32"), *rnn, *rnn, *[None] * 3],
            (Out("float32"),) * 2,
            "BidirectionalSequenceRNNOptions",
            {"FusedActivationFunction": activation},
            kinds,
            f"activation {activation}",
        )
    add(
        "SVDF",
        [
            V((batch, size), "float32"),
            w(8, size),
            V((8, 10), constant=True, weights=True),
            b(4),
            V((batch, 80), "float32", state=True),
        ],
        Out("float32"),
        "SVDFOptions",
        {"Rank": 2},
        kinds,
    )
    add(
        "LSTM",
        [V((batch, size)), V((batch, units)), w(4 * units, size + units), b(4 * units), V((batch, units))],
        (Out(), Out(), Out(), Out()),
        "LSTMOptions",
        {"FusedActivationFunction": 4, "KernelType": 1},
        FLOAT,
        "basic",
    )


def integer_lstms() -> None:
    """LSTMs of 8-bit activations, 8-bit weights and a 16-bit cell state."""
    size, units, batch, steps = 5, 6, 2, 4

    def w(*shape: int) -> V:
        return V(shape, constant=True, weights=True, limits=(-0.9, 0.9))

    def wide(count: int) -> V:
        return V((count,), "int16", constant=True, limits=(-1, 1), scale=2.0**-15)

    def bias(count: int) -> V:
        return V((count,), "int32", constant=True, limits=(-2000, 2000))

    for form, fields in (
        ("", {}),
        ("time major", {"TimeMajor": 1}),
        ("cifg", {}),
        ("peephole", {}),
        ("projection", {}),
        ("clip", {"CellClip": 0.3}),
        ("norm", {}),
        ("all", {"TimeMajor": 1, "CellClip": 0.8, "ProjClip": 0.4}),
        ("single", {}),
    ):
        out = 3 if form in ("projection", "all") else units
        cifg, peephole, norm = (form in (name, "all") for name in ("cifg", "peephole", "norm"))
        single = form == "single"
        shape = (steps, batch, size) if "TimeMajor" in fields else (batch, steps, size)

        def gates(make: V, absent: bool = cifg) -> list[V | None]:
            return [None if absent else make, make, make, make]

        ins = [
            V((batch, size) if single else shape),
            *gates(w(units, size)),
            *gates(w(units, out)),
            *([None if cifg else wide(units), wide(units), wide(units)] if peephole else [None] * 3),
            *gates(bias(units)),
            *([w(out, units), bias(out)] if out < units else [None, None]),
            V((batch, out), limits=(-1, 1), state=True),
            V((batch, units), "int16", state=True, scale=2.0**-11),
            *(gates(wide(units)) if norm else []),
        ]
        inside = (*(V((0,), "int16", scale=0.0004) for _ in range(4)), V((0,), limits=(-1, 1)))
        add(
            "LSTM" if single else "UNIDIRECTIONAL_SEQUENCE_LSTM",
            ins,
            Out(limits=(-1, 1)),
            "LSTMOptions" if single else "UnidirectionalSequenceLSTMOptions",
            {"FusedActivationFunction": 4, **fields},
            ("int8",),
            "" if single else form,
            between=inside,
        )


def integer_svdfs() -> None:
    """SVDFs of 8-bit activations with a 16-bit memory."""
    size, batch = 9, 2
    for form, filters, rank, memory, biased in (
        ("", 8, 2, 10, True),
        ("rank 1", 5, 1, 7, True),
        ("memory 1", 6, 3, 1, True),
        ("no bias", 8, 4, 3, False),
    ):
        units = filters // rank
        add(
            "SVDF",
            [
                V((batch, size)),
                V((filters, size), constant=True, weights=True, limits=(-0.9, 0.9)),
                V((filters, memory), "int16", constant=True, limits=(-1, 1), scale=2.0**-15),
                V((units,), "int32", constant=True, limits=(-20000, 20000)) if biased else None,
                V((batch, filters * memory), "int16", state=True, scale=2.0**-12),
            ],
            Out(limits=(-9, 9)),
            "SVDFOptions",
            {"Rank": rank, "FusedActivationFunction": 1},
            ("int8",),
            form,
        )
