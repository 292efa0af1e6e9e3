"""Importing ONNX: names, shapes, folding, weights, functions, and what is refused, each on a tiny model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import helper

from ingot.errors import CompilerError, ModelError, ShapeError, UnsupportedError
from ingot.frontend import Imported, import_model
from ingot.frontend.normal_form import check_normal_form

from .tiny_models import model_of, small_onnx

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]


def _operators(imported: Imported) -> list[str]:
    found = []
    for binding in imported.module["main"].body.blocks[0].bindings:
        operator = getattr(binding.value, "op", None)
        if operator is not None:
            found.append(operator.name.removeprefix("relax."))
    return found


def test_the_description_is_the_users(write: Write) -> None:
    path = write(small_onnx(), "My Net-2.onnx")
    imported = import_model(path)
    assert imported.name == "my_net_2" and imported.source_format == "onnx"
    assert imported.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(spec.name, spec.dtype, spec.shape) for spec in imported.inputs] == [("x", "float32", (1, 3, 8, 8))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in imported.outputs] == [("y", "float32", (1, 5))]
    assert len(imported.notices) == 1 and "'N'" in imported.notices[0]
    # conv and norm are live together: two tensors of 16 x 8 x 8 floats.
    assert imported.source_peak_bytes == 2 * 16 * 8 * 8 * 4


def test_values_agree_with_the_reference(write: Write, run_imported: Build) -> None:
    model = small_onnx()
    imported = import_model(write(model), {"x": (2, 3, 8, 8)})
    check_normal_form(imported)
    assert imported.notices == ()
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    wanted = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(run_imported(imported)(x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_clip_and_batch_norm_are_plain_operators(write: Write) -> None:
    operators = _operators(import_model(write(small_onnx())))
    assert operators == ["nn.conv2d", "add", "multiply", "add", "clip", "mean", "reshape", "matmul", "add"]


def test_large_weights_are_views_of_the_file_and_shared(write: Write) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["t"]),
        helper.make_node("MatMul", ["t", "b"], ["y"]),
    ]
    imported = import_model(
        write(model_of(nodes, {"x": ("float32", (4, 32))}, ["y"], {"a": weight, "b": weight.copy()}))
    )
    assert list(imported.weights) == ["a"]
    assert imported.weights["a"].base is not None and not imported.weights["a"].flags.writeable
    np.testing.assert_array_equal(imported.weights["a"], weight)


def test_small_tensors_stay_constants(write: Write) -> None:
    for count, weights in ((64, 0), (65, 1)):
        nodes = [helper.make_node("Add", ["x", "c"], ["y"])]
        value = np.arange(count, dtype=np.float32)
        imported = import_model(write(model_of(nodes, {"x": ("float32", (count,))}, ["y"], {"c": value})))
        assert len(imported.weights) == weights


def test_shape_arithmetic_vanishes(write: Write, run_imported: Build) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
        helper.make_node("Concat", ["n1", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Range", ["zero", "n", "one"], ["range"]),
        helper.make_node("Cast", ["range"], ["numbers"], to=1),
        helper.make_node("Unsqueeze", ["numbers", "axis1"], ["column"]),
        helper.make_node("Add", ["flat", "column"], ["y"]),
    ]
    weights = {
        "zero": np.array(0), "one": np.array(1), "axis": np.array([0]), "axis1": np.array([1]), "minus": np.array([-1]),
    }  # fmt: skip
    model = model_of(nodes, {"x": ("float32", ("n", 2, 3))}, ["y"], weights)
    imported = import_model(write(model), {"x": (4, 2, 3)})
    assert _operators(imported) == ["reshape", "add"]
    x = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        run_imported(imported)(x)[0], x.reshape(4, 6) + np.arange(4, dtype=np.float32)[:, None]
    )


def test_a_constant_if_becomes_its_branch(write: Write, run_imported: Build) -> None:
    def branch(op: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info("t", 1, (2,))
        return helper.make_graph([helper.make_node(op, ["x", "x"], ["t"])], op, [], [value])

    for chosen, factor in ((True, 2), (False, 0)):
        nodes = [
            helper.make_node("If", ["c"], ["a"], then_branch=branch("Add"), else_branch=branch("Sub")),
            helper.make_node("If", ["c"], ["b"], then_branch=branch("Add"), else_branch=branch("Sub")),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ]
        imported = import_model(write(model_of(nodes, {"x": ("float32", (2,))}, ["y"], {"c": np.array(chosen)})))
        x = np.array([1, 2], np.float32)
        np.testing.assert_array_equal(run_imported(imported)(x)[0], 2 * factor * x)


def _if_on_data(branches: Sequence[tuple[str, str]]) -> onnx.ModelProto:
    value = helper.make_value_info("t", onnx.TypeProto())
    graphs = [helper.make_graph([helper.make_node(op, ["x", name], ["t"])], op, [], [value]) for op, name in branches]
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=graphs[0], else_branch=graphs[1])
    one = all(name == "x" for _, name in branches)
    inputs = {"x": ("float32", (2,)), "z": ("float32", (3, 1)), "c": ("bool", (1,))}
    model = model_of([node], inputs, ["y"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ("a",) if one else ("a", "b")))
    return model


def test_an_if_on_data_runs_both_branches_and_takes_one(write: Write, run_imported: Build) -> None:
    run = run_imported(import_model(write(_if_on_data([("Add", "x"), ("Mul", "x")]))))
    x, z = np.array([3, 5], np.float32), np.zeros((3, 1), np.float32)
    np.testing.assert_array_equal(run(x, z, np.array([True]))[0], x + x)
    np.testing.assert_array_equal(run(x, z, np.array([False]))[0], x * x)


def test_an_if_on_data_with_branches_of_two_shapes_is_refused_by_name(write: Write) -> None:
    with pytest.raises(UnsupportedError, match="'choice'"):
        import_model(write(_if_on_data([("Add", "x"), ("Mul", "z")])))


def test_functions_are_inlined(write: Write, run_imported: Build) -> None:
    twice = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    nodes = [helper.make_node("Twice", ["x"], ["y"], domain="mine")]
    model = model_of(nodes, {"x": ("float32", (2,))}, ["y"], functions=[twice], domains=["mine"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, (2,)))
    x = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(run_imported(import_model(write(model)))(x)[0], 2 * x)


def test_operators_with_a_body_are_expanded(write: Write, run_imported: Build) -> None:
    nodes = [helper.make_node("HannWindow", ["n"], ["w"]), helper.make_node("Mul", ["x", "w"], ["y"])]
    model = model_of(nodes, {"x": ("float32", (8,))}, ["y"], {"n": np.array(8)})
    found = run_imported(import_model(write(model)))(np.ones(8, np.float32))[0]
    np.testing.assert_allclose(found, 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(8) / 8), atol=1e-6)


def test_outputs_may_be_inputs_weights_or_repeated(write: Write, run_imported: Build) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Identity", ["w"], ["weight"]),
        helper.make_node("Neg", ["x"], ["y"]),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    weight = np.arange(100, dtype=np.float32)
    model = model_of(nodes, {"x": ("float32", (3,))}, ["same", "weight", "y", "z"], {"w": weight})
    imported = import_model(write(model))
    check_normal_form(imported)
    x = np.array([1, -2, 3], np.float32)
    for found, wanted in zip(run_imported(imported)(x), (x, weight, -x, -x), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("index", [-(2**40), -6, -5, -1, 0, 4, 5, 2**40])
@pytest.mark.parametrize("op", ["Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"])
def test_indices_never_reach_outside(write: Write, run_imported: Build, op: str, index: int) -> None:
    shape = (3, 1) if op.endswith("ND") else (3,)
    if op.startswith("Gather"):
        nodes, weights = [helper.make_node(op, ["x", "i"], ["y"])], {}
    else:
        nodes, weights = [helper.make_node(op, ["x", "i", "u"], ["y"])], {"u": np.full(3, 9, np.float32)}
    model = model_of(nodes, {"x": ("float32", (5,)), "i": ("int64", shape)}, ["y"], weights)
    x = np.arange(5, dtype=np.float32)
    found = run_imported(import_model(write(model)))(x, np.full(shape, index))[0]
    wanted = min(max(index + 5 if index < 0 else index, 0), 4)
    if op.startswith("Gather"):
        np.testing.assert_array_equal(found, np.full(3, x[wanted]))
    else:
        np.testing.assert_array_equal(found, np.where(np.arange(5) == wanted, 9, x))


def test_an_output_without_a_declared_shape_is_inferred(write: Write) -> None:
    model = small_onnx()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert import_model(write(model)).outputs[0].shape == (1, 5)


def test_external_data_is_mapped(tmp_path: Path, run_imported: Build) -> None:
    model = small_onnx()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    imported = import_model(path)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    wanted = onnx.reference.ReferenceEvaluator(small_onnx()).run(None, {"x": x})[0]
    np.testing.assert_allclose(run_imported(imported)(x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_all_unknown_operators_are_listed_with_their_nodes(write: Write) -> None:
    nodes = [
        helper.make_node("Crop", ["x"], ["a"], name="first"),
        helper.make_node("Crop", ["a"], ["b"]),
        helper.make_node("Magic", ["b"], ["c"], name="wand", domain="mine"),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    model = model_of(nodes, {"x": ("float32", (2,))}, ["y"], domains=["mine"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, (2,)))
    with pytest.raises(UnsupportedError) as caught:
        import_model(write(model))
    text = str(caught.value)
    for word in ("3 nodes", "Crop (first, #1 -> b)", "mine:Magic (wand)"):
        assert word in text
    assert "Relu" not in text


def test_an_operator_that_draws_random_numbers_says_what_to_do(write: Write) -> None:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["y"], name="noise")]
    with pytest.raises(UnsupportedError) as caught:
        import_model(write(model_of(nodes, {"x": ("float32", (2,))}, ["y"])))
    for words in ("RandomNormalLike, which makes random numbers (noise)", "an input of the model"):
        assert words in str(caught.value)


def test_a_shape_the_operators_refuse_names_the_node(write: Write) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    model = model_of(nodes, {"x": ("float32", ("n", "k"))}, ["y"], {"w": np.ones((3, 2), np.float32)})
    with pytest.raises(ModelError, match="'product'"):
        import_model(write(model), {"x": (2, 4)})
    with pytest.raises(ShapeError):
        import_model(write(model))


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        (lambda m: setattr(m, "ir_version", 99), UnsupportedError, "IR version"),
        (lambda m: setattr(m, "ir_version", 1), UnsupportedError, "IR version"),
        (lambda m: setattr(m.opset_import[0], "version", 999), UnsupportedError, "opset"),
        (lambda m: setattr(m.opset_import[0], "version", 6), UnsupportedError, "opset"),
        (lambda m: m.graph.node[0].input.__setitem__(1, "nobody"), ModelError, "nobody"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("strange", 1)), ModelError, "strange"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 8), UnsupportedError, "string"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 17), ModelError, "kernel"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -16), ModelError, "negative"),
        (lambda m: m.graph.initializer[0].dims.extend([2**62, 2**18]), ModelError, "too large"),
        (lambda m: m.graph.output[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 7), ModelError, "check"),
        (lambda m: m.graph.ClearField("output"), ModelError, "no outputs"),
    ],
)
def test_invalid_models_are_refused_by_name(write: Write, change: Callable[..., Any], kind: type, word: str) -> None:
    model = small_onnx()
    change(model)
    with pytest.raises(kind, match=word):
        import_model(write(model))


def test_normal_form_violations_are_named(write: Write) -> None:
    import dataclasses

    imported = import_model(write(small_onnx()))
    check_normal_form(imported)
    spec = imported.inputs[0]
    first, *rest = imported.weights.items()
    broken = {
        "rule 7": {"inputs": (dataclasses.replace(spec, shape=(2, 3, 8, 8)),)},
        "rule 1": {"weights": dict([*rest, first])},
        "rule 2": {"outputs": (*imported.outputs, imported.outputs[0])},
        "rule 4": {"weights": {**imported.weights, first[0]: first[1].astype(np.float16)}},
    }
    for rule, change in broken.items():
        with pytest.raises(CompilerError, match=rule):
            check_normal_form(dataclasses.replace(imported, **change))
