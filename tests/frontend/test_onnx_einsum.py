"""Einsum: sums that are products of matrices, and those that are none, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from ingot.frontend import import_model
from passes.execute import Executable, compile_state

from .tiny_models import model_of

_SIZES = {"b": 2, "h": 3, "i": 5, "j": 4, "k": 7, "d": 8, "n": 1}
#: The equations and whether a product of matrices computes them.
_EQUATIONS = {
    "bhid,bhjd->bhij": True,
    "bhij,bhjd->bhid": True,
    "bihd,bjhd->bhij": True,
    "bij,jk->bik": True,
    "ij,jk": True,
    "kj,ji": True,
    "ij,jk->ki": True,
    "bijk,jkd->bid": True,
    "hbi,jih->jbh": True,
    "bik,kdj->id": True,
    "ij,j->i": True,
    "j,ij->i": True,
    "ij,ij->": True,
    "j,j": True,
    "nij,njk->nik": True,
    "bi d, bj d -> b j i": True,
    "bij,i->bj": False,
    "ij,ij->ij": False,
    "i,j->ij": False,
    "ii,ij->j": False,
    "bij->jb": False,
    "ij,jk,kd->id": False,
    "...ij,...jk->...ik": False,
}


def test_einsum(tmp_path: Path) -> None:
    nodes, feeds, wanted = [], {}, []
    rng = np.random.default_rng(4)
    for number, equation in enumerate(_EQUATIONS):
        operands = []
        for term in equation.replace(" ", "").partition("->")[0].split(","):
            name = f"x{len(feeds)}"
            shape = [_SIZES[label] for label in term.replace("...", "bh")]
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
            operands.append(name)
        nodes.append(helper.make_node("Einsum", operands, [f"y{number}"], equation=equation))
        wanted.append(np.einsum(equation, *(feeds[name] for name in operands)))
    outputs = [f"y{number}" for number in range(len(nodes))]
    model = model_of(nodes, {name: ("float32", x.shape) for name, x in feeds.items()}, outputs)
    onnx.save(model, tmp_path / "m.onnx")
    found = Executable(compile_state(import_model(tmp_path / "m.onnx")), tmp_path).run(list(feeds.values()))
    for equation, got, right in zip(_EQUATIONS, found, wanted, strict=True):
        assert got.shape == right.shape, equation
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5, err_msg=equation)


@pytest.mark.parametrize(("equation", "product"), _EQUATIONS.items())
def test_what_is_a_product_of_matrices_becomes_one(equation: str, product: bool, tmp_path: Path) -> None:
    terms = [term.replace("...", "bh") for term in equation.replace(" ", "").partition("->")[0].split(",")]
    inputs = {f"x{i}": ("float32", tuple(_SIZES[label] for label in term)) for i, term in enumerate(terms)}
    onnx.save(
        model_of([helper.make_node("Einsum", [*inputs], ["y"], equation=equation)], inputs, ["y"]), tmp_path / "m"
    )
    text = str(import_model(tmp_path / "m").module)
    assert ("R.matmul" in text, "R.einsum" in text) == (product, not product)
