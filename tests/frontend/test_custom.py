"""Operators that users register: a converter, a kernel in C, and what goes wrong with them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from tvm import relax

import ingot
from ingot.emulator import run_under_qemu
from ingot.errors import OptionError, UnsupportedError
from ingot.frontend.custom import unregister_op
from ingot.target import load_target

from .tiny_models import Op, Tensor, tflite_of

KERNEL = """
void Mine(const ingot_op_tensor *in, const ingot_op_tensor *out) {
    const float *x = in[0].data;
    float *y = out[0].data;
    for (int64_t i = 0; i < in[0].shape[0]; i++)
        for (int64_t j = 0; j < in[0].shape[1]; j++) y[j * in[0].shape[0] + i] = x[i * in[0].shape[1] + j] + 1;
}
"""
VALUE = np.arange(12, dtype=np.float32).reshape(3, 4)


def turned(node):
    return [(node.shapes[0][::-1], node.dtypes[0])]


@pytest.fixture(autouse=True)
def forget():
    yield
    unregister_op("Mine", domain="test")
    unregister_op("Mine")


@pytest.fixture
def model(tmp_path):
    nodes = [
        helper.make_node("Mine", ["x"], ["a"], domain="test", scale=1),
        helper.make_node("Mul", ["a", "a"], ["b"]),
        helper.make_node("Mine", ["b"], ["y"], domain="test", scale=1),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (3, 4)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("test", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_a_converter(model, tmp_path):
    def convert(node):
        assert node.attributes["scale"] == 1
        return relax.op.permute_dims(node.emit(relax.op.add(node.inputs[0], relax.const(1.0, "float32"))))

    ingot.register_op("Mine", domain="test", infer=turned, convert=convert)
    out = ingot.load(ingot.compile(model).save(tmp_path / "m.so"))(VALUE)
    np.testing.assert_array_equal(out, (VALUE + 1) ** 2 + 1)


def test_a_kernel_in_c(model, tmp_path):
    ingot.register_op("Mine", domain="test", infer=turned, kernel=KERNEL)
    out = ingot.load(ingot.compile(model).save(tmp_path / "m.so"))(VALUE)
    np.testing.assert_array_equal(out, (VALUE + 1) ** 2 + 1)


@pytest.mark.qemu
def test_a_kernel_in_c_on_a_board(model, tmp_path, qemu):
    board = load_target("raspberry-pi-4")
    qemu(board.arch)
    ingot.register_op("Mine", domain="test", infer=turned, kernel=KERNEL)
    path = ingot.compile(model, target=board.name, selftest=False).save(tmp_path / "m.so")
    (out,) = run_under_qemu(path, [VALUE], board, threads=1)
    np.testing.assert_array_equal(out, (VALUE + 1) ** 2 + 1)


def test_a_custom_operator_of_tflite(tmp_path):
    tensors = [Tensor("x", (3, 4)), Tensor("y", (4, 3))]
    data = tflite_of(tensors, [Op("CUSTOM", (0,), (1,), custom="Mine")], [0], [1])
    (tmp_path / "m.tflite").write_bytes(data)
    with pytest.raises(UnsupportedError, match="register_op"):
        ingot.compile(tmp_path / "m.tflite")
    ingot.register_op("Mine", infer=turned, kernel=KERNEL)
    out = ingot.load(ingot.compile(tmp_path / "m.tflite", selftest=False).save(tmp_path / "m.so"))(VALUE)
    np.testing.assert_array_equal(out, VALUE.T + 1)


def test_what_goes_wrong_is_said(model):
    with pytest.raises(UnsupportedError, match="register_op"):
        ingot.compile(model)
    with pytest.raises(OptionError, match="converter or a kernel"):
        ingot.register_op("Mine", infer=turned)
    with pytest.raises(OptionError, match="not a name"):
        ingot.register_op("my op", infer=turned, kernel="")
    ingot.register_op("Mine", domain="test", infer=lambda node: [((0,), "float32")], kernel=KERNEL)
    with pytest.raises(UnsupportedError, match="shapes are not usable"):
        ingot.compile(model)
    ingot.register_op("Mine", domain="test", infer=turned, convert=lambda node: node.nothing)
    with pytest.raises(UnsupportedError, match="converter failed"):
        ingot.compile(model)
    ingot.register_op("Mine", domain="test", infer=turned, kernel="void Mine(int x) { nonsense }")
    with pytest.raises(OptionError, match="does not compile"):
        ingot.compile(model, selftest=False)
