"""Machine forms written as LLVM functions, for instructions whose types TVM's code generator does not have.

A kernel calls a form by name (`call`); `link` adds the text of the called forms to the module, where LLVM inlines them,
so that no call is left in the object. A form is chosen by the target: the instruction where it has one, else portable
arithmetic with the same meaning, which is how a kernel made for one target is computed on another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from ingot.errors import CompilerError
from ingot.schedules.half import NARROW_BF16
from ingot.target import Target

#: The text of a form, given its target and its name.
Text = Callable[[Target, str], str]

_PREFIX = "ingot_form_"
_FORMS: dict[str, Text] = {}
_OPERATORS: dict[str, Callable[[Any], Any]] = {}


def register(family: str, text: Text) -> None:
    """Make known how the forms called `family` or `family_...` are written."""
    _FORMS[family] = text


def lower_operator(name: str, lower: Callable[[Any], Any]) -> None:
    """Make known how calls of an operator of ours become calls of a form, once they are vectorised."""
    _OPERATORS[name] = lower


def name_of(family: str, *parts: object) -> str:
    """Return the name of a form's function; `family` holds no underscore."""
    return "_".join([_PREFIX + family, *map(str, parts)])


def call(dtype: str, name: str, *args: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the call of a form with a result."""
    return tirx.call_pure_extern(dtype, name, *args)


def link(functions: Mapping[Any, Any], target: Target) -> dict[Any, Any]:
    """Return the lowered functions of a module with the text of every form they call attached to one of them."""
    called: set[str] = set()

    def visit(expr: Any) -> Any:  # noqa: ANN401
        lower = _OPERATORS.get(str(getattr(expr.op, "name", "")))
        if lower is not None:
            expr = lower(expr)
        if len(expr.args) > 0 and isinstance(expr.args[0], ir.StringImm) and expr.args[0].value.startswith(_PREFIX):
            called.add(str(expr.args[0].value))
        return expr

    result = {gvar: tvm_ffi.structural_map(function, [(ir.Call, visit)]) for gvar, function in functions.items()}
    if not called:
        return dict(functions)
    texts = []
    for name in sorted(called):
        family = name.removeprefix(_PREFIX).partition("_")[0]
        if family not in _FORMS:
            raise CompilerError("a kernel calls a machine form nobody wrote", found=name, allowed=", ".join(_FORMS))
        texts.append(_FORMS[family](target, name))
    first = min(result, key=lambda gvar: str(gvar.name_hint))
    text = ir.StringImm(_module(texts))
    body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", text, result[first].body)
    result[first] = result[first].with_body(body)
    return result


def _module(texts: list[str]) -> str:
    """Join the texts; a declaration that several of them need may stand once only."""
    lines = [line.strip() for text in texts for line in text.strip().splitlines()]
    declared = sorted({line for line in lines if line.startswith("declare ")})
    return "\n".join([*(line for line in lines if not line.startswith("declare ")), *declared, ""])


# -- float32 to bfloat16 -----------------------------------------------------------------------------------------------


def _narrow(expr: Any) -> Any:  # noqa: ANN401
    lanes = int(re.sub(r"uint16x?", "", str(expr.ty.dtype)) or 1)
    return call(str(expr.ty.dtype), name_of("narrow", lanes), expr.args[0])


def _narrow_text(target: Target, name: str) -> str:
    """Write a conversion of `lanes` values: LLVM's own where an instruction does it, else on the bits.

    On the bits: half of the last place that stays, less one if the result is even so far, carries into it; a NaN keeps
    its upper bits, with the quiet one set.
    """
    lanes = int(name.rpartition("_")[2])
    f, i, s = (f"<{lanes} x {t}>" if lanes > 1 else t for t in ("float", "i32", "i16"))
    head = f"define {s} @{name}({f} %x) alwaysinline {{"
    if {"avx512bf16", "bf16"} & set(target.features):
        b = f"<{lanes} x bfloat>" if lanes > 1 else "bfloat"
        body = f"%b = fptrunc {f} %x to {b}\n%r = bitcast {b} %b to {s}"
        return f"{head}\n{body}\nret {s} %r\n}}"

    def const(value: int) -> str:
        return f"splat (i32 {value})" if lanes > 1 else str(value)

    c = f"<{lanes} x i1>" if lanes > 1 else "i1"
    return f"""{head}
        %bits = bitcast {f} %x to {i}
        %upper = lshr {i} %bits, {const(16)}
        %odd = and {i} %upper, {const(1)}
        %half = add {i} %odd, {const(0x7FFF)}
        %sum = add {i} %bits, %half
        %rounded = lshr {i} %sum, {const(16)}
        %quiet = or {i} %upper, {const(0x40)}
        %isnan = fcmp uno {f} %x, %x
        %wide = select {c} %isnan, {i} %quiet, {i} %rounded
        %r = trunc {i} %wide to {s}
        ret {s} %r
        }}"""


register("narrow", _narrow_text)
lower_operator(NARROW_BF16, _narrow)
