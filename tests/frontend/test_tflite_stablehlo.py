"""StableHLO operators in TFLite files: judged by numpy, and by LiteRT where it has a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from conformance.tflite_suite import STABLEHLO, litert
from ingot.errors import UnsupportedError
from ingot.frontend import Imported, import_model

from .tiny_models import Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]
#: LiteRT has kernels for these.
_IN_LITERT = frozenset(("ADD", "MULTIPLY", "MAXIMUM", "MINIMUM", "GATHER", "PAD", "SHIFT_LEFT"))
_RANDOM = np.random.default_rng(5)


def _real(*shape: int, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    return _RANDOM.uniform(low, high, shape).astype(np.float32)


def _whole(*shape: int, low: int = -9, high: int = 9) -> np.ndarray:
    return _RANDOM.integers(low, high + 1, shape).astype(np.int32)


def _bools(*shape: int) -> np.ndarray:
    return _RANDOM.integers(0, 2, shape).astype(bool)


@dataclass
class Form:
    """An operator on values, with the result that numpy computes."""

    name: str
    inputs: tuple[np.ndarray, ...]
    wanted: Callable[..., np.ndarray]
    options: str = ""
    fields: Mapping[str, float | np.ndarray] = field(default_factory=dict)

    def expected(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(self.wanted(*self.inputs))


def _i64(**fields: tuple[int, ...] | int) -> dict[str, float | np.ndarray]:
    return {key: np.array(v, np.int64) if isinstance(v, tuple) else v for key, v in fields.items()}


def _i32(value: int) -> np.ndarray:
    return np.array(value, np.int32)


def _padded(
    x: np.ndarray, fill: np.ndarray, low: tuple[int, ...], high: tuple[int, ...], gap: tuple[int, ...]
) -> np.ndarray:
    """StableHLO's pad, written from its text: spread, then add or take away at the edges."""
    spread = np.full([n + (n - 1) * g for n, g in zip(x.shape, gap, strict=True)], fill, x.dtype)
    spread[tuple(slice(None, None, g + 1) for g in gap)] = x
    grown = np.pad(spread, [(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True)], constant_values=fill)
    return grown[tuple(slice(max(-a, 0), n - max(-b, 0)) for a, b, n in zip(low, high, grown.shape, strict=True))]


def _truncated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(y == 0, -1, np.trunc(x / np.where(y == 0, 1, y))).astype(x.dtype)


def _convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [F, N, H, W], weight [KH, O, KW, I / 2]: stride 2 and 1, padding 1, 0 and 0, 2, two groups; [O, H, W, N]."""
    image = np.pad(np.moveaxis(x, 0, 3), [(0, 0), (1, 0), (0, 2), (0, 0)]).astype(np.float64)
    rows, last, columns, depth = weight.shape
    height, width = (image.shape[1] - rows) // 2 + 1, image.shape[2] - columns + 1
    out = np.zeros((image.shape[0], height, width, last))
    for group in range(2):
        channels, ends = slice(group * depth, (group + 1) * depth), slice(group * last // 2, (group + 1) * last // 2)
        for i in range(rows):
            for j in range(columns):
                part = image[:, i : i + 2 * height - 1 : 2, j : j + width, channels]
                out[..., ends] += np.einsum("nhwc,oc->nhwo", part, weight[i, ends, j])
    return np.moveaxis(out, 3, 0).transpose(0, 2, 3, 1).astype(np.float32)


_CONVOLUTION = _i64(
    WindowStrides=(2, 1), Padding=(1, 0, 0, 2), InputBatchDimension=1, InputFeatureDimension=0,
    InputSpatialDimensions=(2, 3), KernelInputFeatureDimension=3, KernelOutputFeatureDimension=1,
    KernelSpatialDimensions=(0, 2), OutputBatchDimension=3, OutputFeatureDimension=0, OutputSpatialDimensions=(1, 2),
    FeatureGroupCount=2, BatchGroupCount=1,
)  # fmt: skip


def _forms() -> list[Form]:
    x, y, n, m, b = _real(2, 3, 5), _real(2, 3, 5), _whole(3, 7), _whole(3, 7), _bools(2, 9)
    plus = np.abs(x) + np.float32(0.1)
    wide = _real(4, 6, 5)
    plain = [
        Form("ABS", (x,), np.abs), Form("ABS", (n,), np.abs), Form("ADD", (x, y), np.add),
        Form("AND", (b, ~b), np.logical_and), Form("AND", (n, m), np.bitwise_and), Form("CBRT", (x,), np.cbrt),
        Form("CLAMP", (np.float32(-1), x, np.float32(0.5)), lambda low, v, high: np.clip(v, low, high)),
        Form("CONVERT", (x,), lambda v: v.astype(np.int32)), Form("CONVERT", (n,), lambda v: v != 0),
        Form("COSINE", (x,), np.cos), Form("DIVIDE", (x, plus), np.divide), Form("DIVIDE", (n, m), _truncated),
        Form("EXPONENTIAL", (x,), np.exp), Form("FLOOR", (x,), np.floor), Form("LOG", (plus,), np.log),
        Form("LOGISTIC", (x,), lambda v: 1 / (1 + np.exp(-v))), Form("MAXIMUM", (x, y), np.maximum),
        Form("MINIMUM", (n, m), np.minimum), Form("MULTIPLY", (x, y), np.multiply), Form("NEGATE", (x,), np.negative),
        Form("OR", (b, ~b), np.logical_or), Form("OR", (n, m), np.bitwise_or), Form("POWER", (plus, y), np.power),
        Form("REMAINDER", (x, plus), np.fmod),
        Form("REMAINDER", (n, m), lambda v, w: v - np.where(w == 0, 0, _truncated(v, w) * w)),
        Form("RESHAPE", (x,), lambda v: v.reshape(5, 6)), Form("RSQRT", (plus,), lambda v: 1 / np.sqrt(v)),
        Form("SELECT", (b, _whole(2, 9), _whole(2, 9)), np.where), Form("SELECT", (np.array(True), x, y), np.where),
        Form("SHIFT_LEFT", (n, _whole(3, 7, low=0, high=5)), np.left_shift), Form("SUBTRACT", (x, y), np.subtract),
        Form("TANH", (x,), np.tanh),
        Form("DYNAMIC_UPDATE_SLICE", (wide, _real(2, 3, 5), _i32(9), _i32(1), _i32(-4)), _updated),
    ]  # fmt: skip
    compare = ("equal", "not_equal", "greater_equal", "greater", "less_equal", "less")
    plain += [
        Form("COMPARE", (n, m), getattr(np, name), "StablehloCompareOptions", {"ComparisonDirection": number})
        for number, name in enumerate(compare)
    ]
    low, high, gap = (2, -1, 0), (-1, 1, 3), (0, 1, 2)
    return [
        *plain,
        Form("COMPARE", (b, ~b), np.not_equal, "StablehloCompareOptions", {"ComparisonDirection": 1}),
        Form(
            "BROADCAST_IN_DIM",
            (_real(3, 1, 2),),
            lambda v: np.broadcast_to(v.transpose(2, 0, 1)[:, None], (2, 4, 3, 5)),
            "StablehloBroadcastInDimOptions",
            _i64(BroadcastDimensions=(2, 3, 0)),
        ),
        Form(
            "CONCATENATE",
            (x, y),
            lambda v, w: np.concatenate([v, w], 1),
            "StablehloConcatenateOptions",
            {"Dimension": 1},
        ),
        Form(
            "CONVOLUTION",
            (_real(4, 2, 7, 6), _real(3, 6, 2, 2)),
            _convolved,
            "StablehloConvolutionOptions",
            _CONVOLUTION,
        ),
        Form(
            "DOT_GENERAL",
            (_real(3, 4, 2, 5), _real(5, 2, 7, 4)),
            lambda v, w: np.einsum("abcd,dceb->bae", v, w),
            "StablehloDotGeneralOptions",
            _i64(
                LhsBatchingDimensions=(1,),
                RhsBatchingDimensions=(3,),
                LhsContractingDimensions=(2, 3),
                RhsContractingDimensions=(1, 0),
            ),
        ),
        Form(
            "DYNAMIC_SLICE",
            (wide, _i32(3), _i32(-2), _i32(1)),
            lambda v, *_: v[2:4, 0:3, 1:5],
            "StablehloDynamicSliceOptions",
            _i64(SliceSizes=(2, 3, 4)),
        ),
        Form(
            "GATHER",
            (wide, np.array([[0, 1], [3, 4], [9, -1]], np.int32)),
            lambda v, at: np.stack([v[min(max(i, 0), 3), :, min(max(k, 0), 2) :][:, :3] for i, k in at], 1),
            "StablehloGatherOptions",
            _i64(
                OffsetDims=(0, 2), CollapsedSliceDims=(0,), StartIndexMap=(0, 2), IndexVectorDim=1, SliceSizes=(1, 6, 3)
            ),
        ),
        Form(
            "IOTA",
            (),
            lambda: np.broadcast_to(np.arange(4, dtype=np.float32)[:, None], (3, 4, 2)),
            "StablehloIotaOptions",
            {"IotaDimension": 1},
        ),
        Form(
            "PAD",
            (wide, np.array(7, np.float32)),
            lambda v, fill: _padded(v, fill, low, high, gap),
            "StablehloPadOptions",
            _i64(EdgePaddingLow=low, EdgePaddingHigh=high, InteriorPadding=gap),
        ),
        Form(
            "SLICE",
            (wide,),
            lambda v: v[1:4:2, 0:6:1, 2:5:2],
            "StablehloSliceOptions",
            _i64(StartIndices=(1, 0, 2), LimitIndices=(4, 6, 5), Strides=(2, 1, 2)),
        ),
        Form(
            "TRANSPOSE",
            (wide,),
            lambda v: v.transpose(2, 0, 1),
            "StablehloTransposeOptions",
            _i64(Permutation=(2, 0, 1)),
        ),
    ]


def _updated(x: np.ndarray, new: np.ndarray, *_: np.ndarray) -> np.ndarray:
    found = x.copy()
    found[2:4, 1:4, 0:5] = new  # the places 9, 1, -4, moved to lie inside
    return found


def _model(forms: list[Form]) -> bytes:
    """The operators side by side."""
    tensors: list[Tensor] = []
    ops, inputs, outputs = [], [], []
    for number, form in enumerate(forms):
        first = len(tensors)
        tensors += [Tensor(f"x{number}.{i}", v.shape, str(v.dtype)) for i, v in enumerate(form.inputs)]
        result = form.expected()
        tensors.append(Tensor(f"y{number}", result.shape, str(result.dtype)))
        places = tuple(range(first, len(tensors) - 1))
        inputs += places
        outputs.append(len(tensors) - 1)
        ops.append(Op(f"STABLEHLO_{form.name}", places, (len(tensors) - 1,), form.options, form.fields))
    return tflite_of(tensors, ops, inputs, outputs)


def test_every_operator_computes_what_stablehlo_says(write: Write, run_imported: Build) -> None:
    forms = _forms()
    assert {f"STABLEHLO_{form.name}" for form in forms} == set(STABLEHLO)
    found = run_imported(import_model(write(_model(forms), "m.tflite")))(*(v for form in forms for v in form.inputs))
    for value, form in zip(found, forms, strict=True):
        assert value.dtype == form.expected().dtype, form.name
        np.testing.assert_allclose(value, form.expected(), rtol=2e-5, atol=1e-5, err_msg=form.name)


@pytest.mark.parametrize("form", [form for form in _forms() if form.name in _IN_LITERT], ids=lambda form: form.name)
def test_numpy_and_litert_agree(form: Form) -> None:
    (found,) = litert(_model([form]), form.inputs)
    np.testing.assert_allclose(found, form.expected(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "fields", "said"),
    [
        ("TRANSPOSE", "StablehloTransposeOptions", _i64(Permutation=(0, 0)), "no axes"),
        ("TRANSPOSE", "StablehloTransposeOptions", _i64(Permutation=(0,)), "does not fit"),
        ("SLICE", "StablehloSliceOptions", _i64(StartIndices=(0, 0), LimitIndices=(9, 3), Strides=(1, 1)), "outside"),
        ("REDUCE", "", {}, "runs other graphs"),
        ("TRANSPOSE", "", {}, "no options"),
    ],
)
def test_what_does_not_fit_is_refused(
    write: Write, name: str, options: str, fields: dict[str, float], said: str
) -> None:
    tensors = [Tensor("x", (2, 3)), Tensor("y", (2, 3))]
    data = tflite_of(tensors, [Op(f"STABLEHLO_{name}", (0,), (1,), options, fields)], [0], [1])
    with pytest.raises(UnsupportedError, match=said):
        import_model(write(data, "m.tflite"))
