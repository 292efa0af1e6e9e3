"""Calibration data: what is read, and each refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import InputError
from ingot.frontend.interface import TensorSpec
from ingot.quantize.samples import ArraySamples, FileSamples

X = TensorSpec("x", "float32", (1, 2, 3))
N = TensorSpec("n", "int64", (4,))


def rows(count: int) -> np.ndarray:
    return np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)


def read(samples: Any) -> list[dict[str, np.ndarray]]:
    found = [dict(feeds) for feeds in samples]
    assert len(found) == len(samples)
    return found


def test_an_archive_gives_its_rows(tmp_path: Path) -> None:
    n = np.arange(36, dtype=np.int64).reshape(9, 4)
    np.savez(tmp_path / "s.npz", x=rows(9), n=n, labels=np.arange(9))
    samples = FileSamples(tmp_path / "s.npz", [X, N])
    for i, feeds in enumerate(read(samples)):
        assert np.array_equal(feeds["x"], rows(9)[i : i + 1]) and np.array_equal(feeds["n"], n[i])
    assert samples.labels is not None and samples.labels.tolist() == list(range(9))
    assert samples.notices == []
    in_memory = ArraySamples({"x": rows(9), "n": n}, [X, N])
    for a, b in zip(read(in_memory), read(samples), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", rows(2))
    np.save(tmp_path / "a.npy", rows(1)[0][None] + 100)
    (tmp_path / "notes.txt").write_text("not a sample")
    found = read(FileSamples(tmp_path, [X]))
    assert [float(feeds["x"].reshape(-1)[0]) for feeds in found] == [100, 0, 6]


def test_images_are_samples(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((5, 7, 3), 51, np.uint8)).save(tmp_path / "a.png")
    (feeds,) = read(FileSamples(tmp_path, [TensorSpec("x", "float32", (1, 3, 5, 6))]))
    assert feeds["x"].shape == (1, 3, 5, 6) and np.allclose(feeds["x"], 0.2)


def test_many_samples_are_thinned_and_few_are_noted(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", rows(1200))
    samples = FileSamples(tmp_path / "s.npy", [X])
    found = read(samples)
    assert len(found) == 500 and found[-1]["x"][0, 0, 0] == rows(1200)[-1, 0, 0]
    assert samples.notices == ["of 1200 calibration samples 500 are used, evenly spread"]
    assert "calibrated on 1 sample:" in ArraySamples({"x": rows(1)}, [X]).notices[0]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": rows(9), "z": rows(9)}, "no array for input 'x'"),
        ({"x": rows(9).astype(np.float64)}, "wrong dtype for input 'x'"),
        ({"x": rows(9)[:, :1]}, "wrong shape for input 'x'"),
        ({"x": rows(9)[:0]}, "wrong shape for input 'x'"),
        ({"x": np.float32(1)}, "wrong shape for input 'x'"),
        ({"x": np.where(rows(9) == 7, np.nan, rows(9)).astype(np.float32)}, "not finite"),
        ({"x": np.where(rows(9) == 7, np.inf, rows(9)).astype(np.float32)}, "not finite"),
        ({"x": rows(9), "labels": np.ones((3, 3), np.int64)}, "labels cannot be used"),
        ({"x": rows(9), "labels": np.arange(5)}, "labels do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        list(FileSamples(tmp_path / "s.npz", [X]))


def test_inputs_must_have_as_many_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=rows(9), n=np.zeros((8, 4), np.int64))
    with pytest.raises(InputError, match="different numbers"):
        FileSamples(tmp_path / "s.npz", [X, N])
    np.save(tmp_path / "s.npy", rows(9))
    with pytest.raises(InputError, match="several inputs"):
        FileSamples(tmp_path / "s.npy", [X, N])


def test_a_file_that_lies_about_its_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "s.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 2, 3)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="truncated"):
        list(FileSamples(tmp_path / "s.npy", [X]))


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_no_samples_at_all(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    if kind == "empty":
        path.mkdir()
    elif kind == "text":
        path.write_text("hello")
    with pytest.raises(InputError):
        list(FileSamples(path, [X]))
