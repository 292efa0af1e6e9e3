"""Bring every image operator to NHWC, with as few transposes as the model's own edges need."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.conv_transpose import as_convolution
from ingot.passes.rewriter import Rewriter, dtype_of, is_tensor, op_name, rebuild, rewrite, shape_of
from ingot.passes.state import State

# new dimension i of an NHWC tensor is old dimension TO_NHWC[i] of the NCHW one; TO_NCHW is the inverse.
TO_NHWC = (0, 2, 3, 1)
TO_NCHW = (0, 3, 1, 2)

# Operators that work on each element alone (with broadcasting): any layout will do.
ELEMENTWISE = frozenset(
    "relax." + name
    for name in (
        "add subtract multiply divide maximum minimum power where clip abs negative exp log sqrt rsqrt tanh erf "
        "sigmoid round floor ceil sign square astype less less_equal greater greater_equal equal not_equal isnan "
        "logical_and logical_or logical_not mod floor_mod nn.relu nn.relu6 nn.leakyrelu nn.silu nn.gelu nn.gelu_tanh "
        "nn.softplus nn.elu nn.selu hardswish"
    ).split()
)
_POOLS = frozenset({"relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d"})
_REDUCTIONS = frozenset("relax." + name for name in ("mean", "sum", "max", "min", "prod", "variance", "std"))


def nhwc_layout(state: State) -> State:
    """Bring every image operator to NHWC, with as few transposes as the model's own edges need.

    A value that an NCHW operator makes is kept in NHWC, and its NCHW form is made only if someone asks for it.

    Case 1: conv2d, pooling and resize in NCHW are rewritten in NHWC, weights to OHWI; conv2d_transpose as conv2d.
    Case 2: an elementwise operator with an operand kept in NHWC works in NHWC; other operands are brought there.
    Case 3: concat, split, softmax, reductions and quantize move their axis.
    Case 4: a transpose of a value kept in NHWC composes with it (TO_NHWC itself costs nothing).
    Case 5: pad moves its pairs.
    Any other operator gets the NCHW form.
    """
    return _Layout().apply(state)


class _Layout:
    """The pass's memory: for a variable standing for an NCHW value, its NHWC variable."""

    def __init__(self) -> None:
        # key: a placeholder variable standing for the NCHW tensor; value: the NHWC tensor that exists.
        self.nhwc: dict[Any, Any] = {}
        self.nchw: dict[Any, Any] = {}  # materialised NCHW form of a placeholder

    def apply(self, state: State) -> State:
        """Run the pass."""
        rewriter = Rewriter(state, self.visit)
        rewriter.finish = lambda expr: self._deep_nchw(rewriter, expr)
        return rewriter.run()

    # -- moving between the two forms --------------------------------------------------------------------------------

    def keep(self, rewriter: Rewriter, nhwc_expr: Any) -> Any:  # noqa: ANN401
        """Bind an NHWC expression and return the placeholder of its NCHW form."""
        var = rewriter.emit(nhwc_expr)
        shape = shape_of(var)
        placeholder = relax.Var("nchw", relax.TensorType([shape[a] for a in TO_NCHW], dtype_of(var)))
        self.nhwc[placeholder] = var
        return placeholder

    def as_nchw(self, rewriter: Rewriter, var: Any) -> Any:  # noqa: ANN401
        """Return the NCHW form of a value, transposing once if it is kept in NHWC."""
        if var not in self.nhwc:
            return var
        if var not in self.nchw:
            self.nchw[var] = rewriter.emit(relax.op.permute_dims(self.nhwc[var], list(TO_NCHW)))
        return self.nchw[var]

    def as_nhwc(self, rewriter: Rewriter, var: Any) -> Any:  # noqa: ANN401
        """Return the NHWC form of a 4-D value in NCHW order."""
        if var in self.nhwc:
            return self.nhwc[var]
        value = rewriter.weight(var)
        if value is not None:
            return rewriter.constant(np.transpose(value, TO_NHWC), str(getattr(var, "name", "constant")) + "_nhwc")
        made = rewriter.emit(relax.op.permute_dims(var, list(TO_NHWC)))
        placeholder_shape = shape_of(var)
        if len(placeholder_shape) == 4:
            self.nhwc[var] = made
            self.nchw[var] = var
        return made

    # -- the cases ----------------------------------------------------------------------------------------------------

    def visit(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Choose the case for one call; `args` may hold placeholders."""
        name = op_name(call)
        if name in ("relax.nn.conv2d", "relax.nn.conv2d_transpose"):
            return self.convolution(rewriter, call, args)
        if name in _POOLS and str(call.attrs.layout) == "NCHW":
            return self.pool(rewriter, call, args)
        if name == "relax.image.resize2d" and str(call.attrs.layout) == "NCHW":
            return self.resize(rewriter, call, args)
        kept = any(arg in self.nhwc for arg in args if isinstance(arg, relax.Var))
        if name in ELEMENTWISE and kept:
            return self.elementwise(rewriter, call, args)
        if name == "relax.permute_dims" and kept:
            return self.permute(rewriter, call, args)
        if name in _REDUCTIONS and kept:
            return self.reduction(rewriter, call, args)
        if name in ("relax.nn.softmax", "relax.nn.log_softmax", "relax.quantize", "relax.dequantize") and kept:
            return self.one_axis(rewriter, call, args)
        if name == "relax.nn.pad" and kept:
            return self.pad(rewriter, call, args)
        if name == "relax.concat":
            return self.concat(rewriter, call, args)
        if name == "relax.split" and kept:
            return self.split(rewriter, call, args)
        return rebuild(call, [self._deep_nchw(rewriter, arg) for arg in args])

    def _deep_nchw(self, rewriter: Rewriter, expr: Any) -> Any:  # noqa: ANN401
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._deep_nchw(rewriter, item) for item in expr.fields])
        return self.as_nchw(rewriter, expr) if isinstance(expr, relax.Var) else expr

    def convolution(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 1."""
        attrs, weight = call.attrs, self.as_nchw(rewriter, args[1])
        transposed = op_name(call).endswith("transpose")
        wanted = "IHWO" if transposed else "OHWI"
        order = [str(attrs.kernel_layout).index(letter) for letter in wanted]
        if str(attrs.kernel_layout) == "HWOI" and int(attrs.groups) > 1:
            # TFLite depthwise [H, W, channels, multiplier]: output channel = channel * multiplier + m.
            height, width, channels, multiplier = shape_of(weight)
            value = rewriter.weight(weight)
            flat = (height, width, channels * multiplier, 1)
            weight = (
                rewriter.emit(relax.op.reshape(weight, flat))
                if value is None
                else rewriter.constant(value.reshape(flat), str(getattr(weight, "name", "w")) + "_flat")
            )
        if order != [0, 1, 2, 3]:
            value = rewriter.weight(weight)
            if value is not None:
                name = str(getattr(weight, "name", "weight")) + "_" + wanted.lower()
                weight = rewriter.constant(np.transpose(value, order), name)
            else:
                weight = rewriter.emit(relax.op.permute_dims(weight, order))
        nchw = str(attrs.data_layout) == "NCHW"
        data = self.as_nhwc(rewriter, args[0]) if nchw else self.as_nchw(rewriter, args[0])
        if transposed:
            out = as_convolution(rewriter, call, data, weight)
        else:
            out = relax.op.nn.conv2d(
                data,
                weight,
                strides=list(attrs.strides),
                padding=list(attrs.padding),
                dilation=list(attrs.dilation),
                groups=int(attrs.groups),
                data_layout="NHWC",
                kernel_layout="OHWI",
                out_layout="NHWC",
                out_dtype=dtype_of(call),
            )
        return self.keep(rewriter, out) if nchw else out

    def pool(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 1."""
        attrs, data = call.attrs, self.as_nhwc(rewriter, args[0])
        if op_name(call) == "relax.nn.adaptive_avg_pool2d":
            out = relax.op.nn.adaptive_avg_pool2d(data, list(shape_of(call)[2:]), layout="NHWC")
            return self.keep(rewriter, out)
        options = {
            "pool_size": list(attrs.pool_size),
            "strides": list(attrs.strides),
            "padding": list(attrs.padding),
            "dilation": list(attrs.dilation),
            "ceil_mode": bool(attrs.ceil_mode),
            "count_include_pad": bool(attrs.count_include_pad),
            "layout": "NHWC",
            "out_layout": "NHWC",
        }
        make = relax.op.nn.max_pool2d if "max" in op_name(call) else relax.op.nn.avg_pool2d
        return self.keep(rewriter, make(data, **options))

    def resize(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 1."""
        attrs = call.attrs
        out = relax.op.image.resize2d(
            self.as_nhwc(rewriter, args[0]),
            args[1],
            roi=[float(v) for v in attrs.roi],
            layout="NHWC",
            method=str(attrs.method),
            coordinate_transformation_mode=str(attrs.coordinate_transformation_mode),
            rounding_method=str(attrs.rounding_method),
            cubic_alpha=float(attrs.cubic_alpha),
            cubic_exclude=int(attrs.cubic_exclude),
            extrapolation_value=float(attrs.extrapolation_value),
        )
        return self.keep(rewriter, out)

    def elementwise(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 2: operands of fewer dimensions are seen as 4-D with leading ones, as broadcasting does."""
        if len(shape_of(call)) != 4:
            return rebuild(call, [self._deep_nchw(rewriter, arg) for arg in args])
        moved: list[Any] = []
        for arg in args:
            if not is_tensor(arg):
                moved.append(arg)  # clip's bounds are scalars
                continue
            shape = shape_of(arg)
            if int(np.prod(shape)) == 1 and len(shape) < 4:
                moved.append(arg)
                continue
            if len(shape) < 4:
                value = rewriter.weight(arg)
                full = (1,) * (4 - len(shape)) + shape
                if value is not None:
                    name = str(getattr(arg, "name", "constant"))
                    arg = rewriter.constant(value.reshape(full), name + "_4d")
                else:
                    arg = rewriter.emit(relax.op.reshape(self.as_nchw(rewriter, arg), full))
            moved.append(self._operand(rewriter, arg))
        return self.keep(rewriter, rebuild(call, moved))

    def _operand(self, rewriter: Rewriter, arg: Any) -> Any:  # noqa: ANN401
        """Return a 4-D NCHW operand in NHWC; one that is 1x1 in H and W, or has one channel, is only viewed so."""
        shape = shape_of(arg)
        if arg not in self.nhwc and rewriter.weight(arg) is None and (shape[1] == 1 or shape[2:] == (1, 1)):
            return rewriter.emit(relax.op.reshape(arg, tuple(shape[a] for a in TO_NHWC)))
        return self.as_nhwc(rewriter, arg)

    def permute(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 4."""
        axes = call.attrs.axes
        order = (3, 2, 1, 0) if axes is None else tuple(int(a) % 4 for a in axes)
        composed = [TO_NCHW[a] for a in order]
        source = self.nhwc[args[0]]
        return source if composed == [0, 1, 2, 3] else relax.op.permute_dims(source, composed)

    def reduction(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3. Without keepdims the result has fewer dimensions: right as it is when C alone or H and W go."""
        axes = call.attrs.axis
        reduced = set(range(4)) if axes is None else {int(a) % 4 for a in axes}
        source = self.nhwc[args[0]]
        moved = sorted(TO_NHWC.index(a) for a in reduced)
        make = getattr(relax.op, op_name(call).removeprefix("relax."))
        keepdims = bool(call.attrs.keepdims)
        if keepdims:
            return self.keep(rewriter, make(source, axis=moved, keepdims=True))
        left_nhwc = [a for a in TO_NHWC if a not in reduced]
        if left_nhwc == sorted(left_nhwc):
            return make(source, axis=moved, keepdims=False)
        out = rewriter.emit(make(source, axis=moved, keepdims=False))
        order = [left_nhwc.index(a) for a in sorted(left_nhwc)]
        return relax.op.permute_dims(out, order)

    def one_axis(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3, for operators with one `axis` attribute."""
        axis = TO_NHWC.index(int(call.attrs.axis) % 4)
        source = self.nhwc[args[0]]
        name = op_name(call)
        if name == "relax.quantize":
            out = relax.op.quantize(source, args[1], args[2], axis=axis, out_dtype=dtype_of(call))
        elif name == "relax.dequantize":
            out = relax.op.dequantize(source, args[1], args[2], axis=axis, out_dtype=dtype_of(call))
        else:
            out = getattr(relax.op.nn, name.removeprefix("relax.nn."))(source, axis=axis)
        return self.keep(rewriter, out)

    def pad(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 5."""
        width = [int(v) for v in call.attrs.pad_width]
        pairs = [width[2 * i : 2 * i + 2] for i in range(4)]
        moved = [v for a in TO_NHWC for v in pairs[a]]
        out = relax.op.nn.pad(
            self.nhwc[args[0]], moved, str(call.attrs.pad_mode), float(call.attrs.pad_value)
        )
        return self.keep(rewriter, out)

    def concat(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3."""
        fields = list(args[0].fields) if isinstance(args[0], relax.Tuple) else None
        if fields is None or not any(item in self.nhwc for item in fields if isinstance(item, relax.Var)):
            return rebuild(call, [self._deep_nchw(rewriter, arg) for arg in args])
        axis = TO_NHWC.index(int(call.attrs.axis) % 4)
        return self.keep(rewriter, relax.op.concat([self.as_nhwc(rewriter, item) for item in fields], axis))

    def split(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3."""
        axis = TO_NHWC.index(int(call.attrs.axis) % 4)
        sections = call.attrs.indices_or_sections
        where = [int(v) for v in sections] if hasattr(sections, "__len__") else int(sections)
        parts = rewriter.emit(relax.op.split(self.nhwc[args[0]], where, axis))
        count = len(parts.ty.fields)
        return relax.Tuple([self.keep(rewriter, relax.TupleGetItem(parts, i)) for i in range(count)])
