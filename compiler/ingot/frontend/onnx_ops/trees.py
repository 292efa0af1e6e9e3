"""Tree ensembles of ai.onnx.ml: one kernel that walks eight trees at a time over flat arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.loops import call_loops
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.scores import DOMAIN, choose, choose_by, joined, labels, post_transform, transformed
from ingot.frontend.onnx_tensors import tensor_array
from ingot.frontend.trees import MODES, Forest, ForestBuilder
from ingot.frontend.tvm_types import Expr

# Trees that are walked in lockstep: each step waits for a load, and eight of them wait together.
_LANES = 8


def _rows(node: OpNode) -> int:
    return node.shapes[0][0] if len(node.shapes[0]) > 1 else 1


def _numbers(ctx: Context, name: str) -> np.ndarray:
    """An attribute that is floats, or a tensor under `name`_as_tensor."""
    tensor = ctx.attr(f"{name}_as_tensor")
    if tensor is not None:
        return tensor_array(tensor, ctx.label).reshape(-1)
    return np.array(ctx.attr(name, ()), dtype=np.float32)


def _same_length(ctx: Context, lists: dict[str, Any]) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ctx.unsupported(f"lists of different lengths: {lengths}", "one entry for each node")


def _listed(ctx: Context, builder: ForestBuilder, prefix: str, targets: int) -> Forest:
    """The forest of the operators that name each node by its tree and its number in it."""
    names = ("treeids", "nodeids", "featureids", "modes", "truenodeids", "falsenodeids")
    lists: dict[str, Any] = {name: list(ctx.attr(f"nodes_{name}", ())) for name in names}
    lists["values"] = _numbers(ctx, "nodes_values")
    _same_length(ctx, lists)
    missing = list(ctx.attr("nodes_missing_value_tracks_true", ())) or [0] * len(lists["treeids"])
    place = {key: number for number, key in enumerate(zip(lists["treeids"], lists["nodeids"], strict=True))}
    builder.reserve(len(lists["treeids"]))
    pointed = set[int]()
    for number, (tree, _) in enumerate(zip(lists["treeids"], lists["nodeids"], strict=True)):
        mode = lists["modes"][number]
        mode = mode.decode("utf-8", "replace") if isinstance(mode, bytes) else mode
        if mode == "LEAF":
            continue
        keys = [(tree, lists[f"{side}nodeids"][number]) for side in ("true", "false")]
        if any(key not in place for key in keys):
            raise ctx.unsupported(f"a branch to {keys}, which is not there", "nodes of the same tree")
        branches = (place[keys[0]], place[keys[1]])
        pointed.update(branches)
        value = (float(lists["values"][number]),)
        builder.split(number, mode, lists["featureids"][number], value, branches, bool(missing[number]))
    first: dict[int, int] = {}
    for (tree, _), number in place.items():
        if number not in pointed:
            first.setdefault(tree, number)
    ends = {name: list(ctx.attr(f"{prefix}_{name}", ())) for name in ("treeids", "nodeids", "ids")}
    weights = _numbers(ctx, f"{prefix}_weights")
    _same_length(ctx, {**ends, "weights": weights})
    leaves = []
    for tree, node, target, weight in zip(*ends.values(), weights, strict=True):
        if (tree, node) not in place:
            raise ctx.unsupported(f"a weight of node {node} of tree {tree}, which is not there", "nodes of the trees")
        leaves.append((place[(tree, node)], target, float(weight)))
    return builder.finish(list(first.values()), leaves, targets)


def _numbered(ctx: Context, builder: ForestBuilder, targets: int) -> Forest:
    """The forest of TreeEnsemble, whose branches are numbers of nodes or of leaves."""
    names = ("featureids", "truenodeids", "falsenodeids", "trueleafs", "falseleafs")
    lists: dict[str, Any] = {name: list(ctx.attr(f"nodes_{name}", ())) for name in names}
    for name in ("modes", "splits"):
        lists[name] = tensor_array(ctx.attr(f"nodes_{name}"), ctx.label).reshape(-1)
    _same_length(ctx, lists)
    count, leaf_targets = len(lists["featureids"]), list(ctx.attr("leaf_targetids", ()))
    leaf_weights = tensor_array(ctx.attr("leaf_weights"), ctx.label).reshape(-1)
    _same_length(ctx, {"leaf_targetids": leaf_targets, "leaf_weights": leaf_weights})
    missing = list(ctx.attr("nodes_missing_value_tracks_true", ())) or [0] * count
    members = ctx.attr("membership_values")
    groups = _groups(tensor_array(members, ctx.label)) if members is not None else []
    builder.reserve(count + len(leaf_targets))
    for number in range(count):
        branches = []
        for side in ("true", "false"):
            target, is_leaf = lists[f"{side}nodeids"][number], bool(lists[f"{side}leafs"][number])
            if not 0 <= target < (len(leaf_targets) if is_leaf else count):
                raise ctx.unsupported(f"a branch to {target}, which is not there", "nodes and leaves of the ensemble")
            branches.append(target + count if is_leaf else target)
        code = int(lists["modes"][number])
        mode = MODES[code] if code < len(MODES) else str(code)
        values: tuple[float, ...] = (float(lists["splits"][number]),)
        if mode == "BRANCH_MEMBER":
            if not groups or not groups[0]:
                raise ctx.unsupported("a BRANCH_MEMBER without values", "membership_values for each")
            values = groups.pop(0)
        builder.split(
            number, mode, lists["featureids"][number], values, (branches[0], branches[1]), bool(missing[number])
        )
    leaves = [(count + i, leaf_targets[i], float(leaf_weights[i])) for i in range(len(leaf_targets))]
    roots = list(ctx.attr("tree_roots", ()))
    if any(not 0 <= root < max(count, 1) for root in roots):
        raise ctx.unsupported(f"roots {roots}", f"0 to {count - 1}")
    return builder.finish(roots, leaves, targets)


def _groups(values: np.ndarray) -> list[tuple[float, ...]]:
    """The sets of numbers that NaN separates."""
    cuts = np.flatnonzero(np.isnan(values))
    return [tuple(float(x) for x in part if not np.isnan(x)) for part in np.split(values.reshape(-1), cuts + 1)]


def _builder(ctx: Context) -> tuple[ForestBuilder, Expr, str]:
    """A builder for the node, and its input as floats [rows, features]."""
    from tvm import relax

    shape, dtype = ctx.shape(), "float64" if ctx.dtype() == "float64" else "float32"
    x = ctx.inputs[0] if ctx.dtype() == dtype else ctx.emit(relax.op.astype(ctx.inputs[0], dtype))
    if len(shape) != 2:
        x = ctx.emit(relax.op.reshape(x, (1, shape[-1])))
    return ForestBuilder(ctx.label, shape[-1], dtype), x, dtype


def walk(ctx: Context, x: Expr, forest: Forest, targets: int, aggregate: str, base: np.ndarray) -> Expr:
    """Each row's sum (or least, largest, mean) of the weights of the leaves it reaches, plus `base`: [rows, targets].

    The kernel's indices come from the forest alone, which is checked where it is built.
    """
    from tvm import relax, tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    rows, dtype = int(x.ty.shape[0]), str(forest.weights.dtype)
    if aggregate in ("MIN", "MAX") and not forest.whole:
        raise ctx.unsupported(f"{aggregate} where leaves have weights for some of the targets", "SUM or AVERAGE")
    start = {"MIN": np.inf, "MAX": -np.inf}.get(aggregate, 0.0)
    combine = {"MIN": tirx.min, "MAX": tirx.max}.get(aggregate, lambda a, b: a + b)
    trees = len(forest.roots)
    groups = -(-trees // _LANES)
    # What fills the last group repeats its last tree, and does not count in a sum.
    roots = np.concatenate([forest.roots, np.repeat(forest.roots[-1:], groups * _LANES - trees)])
    depths = np.concatenate([forest.depths, np.zeros(groups * _LANES - trees, np.int32)]).reshape(groups, _LANES)
    branches = np.stack([forest.no, forest.yes], axis=1)
    arrays = [
        ctx.array("features", forest.feature),
        ctx.array("thresholds", forest.threshold),
        ctx.array("branches", branches),
        ctx.array("roots", roots.astype(np.int32)),
        ctx.array("depths", depths.max(axis=1).astype(np.int32)),
        ctx.array("weights", forest.weights),
        *([ctx.array("targets", forest.targets)] if forest.targets is not None and targets > 1 else []),
        *([ctx.array("nan_yes", forest.nan_yes)] if forest.nan_yes.any() else []),
    ]
    dense, several, nan_yes = forest.targets is None, targets > 1, bool(forest.nan_yes.any())

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        values, feature, threshold, branch, root, depth, weight, *more = ins
        (out,) = outs
        lane = T.buffer_proxy(T.alloc_buffer([_LANES], "int32", scope="global"))

        def add(n: Any, node: Any) -> None:  # noqa: ANN401
            at = T.Cast("int64", node)
            if dense:
                with T.serial(0, targets) as j:
                    out[n, j] = combine(out[n, j], weight[at, j])
                return
            j = T.Cast("int64", more[0][at]) if several else tirx.const(0, "int64")
            out[n, j] = combine(out[n, j], weight[at])

        with T.grid(rows, targets) as (n, j):
            out[n, j] = tirx.const(start, dtype)
        # All rows through eight trees, then the next eight: a few trees fit the first-level cache, a forest does not.
        with T.grid(groups, rows) as (g, n):
            with T.unroll(0, _LANES) as k:
                lane[k] = root[g * _LANES + k]
            with T.serial(0, T.Cast("int64", depth[g])), T.unroll(0, _LANES) as k:
                node = T.Cast("int64", lane[k])
                value = values[n, T.Cast("int64", feature[node])]
                taken = value <= threshold[node]
                if nan_yes:
                    taken = tirx.Or(taken, tirx.And(tirx.isnan(value), more[-1][node]))
                lane[k] = branch[node, T.Cast("int64", taken)]
            with T.serial(0, _LANES) as k, T.If(g * _LANES + k < trees), T.Then():
                add(n, lane[k])

    result = call_loops(ctx.bb, "trees", [x, *arrays], [((rows, targets), dtype)], body)[0]
    if aggregate == "AVERAGE":
        result = ctx.emit(relax.op.divide(result, ctx.const(trees, dtype)))
    if base.size and np.any(base):
        result = ctx.emit(relax.op.add(result, ctx.array("base", base.astype(dtype))))
    return result


@converts(
    "TreeEnsembleRegressor",
    domain=DOMAIN,
    types=lambda node: [((_rows(node), int(node.attributes.get("n_targets", 1))), "float32")],
)
def _regressor(ctx: Context) -> Expr:
    from tvm import relax

    targets = int(ctx.attr("n_targets", 1))
    builder, x, dtype = _builder(ctx)
    forest, base = _listed(ctx, builder, "target", targets), _numbers(ctx, "base_values")
    if base.size not in (0, targets):
        raise ctx.unsupported(f"{base.size} base_values", f"one for each of {targets} targets")
    scores = walk(ctx, x, forest, targets, ctx.attr("aggregate_function", "SUM"), base)
    return relax.op.astype(_of_targets(ctx, scores, targets, dtype), "float32")


def _of_targets(ctx: Context, scores: Expr, targets: int, dtype: str) -> Expr:
    """Scores after post_transform. As ONNX Runtime, a single target is only ever transformed by PROBIT."""
    name = post_transform(ctx)
    if targets == 1 and name in ("SOFTMAX", "SOFTMAX_ZERO", "LOGISTIC"):
        raise ctx.unsupported(f"post_transform {name} of one target", "NONE or PROBIT", "apply it behind the model")
    return transformed(ctx, scores, name, dtype)


@converts("TreeEnsemble", domain=DOMAIN)
def _ensemble(ctx: Context) -> Expr:
    from tvm import relax

    targets = int(ctx.attr("n_targets", 1))
    builder, x, dtype = _builder(ctx)
    forest = _numbered(ctx, builder, targets)
    names = ("AVERAGE", "SUM", "MIN", "MAX")
    code = int(ctx.attr("aggregate_function", 1))
    if not 0 <= code < len(names):
        raise ctx.unsupported(f"aggregate_function {code}", "0 to 3")
    scores = walk(ctx, x, forest, targets, names[code], np.zeros(0))
    return relax.op.astype(_of_targets(ctx, scores, targets, dtype), ctx.out_dtype())


def _class_types(node: OpNode) -> Shapes:
    names = node.attributes.get("classlabels_int64s") or node.attributes.get("classlabels_strings") or ()
    rows = _rows(node)
    return [((rows,), "int64"), ((rows, max(len(names), 1)), "float32")]


@converts("TreeEnsembleClassifier", domain=DOMAIN, types=_class_types)
def _classifier(ctx: Context) -> list[Expr]:
    """Two classes may have one score: its sign or, if all weights are probabilities, its half decides."""
    from tvm import relax

    names = labels(ctx, "classlabels_int64s", "classlabels_strings")
    builder, x, dtype = _builder(ctx)
    classes = len(names)
    if classes < 2:
        raise ctx.unsupported(f"{classes} classes", "two or more")
    forest, base = _listed(ctx, builder, "class", classes), _numbers(ctx, "base_values")
    name, ids = post_transform(ctx), set(ctx.attr("class_ids", ()))
    single = classes == 2 and ids == {0}
    if classes == 2 and ids == {1}:
        raise ctx.unsupported("weights of the second of two classes alone", "weights of the first, or of both")
    if single and name == "PROBIT":
        raise ctx.unsupported("PROBIT of one score for two classes", "NONE, LOGISTIC or SOFTMAX")
    if base.size not in ((0, 1) if single else (0, classes)):
        raise ctx.unsupported(f"{base.size} base_values", "none, or one for each score")
    weights = _numbers(ctx, "class_weights")
    if classes > 2 and not forest.whole and forest.targets is None and weights.min(initial=0) < 0:
        raise ctx.unsupported("leaves with weights for some of the classes, and negative ones", "weights for all")
    scores = walk(ctx, x, forest, classes, "SUM", np.zeros(0) if single else base)
    if not single:
        return [choose(ctx, scores, names), relax.op.astype(transformed(ctx, scores, name, dtype), "float32")]
    score = ctx.emit(relax.op.strided_slice(scores, [1], [0], [1], [1]))
    if base.size:
        score = ctx.emit(relax.op.add(score, ctx.const(float(base[0]), dtype)))
    positive = bool(weights.min(initial=0) >= 0)
    label = choose_by(ctx, relax.op.greater(score, ctx.const(0.5 if positive else 0.0, dtype)), names)
    other = relax.op.negative(score)
    if positive and name != "LOGISTIC":
        other = relax.op.subtract(ctx.const(1, dtype), score)
    pair = joined(ctx, [other, score])
    if name == "LOGISTIC":
        pair = transformed(ctx, pair, name, dtype)
    return [label, relax.op.astype(pair, "float32")]
