"""TFLite's IF and WHILE: graphs that are written out compute what LiteRT computes; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flatbuffers import flexbuffers

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend import Imported, import_model
from passes.execute import Executable, compile_state

from .test_import_tflite import litert
from .tiny_models import Graph, Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]
RANDOM = np.random.default_rng(4)


def _scalar(name: str, value: float | bool | None, dtype: str = "int32") -> Tensor:
    return Tensor(name, (), dtype, None if value is None else np.array(value, dtype))


def _branch(operator: str, shape: tuple[int, ...] = (2, 3), **quantised: tuple[float | int, ...]) -> Graph:
    """x, w -> operator(x, w)."""
    dtype, options = "int8" if quantised else "float32", f"{operator.title()}Options" if "_" not in operator else ""
    tensors = [Tensor(name, shape, dtype, **quantised) for name in "xwy"]  # type: ignore[arg-type]
    return Graph(tensors, [Op(operator, (0, 1), (2,), options)], operator, (0, 1), (2,))


def _if(condition: Tensor, yes: Graph, no: Graph, *more: Graph) -> bytes:
    """One IF on (condition, x, w), which are inputs; the condition may be a constant."""
    x, w, y = yes.tensors[0], yes.tensors[1], yes.tensors[yes.outputs[0]]
    tensors = [condition, Tensor("a", x.shape, x.dtype, scale=x.scale, zero_point=x.zero_point)]
    tensors += [Tensor("b", w.shape, w.dtype, scale=w.scale, zero_point=w.zero_point)]
    tensors += [Tensor("c", y.shape, y.dtype, scale=y.scale, zero_point=y.zero_point)]
    op = Op("IF", (0, 1, 2), (3,), "IfOptions", {"ThenSubgraphIndex": 1, "ElseSubgraphIndex": 2})
    inputs = [1, 2] if condition.data is not None else [0, 1, 2]
    return tflite_of(tensors, [op], inputs, [3], (yes, no, *more))


@pytest.mark.parametrize("known", ["constant", "bound", "computed"])
@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_is_taken(write: Write, run_imported: Build, known: str, taken: bool) -> None:
    condition = _scalar("flag", taken if known == "constant" else None, "bool")
    path = write(_if(condition, _branch("ADD"), _branch("MUL")), "m.tflite")
    imported = import_model(path, bind={"flag": np.array(taken)} if known == "bound" else None)
    arrays = [RANDOM.standard_normal((2, 3)).astype(np.float32) for _ in range(2)]
    given = [np.array(taken), *arrays]
    (found,) = run_imported(imported)(*(given if known == "computed" else arrays))
    (wanted,) = litert(path, arrays if known == "constant" else given)
    np.testing.assert_array_equal(found, wanted)
    assert ("where" in imported.module.script()) == (known == "computed")


def test_both_branches_as_machine_code(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(_if(_scalar("flag", None, "bool"), _branch("ADD"), _branch("MUL")))
    program = Executable(compile_state(import_model(path)), tmp_path)
    arrays = [RANDOM.standard_normal((2, 3)).astype(np.float32) for _ in range(2)]
    for taken in (True, False):
        given = [np.array(taken), *arrays]
        np.testing.assert_array_equal(program.run(given)[0], litert(path, given)[0])


def test_a_branch_of_stored_integers_and_one_of_another_branch(write: Write, run_imported: Build) -> None:
    stored = {"scale": (0.05,), "zero_point": (3,)}
    inner = Graph(
        [*(Tensor(name, (2, 3), "int8", **stored) for name in "xwy"), _scalar("x y", True, "bool")],  # type: ignore[arg-type]
        [Op("IF", (3, 0, 1), (2,), "IfOptions", {"ThenSubgraphIndex": 1, "ElseSubgraphIndex": 3})],
        "again", (0, 1), (2,),
    )  # fmt: skip
    data = _if(_scalar("flag", None, "bool"), _branch("ADD", **stored), inner, _branch("SUB", **stored))
    path = write(data, "m.tflite")
    arrays = [RANDOM.integers(-128, 128, (2, 3)).astype(np.int8) for _ in range(2)]
    for taken in (True, False):
        (found,) = run_imported(import_model(path))(np.array(taken), *arrays)
        np.testing.assert_array_equal(found, litert(path, [np.array(taken), *arrays])[0])


def _counting(limit: Tensor, step: int = 1, operator: str = "LESS") -> tuple[Graph, Graph]:
    """The condition i < limit, and a body: i + step, table[i], x * table[i] + x."""
    condition = Graph(
        [_scalar("i", None), Tensor("row", (1, 3)), Tensor("x", (2, 3)), limit, _scalar("more", None, "bool")],
        [Op(operator, (0, 3), (4,))], "condition", (0, 1, 2), (4,),
    )  # fmt: skip
    table = RANDOM.standard_normal((8, 3)).astype(np.float32)
    tensors = [
        _scalar("i", None), Tensor("old", (1, 3)), Tensor("x", (2, 3)), _scalar("step", step), _scalar("next", None),
        Tensor("table", (8, 3), "float32", table), Tensor("where", (1,), "int32"), Tensor("row", (1, 3)),
        Tensor("scaled", (2, 3)), Tensor("y", (2, 3)), Tensor("one", (1,), "int32", np.array([1], np.int32)),
    ]  # fmt: skip
    ops = [
        Op("ADD", (0, 3), (4,), "AddOptions"),
        Op("RESHAPE", (0, 10), (6,)),
        Op("GATHER", (5, 6), (7,), "GatherOptions"),
        Op("MUL", (2, 7), (8,), "MulOptions"),
        Op("ADD", (8, 2), (9,), "AddOptions"),
    ]
    return condition, Graph(tensors, ops, "body", (0, 1, 2), (4, 7, 9))


def _while(graphs: tuple[Graph, Graph], first: int | None = 0, second: int = 2) -> bytes:
    tensors = [_scalar("start", first), Tensor("row", (1, 3)), Tensor("x", (2, 3))]
    tensors += [_scalar("end", None), Tensor("last", (1, 3)), Tensor("y", (2, 3))]
    fields = {"CondSubgraphIndex": 1, "BodySubgraphIndex": second}
    op = Op("WHILE", (0, 1, 2), (3, 4, 5), "WhileOptions", fields)
    return tflite_of(tensors, [op], [1, 2] if first is not None else [0, 1, 2], [3, 4, 5], graphs)


def test_a_composite_computes_what_its_graph_says(write: Write, run_imported: Build) -> None:
    tensors = [Tensor("a", (2, 3)), Tensor("b", (2, 3)), Tensor("c", (2, 3)), Tensor("d", (2, 3))]
    attributes = flexbuffers.Builder()
    with attributes.Map():
        attributes.Int("version", 1)
    packed = np.frombuffer(bytes(attributes.Finish()), np.uint8)
    fields = {"DecompositionSubgraphIndex": 1, "Name": "odml.product", "CompositeAttributes": packed}
    ops = [Op("ADD", (0, 1), (2,), "AddOptions")]
    ops.append(Op("STABLEHLO_COMPOSITE", (2, 1), (3,), "StableHLOCompositeOptions", fields))
    path = write(tflite_of(tensors, ops, [0, 1], [3], (_branch("MUL"),)), "m.tflite")
    a, b = (RANDOM.standard_normal((2, 3)).astype(np.float32) for _ in range(2))
    (found,) = run_imported(import_model(path))(a, b)
    np.testing.assert_array_equal(found, (a + b) * b)
    np.testing.assert_array_equal(found, litert(path, [a, b])[0])


@pytest.mark.parametrize(("first", "limit", "step"), [(0, 5, 1), (1, 8, 3), (5, 5, 1)])
def test_a_loop_is_written_out(write: Write, run_imported: Build, first: int, limit: int, step: int) -> None:
    path = write(_while(_counting(_scalar("limit", limit), step), first), "m.tflite")
    arrays = [RANDOM.standard_normal(shape).astype(np.float32) for shape in ((1, 3), (2, 3))]
    for left, right in zip(run_imported(import_model(path))(*arrays), litert(path, arrays), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_a_loop_whose_limit_is_bound(write: Write, run_imported: Build) -> None:
    path = write(_while(_counting(_scalar("limit", 6)), None), "m.tflite")
    arrays = [RANDOM.standard_normal(shape).astype(np.float32) for shape in ((1, 3), (2, 3))]
    with pytest.raises(UnsupportedError, match="known only at run time"):
        import_model(path)
    found = run_imported(import_model(path, bind={"start": np.array(3, np.int32)}))(*arrays)
    for left, right in zip(found, litert(path, [np.array(3, np.int32), *arrays]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def _refused(write: Write, data: bytes, what: str) -> None:
    with pytest.raises((UnsupportedError, ModelError), match=what):
        import_model(write(data, "m.tflite"))


def test_what_is_refused_says_why(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.frontend.tflite_control.MAX_STEPS", 8)
    flag = _scalar("flag", None, "bool")
    other = Graph(
        [Tensor("x", (2, 3)), Tensor("w", (2, 3)), Tensor("y", (4, 3))],
        [Op("CONCATENATION", (0, 1), (2,), "ConcatenationOptions")], "other", (0, 1), (2,),
    )  # fmt: skip
    _refused(write, _if(flag, _branch("ADD"), other), "tensors of different shapes")
    _refused(write, _if(flag, _branch("ADD"), _branch("RANDOM_UNIFORM")), "IF of a graph with RANDOM_UNIFORM, which")
    _refused(write, _if(_scalar("flag", None), _branch("ADD"), _branch("MUL")), "this condition")
    whole = [Tensor(name, (2, 3), "int32") for name in "xwy"]
    division = Graph(whole, [Op("DIV", (0, 1), (2,), "DivOptions")], "divide", (0, 1), (2,))
    addition = Graph(whole, [Op("ADD", (0, 1), (2,), "AddOptions")], "add", (0, 1), (2,))
    _refused(write, _if(flag, addition, division), "divides whole numbers")
    itself = Graph(
        [*_branch("ADD").tensors, _scalar("t", True, "bool")],
        [Op("IF", (3, 0, 1), (2,), "IfOptions", {"ThenSubgraphIndex": 2, "ElseSubgraphIndex": 1})],
        "itself", (0, 1), (2,),
    )  # fmt: skip
    _refused(write, _if(flag, _branch("ADD"), itself), "run themselves")
    condition, body = _counting(_scalar("limit", 5))
    _refused(write, _while((condition, body), second=7), "a graph that does not exist")
    _refused(write, _while((condition, condition)), "another|unexpected|type")
    _refused(write, _while(_counting(_scalar("limit", 5), step=0)), "never ends")
    _refused(write, _while(_counting(_scalar("limit", -1), operator="GREATER")), "too many steps")
    _refused(write, _while((condition, _branch("ADD"))), "another number of tensors")
    doubled = Op("CONCATENATION", (9, 9), (11,), "ConcatenationOptions")
    tensors = [*body.tensors, Tensor("two", (4, 3))]
    grown = Graph(tensors, [*body.ops, doubled], "grown", (0, 1, 2), (4, 7, 11))
    _refused(write, _while((condition, grown)), "changes the type")
    handle = Op("VAR_HANDLE", (), (0,), "VarHandleOptions")
    variable = Graph([Tensor("v", (), "resource"), *body.tensors], [handle], "state", (1, 2, 3), (1, 2, 3))
    _refused(write, _while((condition, variable)), "keeps a state")
