"""Taking an ONNX file apart: what is split comes together again, and no length is believed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from ingot.errors import ModelError
from ingot.frontend.onnx_wire import RAW_KEEP_BYTES, split_weights

from .tiny_models import model_of

SIZES = (1, RAW_KEEP_BYTES // 4 - 1, RAW_KEEP_BYTES // 4, RAW_KEEP_BYTES // 4 + 1, 5000)


def _model() -> onnx.ModelProto:
    weights = {f"w{size}": np.arange(size, dtype=np.float32) for size in SIZES}
    nodes = [helper.make_node("Sum", list(weights)[:1], ["y"])]
    return model_of(nodes, {"x": ("float32", [1])}, ["y"], weights)


def test_large_raw_data_is_cut_out_and_found_again() -> None:
    model = _model()
    data = model.SerializeToString()
    stripped, raw = split_weights(data)
    assert set(raw) == {"w256", "w257", "w5000"}
    for name, place in raw.items():
        wanted = np.arange(int(name[1:]), dtype=np.float32).tobytes()
        assert data[place.offset : place.offset + place.bytes] == wanted
    rest = onnx.ModelProto.FromString(stripped)
    for tensor in rest.graph.initializer:
        if tensor.name in raw:
            place = raw[tensor.name]
            tensor.raw_data = data[place.offset : place.offset + place.bytes]
    assert rest == model


def test_every_truncation_is_refused_or_leaves_a_smaller_model() -> None:
    data = _model().SerializeToString()
    refused = 0
    for end in range(0, len(data), 97):
        try:
            split_weights(data[:end])
        except ModelError:
            refused += 1
    assert refused > len(data) // 97 * 0.9


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # a tag without its value
        b"\x08" + b"\xff" * 11,  # a number without end
        b"\x3a\xff\xff\xff\xff\x7f",  # a graph of 32 GiB
        b"\x3a\x02\x2a\x7f",  # an initializer longer than its graph
        b"\x00\x00",  # field 0
        b"\x0b",  # wire type 3, a group
        b"\x08\x08",  # a version, but no graph
        b"\x3a\x00\x3a\x00",  # two graphs
        b"\x92\x03\x00",  # an unknown outer field
    ],
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        split_weights(data)


def test_two_initializers_of_one_name_are_refused() -> None:
    model = _model()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(5000, np.float32), "w5000"))
    with pytest.raises(ModelError, match="same name"):
        split_weights(model.SerializeToString())
