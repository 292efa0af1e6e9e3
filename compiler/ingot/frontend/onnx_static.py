"""A checked ONNX model with static inputs -> a graph in which every tensor's type is known and constants are folded.

One walk over the nodes in their order: a node whose inputs are all constants is evaluated (within a size budget), a
Shape or Size becomes a constant because every shape is known, and every other node gets its output types from ONNX's
own inference, which sees the constants. So chains that compute a Reshape's shape or a Resize's sizes vanish.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.counted import bounds, is_counted
from ingot.frontend.extents import Extent, Situation, follow
from ingot.frontend.liveness import is_view
from ingot.frontend.onnx_constants import constant_value, stays_true
from ingot.frontend.onnx_contrib import contrib_body, is_contrib
from ingot.frontend.onnx_custom import known_types
from ingot.frontend.onnx_expand import MAX_EXPANDED_NODES, Labelled, Unroller, check_steps, function_body, rename
from ingot.frontend.onnx_infer import infer_outputs
from ingot.frontend.onnx_read import OnnxModel, all_nodes, node_label, refuse_operators
from ingot.frontend.onnx_tensors import checked_count, element_bits, tensor_array
from ingot.frontend.survey import Survey, surveyed

if TYPE_CHECKING:
    import onnx

# A folded result may always be this large; a larger one only if it is no larger than what it was computed from.
FOLD_BYTES = 2**20
FOLD_TOTAL_BYTES = 2**30
# Left as operators on weights: the quantised weights must stay visible to the passes, and random is never constant.
_NEVER_FOLDED = frozenset(
    (
        "DequantizeLinear",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
    )
)


# Functions of many steps whose 16-bit float forms compute in float32.
_BODIES_IN_FLOAT32 = frozenset(("Attention", "FlexAttention", "GroupNormalization", "RMSNormalization"))


@dataclass(frozen=True)
class TensorType:
    """A static tensor type; `elem` is ONNX's data type number."""

    elem: int
    shape: tuple[int, ...]


@dataclass
class StaticGraph:
    """Nodes to convert, in order, with the type of every tensor and the value of every constant.

    `numbers` has for each node that of the model's node it stands for. A tensor in `extents` has its largest shape as
    its type. `unread` has the types of outputs that nobody reads.
    """

    opset: int
    inputs: list[str]
    outputs: list[str]
    nodes: list[tuple[onnx.NodeProto, str]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    types: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    extents: dict[str, Extent] = field(default_factory=dict)
    unread: dict[str, TensorType] = field(default_factory=dict)

    @property
    def counters(self) -> list[str]:
        """The counters of outputs whose size depends on data, each once."""
        return list(dict.fromkeys(self.extents[name].counter for name in self.outputs if name in self.extents))


def make_static(
    model: OnnxModel, inputs: dict[str, TensorType], sizes: dict[str, int], survey: Survey | None = None
) -> StaticGraph:
    """Infer every type and fold constants, for the given static input types.

    Raises ModelError if the model contradicts itself, UnsupportedError if a tensor's shape depends on data. A survey
    gets the errors of nodes, and all others are visited.
    """
    return _Walker(model, inputs, sizes).run(survey)


class _Walker:
    def __init__(self, model: OnnxModel, inputs: dict[str, TensorType], sizes: dict[str, int]) -> None:
        graph = model.proto.graph
        self.model = model
        self.sizes = sizes
        self.static = StaticGraph(model.opset, list(inputs), [value.name for value in graph.output])
        self.static.types.update(inputs)
        self.opsets = {entry.domain: entry.version for entry in model.proto.opset_import}
        # "" stands for an input or output that is left out.
        self.used = {name for _, node in all_nodes(graph) for name in node.input} | set(self.static.outputs)
        self.used.discard("")
        self.folded_bytes = 0
        self.inlined = 0
        self.expanded = 0
        self.either: set[str] = set()  # results of an If that takes one of two computed tensors
        self.unroller = Unroller(model.opset, self._constant)
        for name, array in model.initializers.items():
            self._constant(name, array)
        for name, kind in inputs.items():
            if 0 in kind.shape:
                self._constant(name, _empty(kind))

    def run(self, survey: Survey | None) -> StaticGraph:
        static = self.static
        for number, node in zip(self.model.numbers, self.model.proto.graph.node, strict=True):
            if survey is not None and survey.skips(number, _reads(node), node.output):
                continue
            before = len(static.nodes)
            with surveyed(survey, number, node.output):
                self._visit_all(node, node_label(node, number))
            if survey is not None and number in survey.failures:
                del static.nodes[before:]
                for name in node.output:
                    static.types.pop(name, None)
                    static.constants.pop(name, None)
            static.numbers += [number] * (len(static.nodes) - before)
        for name in static.outputs:
            if name not in static.types and survey is None:
                raise ModelError("an output is not computed by any node", where=f"output {name!r}")
        return static

    def _visit_all(self, whole: onnx.NodeProto, name: str) -> None:
        """Visit one node of the model, or the nodes that stand for it."""
        queue = deque([(whole, name)])
        while queue:
            node, label = queue.popleft()
            inner = self._expanded(node, label)
            if inner is None:
                self._visit(node, label)
                continue
            self.expanded += len(inner)
            if self.expanded > MAX_EXPANDED_NODES:
                allowed = f"at most {MAX_EXPANDED_NODES} nodes"
                raise UnsupportedError("loops and functions make the graph too large", where=label, allowed=allowed)
            for copy, _ in inner:
                self.used.update(name for _, held in all_nodes_of(copy) for name in held.input if name)
            queue.extendleft(reversed(inner))

    def _expanded(self, node: onnx.NodeProto, label: str) -> list[Labelled] | None:
        """The nodes that stand for this one: of a branch, a loop's steps or a function; None for a plain operator."""
        import onnx

        from ingot.frontend.onnx_ops import is_supported

        if not self._is_plain(node) or not is_supported(node.domain, node.op_type):
            self._follow(node, label, (), None)
        if node.domain in ("", "ai.onnx") and node.op_type in ("If", "Scan", "Loop"):
            self._check_inputs(node, label)
            if node.op_type == "If":
                return self._inline_if(node, label)
            if node.op_type == "Scan":
                known = self.static.types
                return self.unroller.scan(node, [known[name].shape if name else () for name in node.input], label)
            return self._unroll_loop(node, label)
        if is_contrib(node.domain, node.op_type):
            self._check_inputs(node, label)
            self.inlined += 1
            prefix, graph = f"body{self.inlined}/", self.static
            return contrib_body(node, label, prefix, graph.opset, graph.types, graph.constants, self._constant)
        if is_supported(node.domain, node.op_type):
            return None
        self._check_inputs(node, label)
        if node.op_type in _BODIES_IN_FLOAT32 and self._is_half(node):
            return self._in_float32(node, label)
        types = []
        for name in node.input:
            kind = self.static.types.get(name)
            types.append(
                onnx.TypeProto() if kind is None else onnx.helper.make_tensor_type_proto(kind.elem, kind.shape)
            )
        self.inlined += 1
        version = self.opsets.get(node.domain, self.static.opset)
        body = function_body(node, version, types, label, f"body{self.inlined}/")
        if body is None:
            refuse_operators({node.op_type: [label]})
        return body

    def _is_half(self, node: onnx.NodeProto) -> bool:
        import onnx

        halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        return self.static.types[node.input[0]].elem in halves

    def _in_float32(self, node: onnx.NodeProto, label: str) -> list[Labelled]:
        """The node on inputs that are cast to float32, and its results cast back: rounded once, not at every step."""
        import onnx

        self.inlined += 1
        prefix, half = f"wide{self.inlined}/", self.static.types[node.input[0]].elem
        copy, nodes = onnx_copy(node), list[Labelled]()
        for index, name in enumerate(node.input):
            if name and self.static.types[name].elem == half:
                copy.input[index] = f"{prefix}{index}"
                cast = onnx.helper.make_node("Cast", [name], [copy.input[index]], to=onnx.TensorProto.FLOAT)
                nodes.append((cast, label))
        nodes.append((copy, label))
        for index, name in enumerate(node.output):
            if name:
                copy.output[index] = prefix + name
                nodes.append((onnx.helper.make_node("Cast", [prefix + name], [name], to=half), label))
        return nodes

    def _check_inputs(self, node: onnx.NodeProto, label: str) -> None:
        for name in node.input:
            if name and name not in self.static.types:
                raise ModelError("a node reads a tensor that nothing computes", where=label, found=repr(name))

    def _unroll_loop(self, node: onnx.NodeProto, label: str) -> list[Labelled]:
        """The steps of a Loop whose trip count is constant and whose condition stays true."""
        import onnx

        body = next((attribute.g for attribute in node.attribute if attribute.name == "body"), None)
        if body is None:
            raise ModelError("a Loop has no body", where=label)
        trips = self.static.constants.get(node.input[0]) if node.input[0] else None
        start = self.static.constants.get(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        if trips is None or (start is None and len(node.input) > 1 and node.input[1]):
            raise UnsupportedError(
                "a Loop whose trip count is not constant is not supported",
                where=label,
                found=f"{node.input[0] or 'no trip count'!r} is computed at run time",
                hint="export the model with a fixed number of steps",
            )
        if not stays_true(body):
            raise UnsupportedError(
                "a Loop that may end early is not supported",
                where=label,
                found=f"its condition {body.output[0].name!r} is computed in the body",
                hint="export the model with a fixed number of steps",
            )
        running = start is None or bool(start.reshape(-1)[0])
        steps = check_steps(int(trips.reshape(-1)[0]) if running else 0, label)
        states, nodes = list(node.input[2:]), list[Labelled]()
        collected: list[list[str]] = [[] for _ in body.output[1 + len(states) :]]
        self.inlined += 1
        always = f"loop{self.inlined}/true"
        self._constant(always, np.array(True))
        for step in range(steps):
            number = f"loop{self.inlined}/number{step}"
            self._constant(number, np.array(step, dtype=np.int64))
            inner, results = self.unroller.step(body, [number, always, *states], label)
            nodes.extend(inner)
            states = results[1 : 1 + len(states)]
            for place, name in enumerate(results[1 + len(states) :]):
                collected[place].append(name)
        for final, name in zip(states, node.output, strict=False):
            if name:
                nodes.append((onnx.helper.make_node("Identity", [final], [name]), label))
        for parts, name in zip(collected, node.output[len(states) :], strict=False):
            if name:
                nodes.extend(self.unroller.stacked(parts, 0, name, label))
        return nodes

    def _constant(self, name: str, array: np.ndarray) -> None:
        import onnx

        elem = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        self.static.types[name] = TensorType(elem, tuple(array.shape))
        self.static.constants[name] = array

    def _visit(self, node: onnx.NodeProto, label: str) -> None:
        self._check_inputs(node, label)
        if node.output and node.output[0] in self.either:
            self._check_either(node, label)
        if not any(name in self.used for name in node.output):
            return
        if node.op_type in ("Shape", "Size"):
            self._follow(node, label, (), None)
        simple = self._simple_constant(node, label)
        if simple is not None:
            self._constant(node.output[0], simple)
            return
        constants = self.static.constants
        known = [constants[name] for name in node.input if name in constants]
        all_known = len(known) == sum(1 for name in node.input if name)
        counted = self._is_plain(node) and is_counted(node, constants)
        inferred = self._infer(node, label)
        if all_known and node.op_type not in _NEVER_FOLDED and self._fits(known, inferred):
            values = self._evaluate(node, label)
            if values is not None:
                for name, value in zip(node.output, values, strict=False):
                    if name:
                        self._constant(name, value)
                return
        if counted:
            node, inferred = self._count(node, label)
        # An output nobody reads, such as Dropout's mask, needs no type: in `types` are used tensors only.
        self.static.unread.update({n: kind for n, kind in inferred.items() if kind is not None and n not in self.used})
        inferred = {name: kind for name, kind in inferred.items() if name in self.used}
        missing = [name for name, kind in inferred.items() if kind is None]
        if missing:
            raise UnsupportedError(
                "a tensor's shape depends on data or cannot be inferred",
                where=label,
                found=f"output {missing[0]!r} without a static shape",
                allowed="static shapes",
                hint="fix the model's input shapes, or bind the inputs that decide sizes: --bind NAME=VALUE",
            )
        self.static.types.update({name: kind for name, kind in inferred.items() if kind is not None})
        self._follow(node, label, tuple(inferred), next(iter(inferred.values())))
        for name, kind in inferred.items():
            if kind is not None and 0 in kind.shape:
                self._constant(name, _empty(kind))
        if all(name in self.static.constants for name in inferred):
            return
        self.static.nodes.append((node, label))

    @staticmethod
    def _is_plain(node: onnx.NodeProto) -> bool:
        """Whether this is an operator of ONNX itself that holds no graph."""
        return node.domain in ("", "ai.onnx") and node.op_type not in ("If", "Scan", "Loop")

    def _count(self, node: onnx.NodeProto, label: str) -> tuple[onnx.NodeProto, dict[str, TensorType | None]]:
        """A node that chooses how many results it has, with one more output that counts them, and its largest types."""
        import onnx

        types = self.static.types
        shapes = [types[name].shape if name else () for name in node.input]
        found = bounds(node, shapes, [self.static.constants.get(name) for name in node.input], label)
        elem, integer = types[node.input[0]].elem, int(onnx.TensorProto.INT64)
        inferred: dict[str, TensorType | None] = {}
        for name, shape, whole in zip(node.output, found.shapes, found.integers, strict=False):
            if name:
                checked_count(shape, 64, label)
                inferred[name] = TensorType(integer if whole else elem, shape)
        if found.exact:
            return node, inferred
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        counter = f"{node.output[0] or label}#count"
        while counter in types:
            counter += "'"
        copy.output.extend([""] * (len(found.shapes) - len(copy.output)) + [counter])
        self.used.add(counter)
        for name, axis in zip(node.output, found.axes, strict=False):
            if name and axis is not None:
                self.static.extents[name] = Extent(axis, counter)
        return copy, {**inferred, counter: TensorType(integer, (1,))}

    def _follow(self, node: onnx.NodeProto, label: str, outputs: tuple[str, ...], kind: TensorType | None) -> None:
        """Give the outputs of a node the extent of its inputs; UnsupportedError where it would need their true size.

        Without a `kind` of its outputs no extent can be followed.
        """
        types, extents = self.static.types, self.static.extents
        held = {name for _, inner in all_nodes_of(node) for name in inner.input} if kind is None else set(node.input)
        mine = {place: extents[name] for place, name in enumerate(node.input) if name in extents}
        if not held & set(extents):
            return
        found = None
        if mine and kind is not None:
            shapes = [types[name].shape if name else () for name in node.input]
            constants = [self.static.constants.get(name) for name in node.input]
            found = follow(Situation(node, shapes, constants, kind.shape), mine)
        if found is None:
            name = next(name for name in (*node.input, *sorted(held)) if name in extents)
            axis = extents[name].axis
            raise UnsupportedError(
                "an operator needs the size of a tensor whose size depends on data",
                where=label,
                found=f"input {name!r}, at most {types[name].shape[axis]} along axis {axis}",
                allowed="operators that compute each of its entries alone",
                hint="end the model before this operator, and do the rest in the program that calls it",
            )
        for name in outputs:
            extents[name] = found

    def _simple_constant(self, node: onnx.NodeProto, label: str) -> np.ndarray | None:
        """The value of a Constant, ConstantOfShape, Shape, Size, or of a view of a constant; else None."""
        attributes = {attribute.name: attribute for attribute in node.attribute}
        types, constants = self.static.types, self.static.constants
        if node.op_type == "Constant":
            return constant_value(attributes, label)
        if node.op_type in ("Shape", "Size") and node.input[0] in types:
            shape = types[node.input[0]].shape
            if node.op_type == "Size":
                return np.array(int(np.prod(shape, dtype=np.int64)), dtype=np.int64)
            start = attributes["start"].i if "start" in attributes else 0
            end = attributes["end"].i if "end" in attributes else len(shape)
            return np.array(shape[start:end], dtype=np.int64)
        if node.op_type == "ConstantOfShape" and node.input[0] in constants:
            value = np.zeros(1, dtype=np.float32)
            if "value" in attributes:
                value = tensor_array(attributes["value"].t, label)
            shape = tuple(int(dim) for dim in constants[node.input[0]].reshape(-1))
            checked_count(shape, value.dtype.itemsize * 8, label)
            if value.size != 1:
                raise ModelError("ConstantOfShape needs a value of one element", where=label, found=str(value.shape))
            # A broadcast view: no memory for weights that are one number repeated.
            return np.broadcast_to(value.reshape(()), shape)
        if node.op_type == "Range" and all(name in constants and constants[name].size == 1 for name in node.input):
            # ONNX's own function bodies hand it one-element vectors, which its shape inference refuses.
            start, limit, delta = (constants[name].reshape(()) for name in node.input)
            if start.dtype.kind in "iu" and int(delta) != 0:
                size = max(-(-(int(limit) - int(start)) // int(delta)), 0)
                checked_count((size,), start.dtype.itemsize * 8, label)
                if size * start.dtype.itemsize <= FOLD_BYTES:
                    return np.arange(int(start), int(limit), int(delta), dtype=start.dtype)
        if node.op_type in ("Identity", "Dropout") and node.input[0] in constants and not any(node.output[1:]):
            return constants[node.input[0]]
        return None

    def _fits(self, known: list[np.ndarray], inferred: dict[str, TensorType | None]) -> bool:
        taken = sum(array.nbytes for array in known)
        made = 0
        for kind in inferred.values():
            if kind is None:
                # An output whose size the types do not tell: at most as large as these small inputs make it.
                made += FOLD_BYTES if taken <= 4096 else 2**62
            else:
                made += int(np.prod(kind.shape, dtype=np.float64)) * max(element_bits(kind.elem, ""), 8) // 8
        return made <= max(FOLD_BYTES, taken) and self.folded_bytes + made <= FOLD_TOTAL_BYTES

    def _infer(self, node: onnx.NodeProto, label: str) -> dict[str, TensorType | None]:
        known = known_types(self.static, node, label)
        if known is not None:
            return {name: TensorType(*kind) for name, kind in zip(node.output, known, strict=False) if name}
        names = {name for name in node.input if name}
        types = {name: (self.static.types[name].elem, self.static.types[name].shape) for name in names}
        version = self.model.proto.ir_version
        found = infer_outputs(node, label, types, self.static.constants, self.opsets, version)
        return {name: _static_type(found[name], label) if name in found else None for name in node.output if name}

    def _evaluate(self, node: onnx.NodeProto, label: str) -> list[np.ndarray] | None:
        """Run one node on its constant inputs with ONNX's reference implementation; None if that has no answer."""
        import onnx
        import onnx.reference

        names = list(dict.fromkeys(name for name in node.input if name))
        feeds = {name: self.static.constants[name] for name in names}
        undefined = onnx.TypeProto()
        graph = onnx.helper.make_graph(
            [node],
            "constant",
            [onnx.helper.make_tensor_value_info(name, self.static.types[name].elem, None) for name in names],
            [onnx.helper.make_value_info(name, undefined) for name in node.output if name],
        )
        imports = [onnx.helper.make_opsetid(domain, number) for domain, number in self.opsets.items()]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=self.model.proto.ir_version)
        try:
            with np.errstate(all="ignore"):
                results = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # the reference implementation raises anything; the node then stays for run time
            return None
        values = []
        by_name = dict(zip((name for name in node.output if name), results, strict=True))
        for name in node.output:
            value = np.asarray(by_name[name]) if name else np.zeros(0)
            if value.dtype == np.dtype(object):
                return None
            values.append(value)
        self.folded_bytes += sum(value.nbytes for value in values)
        return values

    def _inline_if(self, node: onnx.NodeProto, label: str) -> list[Labelled]:
        """The nodes of the branch that a constant condition chooses, renamed so that no two tensors clash.

        A condition that is computed at run time makes both branches run, and one of their results is taken.
        """
        import onnx

        condition = self.static.constants.get(node.input[0])
        if condition is not None and condition.size == 1:
            wanted = "then_branch" if bool(condition.reshape(())) else "else_branch"
            copies, results = self._branch(node, wanted, label)
            for outer, source in zip(node.output, results, strict=False):
                if outer:
                    copies.append((onnx.helper.make_node("Identity", [source], [outer]), f"{label} result"))
            return copies
        copies, taken = self._branch(node, "then_branch", label)
        other, otherwise = self._branch(node, "else_branch", label)
        copies += other
        self.inlined += 1
        whether = f"if{self.inlined}/condition"
        self._constant(f"{whether}_shape", np.zeros(0, dtype=np.int64))
        copies.append((onnx.helper.make_node("Reshape", [node.input[0], f"{whether}_shape"], [whether]), label))
        for outer, yes, no in zip(node.output, taken, otherwise, strict=False):
            if outer:
                self.either.add(outer)
                copies.append((onnx.helper.make_node("Where", [whether, yes, no], [outer]), label))
        return copies

    def _branch(self, node: onnx.NodeProto, wanted: str, label: str) -> tuple[list[Labelled], list[str]]:
        """The nodes of one branch of an If, and the names of its results."""
        branch = next((attribute.g for attribute in node.attribute if attribute.name == wanted), None)
        if branch is None or len(branch.output) < len(node.output):
            raise ModelError("an If has no complete branch", where=label, found=f"no {wanted}")
        self.inlined += 1
        prefix = f"if{self.inlined}/"
        renamed: dict[str, str] = {}
        for tensor in branch.initializer:
            renamed[tensor.name] = prefix + tensor.name
            self._constant(prefix + tensor.name, tensor_array(tensor, f"{label}, initializer {tensor.name!r}"))
        for inner in branch.node:
            renamed.update((name, prefix + name) for name in inner.output if name)
        copies = []
        for index, inner in enumerate(branch.node):
            copy = onnx_copy(inner)
            rename(copy, renamed)
            copies.append((copy, node_label(inner, index)))
        return copies, [renamed.get(result.name, result.name) for result in branch.output]

    def _check_either(self, node: onnx.NodeProto, label: str) -> None:
        """Refuse an If whose branches make different types: which one comes out is only known at run time."""
        yes, no = (self.static.types[name] for name in node.input[1:])
        if yes != no:
            raise UnsupportedError(
                "an If whose branches make tensors of different shapes is not supported",
                where=label,
                found=f"{list(yes.shape)} or {list(no.shape)}",
                allowed="a constant condition, or branches that make the same shapes",
                hint="export the model for one of its branches, or bind the input that decides",
            )


def onnx_copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy of a node."""
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def all_nodes_of(node: onnx.NodeProto) -> list[tuple[int, onnx.NodeProto]]:
    """A node and the nodes inside the graphs it holds."""
    inner = (
        item
        for attribute in node.attribute
        for graph in ((attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ())
        for item in all_nodes(graph)
    )
    return [(0, node), *inner]


def _reads(node: onnx.NodeProto) -> set[str]:
    return {name for _, held in all_nodes_of(node) for name in held.input if name}


def _empty(kind: TensorType) -> np.ndarray:
    """A tensor without elements: there is nothing to know about its values, so it is a constant."""
    import onnx

    return np.zeros(kind.shape, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem))


def _static_type(proto: onnx.TypeProto, label: str) -> TensorType | None:
    if proto.WhichOneof("value") != "tensor_type" or not proto.tensor_type.HasField("shape"):
        return None
    dims = []
    for dim in proto.tensor_type.shape.dim:
        if dim.WhichOneof("value") != "dim_value":
            return None
        dims.append(int(dim.dim_value))
    elem = int(proto.tensor_type.elem_type)
    checked_count(tuple(dims), element_bits(elem, label), label)
    return TensorType(elem, tuple(dims))


def is_onnx_view(node: onnx.NodeProto) -> bool:
    """Whether a node only renames its first input's bytes (it needs no memory of its own)."""
    return is_view(node.op_type)
