"""What of a model cannot be compiled: all of it at once, and the part that is left computes what it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from cli.conftest import ingot as ingot_cli
from cli.models import save, value
from frontend.tiny_models import Op, Tensor, tflite_of
from ingot.diagnosis import diagnose
from ingot.driver import diagnose_model
from ingot.errors import IngotError, ModelError, UnsupportedError
from ingot.frontend import import_model, survey_model
from ingot.frontend.survey import Links, part_without
from ingot.packager.source_part import write_part

command = ingot_cli


def graph(path: Path, nodes: list[onnx.NodeProto], outputs: dict[str, object], opset: int = 17) -> Path:
    """x [N, 3, 8, 8], k [1] and the weights w -> the outputs, of any shapes."""
    weights = {"w": np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)}
    inputs = [value("x", ["N", 3, 8, 8]), value("k", [1], TensorProto.INT64)]
    save(path, nodes, inputs, [value(name, shape) for name, shape in outputs.items()], weights)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, path)
    return path


GOOD = [
    helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["c"], ["r"]),
    helper.make_node("GlobalAveragePool", ["r"], ["p"]),
    helper.make_node("Add", ["p", "p"], ["y"]),
]
BAD = [
    helper.make_node("Frobnicate", ["r"], ["f"], domain="acme", name="frob"),
    helper.make_node("Add", ["f", "f"], ["f2"]),
    helper.make_node("Loop", ["k", "", "p"], ["l"], name="loop", body=helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["s", "s"], ["s2"])], "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("s", None)],
        [value("on", [], TensorProto.BOOL), value("s2", None)],
    )),
    helper.make_node("Sub", ["l", "f2"], ["z"]),
]  # fmt: skip


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    nodes = [*GOOD[:2], *BAD[:2], *GOOD[2:], *BAD[2:]]
    return graph(tmp_path / "broken.onnx", nodes, {"f2": None, "y": ["N", 8, 1, 1], "z": None})


def test_every_node_that_fails_is_listed_and_the_rest_counted(broken: Path) -> None:
    found = diagnose_model(broken)
    assert [failure.label for failure in found.failures] == ["acme:Frobnicate 'frob'", "Loop 'loop'"]
    assert "not supported" in found.failures[0].reason
    assert "register_op" in found.failures[0].hint
    assert "trip count" in found.failures[1].reason
    assert (found.nodes, found.behind) == (8, 2)
    (model,) = found.models
    assert [spec.name for spec in model.inputs] == ["x"], "nothing that is left reads k"
    assert model.cut is not None
    assert model.cut.outputs == ("y", "r", "p")
    assert model.cut.opened == ("r", "p")


def test_the_command_lists_them_and_says_what_is_left(broken: Path, command, tmp_path: Path) -> None:
    checked = command("check", broken)
    assert checked.exit_code == 2
    for words in ("2 nodes cannot be", "acme:Frobnicate 'frob': the operator is not supported", "do: ", "y, r, p"):
        assert words in checked.stdout
    path = tmp_path / "part.so"
    done = command("compile", broken, "-o", path, "--keep-going")
    assert done.exit_code == 1, "a part is not the whole"
    for words in ("4 of its 8 nodes", "cut at Loop 'loop'", "inside the whole model: r, p"):
        assert words in done.stdout
    verified = command("verify", path, broken)
    assert verified.exit_code == 0, verified.output
    assert "cut at     acme:Frobnicate" in command("inspect", path).stdout


def test_the_part_computes_what_onnxruntime_computes(broken: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    whole = graph(tmp_path / "good.onnx", GOOD, {"y": None, "r": None, "p": None})
    artifact = ingot.compile(broken, keep_going=True)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    names = ["y", "r", "p"]
    judge = onnxruntime.InferenceSession(str(whole), providers=["CPUExecutionProvider"])
    with ingot.load(artifact.save(tmp_path / "part.so")) as model:
        assert model.selftest() < 1e-4
        found = model.run({"x": x})
    for name, wanted in zip(names, judge.run(names, {"x": x, "k": np.ones(1, np.int64)}), strict=True):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)
    cut = artifact.metadata["cut"]
    assert cut["opened"] == ["r", "p"]
    assert [entry["node"] for entry in cut["failed"]] == ["acme:Frobnicate 'frob'", "Loop 'loop'"]


def test_a_whole_model_is_not_cut(tmp_path: Path, command) -> None:
    path = graph(tmp_path / "good.onnx", GOOD, {"y": None})
    plain, going = (ingot.compile(path, keep_going=going, selftest=False) for going in (False, True))
    assert plain.metadata["cut"] is None
    assert plain.library == going.library
    assert diagnose_model(path).failures == ()
    assert command("check", path).exit_code == 0


def test_what_only_a_later_step_finds_belongs_to_its_node(tmp_path: Path) -> None:
    """An operator of the user's that imports well, but has no loops that could be compiled."""
    nodes = [*GOOD[:2], helper.make_node("Sorted", ["r"], ["s"], domain="acme", name="sort"), *GOOD[2:]]
    nodes.append(helper.make_node("Add", ["s", "p"], ["z"]))
    path = graph(tmp_path / "late.onnx", nodes, {"y": None, "z": None})

    def convert(node):
        from tvm import relax

        return relax.op.sort(node.inputs[0])

    ingot.register_op("Sorted", domain="acme", infer=lambda node: [(node.shapes[0], node.dtypes[0])], convert=convert)
    try:
        assert survey_model(path).failures == {}
        with pytest.raises(Exception):  # noqa: B017 - whatever the compiler says of such loops
            ingot.compile(path, selftest=False)
        found = diagnose_model(path)
        (failure,) = found.failures
        assert failure.label == "acme:Sorted 'sort'"
        assert "report it" in failure.hint
        assert found.models[0].cut is not None
        assert found.models[0].cut.outputs == ("y", "r", "p")
    finally:
        from ingot.frontend.custom import unregister_op

        unregister_op("Sorted", domain="acme")


def test_a_build_that_fails_on_one_node_is_bisected_to_it(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["t0"])]
    nodes += [helper.make_node("Abs", [f"t{i}"], [f"t{i + 1}"], name=f"n{i + 1}") for i in range(20)]
    path = graph(tmp_path / "chain.onnx", nodes, {"t20": None})
    built = []

    def build(imported):
        built.append(len(imported.module["main"].body.blocks[0].bindings))
        if built[-1] > 13:
            raise RuntimeError("too long")

    found = diagnose(path, [{}], None, None, build)
    assert [failure.label for failure in found.failures] == ["Abs 'n12'"]
    assert "too long" in found.failures[0].reason
    assert len(built) <= 8, "a search by halves"


def test_nothing_left_and_errors_of_no_node(tmp_path: Path, command) -> None:
    path = graph(tmp_path / "bad.onnx", [helper.make_node("Frobnicate", ["x"], ["y"], domain="acme")], {"y": None})
    found = diagnose_model(path)
    assert (len(found.failures), found.models) == (1, ())
    assert command("check", path).exit_code == 2
    with pytest.raises(UnsupportedError, match="nothing of the model"):
        ingot.compile(path, keep_going=True)
    good = graph(tmp_path / "good.onnx", GOOD, {"y": None})
    with pytest.raises(IngotError, match="does not have"):
        diagnose_model(good, shape={"q": (1,)})
    (tmp_path / "none.onnx").write_bytes(b"\0" * 40)
    with pytest.raises(ModelError):
        diagnose_model(tmp_path / "none.onnx")


def test_a_tflite_model_is_cut_too(tmp_path: Path) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    random = np.random.default_rng(2)
    tensors = [
        Tensor("x", (2, 5)), Tensor("w", (4, 5), data=random.standard_normal((4, 5)).astype(np.float32)),
        Tensor("d", (2, 4)), Tensor("s", (2, 4)), Tensor("a", (2, 4)), Tensor("y", (2, 4)), Tensor("z", (2, 4)),
    ]  # fmt: skip
    ops = [
        Op("FULLY_CONNECTED", (0, 1), (2,), "FullyConnectedOptions", {"FusedActivationFunction": 1}),
        Op("CUSTOM", (2,), (3,), custom="Sparkle"),
        Op("ABS", (3,), (4,)),
        Op("NEG", (2,), (5,)),
        Op("RANDOM_UNIFORM", (4,), (6,)),
    ]
    path = tmp_path / "net.tflite"
    path.write_bytes(tflite_of(tensors, ops, [0], [5, 6]))
    found = diagnose_model(path)
    assert [failure.number for failure in found.failures] == [1, 4]
    assert "Sparkle" in found.failures[0].reason
    artifact = ingot.compile(path, keep_going=True)
    assert artifact.metadata["cut"]["outputs"] == ["y", "d"]
    x = random.standard_normal((2, 5)).astype(np.float32)
    write_part(path, ["y", "d"], ["x"], tmp_path / "part.tflite")
    net = interpreter.Interpreter(model_path=str(tmp_path / "part.tflite"))
    net.allocate_tensors()
    net.set_tensor(net.get_input_details()[0]["index"], x)
    net.invoke()
    with ingot.load(artifact.save(tmp_path / "part.so")) as model:
        assert model.selftest() < 1e-5
        outputs = model.run({"x": x})
    for slot in net.get_output_details():
        np.testing.assert_allclose(outputs[slot["name"]], net.get_tensor(slot["index"]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="no such tensors"):
        write_part(path, ["q"], ["x"], tmp_path / "none.tflite")


def test_the_largest_part_of_a_graph() -> None:
    links = [Links(frozenset("x"), ("a",)), Links(frozenset("ab"), ("c",)), Links(frozenset(), ("b",))]
    part = part_without(links, [1], ["x"], ["c"])
    assert (part.kept, part.outputs, part.opened) == ((0, 2), ("a",), ("a",)), "constants are no outputs"
    with pytest.raises(UnsupportedError, match="nothing of the model"):
        part_without(links, [0, 1, 2], ["x"], ["c"])


def test_buckets_are_cut_at_the_same_nodes(tmp_path: Path) -> None:
    path = graph(tmp_path / "two.onnx", [*GOOD[:2], BAD[0]], {"f": None})
    artifact = ingot.compile(path, keep_going=True, shape={"x": ([1, 2], 3, 8, 8)}, selftest=False)
    assert [t["name"] for t in artifact.metadata["outputs"]] == ["r"]
    with ingot.load(artifact.save(tmp_path / "two.so")) as model:
        assert model(np.zeros((1, 3, 8, 8), np.float32), np.ones(1, np.int64)).shape == (1, 8, 8, 8)


def test_without_gives_an_import_of_the_part(broken: Path) -> None:
    with pytest.raises(UnsupportedError):
        import_model(broken)
    assert [spec.name for spec in import_model(broken, without=[2, 6]).outputs] == ["y", "r", "p"]
