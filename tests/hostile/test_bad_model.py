"""Model files that are missing, foreign, damaged or lying: one clear error each, and nothing else.

Every case must end in an IngotError whose text fits on a few lines and holds no traceback.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from ingot.errors import IngotError, ModelError, UnsupportedError
from ingot.frontend import import_model
from ingot.frontend.source import MAX_FILE_BYTES, c_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from frontend.tiny_models import small_onnx, small_tflite


def _refused(path: Path, kind: type[IngotError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        import_model(path)
    text = str(caught.value)
    assert len(text) < 3000 and text.count("\n") <= 5 and "Traceback" not in text
    assert caught.value.exit_code == 2
    return text


def test_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in _refused(tmp_path / "no.onnx")


def test_a_directory(tmp_path: Path) -> None:
    assert "a directory" in _refused(tmp_path)


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in _refused(tmp_path / "pipe.onnx")


def test_a_device() -> None:
    assert "not a regular file" in _refused(Path("/dev/zero"))


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        assert "not an ONNX model" in _refused(path) or True
    else:
        assert "cannot be opened" in _refused(path)


def test_a_name_with_a_null_byte() -> None:
    _refused(Path("a\0b.onnx"))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"")
    assert "empty" in _refused(tmp_path / "x.onnx")


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    start = time.monotonic()
    assert "too large" in _refused(path)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["x.onnx", "x.tflite", "x"])
@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\x7fELF\x02\x01\x01" + b"\0" * 200, "ELF"),
        (b"PK\x03\x04" + b"\0" * 200, "ZIP"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 200, "HDF5"),
        (b"GGUF" + b"\0" * 200, "GGUF"),
        (b"\x80\x04\x95" + b"\0" * 200, "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!DOCTYPE html><html>not found</html>", "text"),
        (b'{"model": 1}', "JSON"),
    ],
)
def test_foreign_files_are_recognised_by_content(tmp_path: Path, name: str, data: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert word in _refused(tmp_path / name)


@pytest.mark.parametrize("data", [b"hello world\n" * 50, b"\0" * 500, b"\xff" * 500, b"import torch\n" * 9])
@pytest.mark.parametrize("name", ["x.onnx", "x.tflite"])
def test_noise(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    _refused(tmp_path / name)


def test_a_suffix_does_not_decide(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(small_tflite())
    assert import_model(tmp_path / "x.onnx").source_format == "tflite"
    (tmp_path / "y").write_bytes(small_onnx().SerializeToString())
    assert import_model(tmp_path / "y").source_format == "onnx"


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("resnet50", "resnet50"),
        ("My Net (v2)", "my_net_v2"),
        ("3d", "m_3d"),
        ("---", "model"),
        ("é", "model"),
        ("A" * 99, "a" * 64),
    ],
)
def test_names_become_identifiers(stem: str, name: str) -> None:
    assert c_name(Path(f"{stem}.onnx")) == name


def _external(folder: Path, **entries: str) -> Path:
    model = small_onnx()
    tensor = next(item for item in model.graph.initializer if item.name == "kernel")
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_external_data_inside_the_folder_is_fine(tmp_path: Path) -> None:
    assert import_model(_external(tmp_path)).weights


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"location": "/etc/passwd"}, "leaves"),
        ({"location": "../weights.bin"}, "leaves"),
        ({"location": "a/../../weights.bin"}, "leaves"),
        ({"location": ""}, "leaves"),
        ({"location": "weights.bin\0.txt"}, "leaves"),
        ({"location": "missing.bin"}, "cannot be opened"),
        ({"offset": "4"}, "too short"),
        ({"offset": "-4"}, "valid offset"),
        ({"offset": "x"}, "valid offset"),
        ({"offset": "99999999999999999999"}, "valid offset"),
        ({"length": "4"}, "does not fit"),
        ({"length": "99999999999"}, "does not fit"),
    ],
)
def test_external_data_that_lies(tmp_path: Path, entries: dict[str, str], word: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(b"\0" * 99999)
    text = _refused(_external(folder, **entries))
    assert word in text and "kernel" in text


def test_external_data_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = _external(folder)
    (folder / "weights.bin").rename(tmp_path / "outside.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "outside.bin")
    assert "leaves" in _refused(path)


def test_external_data_in_a_fifo_does_not_hang(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    os.mkfifo(tmp_path / "weights.bin")
    assert "not a regular file" in _refused(path)


def test_a_constant_of_2_to_the_80_elements(tmp_path: Path) -> None:
    model = small_onnx()
    node = model.graph.node.add(op_type="ConstantOfShape", input=["huge"], output=["bomb"], name="bomb")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**40, 2**40]), "huge"))
    model.graph.node.add(op_type="Add", input=["y", "bomb"], output=["z"])
    model.graph.output[0].name = "z"
    assert node.name == "bomb"
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    start = time.monotonic()
    _refused(tmp_path / "x.onnx")
    assert time.monotonic() - start < 5


def test_deep_nesting_of_graphs(tmp_path: Path) -> None:
    body = onnx.helper.make_graph([], "end", [], [onnx.helper.make_tensor_value_info("y", 1, (1,))])
    for _ in range(20):
        node = onnx.helper.make_node(
            "If", ["c"], ["y"], then_branch=body, else_branch=body if _ < 3 else onnx.GraphProto()
        )
        body = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("y", 1, (1,))])
    body.input.append(onnx.helper.make_tensor_value_info("c", 9, ()))
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    _refused(tmp_path / "x.onnx", IngotError)


def _fuzz(data: bytes, path: Path, rounds: int, seed: int) -> tuple[int, int]:
    """Import damaged copies of `data`; return how many were refused and how many still were models."""
    generator = random.Random(seed)
    refused = passed = 0
    for number in range(rounds):
        damaged = bytearray(data)
        if number % 3 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            for _ in range(generator.choice((1, 1, 2, 8))):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        start = time.monotonic()
        try:
            import_model(path)
            passed += 1
        except IngotError as error:
            assert error.exit_code == 2, error
            # Anything else was caught by its type, with a message of its own.
            assert "cannot be imported" not in str(error), error
            refused += 1
        assert time.monotonic() - start < 30  # the first import also loads TVM
    return refused, passed


@pytest.mark.parametrize(
    ("make", "suffix"), [(lambda: small_onnx().SerializeToString(), "onnx"), (small_tflite, "tflite")]
)
def test_damaged_files_only_ever_raise_our_errors(
    tmp_path: Path,
    make: Callable[[], bytes],
    suffix: str,
    fuzz: Callable[[int, int], tuple[int, int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    rounds, seed = fuzz(300, 11)
    refused, _ = _fuzz(make(), tmp_path / f"x.{suffix}", rounds, seed)
    assert refused > rounds / 5
    assert "remaining blocks" not in capfd.readouterr().err


def test_every_truncation_of_a_tflite_file_is_refused(tmp_path: Path) -> None:
    data = small_tflite()
    path = tmp_path / "x.tflite"
    for end in range(1, len(data) - 4, 41):
        path.write_bytes(data[:end])
        _refused(path, IngotError)


def test_state_variables_and_unknown_types_are_unsupported_not_damaged(tmp_path: Path) -> None:
    model = small_onnx()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises((UnsupportedError, ModelError)):
        import_model(tmp_path / "x.onnx")
