"""Arrays from .npy and .npz files for one model's inputs, read only if they fit: the header of such a file can lie.

Nothing is unpickled. The header is compared with the model first; then exactly the bytes the model needs are read.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ingot.errors import InputError

if TYPE_CHECKING:
    from ingot.runtime.loader import TensorSpec

    Array = np.ndarray[Any, Any]

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_EMPTY_ZIP = b"PK\x05\x06"
_MAX_HEADER = 10_000
# Among RuntimeError: encrypted members, and methods of compression that this Python lacks.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError)


@dataclass(frozen=True)
class Header:
    """What a .npy header claims: dtype, shape, and whether the elements are in Fortran order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool


def kind_of(path: Path) -> str:
    """Decide by content what a data file is: "npy", "npz" or "other". Raises InputError if it cannot be read."""
    with open_file(path) as file:
        head = file.read(6)
    return "npy" if head == _NPY else "npz" if head[:4] in (_ZIP, _EMPTY_ZIP) else "other"


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading. Raises InputError."""
    try:
        # Not blocking: a FIFO that nobody writes to must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError("cannot open the input file", where=str(path), found=found, hint="check the path") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        allowed = "a .npy, .npz, .png or .jpg file"
        raise InputError("the input is not a file", where=str(path), found="a folder or device", allowed=allowed)
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_header(stream: IO[bytes], where: str) -> Header:
    """Read a .npy header. Raises InputError for what is none, and for a version that only structured arrays need."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version[0]}.{version[1]} of the format, which only structured arrays use")
        shape, fortran, dtype = read(stream, max_header_size=_MAX_HEADER)
        if any(n < 0 for n in shape):
            raise ValueError(f"negative dimensions {shape}")
    except (*_BROKEN, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        found = " ".join(str(error).split())[:200]
        raise InputError("the array file is damaged", where=where, found=found, allowed="a file of np.save") from None
    return Header(dtype, tuple(shape), bool(fortran))


def stand_in(header: Header, where: str) -> Array:
    """An array of the header's dtype and shape without its memory, for the model to refuse in its own words."""
    try:
        return np.broadcast_to(np.empty((), header.dtype), header.shape)
    except (ValueError, MemoryError, OverflowError):
        found = f"shape {header.shape}"[:200]
        raise InputError("the array file claims an impossible size", where=where, found=found) from None


def read_bytes(stream: IO[bytes], header: Header, count: int, where: str) -> bytes:
    """Exactly `count` bytes of the array's data. Raises InputError where there are fewer."""
    data = b""
    try:
        data = stream.read(count)
    except _BROKEN as error:
        found = " ".join(str(error).split())[:200]
        raise InputError("the array file is damaged", where=where, found=found) from None
    if len(data) != count:
        raise InputError(
            "the array file is truncated",
            where=where,
            found=f"{len(data)} bytes of data",
            allowed=f"{count} bytes, for {header.dtype} {list(header.shape)}",
        )
    return data


def matches(header: Header, spec: TensorSpec) -> bool:
    """Say whether an array file has the dtype an input asks for."""
    # NumPy has no bfloat16: arrays of ml_dtypes.bfloat16 are saved as two opaque bytes.
    raw = spec.type == "bfloat16" and header.dtype == np.dtype("V2")
    return raw or header.dtype == spec.dtype


def _load(stream: IO[bytes], spec: TensorSpec, where: str) -> Array:
    """The array if it is what `spec` asks for, else a stand-in that the model will refuse."""
    header = read_header(stream, where)
    if not matches(header, spec) or header.shape != spec.shape:
        return stand_in(header, where)
    data = read_bytes(stream, header, spec.nbytes, where)
    return np.frombuffer(data, spec.dtype).reshape(spec.shape, order="F" if header.fortran else "C")


def load_npy(path: Path, spec: TensorSpec) -> Array:
    """The array in a .npy file, of any dtype and shape; with data only if they are the model's. Raises InputError."""
    with open_file(path) as file:
        return _load(file, spec, str(path))


def load_any(path: Path) -> Array:
    """The array in a .npy file, whatever its dtype and shape, if the file holds all of it. Raises InputError."""
    with open_file(path) as file:
        header = read_header(file, str(path))
        if header.dtype.kind not in "biuf" and header.dtype != np.dtype("V2"):  # V2: bfloat16, which NumPy lacks
            found = str(header.dtype)
            raise InputError("the array does not hold numbers", where=str(path), found=found, allowed="numbers")
        # Python's whole numbers: the header's product may be anything. Nothing is read that the file does not hold.
        size = header.dtype.itemsize * math.prod(header.shape)
        left = os.fstat(file.fileno()).st_size - file.tell()
        if size != left:
            found = f"{left} bytes of data"
            raise InputError("the array file has another size", where=str(path), found=found, allowed=f"{size} bytes")
        data = read_bytes(file, header, size, str(path))
    array = np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class Archive:
    """The arrays of a .npz file, by name. Raises InputError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        file = self._stack.enter_context(open_file(path))
        try:
            self._zip = self._stack.enter_context(zipfile.ZipFile(file))
        except _BROKEN as error:
            self._stack.close()
            found = " ".join(str(error).split())[:200]
            raise InputError("the .npz file is damaged", where=str(path), found=found) from None
        self.names = [name.removesuffix(".npy") for name in self._zip.namelist()]

    def __enter__(self) -> Archive:
        """Return the archive itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self._stack.close()

    def member(self, name: str) -> IO[bytes]:
        """Open one array's .npy stream."""
        inside = f"{name}.npy" if f"{name}.npy" in self._zip.namelist() else name
        try:
            return self._zip.open(inside)
        except (*_BROKEN, KeyError) as error:
            found = " ".join(str(error).split())[:200]
            raise InputError("the .npz file is damaged", where=self.where(name), found=found) from None

    def where(self, name: str) -> str:
        """Say in words which array of which file is meant."""
        return f"{self._path}, array {name!r}"

    def load(self, name: str, spec: TensorSpec) -> Array:
        """One array, as `load_npy` gives it."""
        with self.member(name) as stream:
            return _load(stream, spec, self.where(name))

    def samples(self, name: str, spec: TensorSpec) -> tuple[int, Iterator[Array]]:
        """How many samples an array holds, and these, read one at a time.

        An array of exactly the model's shape is one sample; one with more rows along a first dimension that is 1 in
        the model holds a sample in each row. Anything else comes as one stand-in, for the model to refuse.
        """
        stream = self.member(name)
        self._stack.callback(stream.close)
        header, where = read_header(stream, self.where(name)), self.where(name)
        many = spec.shape[:1] == (1,) and header.shape[1:] == spec.shape[1:] and len(header.shape) == len(spec.shape)
        if header.shape != spec.shape and (not many or header.fortran or not header.shape[0]):
            return 1, iter([stand_in(header, where)])
        if not matches(header, spec):
            return 1, iter([stand_in(header, where)])
        count = header.shape[0] if many else 1

        def rows() -> Iterator[Array]:
            for _ in range(count):
                data = read_bytes(stream, header, spec.nbytes, where)
                yield np.frombuffer(data, spec.dtype).reshape(spec.shape, order="F" if header.fortran else "C")

        return count, rows()


def npy_bytes(array: Array) -> bytes:
    """The bytes of a .npy file."""
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(arrays: dict[str, Array]) -> bytes:
    """The bytes of an uncompressed .npz file, the same for the same arrays whenever it is written."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            # Not np.savez: it takes names as keyword arguments, and a model may call an output "file".
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), npy_bytes(array))
    return buffer.getvalue()
