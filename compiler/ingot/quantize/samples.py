"""Calibration data: checked against the model before anything is read, and read one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ingot.arrays import Archive, Header, kind_of, matches, open_file, read_bytes, read_header
from ingot.errors import InputError
from ingot.frontend.interface import TensorSpec
from ingot.images import Preprocessing, load_image
from ingot.runtime.loader import TensorSpec as ArraySpec

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

#: More samples than this are thinned evenly: they cost time and change ranges little.
MOST = 500
#: Fewer samples than this are taken with a notice.
FEW = 8
#: The array of a .npz file that holds the right answers, one for each sample.
LABELS = "labels"
#: Pixels / 255.
_PLAIN = Preprocessing()
_SUFFIXES = (".npy", ".npz", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class _Source:
    """A file with one array, or several samples of it, for one input."""

    count: int
    rows: Callable[[], Iterator[Array]]


class FileSamples:
    """Samples from a .npz or .npy file, or from a folder of .npy, .npz, .png and .jpg files.

    A .npz file holds an array for each of the model's inputs, by name: one sample of the input's shape, or many, along
    a first dimension that the input has as 1 or not at all. In a folder each .npz file is such a file; a .npy file or
    an image is for a model of one input. Headers and sizes are checked here, values as they are read.

    Raises InputError for a file that is missing, damaged or does not fit, and, while reading, for NaN and infinity.
    """

    def __init__(self, path: Path, inputs: Sequence[TensorSpec], how: Preprocessing = _PLAIN, most: int = MOST) -> None:
        self._specs = {s.name: ArraySpec({**s.__dict__, "quantization": None}) for s in inputs}
        self._how = how
        self.labels: Array | None = None
        files = _files(path)
        self._parts = [self._part(file) for file in files]
        self.found = sum(next(iter(part.values())).count for part in self._parts)
        if not self.found:
            raise InputError("there are no calibration samples", where=str(path), allowed="8 to 500 samples")
        self._kept = _spread(self.found, most)
        if self.labels is not None:
            self.labels = _kept_labels(self.labels, self.found, self._kept, str(path)) if len(files) == 1 else None

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self._kept)

    def __iter__(self) -> Iterator[Feeds]:
        """Read them one at a time."""
        wanted, number = set(self._kept.tolist()), 0
        for part in self._parts:
            count = next(iter(part.values())).count
            streams = {name: source.rows() for name, source in part.items()}
            for _ in range(count):
                feeds = {name: next(stream) for name, stream in streams.items()}
                if number in wanted:
                    for name, array in feeds.items():
                        check_finite(array, f"sample {number}, input '{name}'")
                    yield feeds
                number += 1

    @property
    def notices(self) -> list[str]:
        """Return what the user should know about the number of samples."""
        return notices(self.found, len(self))

    def _part(self, path: Path) -> dict[str, _Source]:
        """Return a source for every input from one file."""
        kind = kind_of(path)
        if kind == "npz":
            return self._archive(path)
        if len(self._specs) != 1:
            names = ", ".join(map(repr, self._specs.values()))[:300]
            hint = "np.savez('samples.npz', NAME=array, ...)"
            raise InputError(
                "the model has several inputs", where=str(path), allowed=f"a .npz file with {names}", hint=hint
            )
        ((name, spec),) = self._specs.items()
        if kind == "npy":
            return {name: _file_source(lambda: open_file(path), spec, str(path))}
        return {name: _Source(1, lambda: iter([load_image(path, spec, self._how)]))}

    def _archive(self, path: Path) -> dict[str, _Source]:
        with Archive(path) as archive:
            names = archive.names
            if LABELS in names and LABELS not in self._specs:
                self.labels = _labels(archive)
        missing = [name for name in self._specs if name not in names]
        if missing and len(self._specs) == 1 and len(set(names) - {LABELS}) == 1:
            renamed = {missing[0]: next(name for name in names if name != LABELS)}
        elif missing:
            found = ", ".join(names)[:200] or "nothing"
            allowed = ", ".join(map(repr, self._specs.values()))[:300]
            raise InputError(
                f"the calibration file has no array for input '{missing[0]}'",
                where=str(path),
                found=found,
                allowed=allowed,
                hint="name the arrays after the model's inputs: np.savez('samples.npz', NAME=array)",
            )
        else:
            renamed = {}
        sources = {
            name: _file_source(
                _opener(path, renamed.get(name, name)), spec, f"{path}, array '{renamed.get(name, name)}'"
            )
            for name, spec in self._specs.items()
        }
        counts = {name: source.count for name, source in sources.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name}: {count}" for name, count in counts.items())[:200]
            raise InputError("the inputs have different numbers of samples", where=str(path), found=found)
        return sources


def notices(found: int, kept: int) -> list[str]:
    """Return sentences about too few or too many samples."""
    if kept < found:
        return [f"of {found} calibration samples {kept} are used, evenly spread"]
    if found < FEW:
        plural = "sample" if found == 1 else "samples"
        return [f"calibrated on {found} {plural}: ranges may be too narrow for other inputs; give {FEW} to {MOST}"]
    return []


class ArraySamples:
    """Samples from arrays by input name, in memory, with the same rules as `FileSamples`."""

    def __init__(self, arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], most: int = MOST) -> None:
        self.labels: Array | None = None
        self._rows: dict[str, Array] = {}
        for spec in inputs:
            if spec.name not in arrays:
                allowed = ", ".join(s.name for s in inputs)
                raise InputError(f"calibrate has no array for input '{spec.name}'", where="calibrate", allowed=allowed)
            array, wanted = np.asarray(arrays[spec.name]), ArraySpec({**spec.__dict__, "quantization": None})
            header = Header(array.dtype, array.shape, False)
            count = _count(header, wanted, f"calibrate['{spec.name}']")
            self._rows[spec.name] = array.reshape(count, *spec.shape)
        counts = {len(rows) for rows in self._rows.values()}
        if len(counts) != 1 or counts == {0}:
            found = str({name: len(rows) for name, rows in self._rows.items()})
            raise InputError("the inputs have different numbers of samples", where="calibrate", found=found)
        self.found = counts.pop()
        self._kept = _spread(self.found, most)
        if LABELS in arrays and LABELS not in self._rows:
            self.labels = _kept_labels(np.asarray(arrays[LABELS]), self.found, self._kept, "calibrate")

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self._kept)

    def __iter__(self) -> Iterator[Feeds]:
        """Give them one at a time."""
        for number in self._kept:
            feeds = {name: rows[number] for name, rows in self._rows.items()}
            for name, array in feeds.items():
                check_finite(array, f"sample {number}, input '{name}'")
            yield feeds

    @property
    def notices(self) -> list[str]:
        """Return what the user should know about the number of samples."""
        return notices(self.found, len(self))


def check_finite(array: Array, where: str) -> None:
    """Raise InputError if a sample holds NaN or infinity: no range can come of it."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array[~np.isfinite(array)].reshape(-1)
        raise InputError(
            "a calibration sample holds values that are not finite",
            where=where,
            found=f"{bad.size} of {array.size} values, the first is {bad[0]}",
            allowed="finite numbers",
        )


def _files(path: Path) -> list[Path]:
    """Return the file, or those of a folder that can hold samples, by name."""
    if not path.is_dir():
        return [path]
    try:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
    except OSError as error:
        raise InputError("cannot read the folder", where=str(path), found=error.strerror or str(error)) from None
    if not found:
        allowed = f"files ending in {', '.join(_SUFFIXES)}"
        raise InputError("the folder has no calibration samples", where=str(path), allowed=allowed)
    return found


def _spread(found: int, most: int) -> Array:
    """Return the numbers of the samples to use: all, or `most` of them at even distances."""
    return np.arange(found) if found <= most else np.linspace(0, found - 1, most).round().astype(np.int64)


def _kept_labels(labels: Array, found: int, kept: Array, where: str) -> Array:
    """Return the labels of the samples that are used. Raises InputError if there is not one for each sample found."""
    if labels.shape != (found,):
        raise InputError(
            "the labels do not fit the samples",
            where=where,
            found=f"labels of shape {list(labels.shape)}",
            allowed=f"[{found}], one per sample",
        )
    chosen: Array = labels[kept]
    return chosen


def _opener(path: Path, name: str) -> Callable[[], Any]:
    """Return what opens one array of a .npz file, as a context manager that gives its stream."""
    import contextlib

    @contextlib.contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with Archive(path) as archive, archive.member(name) as stream:
            yield stream

    return opened


def _file_source(opened: Callable[[], Any], spec: ArraySpec, where: str) -> _Source:
    """Return the samples that an array file holds for one input, its header checked."""
    with opened() as stream:
        count = _count(read_header(stream, where), spec, where)

    def rows() -> Iterator[Array]:
        with opened() as stream:
            header = read_header(stream, where)
            for _ in range(count):
                data = read_bytes(stream, header, spec.nbytes, where)
                yield np.frombuffer(data, spec.dtype).reshape(spec.shape, order="F" if header.fortran else "C")

    return _Source(count, rows)


def _count(header: Header, spec: ArraySpec, where: str) -> int:
    """Return how many samples an array of this header holds. Raises InputError if it does not fit the input."""
    shape, wanted = header.shape, spec.shape
    if not matches(header, spec):
        raise InputError(
            f"calibration data of the wrong dtype for input '{spec.name}'",
            where=where,
            found=str(header.dtype),
            allowed=spec.type,
            hint=f"array.astype('{spec.type}')",
        )
    count = 0
    if shape == wanted:
        count = 1
    elif shape and shape[1:] in (wanted, wanted[1:] if wanted[:1] == (1,) else wanted):
        count = shape[0]
    if not count or (count > 1 and header.fortran):
        found = f"{list(shape)}" + (" in Fortran order" if header.fortran else "")
        many = ["N", *(wanted[1:] if wanted[:1] == (1,) else wanted)]
        allowed = f"[{', '.join(map(str, many))}]"
        raise InputError(
            f"calibration data of the wrong shape for input '{spec.name}'", where=where, found=found, allowed=allowed
        )
    return count


def _labels(archive: Archive) -> Array:
    """Return the labels of an archive: whole numbers in one dimension."""
    where = archive.where(LABELS)
    with archive.member(LABELS) as stream:
        header = read_header(stream, where)
        if header.dtype.kind not in "iu" or len(header.shape) != 1 or header.shape[0] > 1 << 24:
            found = f"{header.dtype} {list(header.shape)}"
            raise InputError(
                "the labels cannot be used", where=where, found=found, allowed="whole numbers, one per sample"
            )
        data = read_bytes(stream, header, header.shape[0] * header.dtype.itemsize, where)
    return np.frombuffer(data, header.dtype).astype(np.int64)
