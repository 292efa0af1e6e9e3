"""Operators that users bring along: a converter written with Relax or TE, or a kernel in C."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.errors import OptionError, UnsupportedError
from ingot.frontend.loops import call_loops
from ingot.frontend.tvm_types import Builder, Expr

#: The attribute of a PrimFunc that holds the C file its call needs.
C_SOURCE = "ingot.c_source"
Shapes = Sequence[tuple[Sequence[int], str]]

_HEADER = """#include <stdbool.h>
#include <stdint.h>
typedef struct ingot_op_tensor {
    void *data;           /* elements in C order */
    int32_t ndim;
    const int64_t *shape; /* ndim sizes */
} ingot_op_tensor;
"""


@dataclass(frozen=True)
class OpNode:
    """One node of a registered operator.

    inputs: Relax expressions (None for an input left out; all None while shapes are inferred). shapes, dtypes: of the
    inputs; dtypes are numpy names. constants: the inputs' values where they are known, else None. attributes: an ONNX
    node's, by name, as numbers, text, lists or arrays; a TFLite operator's bytes are under "custom_options".
    """

    label: str
    inputs: tuple[Expr, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    constants: tuple[np.ndarray | None, ...]
    attributes: Mapping[str, Any]
    outputs: int
    builder: Builder = field(default=None, repr=False)

    def emit(self, expr: Expr) -> Expr:
        """Bind an intermediate Relax expression."""
        return self.builder.emit(expr)

    def call_te(self, function: Callable[..., Any], *inputs: Expr, name: str = "custom") -> Expr:
        """The result of a TE function of tensors (`tvm.te.compute`) on these inputs."""
        return self.builder.emit_te(function, *inputs, primfunc_name_hint=name)


@dataclass(frozen=True)
class CustomOp:
    """What `register_op` was given."""

    name: str
    infer: Callable[[OpNode], Shapes]
    convert: Callable[[OpNode], Any] | None
    kernel: str | None
    function: str


_TABLE: dict[tuple[str, str], CustomOp] = {}


def register_op(
    name: str,
    *,
    infer: Callable[[OpNode], Shapes],
    domain: str = "",
    convert: Callable[[OpNode], Any] | None = None,
    kernel: str | None = None,
    function: str = "",
) -> None:
    """Teach this process an operator of your own, for ONNX nodes of `domain` and for TFLite's custom operators.

    infer:   from a node, a (shape, dtype) for each output.
    convert: from a node, a Relax expression for each output (one, or a list).
    kernel:  instead of `convert`, C11 source with `void NAME(const ingot_op_tensor *in, const ingot_op_tensor *out)`,
             which is compiled into the artifact. It may call memcpy, memset and libm, and keeps to its tensors.
    function: NAME, if it is not the operator's name.

    An operator that this compiler has is replaced by yours, if it is of the same domain. Raises OptionError if not
    exactly one of `convert` and `kernel` is given, or a name is not one.
    """
    if (convert is None) == (kernel is None):
        raise OptionError("an operator needs a converter or a kernel", where=name, allowed="one of the two")
    if not name or not (function or name).isidentifier():
        raise OptionError("not a name of an operator", where="register_op", found=repr(name), allowed="an identifier")
    _TABLE[(domain, name)] = CustomOp(name, infer, convert, kernel, function or name)


def unregister_op(name: str, *, domain: str = "") -> None:
    """Forget an operator that `register_op` was given, if it was."""
    _TABLE.pop((domain, name), None)


def custom_op(domain: str, name: str) -> CustomOp | None:
    """The registered operator, if there is one."""
    return _TABLE.get(("" if domain == "ai.onnx" else domain, name))


def inferred(op: CustomOp, node: OpNode) -> list[tuple[tuple[int, ...], str]]:
    """What the operator's own function says of its outputs; UnsupportedError if that is no answer."""
    try:
        found = [(tuple(int(dim) for dim in shape), str(np.dtype(dtype).name)) for shape, dtype in op.infer(node)]
    except Exception as error:  # the user's code
        raise _failed("shapes", node, error) from error
    if len(found) < node.outputs or any(dim < 1 for shape, _ in found for dim in shape):
        raise UnsupportedError(
            "a registered operator's shapes are not usable",
            where=node.label,
            found=str(found),
            allowed=f"{node.outputs} shapes with sizes of at least 1",
        )
    return found


def converted(op: CustomOp, node: OpNode) -> list[Expr]:
    """The operator's results."""
    if op.convert is None:
        return _call_kernel(op, node)
    try:
        results = op.convert(node)
    except UnsupportedError:
        raise
    except Exception as error:  # the user's code
        raise _failed("converter", node, error) from error
    return list(results) if isinstance(results, list | tuple) else [results]


def _failed(what: str, node: OpNode, error: Exception) -> UnsupportedError:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return UnsupportedError(f"a registered operator's {what} failed", where=node.label, found=text)


def _call_kernel(op: CustomOp, node: OpNode) -> list[Expr]:
    """A kernel that calls the user's function, through a C function that knows this node's shapes."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    if any(value is None for value in node.inputs):
        raise UnsupportedError("a C kernel takes no missing inputs", where=node.label)
    outputs = inferred(op, node)
    shapes = [*node.shapes, *(shape for shape, _ in outputs)]
    count, parameters = len(node.shapes), [f"p{i}" for i in range(len(shapes))]
    lines = []
    for i, shape in enumerate(shapes):
        lines.append(f"    static const int64_t s{i}[] = {{{', '.join(map(str, shape or (1,)))}}};")
    for side, places in (("in", range(count)), ("out", range(count, len(shapes)))):
        tensors = ", ".join(f"{{p{i}, {len(shapes[i])}, s{i}}}" for i in places) or "{0, 0, 0}"
        lines.append(f"    const ingot_op_tensor {side}[] = {{{tensors}}};")
    body = "\n".join([*lines, f"    {op.function}(in, out);"])
    # One object for each node's shapes; two models in one program may hold the same one, so its function is weak.
    digest = hashlib.sha256(f"{op.kernel}\0{body}".encode()).hexdigest()[:16]
    symbol = f"ingot_op_{digest}"
    arguments = ", ".join(f"void *{name}" for name in parameters)
    made = f'__attribute__((weak, visibility("hidden"))) int32_t {symbol}({arguments})'
    own = f"#define {op.function} {symbol}_user\n#pragma weak {symbol}_user\n{op.kernel}\n"
    source = f"{_HEADER}\n{own}{made};\n{made} {{\n{body}\n    return 0;\n}}\n"

    def call(ins: Any, outs: Any) -> None:  # noqa: ANN401
        pointers = [tirx.address_of(buffer[tuple(0 for _ in buffer.shape)]) for buffer in (*ins, *outs)]
        T.evaluate(tirx.call_extern("int32", symbol, *pointers))

    attributes = {C_SOURCE: source}
    return call_loops(node.builder, f"custom_{op.function}", list(node.inputs), outputs, call, attributes)


def c_sources(module: Any) -> tuple[str, ...]:  # noqa: ANN401 - an IRModule
    """The C files that the functions of an imported module call, each once."""
    attributes = [function.attrs for function in module.functions.values() if function.attrs is not None]
    return tuple(sorted({str(held[C_SOURCE]) for held in attributes if C_SOURCE in held}))
