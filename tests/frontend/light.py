"""The nine `light_*` graphs of the onnx wheel, with seeded weights that make their outputs worth comparing.

The files make every weight with ConstantOfShape(0.02): right for a download, useless for judging values. `he_model`
replaces these by seeded numbers: He-scaled for filters, and statistics of a trained net for normalisation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test

NAMES = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19",
    "zfnet512",
)  # fmt: skip


def path_of(name: str) -> Path:
    """The file of one light graph."""
    return Path(onnx.backend.test.__file__).parent / "data" / "light" / f"light_{name}.onnx"


def he_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """The graph with its constant weights replaced by seeded ones."""
    model = onnx.load(path_of(name))
    graph = model.graph
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in graph.node:
        for index, value in enumerate(node.input):
            users.setdefault(value, (node, index))
    random = np.random.default_rng(seed)
    kept, gone = [], set()
    for node in graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            kept.append(node)
            continue
        shape = tuple(int(dim) for dim in shapes[node.input[0]])
        graph.initializer.append(
            onnx.numpy_helper.from_array(_values(random, shape, users, node.output[0]), node.output[0])
        )
        gone.add(node.input[0])
    del graph.node[:]
    graph.node.extend(kept)
    for items in (graph.initializer, graph.input):
        left = [item for item in items if item.name not in gone]
        del items[:]
        items.extend(left)
    known = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.name not in known:
            # IR version 3: every initializer is an input too.
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _temper(model, random)
    return model


def _temper(model: onnx.ModelProto, random: np.random.Generator) -> None:
    """Scale the last layer so that Softmax sees numbers around 2: else its output is one 1 and 999 zeros."""
    import onnxruntime

    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    last = next((node for node in graph.node if node.op_type == "Softmax"), None)
    if last is None:
        return
    logits = last.input[0]
    layer = makers[logits]
    while layer.op_type not in ("Gemm", "Conv"):
        layer = makers[layer.input[0]]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options)
    weights = {tensor.name for tensor in graph.initializer}
    feeds = {
        value.name: random.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in graph.input
        if value.name not in weights
    }
    spread = float(np.std(session.run(None, feeds)[0]))
    scaled = {makers[name].input[0] if name in makers else name for name in layer.input[1:]}
    for tensor in graph.initializer:
        if tensor.name in scaled:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(2 / spread), tensor.name)
            )


def _values(
    random: np.random.Generator, shape: tuple[int, ...], users: dict[str, tuple[onnx.NodeProto, int]], name: str
) -> np.ndarray:
    node, index = users[name]
    while node.op_type == "Unsqueeze":
        node, index = users[node.output[0]]
    if node.op_type == "BatchNormalization" and index in (1, 4):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if node.op_type in ("Conv", "Gemm") and index == 1:
        fan_in = int(np.prod(shape[1:]))
        return (random.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / fan_in))).astype(np.float32)
    if node.op_type == "Mul":
        return random.uniform(0.8, 1.2, shape).astype(np.float32)
    return random.uniform(-0.1, 0.1, shape).astype(np.float32)
