"""TensorProtos as numpy arrays, with every declared size checked before anything is read or allocated."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import ModelError, UnsupportedError

if TYPE_CHECKING:
    import onnx

MAX_TENSOR_BYTES = 2**34
MAX_RANK = 16


def element_bits(elem_type: int, where: str) -> int:
    """Bits of one element of ONNX data type `elem_type`. Raises UnsupportedError for types that are not numbers."""
    import onnx

    packed = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.FLOAT4E2M1: 4}
    for name in ("INT2", "UINT2"):
        if hasattr(onnx.TensorProto, name):
            packed[getattr(onnx.TensorProto, name)] = 2
    if elem_type in packed:
        return packed[elem_type]
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    except (KeyError, ValueError, TypeError):
        raise ModelError("a tensor has an unknown data type", where=where, found=str(elem_type)) from None
    if dtype == np.dtype(object):
        raise UnsupportedError("string tensors are not supported", where=where, found="STRING", allowed="numbers, bool")
    return 8 * int(dtype.itemsize)


def checked_count(dims: tuple[int, ...], bits: int, where: str) -> int:
    """Number of elements of a tensor of these dims. Raises ModelError for negative, absurd or too large dims."""
    if len(dims) > MAX_RANK:
        raise ModelError(
            "a tensor has too many dimensions", where=where, found=str(len(dims)), allowed=f"<= {MAX_RANK}"
        )
    count = 1
    for dim in dims:
        if dim < 0:
            raise ModelError("a tensor has a negative dimension", where=where, found=str(list(dims)), allowed=">= 0")
        count *= dim
    if count * bits > 8 * MAX_TENSOR_BYTES:
        raise ModelError(
            "a tensor is too large",
            where=where,
            found=f"shape {list(dims)}, {count} elements",
            allowed=f"at most {MAX_TENSOR_BYTES} bytes",
            hint="the file is damaged, or lies about its sizes",
        )
    return count


def array_of_raw(raw: memoryview, elem_type: int, dims: tuple[int, ...], where: str) -> np.ndarray:
    """A read-only array over `raw` (little-endian, as ONNX stores it): a view, except for packed 4-bit types."""
    import onnx

    bits = element_bits(elem_type, where)
    count = checked_count(dims, bits, where)
    wanted = (count * bits + 7) // 8
    if len(raw) != wanted:
        raise ModelError(
            "a tensor's data does not fit its shape",
            where=where,
            found=f"{len(raw)} bytes",
            allowed=f"{wanted} bytes for shape {list(dims)}",
            hint="the file is damaged, or lies about its sizes",
        )
    if bits < 8:
        tensor = onnx.TensorProto(data_type=elem_type, dims=dims, raw_data=bytes(raw))
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    return np.frombuffer(raw, dtype=dtype, count=count).reshape(dims)


def tensor_array(tensor: onnx.TensorProto, where: str) -> np.ndarray:
    """The array of a TensorProto that carries its own data. Raises ModelError if data and dims do not fit."""
    import onnx

    dims = tuple(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.HasField("segment"):
        raise UnsupportedError("external data is only supported for the main graph's initializers", where=where)
    if tensor.HasField("raw_data"):
        return array_of_raw(memoryview(tensor.raw_data), tensor.data_type, dims, where)
    bits = element_bits(tensor.data_type, where)
    count = checked_count(dims, bits, where)
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    held = len(getattr(tensor, field))
    complex_types = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
    wanted = 2 * count if tensor.data_type in complex_types else count
    if bits < 8:
        # Packed types keep several elements in each int32_data entry.
        wanted = held if held in (count, (count * bits + 7) // 8) else count
    if held != wanted:
        raise ModelError(
            "a tensor's data does not fit its shape",
            where=where,
            found=f"{held} elements in {field}",
            allowed=f"{wanted} for shape {list(dims)}",
            hint="the file is damaged, or lies about its sizes",
        )
    try:
        array = np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError("a tensor cannot be read", where=where, found=str(error)) from None
    return array.reshape(dims)


def external_array(tensor: onnx.TensorProto, folder: Path, where: str) -> np.ndarray:
    """Memory-map the external data of an initializer.

    The file must lie inside `folder` after all symbolic links are followed, be a regular file, and hold exactly the
    bytes that the tensor's shape asks for. Raises ModelError otherwise.
    """
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    allowed = "a file in the model's own folder"
    relative = Path(location)
    if not location or "\0" in location or relative.is_absolute() or ".." in relative.parts or "\\" in location:
        raise ModelError("external data leaves the model's folder", where=where, found=repr(location), allowed=allowed)
    root = folder.resolve()
    file = (root / relative).resolve()
    if not file.is_relative_to(root):
        raise ModelError("external data leaves the model's folder", where=where, found=repr(location), allowed=allowed)
    dims = tuple(tensor.dims)
    bits = element_bits(tensor.data_type, where)
    wanted = (checked_count(dims, bits, where) * bits + 7) // 8
    offset = _number(entries, "offset", 0, where)
    length = _number(entries, "length", wanted, where)
    if length != wanted:
        raise ModelError(
            "a tensor's external data does not fit its shape",
            where=where,
            found=f"{length} bytes",
            allowed=f"{wanted} bytes for shape {list(dims)}",
        )
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "keep the model and its data files in one folder"
        raise ModelError(
            "external data cannot be opened", where=where, found=f"{location}: {reason}", hint=hint
        ) from None
    with os.fdopen(descriptor, "rb") as stream:
        info = os.fstat(stream.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ModelError("external data is not a regular file", where=where, found=location)
        if offset + wanted > info.st_size:
            raise ModelError(
                "an external data file is too short",
                where=where,
                found=f"{location}: {info.st_size} bytes",
                allowed=f"at least {offset + wanted}",
                hint="fetch the file again",
            )
        if wanted == 0:
            return array_of_raw(memoryview(b""), tensor.data_type, dims, where)
        if bits < 8:
            stream.seek(offset)
            return array_of_raw(memoryview(stream.read(wanted)), tensor.data_type, dims, where)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        mapped = np.memmap(stream, dtype=np.uint8, mode="r", offset=offset, shape=(wanted,))
        array: np.ndarray = np.asarray(mapped).view(dtype).reshape(dims)
        return array


def _number(entries: dict[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ModelError(f"external data has no valid {key}", where=where, found=repr(text), allowed="a number >= 0")
    return int(text)
