"""Cases of TFLite operators on elements, and of reductions."""

from __future__ import annotations

import numpy as np

from conformance.tflite_cases import ALL, KINDS, NUMBERS, QUANTISED, Out, V
from conformance.tflite_listing import SAME, add, ints, scalar


def elementwise() -> None:
    x = (2, 3, 5)
    wide = {"ABS": (0, 4), "ELU": (-1, 4), "GELU": (-0.2, 4), "HARD_SWISH": (-0.5, 4), "LEAKY_RELU": (-1, 4)}
    for name in (
        "ABS",
        "CEIL",
        "COS",
        "ELU",
        "FLOOR",
        "HARD_SWISH",
        "NEG",
        "RELU",
        "RELU6",
        "RELU_0_TO_1",
        "RELU_N1_TO_1",
        "ROUND",
        "SIGN",
        "SIN",
        "SQUARE",
        "ZEROS_LIKE",
    ):
        add(name, [x], Out(limits=wide.get(name, (-4, 4))), kinds=NUMBERS)
        add(name, [x], SAME, kinds=QUANTISED, form="same scale")
    for name in ("EXP", "LOG", "SQRT", "RSQRT"):
        add(name, [V(x, limits=(0.1, 3))], Out(limits=(-2.5, 20) if name == "EXP" else (-2.5, 3.5)), kinds=KINDS)
    for approximate in (0, 1):
        add(
            "GELU",
            [x],
            Out(limits=wide["GELU"]),
            "GeluOptions",
            {"Approximate": approximate},
            KINDS,
            f"approximate {approximate}",
        )
    add("LEAKY_RELU", [x], Out(limits=wide["LEAKY_RELU"]), "LeakyReluOptions", {"Alpha": 0.2}, KINDS)
    add("PRELU", [x, V((1, 1, 5), constant=True)], Out(), kinds=("float32", "int8", "uint8"))
    add("PRELU", [x, V((1, 1, 5), constant=True, weights=True)], Out(), kinds=("int16",))
    add("LOGISTIC", [x], Out(scale=1 / 256, zero=-128), kinds=("float32", "int8"))
    add("LOGISTIC", [x], Out(scale=1 / 256, zero=0), kinds=("uint8",))
    add("LOGISTIC", [x], Out(scale=1 / 32768), kinds=("int16",))
    add("TANH", [x], Out(scale=1 / 128, zero=0), kinds=("float32", "int8"))
    add("TANH", [x], Out(scale=1 / 128, zero=128), kinds=("uint8",))
    add("TANH", [x], Out(scale=1 / 32768), kinds=("int16",))
    add("LOGICAL_NOT", [x], kinds=("bool",))
    for name in ("LOGICAL_AND", "LOGICAL_OR"):
        add(name, [x, (1, 5)], kinds=("bool",))
    for name in ("ADD", "SUB", "MUL"):
        for act in (0, 1, 3):
            options = name.title() + "Options"
            fields = {"FusedActivationFunction": act}
            add(name, [x, (1, 5)], Out(), options, fields, NUMBERS if act == 0 else KINDS, f"activation {act}")
        add(name, [x, V((5,), constant=True)], Out(), name.title() + "Options", None, NUMBERS, "constant")
    # LiteRT's own kernel of uint8 is wrong where 0 is divided.
    add("DIV", [V(x, limits=(0.5, 4)), V((1, 5), limits=(0.5, 3))], Out(), "DivOptions", None, ("float32", "uint8"))
    add("DIV", [x, V((1, 5), limits=(1, 9))], Out(), "DivOptions", None, ("int32",))
    for name in ("MAXIMUM", "MINIMUM"):
        add(name, [x, (1, 5)], SAME, "MaximumMinimumOptions", None, NUMBERS)
    add("SQUARED_DIFFERENCE", [x, (1, 5)], Out(limits=(0, 40)), kinds=NUMBERS)
    for name in ("EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL"):
        add(name, [x, (1, 5)], Out("bool"), kinds=ALL)
        add(name, [x, V((1, 5), limits=(-1, 6))], Out("bool"), kinds=("int8", "uint8"), form="two scales")
    add("POW", [V(x, limits=(0.2, 3)), (1, 5)], kinds=("float32",))
    add("POW", [V(x, limits=(1, 4)), V((1, 5), limits=(0, 5))], kinds=("int32",))
    for name in ("FLOOR_DIV", "FLOOR_MOD"):
        add(name, [V(x, limits=(-30, 30)), V((1, 5), limits=(1, 7))], kinds=("float32", "int32", "int64"))
        add(
            name,
            [V(x, limits=(-30, 30)), V((1, 5), limits=(-7, -1))],
            Out(limits=(-30, 30)),
            kinds=("float32", "int32"),
            form="negative",
        )
        add(
            name, [V(x, "int16", limits=(-30, 30)), V((1, 5), "int16", limits=(1, 7))], Out("int16"), form="int16 plain"
        )
        add(name, [V(x, "int8", limits=(-30, 30)), V((1, 5), "int8", limits=(1, 7))], Out("int8"), form="int8 plain")
    add("ATAN2", [x, x])
    add("ADD_N", [x, x, x], kinds=("float32", "int32"))
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32"):
        low = 0 if dtype.startswith("u") else -100
        add(
            "BITWISE_XOR", [V(x, dtype, limits=(low, 100)), V((1, 5), dtype, limits=(low, 100))], Out(dtype), form=dtype
        )
        add("RIGHT_SHIFT", [V(x, dtype, limits=(low, 100)), V((1, 5), dtype, limits=(0, 6))], Out(dtype), form=dtype)
    add("BITWISE_XOR", [x, (1, 5)], kinds=("bool",))
    plain = ("float32", "int32", "int8", "uint8", "int16", "int64", "bool", "float16")
    for left in plain:
        for right in plain:
            if left != right and (left in plain[:2] or right in plain[:2]):
                low = 0 if "u" in (left + right) and "bool" not in (left, right) else -4
                add("CAST", [V(x, left, limits=(low, 4))], Out(right), "CastOptions", form=f"{left} to {right}")
    add("BITCAST", [x], Out("int32"))
    add("BITCAST", [V((3, 4), "uint8", limits=(0, 255))], Out("int32"), form="narrow to wide")
    add("BITCAST", [V((3, 4), "int32", limits=(0, 255))], Out("uint8"), form="wide to narrow")
    add("FAKE_QUANT", [x], options="FakeQuantOptions", fields={"Min": -2.0, "Max": 3.0, "NumBits": 8})
    add(
        "FAKE_QUANT",
        [x],
        options="FakeQuantOptions",
        fields={"Min": -2.0, "Max": 3.0, "NumBits": 4, "NarrowRange": 1},
        form="narrow",
    )
    add(
        "BUCKETIZE",
        [x],
        Out("int32"),
        "BucketizeOptions",
        {"Boundaries": np.array([-1, 0.5, 2], np.float32)},
        ("float32", "int32", "int64"),
    )


def quantise() -> None:
    x = (2, 3, 5)
    for right in QUANTISED:
        scale = {"int8": (0.04, -3), "uint8": (0.04, 125), "int16": (0.001, 0)}[right]
        add(
            "QUANTIZE",
            [x],
            Out(right, scale=scale[0], zero=scale[1]),
            "QuantizeOptions",
            form=f"to {right}",
            kinds=("float32", *QUANTISED),
        )
    add("DEQUANTIZE", [x], Out("float32"), "DequantizeOptions", kinds=QUANTISED)
    add("DEQUANTIZE", [V(x, "float16")], Out("float32"), "DequantizeOptions", form="half")
    add(
        "DEQUANTIZE",
        [V((4, 3), constant=True, weights=True, axis=0)],
        Out("float32"),
        "DequantizeOptions",
        kinds=("int8",),
        form="by axis",
    )


def reductions() -> None:
    x = (2, 3, 4, 5)
    for name in ("SUM", "MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"):
        narrow = (0.5, 1.2) if name == "REDUCE_PROD" else (-4, 4)
        out = SAME if name in ("REDUCE_MAX", "REDUCE_MIN") else Out(limits=(-20, 20) if name == "SUM" else (-3, 3))
        for form, axes, keep in (("hw", (1, 2), 1), ("last", (-1,), 0), ("first", (0,), 0), ("all", (0, 1, 2, 3), 0)):
            few = form == "all" and name in ("REDUCE_PROD",)
            inside = (0.95, 1.05) if few else narrow
            add(name, [V(x, limits=inside), ints(*axes)], out, "ReducerOptions", {"KeepDims": keep}, NUMBERS, form)
    for name in ("REDUCE_ANY", "REDUCE_ALL"):
        add(name, [x, ints(1)], Out("bool"), "ReducerOptions", {"KeepDims": 0}, ("bool",))
    for name in ("ARG_MAX", "ARG_MIN"):
        options = "ArgMaxOptions" if name == "ARG_MAX" else "ArgMinOptions"
        for axis in (0, 2, -1):
            add(name, [x, ints(axis)], Out("int32"), options, {"OutputType": 2}, ALL, f"axis {axis}")
        add(name, [x, scalar(1)], Out("int64"), options, {"OutputType": 4}, ("float32", "int8"), "int64")
    for exclusive in (0, 1):
        for reverse in (0, 1):
            add(
                "CUMSUM",
                [x, scalar(1)],
                Out(),
                "CumsumOptions",
                {"Exclusive": exclusive, "Reverse": reverse},
                ("float32", "int32", "int64"),
                f"{exclusive}{reverse}",
            )
    add("TOPK_V2", [V((3, 20)), scalar(4)], (SAME, Out("int32")), kinds=NUMBERS)
    add("TOPK_V2", [V((7,)), scalar(7)], (SAME, Out("int32")), form="all")
    add("LOG_SOFTMAX", [(3, 10)], Out(scale=16 / 256, zero=127), kinds=("float32", "int8"))
    add("LOG_SOFTMAX", [(3, 10)], Out(scale=16 / 256, zero=255), kinds=("uint8",))
    for beta in (1.0, 0.5):
        for shape in ((3, 10), (2, 3, 4, 6)):
            form = f"{beta} {len(shape)}-d"
            add(
                "SOFTMAX",
                [shape],
                Out(scale=1 / 256, zero=-128),
                "SoftmaxOptions",
                {"Beta": beta},
                ("float32", "int8"),
                form,
            )
            add("SOFTMAX", [shape], Out(scale=1 / 256, zero=0), "SoftmaxOptions", {"Beta": beta}, ("uint8",), form)
            add("SOFTMAX", [shape], Out(scale=1 / 32768, zero=0), "SoftmaxOptions", {"Beta": beta}, ("int16",), form)
    add(
        "SOFTMAX",
        [(3, 10)],
        Out("int16", scale=1 / 65536, zero=-32768),
        "SoftmaxOptions",
        {"Beta": 1.0},
        ("int8",),
        "to int16",
    )
    add("L2_NORMALIZATION", [(2, 3, 3, 8)], Out(scale=1 / 128, zero=0), "L2NormOptions", {}, ("float32", "int8"))
    add("L2_NORMALIZATION", [(2, 3, 3, 8)], Out(scale=1 / 128, zero=128), "L2NormOptions", {}, ("uint8",))
    add(
        "LOCAL_RESPONSE_NORMALIZATION",
        [(2, 3, 3, 8)],
        options="LocalResponseNormalizationOptions",
        fields={"Radius": 2, "Bias": 1.0, "Alpha": 0.3, "Beta": 0.7},
    )
    add("SEGMENT_SUM", [V((6, 3)), ints(0, 0, 1, 2, 2, 2)], kinds=("float32", "int32"))
    for name in ("SUM", "MAX", "MIN", "PROD"):
        add(
            f"UNSORTED_SEGMENT_{name}",
            [V((6, 3)), ints(0, 2, 1, 4, 2, 0), scalar(5)],
            options=f"UnsortedSegment{name.title()}Options",
            kinds=("float32", "int32"),
        )
        add(
            f"UNSORTED_SEGMENT_{name}",
            [V((2, 3, 2)), V((2, 3), data=np.array([[0, 2, 1], [1, -1, 2]], np.int32)), scalar(4)],
            options=f"UnsortedSegment{name.title()}Options",
            kinds=("float32", "int32"),
            form="2-d",
        )
