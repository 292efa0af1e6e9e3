"""Preparation of features in ai.onnx.ml: scaling, imputing, encoding, selecting."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.scores import DOMAIN
from ingot.frontend.onnx_tensors import tensor_array
from ingot.frontend.tvm_types import Expr


def _same(node: OpNode) -> Shapes:
    return [(node.shapes[0], node.dtypes[0])]


def _floats(node: OpNode) -> Shapes:
    return [(node.shapes[0], "float32")]


def _real(ctx: Context) -> Expr:
    from tvm import relax

    return ctx.inputs[0] if ctx.dtype() == "float32" else ctx.emit(relax.op.astype(ctx.inputs[0], "float32"))


def _for_each(ctx: Context, name: str, values: Any, dtype: str) -> Expr:  # noqa: ANN401 - an attribute
    """One value, or one for each feature, that broadcasts with the input."""
    found, width = np.array(values, dtype=dtype), ctx.shape()[-1]
    if found.size not in (1, width):
        raise ctx.unsupported(f"{found.size} values of {name}", f"1 or {width}")
    return ctx.array(name, found)


@converts("Scaler", domain=DOMAIN, types=_floats)
def _scaler(ctx: Context) -> Expr:
    from tvm import relax

    offset = _for_each(ctx, "offset", ctx.attr("offset", (0.0,)), "float32")
    scale = _for_each(ctx, "scale", ctx.attr("scale", (1.0,)), "float32")
    return relax.op.multiply(relax.op.subtract(_real(ctx), offset), scale)


@converts("Normalizer", domain=DOMAIN, types=_floats)
def _normalizer(ctx: Context) -> Expr:
    """Rows divided by their norm; a row whose norm is 0 stays. MAX is the largest value, whatever its sign."""
    from tvm import relax

    x, name = _real(ctx), ctx.attr("norm", "MAX")
    if name == "MAX":
        norm = relax.op.max(x, [-1], keepdims=True)
    elif name == "L1":
        norm = relax.op.sum(relax.op.abs(x), [-1], keepdims=True)
    elif name == "L2":
        norm = relax.op.sqrt(relax.op.sum(relax.op.multiply(x, x), [-1], keepdims=True))
    else:
        raise ctx.unsupported(f"norm {name!r}", "MAX, L1 or L2")
    norm = ctx.emit(norm)
    empty = relax.op.equal(norm, ctx.const(0, "float32"))
    return relax.op.divide(x, ctx.emit(relax.op.where(empty, ctx.const(1, "float32"), norm)))


@converts("Imputer", domain=DOMAIN, types=_same)
def _imputer(ctx: Context) -> Expr:
    from tvm import relax

    x, dtype = ctx.inputs[0], ctx.dtype()
    kind = "float" if np.dtype(dtype).kind == "f" else "int64"
    values = ctx.attr(f"imputed_value_{kind}s")
    if values is None:
        raise ctx.unsupported(f"no imputed_value_{kind}s", "one value, or one for each feature")
    replaced = ctx.attr(f"replaced_value_{kind}", 0)
    missing = relax.op.isnan(x) if replaced != replaced else relax.op.equal(x, ctx.const(replaced))
    return relax.op.where(ctx.emit(missing), _for_each(ctx, "imputed", values, dtype), x)


@converts("Binarizer", domain=DOMAIN, types=_same)
def _binarizer(ctx: Context) -> Expr:
    from tvm import relax

    above = relax.op.greater(ctx.inputs[0], ctx.const(float(ctx.attr("threshold", 0.0))))
    return relax.op.astype(above, ctx.dtype())


@converts(
    "OneHotEncoder",
    domain=DOMAIN,
    types=lambda node: [((*node.shapes[0], len(node.attributes.get("cats_int64s") or (0,))), "float32")],
)
def _one_hot(ctx: Context) -> Expr:
    """Zeros for an unknown category, also where ONNX would stop (zeros=0): a compiled model cannot."""
    from tvm import relax

    categories = ctx.attr("cats_int64s")
    if not categories:
        raise ctx.unsupported("categories that are text", "cats_int64s", "encode text before the model")
    whole = ctx.emit(relax.op.expand_dims(relax.op.astype(ctx.inputs[0], "int64"), -1))
    return relax.op.astype(relax.op.equal(whole, ctx.array("categories", np.array(categories, np.int64))), "float32")


def _table(attributes: Any, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:  # noqa: ANN401
    """Keys, values and the default of a LabelEncoder of numbers; None if one of them is text."""
    found = []
    for side in ("keys", "values"):
        value = attributes.get(f"{side}_tensor")
        if value is None:
            whole, real = attributes.get(f"{side}_int64s"), attributes.get(f"{side}_floats")
            if whole is None and real is None:
                return None
            value = np.array(real, np.float32) if whole is None else np.array(whole, np.int64)
        elif not isinstance(value, np.ndarray):
            value = tensor_array(value, label)
        found.append(value.reshape(-1))
    keys, values = found
    if keys.dtype.kind not in "iuf" or values.dtype.kind not in "iuf" or keys.size != values.size or not keys.size:
        return None
    default = attributes.get("default_tensor")
    if default is None:
        whole = values.dtype.kind in "iu"
        default = attributes.get("default_int64", -1) if whole else attributes.get("default_float", -0.0)
    elif not isinstance(default, np.ndarray):
        default = tensor_array(default, label)
    return keys, values, np.asarray(default, dtype=values.dtype).reshape(-1)[:1]


def _encoded(node: OpNode) -> Shapes:
    table = _table(node.attributes, node.label)
    return [(node.shapes[0], str(table[1].dtype) if table is not None else "int64")]


@converts("LabelEncoder", domain=DOMAIN, types=_encoded)
def _label_encoder(ctx: Context) -> Expr:
    """The value of the first key that equals x, or the default; NaN as a key equals NaN."""
    from tvm import relax, te, tirx

    table = _table({item.name: ctx.attr(item.name) for item in ctx.node.attribute}, ctx.label)
    if table is None:
        raise ctx.unsupported("keys or values that are text", "numbers", "encode text before the model")
    keys, values, default = table
    count, dtype = len(keys), ctx.dtype()
    real, nan = np.dtype(dtype).kind == "f", bool(np.isnan(keys.astype(np.float64)).any())

    def first(x: Any, key: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, count), "k")

        def at(*index: Any) -> Any:  # noqa: ANN401
            same = x(*index).equal(key(k))
            if nan and real:
                same = tirx.Or(same, tirx.And(tirx.isnan(x(*index)), tirx.isnan(key(k))))
            return te.min(tirx.Select(same, k.astype("int64"), tirx.const(count, "int64")), axis=k)

        return te.compute(ctx.shape(), at, name="first")

    keys = ctx.array("keys", keys.astype(dtype))
    place = ctx.emit(ctx.bb.call_te(first, ctx.inputs[0], keys, primfunc_name_hint="label"))
    return relax.op.take(ctx.array("values", np.concatenate([values, default])), place, 0, mode="clip")


def _widths(node: OpNode) -> list[int]:
    return [shape[1] if len(shape) > 1 else 1 for shape in node.shapes]


@converts(
    "FeatureVectorizer",
    domain=DOMAIN,
    types=lambda node: [((node.shapes[0][0], sum(_widths(node))), "float32")],
)
def _vectorizer(ctx: Context) -> Expr:
    """The inputs next to each other, as floats."""
    from tvm import relax

    columns = []
    for index, value in enumerate(ctx.inputs):
        shape = ctx.shape(index)
        column = relax.op.reshape(value, (shape[0], shape[1] if len(shape) > 1 else 1))
        columns.append(ctx.emit(relax.op.astype(ctx.emit(column), "float32")))
    return relax.op.concat(columns, 1)


def _extracted(node: OpNode) -> Shapes:
    lead = node.shapes[0][:-1] or (1,)
    return [((*lead, int(np.prod(node.shapes[1], dtype=np.int64))), node.dtypes[0])]


@converts("ArrayFeatureExtractor", domain=DOMAIN, types=_extracted)
def _extractor(ctx: Context) -> Expr:
    """Entries of the last axis at places."""
    from tvm import relax

    width, places = ctx.shape()[-1], ctx.value(1)
    if places is not None and places.size and not 0 <= int(places.min()) <= int(places.max()) < width:
        raise ctx.unsupported(f"places {places.reshape(-1).tolist()[:8]}", f"0 to {width - 1}")
    flat = ctx.emit(relax.op.reshape(ctx.inputs[1], (-1,)))
    taken = relax.op.take(ctx.inputs[0], flat, len(ctx.shape()) - 1, mode="clip")
    return relax.op.reshape(taken, ctx.out_shape())
