"""The normal form that every importer promises and every pass may rely on, as a check.

1. `module["main"]` is one Relax function: the inputs' parameters, then the weights' parameters, in that order.
2. Its body is one dataflow block that ends in a tuple of tensors, one for each output.
3. Every tensor's shape is static and has no zero.
4. Constants have at most 64 elements; a weight has the dtype and shape of its parameter; every weight is used.
5. Every value is a Relax operator call, a tuple item, or call_tir of a function of the module: no control flow, no
   shape arithmetic, no library calls.
6. Nothing is left to do on weights alone that only moves or converts elements (transpose, reshape, cast).
7. Inputs and outputs have the dtypes and shapes of their specs.
"""

from __future__ import annotations

import numpy as np

from ingot.errors import CompilerError
from ingot.frontend.interface import CONSTANT_ELEMENTS, Imported, TensorSpec
from ingot.frontend.tvm_types import Binding, Function, RelaxType

# relax.call_tir itself is an operator; these are what case 5 forbids.
_FORBIDDEN = frozenset(
    (
        "relax.shape_of", "relax.shape_to_tensor", "relax.tensor_to_shape", "relax.call_dps_packed",
        "relax.call_pure_packed", "relax.call_inplace_packed", "relax.invoke_closure", "relax.print", "relax.assert_op",
        "relax.nn.dropout", "relax.null_value",
    )
)  # fmt: skip
_MOVES = frozenset(("relax.permute_dims", "relax.reshape", "relax.astype", "relax.expand_dims", "relax.squeeze"))


def check_normal_form(imported: Imported) -> None:
    """Raise CompilerError naming the first violation of the normal form."""
    from tvm import relax

    names = [var.name_hint for var in imported.module.functions]
    if "main" not in names:
        raise _violation(1, "the module has no function 'main'", str(names))
    main = imported.module["main"]
    if not isinstance(main, relax.Function):
        raise _violation(1, "'main' is no Relax function", type(main).__name__)
    _check_parameters(main, imported)
    bindings = _check_body(main, imported)
    for binding in bindings:
        _check_binding(binding, main, imported)
    _check_use(main, bindings, imported)


def _violation(case: int, what: str, found: str) -> CompilerError:
    return CompilerError(f"the imported module breaks rule {case} of the normal form: {what}", found=found)


def _static_shape(ty: RelaxType, where: str) -> tuple[int, ...]:
    from tvm import relax

    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        raise _violation(3, f"{where} has no static shape", str(ty))
    shape = []
    for dim in ty.shape.values:
        if type(dim).__name__ != "IntImm" or int(dim) < 1:
            raise _violation(3, f"{where} has an open or empty dimension", str(ty))
        shape.append(int(dim))
    return tuple(shape)


def _check_spec(ty: RelaxType, spec: TensorSpec, where: str) -> None:
    shape = _static_shape(ty, where)
    if shape != spec.shape or str(ty.dtype.dtype) != spec.dtype:
        raise _violation(7, f"{where} differs from its spec", f"{ty}, spec {spec.dtype} {list(spec.shape)}")


def _check_parameters(main: Function, imported: Imported) -> None:
    params = list(main.params)
    inputs, weights = params[: len(imported.inputs)], params[len(imported.inputs) :]
    if len(inputs) != len(imported.inputs) or [param.name for param in weights] != list(imported.weights):
        raise _violation(1, "the parameters are not the inputs, then the weights", str([p.name for p in params][:8]))
    for param, spec in zip(inputs, imported.inputs, strict=True):
        _check_spec(param.ty, spec, f"input {spec.name!r}")
    for param, array in zip(weights, imported.weights.values(), strict=True):
        shape = _static_shape(param.ty, f"weight {param.name!r}")
        if shape != array.shape or str(param.ty.dtype.dtype) != array.dtype.name:
            raise _violation(
                4, f"weight {param.name!r} differs from its parameter", f"{array.dtype}{list(array.shape)}"
            )


def _check_body(main: Function, imported: Imported) -> list[Binding]:
    from tvm import relax

    blocks = list(main.body.blocks) if isinstance(main.body, relax.SeqExpr) else []
    if len(blocks) != 1 or not isinstance(blocks[0], relax.DataflowBlock):
        raise _violation(2, "the body is not one dataflow block", str([type(block).__name__ for block in blocks]))
    result = main.body.body.ty
    fields = list(result.fields) if isinstance(result, relax.TupleType) else []
    if len(fields) != len(imported.outputs):
        raise _violation(2, "the result is not a tuple of the outputs", str(result))
    for ty, spec in zip(fields, imported.outputs, strict=True):
        _check_spec(ty, spec, f"output {spec.name!r}")
    return list(blocks[0].bindings)


def _check_binding(binding: Binding, main: Function, imported: Imported) -> None:
    import tvm
    from tvm import relax

    where, value = f"{binding.var.name!r}", binding.value
    if not isinstance(binding, relax.VarBinding):
        raise _violation(5, f"{where} is a match_cast", type(binding).__name__)
    if not isinstance(value, (relax.Call, relax.TupleGetItem, relax.Tuple)):
        raise _violation(5, f"{where} is not an operator call", type(value).__name__)
    types = list(binding.var.ty.fields) if isinstance(binding.var.ty, relax.TupleType) else [binding.var.ty]
    for ty in types:
        _static_shape(ty, where)
    if not isinstance(value, relax.Call):
        return
    if not isinstance(value.op, tvm.ir.Op):
        raise _violation(5, f"{where} calls no operator", str(value.op))
    if value.op.name in _FORBIDDEN:
        raise _violation(5, f"{where} calls a forbidden operator", value.op.name)
    if value.op.name == "relax.call_tir" and not isinstance(imported.module[value.args[0]], tvm.tirx.PrimFunc):
        raise _violation(5, f"{where} calls a function that is no kernel", str(value.args[0]))
    weights = set(main.params[len(imported.inputs) :])
    constants = (*weights,)
    for arg in value.args:
        if isinstance(arg, tvm.ir.GenericConst) and int(np.prod(arg.value.shape, dtype=np.int64)) > CONSTANT_ELEMENTS:
            raise _violation(4, f"{where} holds a constant that should be a weight", str(arg.ty))
    if value.op.name in _MOVES:
        source = value.args[0]
        if isinstance(source, tvm.ir.GenericConst) or any(source.same_as(weight) for weight in constants):
            raise _violation(6, f"{where} moves a weight at run time", value.op.name)


def _check_use(main: Function, bindings: list[Binding], imported: Imported) -> None:
    from ingot.frontend.normalize import free_vars

    used = set(free_vars(main.body.body))
    for binding in bindings:
        used.update(free_vars(binding.value))
    for param in main.params[len(imported.inputs) :]:
        if param not in used:
            raise _violation(4, f"weight {param.name!r} is never used", param.name)
