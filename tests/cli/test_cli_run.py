"""`ingot run`: files in, files and tables out; what does not fit is refused in the loader's words."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import ingot as api

Ingot = Callable[..., Result]
Refused = Callable[..., None]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_outputs_are_those_of_the_loader(ingot: Ingot, tiny_so: Path, x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x)
    folder = tmp_path / "out"
    arguments = ["--input", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "y.npz", "--output-dir", folder, "--threads", 2]
    result = ingot("run", tiny_so, *arguments)
    assert result.exit_code == 0, result.output
    expected = api.load(tiny_so)(x)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], expected)
    np.testing.assert_array_equal(np.load(folder / "y.npy"), expected)
    assert f"{expected.max():.4g}" in result.stdout
    assert str(folder / "y.npy") in result.stdout


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "unnamed"])
def test_arrays_come_in_many_files(
    ingot: Ingot, tiny_so: Path, x: np.ndarray, tmp_path: Path, kind: str, order: str
) -> None:
    array = np.asarray(x, order=order)  # type: ignore[call-overload]
    path = tmp_path / ("x.npy" if kind == "npy" else "x.npz")
    if kind == "npy":
        np.save(path, array)
    elif kind == "npz":
        np.savez(path, x=array)
    elif kind == "compressed":
        np.savez_compressed(path, x=array)
    else:
        np.savez(path, array)
    name = "x=" if kind == "unnamed" else ""
    result = ingot("run", tiny_so, "--input", f"{name}{path}", "-o", tmp_path / "y.npz")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], api.load(tiny_so)(x))


def test_several_inputs_and_odd_names(ingot: Ingot, pair_so: Path, tmp_path: Path) -> None:
    a, k = np.float32([[1, -2, 3], [4, -5, 6]]), np.arange(4)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "k.npy", k)
    np.savez(tmp_path / "both.npz", a=a, k=k)
    one = ingot("run", pair_so, "--input", f"a={tmp_path / 'a.npy'}", "--input", f"k={tmp_path / 'k.npy'}")
    two = ingot(
        "run", pair_so, "--input", tmp_path / "both.npz", "-o", tmp_path / "o.npz", "--output-dir", tmp_path / "o"
    )
    assert one.exit_code == two.exit_code == 0, one.output + two.output
    with np.load(tmp_path / "o.npz") as found:
        np.testing.assert_array_equal(found["../up"], np.maximum(a, 0))
        np.testing.assert_array_equal(found["file"], 2 * k)
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["_up.npy", "file.npy"]


def test_top_ranks_with_labels(ingot: Ingot, tiny_so: Path, x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "labels.txt").write_text("zero\none\ntwo\nthree\nfour\n")
    result = ingot("run", tiny_so, "--input", tmp_path / "x.npy", "--top", 3, "--labels", tmp_path / "labels.txt")
    assert result.exit_code == 0, result.output
    y = api.load(tiny_so)(x)[0]
    order = np.argsort(-y)[:3]
    names = ["zero", "one", "two", "three", "four"]
    found = [line.split() for line in result.stdout.splitlines()[-3:]]
    assert found == [[str(r + 1), str(i), f"{y[i]:.4f}", names[i]] for r, i in enumerate(order)]


# -------------------------------------------------------------------------------------------------------- bad input


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "dtype": (npy(np.zeros((1, 3, 8, 8))), ["wrong dtype", "float64", "float32"]),
    "shape": (npy(np.zeros((3, 8, 8), np.float32)), ["wrong shape", "(3, 8, 8)", "(1, 3, 8, 8)", "x[np.newaxis]"]),
    "layout": (npy(np.zeros((1, 8, 8, 3), np.float32)), ["wrong shape", "x.transpose(0, 3, 1, 2)"]),
    "truncated": (npy(np.zeros((1, 3, 8, 8), np.float32))[:-1], ["truncated", "767 bytes", "768 bytes"]),
    "no data": (header("(1, 3, 8, 8)"), ["truncated", "0 bytes"]),
    "lying size": (header("(1000000, 1000000)"), ["wrong shape", "(1000000, 1000000)"]),
    "impossible size": (header(f"({2**62}, {2**62})"), ["impossible size"]),
    "negative size": (header("(-1, 3)"), ["damaged", "negative"]),
    "code for a shape": (header("(3).__class__"), ["damaged"]),
    "pickle": (npy(np.array([{}], object)), ["wrong dtype", "object"]),
    "half a header": (header("(1, 3, 8, 8)")[:20], ["damaged"]),
    "empty": (b"", ["unknown kind"]),
    "text": (b"1 2 3\n", ["unknown kind", ".npy, .npz, .png or .jpg"]),
    "broken zip": (b"PK\x03\x04" + bytes(40), ["damaged"]),
    "half a picture": (b"\x89PNG\r\n\x1a\n" + bytes(8), []),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused(ingot: Ingot, refused: Refused, tiny_so: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("PIL")
    data, words = BAD_FILES[kind]
    (tmp_path / "x").write_bytes(data)
    refused(ingot("run", tiny_so, "--input", tmp_path / "x", "-o", tmp_path / "y.npz"), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_small_archive_that_unpacks_to_gigabytes_is_not_unpacked(
    ingot: Ingot, refused: Refused, tiny_so: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header("(1, 3, 8, 8)") + bytes(50 << 20))
    result = ingot("run", tiny_so, "--input", path)
    assert result.exit_code == 0, result.output  # only the bytes that the header tells of are read
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header(f"({50 << 18},)") + bytes(50 << 20))
    refused(ingot("run", tiny_so, "--input", path), "wrong shape")


def test_inputs_that_are_missing_extra_or_unknown(
    ingot: Ingot, refused: Refused, tiny_so: Path, pair_so: Path, x: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "x.npy"
    np.save(path, x)
    np.savez(tmp_path / "xz.npz", x=x, z=x)
    refused(ingot("run", tiny_so), "an input is missing", "x: float32[1, 3, 8, 8]")
    refused(ingot("run", tiny_so, "--input", f"X={path}"), "no input 'X'", "did you mean 'x'?")
    refused(ingot("run", tiny_so, "--input", tmp_path / "xz.npz"), "no input 'z'")
    refused(ingot("run", tiny_so, "--input", path, "--input", f"x={path}"), "given twice")
    refused(ingot("run", tiny_so, "--input", tmp_path / "none.npy"), "cannot open the input file", "No such file")
    refused(ingot("run", tiny_so, "--input", tmp_path), "not a file")
    refused(ingot("run", pair_so, "--input", path), "several inputs", "--input a=FILE")
    refused(ingot("run", pair_so, "--input", f"a={tmp_path / 'xz.npz'}"), "no array of this name")


def test_libraries_that_do_not_run_here(
    ingot: Ingot, refused: Refused, tiny_so: Path, pi_so: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "half.so").write_bytes(tiny_so.read_bytes()[:5000])
    refused(ingot("run", pi_so), "built for aarch64 (raspberry-pi-4)")
    refused(ingot("run", tmp_path / "half.so"), "truncated")
    refused(ingot("run", tiny_model), "not a shared library")
    refused(ingot("run", tmp_path / "none.so"), "cannot open the artifact", "none.so")
    refused(ingot("run", tmp_path), "not a regular file")


def test_outputs_that_cannot_be_written(
    ingot: Ingot, refused: Refused, tiny_so: Path, x: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "x.npy"
    np.save(path, x)
    refused(ingot("run", tiny_so, "--input", path, "-o", tmp_path / "no" / "y.npz"), "create the folder first")
    refused(ingot("run", tiny_so, "--input", path, "--output-dir", path), "the output folder is a file")
    refused(ingot("run", tiny_so, "--input", path, "--output-dir", tmp_path / "a" / "b"), "create the folder first")
    refused(ingot("run", tiny_so, "--input", path, "-o", tiny_so), "would replace the input")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_labels_must_fit(ingot: Ingot, refused: Refused, tiny_so: Path, x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    given = ["run", tiny_so, "--input", tmp_path / "x.npy", "--labels"]
    refused(ingot(*given, tmp_path / "four.txt"), "4 lines", "5, one for each class")
    refused(ingot(*given, tmp_path / "none.txt"), "not a file")


# ----------------------------------------------------------------------------------------------------------- images


def picture(path: Path, pixels: np.ndarray) -> Path:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(pixels).save(path)
    return path


def run_image(ingot: Ingot, so: Path, path: Path, tmp_path: Path, *options: object) -> np.ndarray:
    result = ingot("run", so, "--input", path, "-o", tmp_path / "y.npz", *options)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "y.npz") as archive:
        return archive["y"]


def test_images_become_the_models_input(ingot: Ingot, tiny_so: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
    path = picture(tmp_path / "p.png", pixels)
    model = api.load(tiny_so)

    def expected(values: np.ndarray) -> np.ndarray:
        return model(np.ascontiguousarray(values.transpose(2, 0, 1)[np.newaxis], np.float32))

    def check(values: np.ndarray, *options: object) -> None:
        np.testing.assert_allclose(run_image(ingot, tiny_so, path, tmp_path, *options), expected(values), rtol=1e-5)

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    check(pixels / 255)
    check((pixels / 255 - mean) / std, "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    check((pixels - 127.5) / 127.5, "--scale", "1", "--mean", "127.5", "--std", "127.5")
    check(pixels[:, :, ::-1] / 255, "--bgr")
    assert not np.allclose(expected(pixels / 255), expected(pixels[:, :, ::-1] / 255))


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_images_of_another_size_are_resized(ingot: Ingot, tiny_so: Path, tmp_path: Path, resize: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = (200, 100, 50)  # what --resize crop keeps
    path = picture(tmp_path / "p.png", pixels)
    found = run_image(ingot, tiny_so, path, tmp_path, "--resize", resize)
    full = np.broadcast_to(np.float32([200, 100, 50])[:, None, None] / 255, (1, 3, 8, 8))
    whole = api.load(tiny_so)(np.ascontiguousarray(full))
    assert np.allclose(found, whole, atol=0.02) == (resize == "crop")


def test_image_layouts_and_dtypes() -> None:
    pytest.importorskip("PIL")
    from ingot.errors import InputError
    from ingot.images import Preprocessing, _convert, _layout
    from ingot.runtime.loader import TensorSpec

    def spec(shape: list[int], dtype: str = "float32", quantization: object = None) -> TensorSpec:
        return TensorSpec({"name": "x", "dtype": dtype, "shape": shape, "quantization": quantization})

    assert _layout(spec([1, 3, 8, 9]), None) == ("nchw", 3, 8, 9)
    assert _layout(spec([1, 8, 9, 3]), None) == ("nhwc", 3, 8, 9)
    assert _layout(spec([8, 9, 4]), None) == ("nhwc", 4, 8, 9)
    assert _layout(spec([1, 28, 28]), None) == ("hw", 1, 28, 28)
    assert _layout(spec([28, 28]), None) == ("hw", 1, 28, 28)
    assert _layout(spec([1, 3, 8, 3]), "nchw") == ("nchw", 3, 8, 3)
    assert _layout(spec([1, 3, 8, 3]), "nhwc") == ("nhwc", 3, 3, 8)
    for shape, wanted in (([1, 3, 8, 3], None), ([2, 3, 8, 8], None), ([10], None), ([1, 8, 8, 3], "nchw")):
        with pytest.raises(InputError):
            _layout(spec(shape), wanted)
    pixels = np.uint8([[[0], [128], [255]]])
    scaled = Preprocessing(mean=(0.5,))
    q = {"scales": [1 / 127], "zero_points": [1], "axis": 0}
    assert _convert(pixels, spec([1, 3], "uint8"), Preprocessing()).ravel().tolist() == [0, 128, 255]
    assert _convert(pixels, spec([1, 3], "int8"), Preprocessing()).ravel().tolist() == [-128, 0, 127]
    assert _convert(pixels, spec([1, 3], "int8", q), scaled).ravel().tolist() == [-62, 1, 64]
    assert _convert(pixels, spec([1, 3], "float16"), Preprocessing()).dtype == np.float16
    assert _convert(pixels, spec([1, 3], "bfloat16"), Preprocessing()).ravel().tolist() == [0, 0x3F01, 0x3F80]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mean", "a"], ["--mean cannot be read", "'a'"]),
        (["--mean", "nan"], ["--mean cannot be read"]),
        (["--scale", "1/0"], ["--scale cannot be read"]),
        (["--scale", "1,2"], ["--scale takes one number"]),
        (["--mean", "1,2"], ["--mean does not fit", "1 or 3"]),
        (["--std", "0"], ["--std must not be 0"]),
    ],
)
def test_bad_preprocessing_is_refused(
    ingot: Ingot, refused: Refused, tiny_so: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    path = picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8))
    refused(ingot("run", tiny_so, "--input", path, *options), *words)


def test_images_without_pillow_say_what_to_install(
    ingot: Ingot, refused: Refused, tiny_so: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(ingot("run", tiny_so, "--input", path), "needs the Pillow package", "pip install pillow")
