"""Loop definitions of Relax operators where TVM's own ones give other numbers than the operator's meaning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from ingot.frontend import fixed_point as relax_fixed_point
from ingot.frontend import integer_ops
from ingot.passes.rewriter import dtype_of, shape_of
from ingot.schedules import fixed_point
from ingot.schedules.rows import RowsConfig
from ingot.schedules.vector import annotate_block


def _extremum(combine: Callable[[Any, Any], Any], start: float, name: str) -> Callable[[Any, Any], Any]:
    """Return the definition of max or min over axes.

    TVM starts at the type's smallest finite number, so that the maximum of a row of -inf (a masked row of attention)
    is not -inf. Integers keep TVM's definition.
    """

    def define(builder: Any, call: Any) -> Any:  # noqa: ANN401
        shape, dtype = shape_of(call.args[0]), dtype_of(call)
        if not dtype.startswith("float"):
            return builder.call_te(
                getattr(_topi(), name), call.args[0], call.attrs.axis, call.attrs.keepdims, primfunc_name_hint=name
            )
        rank = len(shape)
        axes = sorted({int(a) % rank for a in call.attrs.axis}) if call.attrs.axis is not None else list(range(rank))
        keep = bool(call.attrs.keepdims)
        reducer = te.comm_reducer(lambda x, y: combine(x, y), lambda t: tirx.const(start, t), name=name)

        def compute(x: Any) -> Any:  # noqa: ANN401
            over = {axis: te.reduce_axis((0, shape[axis]), f"k{axis}") for axis in axes}

            def at(*index: Any) -> Any:  # noqa: ANN401
                left = list(index)
                if keep:
                    left = [item for axis, item in enumerate(left) if axis not in over]
                place = [over[axis] if axis in over else left.pop(0) for axis in range(rank)]
                return reducer(x(*place), axis=list(over.values()))

            return te.compute(shape_of(call), at, name=f"{x.op.name}_red")

        return builder.call_te(compute, call.args[0], primfunc_name_hint=name)

    return define


def _topi() -> Any:  # noqa: ANN401
    from tvm import topi

    return topi


#: For `relax.transform.LegalizeOps`.
DEFINITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "relax.max": _extremum(tirx.max, float("-inf"), "max"),
    "relax.min": _extremum(tirx.min, float("inf"), "min"),
    relax_fixed_point.REQUANTIZE: functools.partial(
        relax_fixed_point.define, multiply=fixed_point.multiply, once=fixed_point.once, shifted=fixed_point.shifted
    ),
    integer_ops.SOFTMAX: functools.partial(
        integer_ops.define_softmax,
        attrs=annotate_block("softmax", "rows", RowsConfig(1, 1)),
        multiply=fixed_point.multiply,
    ),
}
