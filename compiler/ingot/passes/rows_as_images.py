"""Write operators on rows [N, C, W] as operators on images [N, C, 1, W], for which there are templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from ingot.passes.layout import ELEMENTWISE
from ingot.passes.rewriter import Rewriter, dtype_of, is_tensor, op_name, rebuild, shape_of
from ingot.passes.state import State

_WINDOWS = frozenset(
    f"relax.nn.{name}" for name in ("conv1d", "conv1d_transpose", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d")
)


def rows_as_images(state: State) -> State:
    """Write operators on rows [N, C, W] as operators on images [N, C, 1, W].

    A result that is made as an image is kept as one, and seen as rows only by those who need it so: that moves nothing,
    but a reshape between a convolution and its activation would keep the two apart.

    Case 1: conv1d, conv1d_transpose and the pools of rows in NCW become those of images in NCHW.
    Case 2: an elementwise operator with an operand kept as an image works on images.
    Case 3: so do concat, pad, quantize and dequantize.
    """
    return _Images(state).run()


class _Images:
    """The pass's memory: for a variable standing for rows, the variable of its image."""

    def __init__(self, state: State) -> None:
        self.images: dict[Any, Any] = {}
        self.rewriter = Rewriter(state, self.visit)
        self.rewriter.finish = self.rows

    def run(self) -> State:
        """Run the pass."""
        return self.rewriter.run()

    def keep(self, expr: Any) -> Any:  # noqa: ANN401
        """Bind an image, and return a placeholder that stands for its rows."""
        var = self.rewriter.emit(expr)
        n, c, _, w = shape_of(var)
        placeholder = relax.Var("rows", relax.TensorType((n, c, w), dtype_of(var)))
        self.images[placeholder] = var
        return placeholder

    def rows(self, expr: Any) -> Any:  # noqa: ANN401
        """Return an expression without placeholders."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.rows(item) for item in expr.fields])
        if not isinstance(expr, relax.Var) or expr not in self.images:
            return expr
        return self.rewriter.emit(relax.op.reshape(self.images[expr], shape_of(expr)))

    def image(self, expr: Any) -> Any:  # noqa: ANN401
        """Return rows, or a value that broadcasts to them, as an image."""
        if isinstance(expr, relax.Var) and expr in self.images:
            return self.images[expr]
        if not is_tensor(expr) or len(shape_of(expr)) < 2:
            return expr  # the bounds of a clip, scalars, and values along W alone
        shape = shape_of(expr)
        return self._reshaped(expr, (*shape[:-1], 1, shape[-1]))

    def _reshaped(self, expr: Any, shape: Sequence[int]) -> Any:  # noqa: ANN401
        made = self.rewriter.value_of(expr)
        if op_name(made) == "relax.dequantize" and len(shape) == 4:
            # The stored integers are reshaped: a layer on integers reads them through nothing but dequantize.
            axis = int(made.attrs.axis) % 3
            stored = self._reshaped(made.args[0], shape)
            scales = (made.args[1], made.args[2])
            out = relax.op.dequantize(stored, *scales, axis=axis + (axis == 2), out_dtype=dtype_of(expr))
            return self.rewriter.emit(out)
        value = self.rewriter.weight(expr)
        if value is not None:
            return self.rewriter.constant(value.reshape(shape), f"{getattr(expr, 'name', 'constant')}_image")
        return self.rewriter.emit(relax.op.reshape(expr, tuple(shape)))

    def visit(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Choose the case for one call."""
        name = op_name(call)
        if name in _WINDOWS and "NCW" in (str(getattr(call.attrs, key, "")) for key in ("data_layout", "layout")):
            return self.keep(self._window(name, call, args))
        items = [item for arg in args for item in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]
        if any(isinstance(item, relax.Var) and item in self.images for item in items):
            if name in ELEMENTWISE and len(shape_of(call)) == 3:
                return self.keep(rebuild(call, [self.image(arg) for arg in args]))
            moved = self._moved(name, call, args)
            if moved is not None:
                return self.keep(moved)
        return rebuild(call, [self.rows(arg) for arg in args])

    def _window(self, name: str, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 1."""
        attrs, data = call.attrs, self.image(args[0])
        if name.endswith("adaptive_avg_pool1d"):
            return relax.op.nn.adaptive_avg_pool2d(data, [1, shape_of(call)[2]], layout="NCHW")
        first, last = (int(pad) for pad in attrs.padding)
        options: dict[str, Any] = {
            "strides": [1, int(attrs.strides[0])],
            "padding": [0, first, 0, last],
            "dilation": [1, int(attrs.dilation[0])],
        }
        if "pool" in name:
            options |= {"ceil_mode": bool(attrs.ceil_mode), "count_include_pad": bool(attrs.count_include_pad)}
            make = relax.op.nn.max_pool2d if "max" in name else relax.op.nn.avg_pool2d
            return make(data, pool_size=[1, int(attrs.pool_size[0])], layout="NCHW", **options)
        weight = self.rows(args[1])
        weight = self._reshaped(weight, (*shape_of(weight)[:2], 1, shape_of(weight)[2]))
        options |= {"groups": int(attrs.groups), "data_layout": "NCHW", "out_dtype": dtype_of(call)}
        if name.endswith("transpose"):
            extra = [0, int(attrs.output_padding[0])]
            return relax.op.nn.conv2d_transpose(data, weight, output_padding=extra, kernel_layout="IOHW", **options)
        return relax.op.nn.conv2d(data, weight, kernel_layout="OIHW", **options)

    def _moved(self, name: str, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Case 3; None for an operator that has none."""
        if name == "relax.concat":
            axis = int(call.attrs.axis) % 3
            return relax.op.concat([self.image(item) for item in args[0].fields], axis + (axis == 2))
        if name == "relax.nn.pad":
            width = [int(v) for v in call.attrs.pad_width]
            image, mode = self.image(args[0]), str(call.attrs.pad_mode)
            return relax.op.nn.pad(image, [*width[:4], 0, 0, *width[4:]], mode, float(call.attrs.pad_value))
        if name in ("relax.quantize", "relax.dequantize"):
            axis = int(call.attrs.axis) % 3
            make = relax.op.quantize if name == "relax.quantize" else relax.op.dequantize
            return make(self.image(args[0]), args[1], args[2], axis=axis + (axis == 2), out_dtype=dtype_of(call))
        return None
