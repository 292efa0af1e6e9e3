"""Operators of ai.onnx.ml on numbers against ONNX Runtime: one graph for each family, one output for each case."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from ingot.errors import IngotError, ModelError, UnsupportedError
from ingot.frontend import import_model

_RNG = np.random.default_rng(11)
_ROWS, _FEATURES = 40, 5
X = _RNG.standard_normal((_ROWS, _FEATURES)).astype(np.float32)
WITH_NAN = np.where(_RNG.random(X.shape) < 0.2, np.float32(np.nan), X)
INPUTS: dict[str, np.ndarray] = {
    "x": X,
    "nan": WITH_NAN,
    "d": X.astype(np.float64),
    "i": _RNG.integers(-3, 4, (_ROWS, _FEATURES)),
    "small": _RNG.integers(0, 3, (_ROWS, _FEATURES)).astype(np.float32),
}
Case = tuple[str, tuple[str, ...], dict[str, Any], int]
MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


def random_trees(
    trees: int,
    depth: int,
    targets: int,
    prefix: str,
    modes: tuple[str, ...],
    dense: bool = False,
    missing: bool = False,
) -> dict[str, Any]:
    """Attributes of a tree ensemble in which a branch ends early now and then."""
    found: dict[str, Any] = {f"nodes_{name}": [] for name in _NODE}
    found |= {f"{prefix}_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}
    if not missing:
        del found["nodes_missing_value_tracks_true"]

    def grow(tree: int, number: list[int], level: int) -> int:
        own = number[0]
        number[0] += 1
        leaf = level == depth or (level > 0 and _RNG.random() < 0.15)
        row = len(found["nodes_treeids"])
        values = {
            "treeids": tree,
            "nodeids": own,
            "featureids": 0 if leaf else int(_RNG.integers(_FEATURES)),
            "modes": "LEAF" if leaf else str(_RNG.choice(modes)),
            "values": 0.0 if leaf else float(np.float32(_RNG.choice((0.0, 1.0, 2.0, _RNG.standard_normal())))),
            "truenodeids": 0,
            "falsenodeids": 0,
            "missing_value_tracks_true": int(_RNG.integers(2)),
        }
        for name, value in values.items():
            if f"nodes_{name}" in found:
                found[f"nodes_{name}"].append(value)
        if leaf:
            for target in range(targets) if dense else [tree % targets]:
                for name, value in (("treeids", tree), ("nodeids", own), ("ids", target)):
                    found[f"{prefix}_{name}"].append(value)
                found[f"{prefix}_weights"].append(float(_RNG.standard_normal()))
            return own
        found["nodes_truenodeids"][row] = grow(tree, number, level + 1)
        found["nodes_falsenodeids"][row] = grow(tree, number, level + 1)
        return own

    for tree in range(trees):
        grow(tree, [0], 0)
    return found


_NODE = (
    "treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids", "missing_value_tracks_true",
)  # fmt: skip


def _regressor(x: str, trees: int, targets: int = 1, modes: tuple[str, ...] = MODES, **more: Any) -> Case:
    options = {key: more.pop(key) for key in ("dense", "missing") if key in more}
    found = random_trees(trees, 4, targets, "target", modes, **options)
    return "TreeEnsembleRegressor", (x,), {**found, "n_targets": targets, **more}, 1


def _classifier(classes: int, one_score: bool = False, positive: bool = False, **more: Any) -> Case:
    found = random_trees(9, 3, 1 if one_score else classes, "class", MODES[:1], dense=not one_score)
    if positive:
        found["class_weights"] = [abs(weight) / 20 for weight in found["class_weights"]]
    names = [3 * number + 4 for number in range(classes)]
    return "TreeEnsembleClassifier", ("x",), {**found, "classlabels_int64s": names, **more}, 2


def _floats(*shape: int) -> list[float]:
    return [float(value) for value in _RNG.standard_normal(int(np.prod(shape))).astype(np.float32)]


def _svm(kind: str, **more: Any) -> Case:
    attributes = {
        "kernel_type": kind,
        "kernel_params": [0.3, 0.1, 3.0],
        "support_vectors": _floats(7, _FEATURES),
        "n_supports": 7,
        "coefficients": _floats(7),
        "rho": [0.2],
    }
    return "SVMRegressor", ("x",), {**attributes, **more}, 1


def _svm_classifier(counts: list[int], kind: str = "RBF", probable: bool = False, **more: Any) -> Case:
    classes, total = len(counts), sum(counts)
    pairs = classes * (classes - 1) // 2
    attributes = {
        "kernel_type": kind,
        "kernel_params": [0.3, 0.1, 2.0],
        "support_vectors": _floats(total, _FEATURES),
        "vectors_per_class": counts,
        "coefficients": _floats(classes - 1, total),
        "rho": [value / 10 for value in _floats(pairs)],
        "classlabels_ints": [5, 9, -4, 2][:classes],
    }
    if probable:
        attributes |= {"prob_a": [-1 - abs(value) for value in _floats(pairs)], "prob_b": _floats(pairs)}
    return "SVMClassifier", ("x",), {**attributes, **more}, 2


FAMILIES: dict[str, list[Case]] = {
    "features": [
        ("Scaler", ("x",), {"offset": _floats(_FEATURES), "scale": _floats(_FEATURES)}, 1),
        ("Scaler", ("i",), {"offset": [1.0], "scale": [0.5]}, 1),
        ("Normalizer", ("x",), {"norm": "MAX"}, 1),
        ("Normalizer", ("small",), {"norm": "L1"}, 1),
        ("Normalizer", ("i",), {"norm": "L2"}, 1),
        ("Imputer", ("nan",), {"imputed_value_floats": _floats(_FEATURES), "replaced_value_float": float("nan")}, 1),
        ("Imputer", ("i",), {"imputed_value_int64s": [9], "replaced_value_int64": 2}, 1),
        ("Binarizer", ("x",), {"threshold": 0.25}, 1),
        ("OneHotEncoder", ("i",), {"cats_int64s": [0, 2, -1]}, 1),
        ("OneHotEncoder", ("small",), {"cats_int64s": [0, 2]}, 1),
        ("LabelEncoder", ("i",), {"keys_int64s": [0, 2, -3], "values_floats": [0.5, 1.5, -1.0]}, 1),
        ("LabelEncoder", ("small",), {"keys_floats": [0.0, 2.0], "values_int64s": [7, 8], "default_int64": 5}, 1),
        ("FeatureVectorizer", ("x", "small"), {"inputdimensions": [_FEATURES, _FEATURES]}, 1),
        ("ArrayFeatureExtractor", ("x", "#places"), {}, 1),
    ],
    "linear": [
        ("LinearRegressor", ("x",), {"coefficients": _floats(_FEATURES), "intercepts": [0.5]}, 1),
        (
            "LinearRegressor",
            ("x",),
            {
                "coefficients": _floats(2, _FEATURES),
                "intercepts": _floats(2),
                "targets": 2,
                "post_transform": "SOFTMAX",
            },
            1,
        ),
        *(
            (
                "LinearClassifier",
                ("x",),
                {
                    "coefficients": _floats(scores, _FEATURES),
                    "intercepts": _floats(scores),
                    "classlabels_ints": [4, 9, -2][:classes],
                    "post_transform": name,
                },
                2,
            )
            for classes, scores in ((2, 1), (2, 2), (3, 3))
            for name in ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO")
        ),
    ],
    "vectors": [
        *(_svm(kind) for kind in ("LINEAR", "RBF", "POLY", "SIGMOID")),
        _svm("RBF", one_class=1),
        (
            "SVMRegressor",
            ("x",),
            {
                "coefficients": _floats(_FEATURES),
                "rho": [0.3],
                "n_supports": 0,
                "kernel_type": "LINEAR",
                "kernel_params": [0.0, 0.0, 0.0],
            },
            1,
        ),
        *(_svm_classifier([4, 3], post_transform=name) for name in ("NONE", "LOGISTIC")),
        _svm_classifier([4, 3], "POLY", probable=True),
        *(_svm_classifier([2, 3, 1, 4], post_transform=name) for name in ("NONE", "SOFTMAX")),
        _svm_classifier([2, 3, 1, 4], "LINEAR", probable=True),
        _svm_classifier([3, 2, 2], probable=True),
        (
            "SVMClassifier",
            ("x",),
            {
                "coefficients": _floats(3, _FEATURES),
                "rho": [0.3],
                "kernel_type": "LINEAR",
                "kernel_params": [0.0, 0.0, 0.0],
                "classlabels_ints": [3, 1, 2],
            },
            2,
        ),
    ],
    "trees": [
        _regressor("x", 12, modes=MODES[:1]),
        _regressor("small", 11, modes=MODES[1:]),
        _regressor("nan", 10, missing=True),
        _regressor("small", 9, 3, base_values=_floats(3)),
        _regressor("nan", 8, 3, missing=True, dense=True, post_transform="SOFTMAX"),
        _regressor("d", 7),
        *(_regressor("small", 17, aggregate_function=name) for name in ("AVERAGE", "MIN", "MAX")),
        _regressor("x", 5, 2, dense=True, aggregate_function="MIN"),
        *(_classifier(2, True, positive) for positive in (False, True)),
        *(_classifier(2, True, positive, post_transform="LOGISTIC") for positive in (False, True)),
        _classifier(2, True, base_values=[0.4], post_transform="LOGISTIC"),
        *(_classifier(3, post_transform=name) for name in ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO")),
        _classifier(4, base_values=_floats(4), positive=True),
    ],
}


def _model(cases: list[Case], ml_opset: int = 3) -> onnx.ModelProto:
    """Regressors' outputs are floats; a classifier has a label and scores."""
    nodes, outputs, used = [], [], set()
    for number, (op, inputs, attributes, count) in enumerate(cases):
        made = [f"{op}_{number}_{index}" for index in range(count)]
        nodes.append(helper.make_node(op, [n.strip("#") for n in inputs], made, domain="ai.onnx.ml", **attributes))
        used.update(inputs)
        for index, name in enumerate(made):
            elem = 7 if count == 2 and index == 0 else 1
            if op in ("Imputer", "Binarizer") and inputs[0] == "i":
                elem = 7
            if op == "LabelEncoder" and "values_int64s" in attributes:
                elem = 7
            outputs.append(helper.make_tensor_value_info(name, elem, None))
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in INPUTS.items()
        if name in used
    ]
    places = onnx.numpy_helper.from_array(np.array([3, 0, 3]), "places")
    graph = helper.make_graph(nodes, "test", declared, outputs, [places] if "#places" in used else [])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", ml_opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _agree(model: onnx.ModelProto, tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    imported = import_model(path)
    feeds = {spec.name: INPUTS[spec.name] for spec in imported.inputs}
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for spec, left, right in zip(
        imported.outputs, run_imported(imported)(*feeds.values()), session.run(None, feeds), strict=True
    ):
        assert left.dtype == right.dtype and left.shape == right.shape, spec.name
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5, err_msg=spec.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_onnx_runtime(family: str, tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    _agree(_model(FAMILIES[family]), tmp_path, run_imported)


def test_the_newer_tree_ensemble(tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    def tensor(name: str, values: Any, dtype: str = "float32") -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.array(values, dtype), name)

    #  0: small[1] in {0, 2}? 1 : leaf 0.  1: small[0] <= 1? leaf 1 : leaf 2.  2: small[2] == 1? leaf 3 : leaf 0.
    attributes = {
        "nodes_featureids": [1, 0, 2],
        "nodes_modes": tensor("modes", [6, 0, 4], "uint8"),
        "nodes_splits": tensor("splits", [0, 1, 1]),
        "nodes_truenodeids": [1, 1, 3],
        "nodes_trueleafs": [0, 1, 1],
        "nodes_falsenodeids": [0, 2, 0],
        "nodes_falseleafs": [1, 1, 1],
        "membership_values": tensor("members", [0, 2, np.nan]),
        "leaf_targetids": [0, 1, 0, 1],
        "leaf_weights": tensor("weights", [0.5, -1.5, 2.25, 4.0]),
        "tree_roots": [0, 2],
        "n_targets": 2,
    }
    model = _model([("TreeEnsemble", ("small",), {**attributes, "aggregate_function": 1}, 1)], ml_opset=5)
    del model.opset_import[0]  # as onnx's own cases, which import no other operators
    _agree(model, tmp_path, run_imported)


def test_two_classes_with_a_score_each_take_the_larger(tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    # ONNX Runtime's label is 1 wherever the second score is positive, and not one of the class labels: the
    # specification's "top class" judges.
    case = _classifier(2)
    model = _model([case])
    onnx.save(model, tmp_path / "model.onnx")
    label, scores = run_imported(import_model(tmp_path / "model.onnx"))(X)
    session = onnxruntime.InferenceSession((tmp_path / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(scores, session.run(None, {"x": X})[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(label, np.array([4, 7])[scores.argmax(1)])


def _changed(case: Case, **attributes: Any) -> Case:
    return case[0], case[1], {**case[2], **attributes}, case[3]


_ONE = _regressor("x", 1)
_PAIR = {name: [0, 0] for name in ("nodes_treeids", "nodes_featureids", "nodes_falsenodeids")}


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        (_changed(_ONE, target_ids=[7] * len(_ONE[2]["target_ids"])), ModelError, "a target that is not there"),
        (_changed(_ONE, nodes_featureids=[9] * len(_ONE[2]["nodes_featureids"])), ModelError, "0 to 4"),
        (_changed(_ONE, nodes_values=[0.0]), UnsupportedError, "different lengths"),
        (
            _changed(
                _ONE,
                **_PAIR,
                nodes_nodeids=[0, 1],
                nodes_modes=["BRANCH_LEQ"] * 2,
                nodes_values=[0.0, 0.0],
                nodes_truenodeids=[1, 0],
                target_treeids=[0],
                target_nodeids=[0],
                target_ids=[0],
                target_weights=[1.0],
            ),
            ModelError,
            "no trees",
        ),
        (_changed(_ONE, post_transform="LOGISTIC"), UnsupportedError, "LOGISTIC of one target"),
        (
            (*_classifier(2, True)[:2], {**_classifier(2, True)[2], "classlabels_strings": ["a", "b"]}, 2),
            UnsupportedError,
            "text",
        ),
        (("ZipMap", ("x",), {"classlabels_int64s": [0, 1]}, 1), UnsupportedError, "without ZipMap"),
    ],
)
def test_forms_that_are_refused_say_so(case: Case, error: type[IngotError], words: str, tmp_path: Path) -> None:
    attributes = dict(case[2])
    if "classlabels_strings" in attributes:
        del attributes["classlabels_int64s"]
    model = _model([(case[0], case[1], attributes, case[3])])
    if "classlabels_strings" in attributes:
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(error, match=re.escape(words)):
        import_model(tmp_path / "model.onnx")
