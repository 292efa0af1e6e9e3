"""Bring every image operator to NHWC, with as few transposes as the model's own edges need."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.conv_transpose import as_convolution
from ingot.passes.conv_volumes import as_images, weight_of
from ingot.passes.rewriter import Rewriter, bindings_of, dtype_of, is_tensor, op_name, outputs_of, rebuild, shape_of
from ingot.passes.state import State
from ingot.passes.windows import may_stay, moved_from_nhwc


def to_last(ndim: int) -> tuple[int, ...]:
    """Return the axes that move channels from dimension 1 to the end: dimension i of the result is old axes[i]."""
    return (0, *range(2, ndim), 1)


def to_first(ndim: int) -> tuple[int, ...]:
    """Return the axes that move channels from the end to dimension 1, the inverse of `to_last`."""
    return (0, ndim - 1, *range(1, ndim - 1))


TO_NHWC = to_last(4)

# Operators that work on each element alone (with broadcasting): any layout will do.
ELEMENTWISE = frozenset(
    "relax." + name
    for line in (
        "add subtract multiply divide maximum minimum power mod floor_mod where clip astype",
        "abs negative sign square exp log sqrt rsqrt tanh erf sigmoid round floor ceil isnan hardswish",
        "less less_equal greater greater_equal equal not_equal logical_and logical_or logical_not",
        "nn.relu nn.relu6 nn.leakyrelu nn.silu nn.gelu nn.gelu_tanh nn.softplus nn.elu nn.selu",
    )
    for name in line.split()
)
_VIEWS = frozenset({"relax.reshape"})
_POOLS = frozenset({"relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d"})
_DIRECT = _POOLS | {"relax.nn.conv2d", "relax.nn.conv2d_transpose", "relax.image.resize2d"}
_REDUCTIONS = frozenset("relax." + name for name in ("mean", "sum", "max", "min", "prod", "variance", "std"))


def nhwc_layout(state: State) -> State:
    """Bring every image operator to NHWC, with as few transposes as the model's own edges need.

    A value that an NCHW operator makes is kept in NHWC, and its NCHW form is made only if someone asks for it. The
    same holds for values of three or more dimensions that are made from it, with channels in dimension 1.

    Case 1: conv2d, conv2d_transpose, pooling and resize in NCHW are rewritten in NHWC; their weights to OHWI/IHWO.
    Case 2: an elementwise operator with an operand kept in NHWC works in NHWC; other operands are brought there.
    Case 3: concat, split, softmax, reductions and quantize move their axis.
    Case 4: a transpose of a value kept in NHWC composes with it (TO_NHWC itself costs nothing).
    Case 5: pad and strided_slice move their dimensions.
    Case 6: a reshape that keeps batch and channels, such as [N, C, H, W] to [N, C, H * W], keeps channels last.
    Case 7: cases 2, 3 and 5 also where no operand is kept yet, but a convolution will want the result in NHWC.
    Case 8: a pool, a resize, a depthwise or a 1x1 convolution that has a template for NCHW (`schedules.planes`,
            `schedules.planes_product`) stays there, if its operand is not kept and nobody wants its result in NHWC.
    Case 9: conv3d (one group, constant weights, float32) becomes a conv2d; in NCDHW its data and its result are moved
            as in case 1.
    Any other operator gets the NCHW form.
    """
    return _Layout(state).apply(state)


class _Layout:
    """The pass's memory: for a variable standing for an NCHW value, its NHWC variable."""

    def __init__(self, state: State) -> None:
        # key: a placeholder variable standing for the NCHW tensor; value: the NHWC tensor that exists.
        self.nhwc: dict[Any, Any] = {}
        self.nchw: dict[Any, Any] = {}  # materialised NCHW form of a placeholder
        self.planes = _planes(state)
        self.wanted = _wanted_in_nhwc(state, self.planes)

    def apply(self, state: State) -> State:
        """Run the pass."""
        rewriter = Rewriter(state, self.visit)
        rewriter.finish = lambda expr: self._deep_nchw(rewriter, expr)
        return rewriter.run()

    # -- moving between the two forms --------------------------------------------------------------------------------

    def keep(self, rewriter: Rewriter, nhwc_expr: Any) -> Any:  # noqa: ANN401
        """Bind a channels-last expression and return the placeholder of its channels-first form."""
        var = rewriter.emit(nhwc_expr)
        shape = shape_of(var)
        first = [shape[a] for a in to_first(len(shape))]
        placeholder = relax.Var("nchw", relax.TensorType(first, dtype_of(var)))
        self.nhwc[placeholder] = var
        return placeholder

    def as_nchw(self, rewriter: Rewriter, var: Any) -> Any:  # noqa: ANN401
        """Return the NCHW form of a value, transposing once if it is kept in NHWC."""
        if var not in self.nhwc:
            return var
        if var not in self.nchw:
            kept = self.nhwc[var]
            self.nchw[var] = rewriter.emit(relax.op.permute_dims(kept, list(to_first(len(shape_of(kept))))))
        return self.nchw[var]

    def as_nhwc(self, rewriter: Rewriter, var: Any) -> Any:  # noqa: ANN401
        """Return the NHWC form of a value in NCHW order."""
        if var in self.nhwc:
            return self.nhwc[var]
        axes = to_last(len(shape_of(var)))
        value = rewriter.weight(var)
        if value is not None:
            return rewriter.constant(np.transpose(value, axes), str(getattr(var, "name", "constant")) + "_nhwc")
        made = rewriter.emit(relax.op.permute_dims(var, list(axes)))
        self.nhwc[var] = made
        self.nchw[var] = var
        return made

    # -- the cases ----------------------------------------------------------------------------------------------------

    def visit(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Choose the case for one call; `args` may hold placeholders."""
        name = op_name(call)
        if call in self.planes and call not in self.wanted and self._is_nchw(rewriter, args[0]):
            return rebuild(call, args)  # case 8
        if name in ("relax.nn.conv2d", "relax.nn.conv2d_transpose"):
            return self.convolution(rewriter, call, args)
        if name == "relax.nn.conv3d" and (weight := weight_of(rewriter, call, args[1])) is not None:
            return self.volume(rewriter, call, args[0], weight)
        if name in _POOLS and str(call.attrs.layout) == "NCHW":
            return self.pool(rewriter, call, args)
        if name == "relax.image.resize2d" and str(call.attrs.layout) == "NCHW":
            return self.resize(rewriter, call, args)
        kept = self._any_kept(args)
        if kept and name == "relax.permute_dims":
            return self.permute(rewriter, call, args)
        if kept and name in _REDUCTIONS:
            return self.reduction(rewriter, call, args)
        if kept and name in _VIEWS:
            return self.view(rewriter, call, args)
        if kept or call in self.wanted:
            case = _MOVABLE.get("elementwise" if name in ELEMENTWISE else name)
            if case is not None:
                return case(self, rewriter, call, args)
        return rebuild(call, [self._deep_nchw(rewriter, arg) for arg in args])

    def _is_nchw(self, rewriter: Rewriter, var: Any) -> bool:  # noqa: ANN401
        """Say whether a value lies in NCHW, and does not come from NHWC by a transpose."""
        return var not in self.nhwc and not moved_from_nhwc(rewriter.value_of(var))

    def _any_kept(self, args: list[Any]) -> bool:
        items = [item for arg in args for item in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]
        return any(item in self.nhwc for item in items if isinstance(item, relax.Var))

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

    def volume(self, rewriter: Rewriter, call: Any, data: Any, weight: np.ndarray) -> Any:  # noqa: ANN401
        """Case 9."""
        if str(call.attrs.data_layout) == "NDHWC":
            return as_images(rewriter, call, self.as_nchw(rewriter, data), weight)
        return self.keep(rewriter, as_images(rewriter, call, self.as_nhwc(rewriter, data), weight))

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
        """Case 2: operands of fewer dimensions are seen with leading ones, as broadcasting does."""
        ndim = len(shape_of(call))
        if ndim < 3 or any(len(shape_of(arg)) != ndim for arg in args if arg in self.nhwc):
            return rebuild(call, [self._deep_nchw(rewriter, arg) for arg in args])
        moved: list[Any] = []
        for arg in args:
            if not is_tensor(arg):
                moved.append(arg)  # clip's bounds are scalars
                continue
            shape = shape_of(arg)
            if int(np.prod(shape)) == 1 and len(shape) < ndim:
                moved.append(arg)
                continue
            if len(shape) < ndim:
                value = rewriter.weight(arg)
                full = (1,) * (ndim - len(shape)) + shape
                if value is not None:
                    arg = rewriter.constant(value.reshape(full), str(getattr(arg, "name", "constant")) + "_full")
                else:
                    arg = rewriter.emit(relax.op.reshape(self.as_nchw(rewriter, arg), full))
            moved.append(self._operand(rewriter, arg))
        return self.keep(rewriter, rebuild(call, moved))

    def _operand(self, rewriter: Rewriter, arg: Any) -> Any:  # noqa: ANN401
        """Return an operand in NHWC; one with a single channel or a single position is only viewed so."""
        shape = shape_of(arg)
        moves_data = shape[1] != 1 and any(dim != 1 for dim in shape[2:])
        if arg not in self.nhwc and rewriter.weight(arg) is None and not moves_data:
            return rewriter.emit(relax.op.reshape(arg, tuple(shape[a] for a in to_last(len(shape)))))
        return self.as_nhwc(rewriter, arg)

    def permute(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 4."""
        axes, ndim = call.attrs.axes, len(shape_of(call))
        order = tuple(reversed(range(ndim))) if axes is None else tuple(int(a) % ndim for a in axes)
        composed = [to_first(ndim)[a] for a in order]
        source = self.nhwc[args[0]]
        return source if composed == list(range(ndim)) else relax.op.permute_dims(source, composed)

    def view(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 6."""
        old, new = shape_of(args[0]), shape_of(call)
        if len(new) < 3 or new[:2] != old[:2]:
            return relax.op.reshape(self.as_nchw(rewriter, args[0]), new)
        return self.keep(rewriter, relax.op.reshape(self.nhwc[args[0]], tuple(new[a] for a in to_last(len(new)))))

    def reduction(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3. Without keepdims the result has fewer dimensions: right as it is when C alone or H and W go."""
        axes, ndim = call.attrs.axis, len(shape_of(args[0]))
        reduced = set(range(ndim)) if axes is None else {int(a) % ndim for a in axes}
        source, last = self.nhwc[args[0]], to_last(ndim)
        moved = sorted(last.index(a) for a in reduced)
        make = getattr(relax.op, op_name(call).removeprefix("relax."))
        if bool(call.attrs.keepdims):
            return self.keep(rewriter, make(source, axis=moved, keepdims=True))
        left = [a for a in last if a not in reduced]
        if left == sorted(left):
            return make(source, axis=moved, keepdims=False)
        out = rewriter.emit(make(source, axis=moved, keepdims=False))
        return relax.op.permute_dims(out, [left.index(a) for a in sorted(left)])

    def _axis(self, call: Any, ndim: int) -> int:  # noqa: ANN401
        return to_last(ndim).index(int(call.attrs.axis) % ndim)

    def one_axis(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3, for operators with one `axis` attribute."""
        axis, name = self._axis(call, len(shape_of(call))), op_name(call)
        source = self.as_nhwc(rewriter, args[0])
        if name == "relax.quantize":
            out = relax.op.quantize(source, args[1], args[2], axis=axis, out_dtype=dtype_of(call))
        elif name == "relax.dequantize":
            out = relax.op.dequantize(source, args[1], args[2], axis=axis, out_dtype=dtype_of(call))
        else:
            out = getattr(relax.op.nn, name.removeprefix("relax.nn."))(source, axis=axis)
        return self.keep(rewriter, out)

    def pad(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 5."""
        width, ndim = [int(v) for v in call.attrs.pad_width], len(shape_of(call))
        pairs = [width[2 * i : 2 * i + 2] for i in range(ndim)]
        moved = [v for a in to_last(ndim) for v in pairs[a]]
        source = self.as_nhwc(rewriter, args[0])
        return self.keep(
            rewriter, relax.op.nn.pad(source, moved, str(call.attrs.pad_mode), float(call.attrs.pad_value))
        )

    def strided_slice(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 5."""
        last = to_last(len(shape_of(call)))
        axes, begin, end, *strides = ([int(v) for v in arg.fields] for arg in args[1:])
        moved = [last.index(a % len(last)) for a in axes]
        source = self.as_nhwc(rewriter, args[0])
        return self.keep(rewriter, relax.op.strided_slice(source, moved, begin, end, *strides))

    def concat(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3."""
        fields = args[0].fields
        axis = self._axis(call, len(shape_of(call)))
        return self.keep(rewriter, relax.op.concat([self.as_nhwc(rewriter, item) for item in fields], axis))

    def split(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3."""
        sections = call.attrs.indices_or_sections
        where = [int(v) for v in sections] if hasattr(sections, "__len__") else int(sections)
        source = self.as_nhwc(rewriter, args[0])
        parts = rewriter.emit(relax.op.split(source, where, self._axis(call, len(shape_of(source)))))
        count = len(parts.ty.fields)
        return relax.Tuple([self.keep(rewriter, relax.TupleGetItem(parts, i)) for i in range(count)])


_MOVABLE = {
    "elementwise": _Layout.elementwise,
    "relax.nn.softmax": _Layout.one_axis,
    "relax.nn.log_softmax": _Layout.one_axis,
    "relax.quantize": _Layout.one_axis,
    "relax.dequantize": _Layout.one_axis,
    "relax.nn.pad": _Layout.pad,
    "relax.strided_slice": _Layout.strided_slice,
    "relax.concat": _Layout.concat,
    "relax.split": _Layout.split,
}


def _planes(state: State) -> set[Any]:
    """Return the calls that have a template for NCHW (case 8); quantised layers, which read dequantize, have none."""
    found, quantised = set(), set()
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) == "relax.dequantize":
            quantised.add(binding.var)
        elif may_stay(state, binding.value) and binding.value.args[0] not in quantised:
            found.add(binding.value)
    return found


def _wanted_in_nhwc(state: State, planes: set[Any]) -> set[Any]:
    """Return the calls whose 4-D result every reader wants in NHWC, directly or through movable operators (case 7).

    planes: the calls that want that of their operand only if their own result is wanted so.
    """
    main = state.module["main"]
    bindings = bindings_of(main)
    wants: dict[Any, bool] = {}
    outputs = {out for out in outputs_of(main) if isinstance(out, relax.Var)}
    result: set[Any] = set()
    for binding in reversed(bindings):
        call, name = binding.value, op_name(binding.value)
        is_image = is_tensor(binding.var) and len(shape_of(binding.var)) == 4
        wanted = is_image and wants.get(binding.var, False) and binding.var not in outputs
        layouts = [str(getattr(call.attrs, key, "")) for key in ("data_layout", "layout")] if name in _DIRECT else []
        direct = "NCHW" in layouts and call not in planes
        movable = name in _MOVABLE or name in ELEMENTWISE or call in planes
        if wanted and movable:
            result.add(call)
        reads = [] if not isinstance(call, relax.Call) else _tensors_read(call)
        if not isinstance(call, relax.Call) and isinstance(call, relax.Tuple):
            reads = [item for item in call.fields if isinstance(item, relax.Var)]
        for position, arg in enumerate(reads):
            moves = wanted and movable and (position == 0 or call not in planes)
            good = (direct and position == 0) or moves
            wants[arg] = wants.get(arg, True) and good
    return result


def _tensors_read(call: Any) -> list[Any]:  # noqa: ANN401
    items = [item for arg in call.args for item in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]
    return [item for item in items if isinstance(item, relax.Var)]
