"""`ingot compile`: what it writes and says, and that nothing is left behind when it refuses."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto, helper

import ingot as api
from cli.models import save, value
from ingot.errors import OutputError

Ingot = Callable[..., Result]
Refused = Callable[..., None]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_writes_a_library_that_runs(ingot: Ingot, tiny_model: Path, tmp_path: Path, x: np.ndarray) -> None:
    out = tmp_path / "m.so"
    result = ingot("compile", tiny_model, "--target", "native", "-o", out)
    assert result.exit_code == 0, result.output
    assert listing(tmp_path) == ["m.so"]
    assert api.load(out, threads=1)(x).shape == (1, 5)
    lines = result.stdout.splitlines()
    assert lines[0] == f"wrote {out}  {out.stat().st_size / 1024:.1f} KiB"
    words = ("target", "weights", "RAM", "arena", "kernels", "multiply-adds", "precision  fp32", "selftest   stored")
    for word in words:
        assert word in result.stdout
    assert "note: batch dimension 'N' of input 'x' set to 1" in result.stdout
    assert lines[-1] == f"next: ingot bench {out}"
    assert "\x1b" not in result.output, "no colours and no progress bar in a pipe"
    assert result.stderr == ""


def test_without_names_it_compiles_for_this_machine_into_this_folder(
    ingot: Ingot, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ingot("compile", tiny_model, "--no-selftest", "--shape", "x=2,3,8,8")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path) == ["tiny.so"]
    assert "note: compiled for this machine; --target NAME" in result.stdout
    assert "selftest   none" in result.stdout
    meta = api.load(tmp_path / "tiny.so").metadata
    assert meta["inputs"][0]["shape"] == [2, 3, 8, 8]
    assert meta["target"]["name"] == "native"


def test_the_static_library_comes_with_its_header(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    result = ingot("compile", tiny_model, "--target", "raspberry-pi-4", "--emit", "a", "-o", tmp_path / "libm.a")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path) == ["libm.a", "libm.h"]
    assert (tmp_path / "libm.a").read_bytes().startswith(b"!<arch>\n")
    assert "ingot_tiny_api" in (tmp_path / "libm.h").read_text()


def test_the_next_step_for_another_architecture_is_to_verify(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    result = ingot("compile", tiny_model, "--target", "raspberry-pi-4", "-o", tmp_path / "pi.so")
    assert result.stdout.splitlines()[-1] == f"next: ingot verify {tmp_path / 'pi.so'} {tiny_model} --on qemu"


@pytest.mark.parametrize(
    ("kind", "word"), [("c-header", "ingot_tiny_api"), ("c", "ingot_tiny_api"), ("llvm", "target triple")]
)
def test_texts_go_to_standard_output(ingot: Ingot, tiny_model: Path, kind: str, word: str) -> None:
    result = ingot("compile", tiny_model, "--emit", kind, "-o", "-")
    assert result.exit_code == 0, result.output
    assert word in result.stdout
    assert "wrote" not in result.stdout


def test_stop_after_writes_the_program(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    printed = ingot("compile", tiny_model, "--stop-after", "simplify")
    assert printed.exit_code == 0, printed.output
    assert "R.nn.conv2d" in printed.stdout
    ingot("compile", tiny_model, "--stop-after", "simplify", "-o", tmp_path / "p.py")
    assert (tmp_path / "p.py").read_text() == printed.stdout


def test_print_ir_after_prints_each_step(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--print-ir-after", "simplify", "--print-ir-after", "plan_memory"]
    result = ingot("compile", tiny_model, "-o", tmp_path / "m.so", *arguments)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.index("# after simplify\n"), result.stdout.index("# after plan_memory\n")
    assert first < second < result.stdout.index("wrote ")


# ------------------------------------------------------------------------------------------------------ bound inputs


def test_bound_inputs_vanish_and_are_verified(ingot: Ingot, refused: Refused, pair_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    so, table = tmp_path / "m.so", tmp_path / "a.npy"
    np.save(table, np.arange(6, dtype=np.float32).reshape(2, 3) - 2)
    result = ingot("compile", pair_model, "--bind", "k=[1, -2, 3, 4]", "-o", so)
    assert result.exit_code == 0, result.output
    assert [t["name"] for t in api.load(so).metadata["inputs"]] == ["a"]
    assert "k int64[4] = 1, -2, 3, 4" in ingot("inspect", so).stdout
    outputs = api.load(so).run({"a": np.load(table)})
    np.testing.assert_array_equal(outputs["file"], [2, -4, 6, 8])
    assert ingot("verify", so, pair_model).exit_code == 0
    refused(ingot("verify", so, pair_model, "--bind", "a=1"), "not bound", "'k'")
    refused(ingot("verify", so, pair_model, "--bind", "k=1,2,3,4"), "another value")
    both = ingot("compile", pair_model, "--bind", "k=1,-2,3,4", "--bind", f"a={table}", "-o", so)
    assert both.exit_code == 0, both.output
    model = api.load(so)
    assert model.inputs == () and model.selftest() == 0
    np.testing.assert_array_equal(model()[0], np.maximum(np.load(table), 0))


def test_a_large_bound_value_is_given_again_to_verify(
    ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    so, values = tmp_path / "m.so", tmp_path / "x.npy"
    np.save(values, np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32))
    result = ingot("compile", tiny_model, "--bind", f"x={values}", "-o", so)
    assert result.exit_code == 0, result.output
    refused(ingot("verify", so, tiny_model), "a bound value is not known", "--bind x=FILE.npy")
    assert ingot("verify", so, tiny_model, "--bind", f"x={values}").exit_code == 0
    assert ingot("check", tiny_model, "--bind", f"x={values}").exit_code == 0


def test_a_bind_that_cannot_be_read_is_refused(
    ingot: Ingot, refused: Refused, pair_model: Path, pair_so: Path, tmp_path: Path
) -> None:
    for name, content in (("text.npy", b"text"), ("half.npy", b"\x93NUMPY\x01\0v\0{'descr': '<i8', 'for")):
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "whole.npy", np.arange(4))
    (tmp_path / "short.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-1])
    for text in ("k", "=1", "k=", "k=one", 'k="1"', "k={}", "k=null", "k=[1", "k=" + "[" * 9999, "k=" + "9" * 5000):
        refused(ingot("compile", pair_model, "--bind", text), "cannot be read")
    for name in ("text", "half", "words", "short", "missing"):
        refused(ingot("compile", pair_model, "--bind", f"k={tmp_path / name}.npy"), str(tmp_path / name))
    refused(ingot("compile", pair_model, "--bind", "k=1,2,3,4", "--bind", "k=1,2,3,4"), "given twice")
    refused(
        ingot("compile", pair_model, "--bind", "a=[[1,2,3],[4,5,6]]", "--shape", "a=2,3"), "both a value and a shape"
    )
    refused(ingot("check", pair_so, "--bind", "k=1"), "a library has its interface already")


# ---------------------------------------------------------------------------------------------------------- buckets


def test_one_library_for_several_shapes(ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    so = tmp_path / "m.so"
    result = ingot("compile", tiny_model, "--shape", "x={1, 3}x3x8x8", "-o", so)
    assert result.exit_code == 0, result.output
    assert "also takes  [1, 3, 8, 8]" in ingot("inspect", so).stdout
    verified = ingot("verify", so, tiny_model)
    assert verified.exit_code == 0, verified.output
    assert "of 2 shapes" in verified.stdout and "4 of 4" in verified.stdout
    header = ingot("compile", tiny_model, "--shape", "x={1,3},3,8,8", "--emit", "c-header", "-o", "-").stdout
    assert "also takes inputs of the shapes [1, 3, 8, 8]" in header
    assert ingot("check", tiny_model, "--shape", "x={1,3},3,8,8").exit_code == 0
    refused(ingot("tune", tiny_model, "--shape", "x={1,3},3,8,8"), "a --shape cannot be read")


@pytest.mark.parametrize("text", ["2x3x8x8", "2,3,8,8", "2x3,8x8", " 2 , 3,8,8"])
def test_both_separators_of_a_shape(ingot: Ingot, tiny_model: Path, text: str) -> None:
    assert "input x: float32[2, 3, 8, 8]" in ingot("check", tiny_model, "--shape", f"x={text}").stdout


@pytest.mark.parametrize(
    "text", ["", "x", "{}", "1,", ",1", "{1,}x3", "{1x3}", "1x{2", "1...4x3", "-1", "1 2", "9" * 30]
)
def test_shapes_that_cannot_be_read(ingot: Ingot, refused: Refused, tiny_model: Path, text: str) -> None:
    refused(ingot("compile", tiny_model, "--shape", f"x={text}"), "a --shape cannot be read")


# ------------------------------------------------------------------------------------------------------------ state


def test_state_is_kept_and_verified(ingot: Ingot, refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [helper.make_node("Add", ["h", "x"], ["h:1"]), helper.make_node("Neg", ["h:1"], ["y"])]
    shapes = {"x": [1, 3], "h": [1, 3]}
    inputs = [value(name, shape) for name, shape in shapes.items()]
    model = save(tmp_path / "sum.onnx", nodes, inputs, [value("y", [1, 3]), value("h:1", [1, 3])], {})
    np.save(tmp_path / "first.npy", np.array([[1, 2, 3]], np.float32))
    rows = np.arange(12, dtype=np.float32).reshape(4, 1, 3)
    np.save(tmp_path / "x.npy", rows)
    np.savez(tmp_path / "x.npz", x=rows.reshape(4, 3))
    for state, first in (("h=h:1", 0), (f"h=h:1:{tmp_path / 'first.npy'}", [[1, 2, 3]])):
        so = tmp_path / "sum.so"
        assert ingot("compile", model, "--state", state, "-o", so).exit_code == 0
        assert "h = h:1 float32[1, 3]" in ingot("inspect", so).stdout
        done = ingot("run", so, "--stream", "--input", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "y.npz")
        assert done.exit_code == 0, done.output
        np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], -(first + np.cumsum(rows, 0)))
        verified = ingot("verify", so, model, "--data", tmp_path / "x.npz")
        assert verified.exit_code == 0, verified.output
        assert "4 samples" in verified.stdout and " 0  " in verified.stdout
    assert "state h = h:1" in ingot("check", model, "--state", "h=h:1").stdout
    refused(ingot("run", so, "--stream", "--input", f"x={tmp_path / 'first.npy'}"), "no row for each run")
    refused(ingot("compile", model, "--state", "h=y:1"), "did you mean 'h:1'")
    refused(ingot("compile", model, "--state", "h"), "cannot be read")
    refused(ingot("compile", model, "--state", "h=y", "--state", "h=y"), "given twice")


# ------------------------------------------------------------------------------------------------------- bad input


def broken_models(folder: Path, tiny: Path, library: Path) -> dict[str, Path]:
    """Files that are no models, by what is wrong with them."""
    data = tiny.read_bytes()
    files = {
        "missing": folder / "nothing.onnx",
        "directory": folder,
        "library": Path(shutil.copy(library, folder / "library.onnx")),
        "truncated onnx": folder / "half.onnx",
        "truncated tflite": folder / "half.tflite",
        "text": folder / "text.onnx",
        "unchecked": folder / "unchecked.onnx",
        "unknown operators": folder / "unknown.onnx",
        "pipe": folder / "pipe.onnx",
    }
    files["truncated onnx"].write_bytes(data[: len(data) // 2])
    files["truncated tflite"].write_bytes(b"\x1c\0\0\0TFL3" + bytes(20))
    files["text"].write_text("this is no model\n")
    save(files["unchecked"], [helper.make_node("Relu", ["x", "x"], ["y"])], [value("x", [2])], [value("y", [2])], {})
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Bamboozle", ["b"], ["y"], name="second", domain="acme"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", [2])], [value("y", [2])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), files["unknown operators"])
    os.mkfifo(files["pipe"])
    return files


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["does not exist"]),
        ("directory", ["not a file", "a directory"]),
        ("library", ["not a model", "shared library"]),
        ("truncated onnx", ["truncated"]),
        ("truncated tflite", ["truncated or damaged"]),
        ("text", ["not an ONNX model"]),
        ("unchecked", ["fails ONNX's own check"]),
        ("unknown operators", ["2 nodes", "Frobnicate (first)", "acme:Bamboozle (second)"]),
        ("pipe", ["not a regular file"]),
    ],
)
@pytest.mark.parametrize("verb", ["compile", "check", "inspect"])
def test_bad_models_are_refused(
    ingot: Ingot,
    refused: Refused,
    tiny_model: Path,
    tiny_so: Path,
    tmp_path: Path,
    kind: str,
    words: list[str],
    verb: str,
) -> None:
    models, out = tmp_path / "models", tmp_path / "out"
    models.mkdir()
    out.mkdir()
    path = broken_models(models, tiny_model, tiny_so)[kind]
    if verb == "inspect" and kind in ("unchecked", "unknown operators"):
        result = ingot(verb, path)  # which tells what is in a model that cannot be compiled
        assert result.exit_code == 0
        return
    if verb != "compile" and kind == "library":
        assert ingot(verb, path).exit_code == 0  # the file is what it is, whatever its name
        return
    if verb == "check" and kind == "unknown operators":
        result = ingot(verb, path)  # which lists all of them, as its answer
        assert result.exit_code == 2
        assert "Frobnicate 'first'" in result.stdout
        assert "acme:Bamboozle 'second'" in result.stdout
        return
    result = ingot(verb, path, *(["-o", out / "m.so"] if verb == "compile" else []))
    refused(result)
    for word in words:
        assert word in result.stderr
    assert listing(out) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "z=1,3,8,8"], ["shape of 'z'", "'x' [N, 3, 8, 8]"]),
        (["--shape", "x=1,3,8"], ["wrong number of dimensions", "4: [N, 3, 8, 8]"]),
        (["--shape", "x=1,4,8,8"], ["contradicts the model", "dimension 1"]),
        (["--shape", "x=0,3,8,8"], ["not a positive number"]),
        (["--shape", "x"], ["a --shape cannot be read", "--shape x=1,3,224,224"]),
        (["--shape", "x="], ["a --shape cannot be read"]),
        (["--shape", "=1,2"], ["a --shape cannot be read"]),
        (["--shape", "x=1,-3,8,8"], ["a --shape cannot be read"]),
        (["--shape", "x=1,3,8,8.0"], ["a --shape cannot be read"]),
        (["--shape", "x=" + "9" * 5000], ["a --shape cannot be read"]),
        (["--shape", "x=1,3,8,8", "--shape", "x=2,3,8,8"], ["given twice"]),
        (["--target", "rasberry-pi-4"], ["unknown target", "did you mean raspberry-pi-4"]),
        (["--target", "nowhere/board.toml"], ["nowhere/board.toml"]),
        (["--precision", "fp8"], ["unknown precision", "fp32, bf16, fp16"]),
        (["--precision", "fp16", "--target", "x86-64-v2"], ["cannot convert fp16", "allowed: fp32, bf16"]),
        (["--emit", "exe"], ["'exe' is not one of"]),
        (["--print-ir-after", "fusee"], ["no such compiler step", "did you mean fuse?"]),
        (["--stop-after", "linking"], ["no such compiler step"]),
        (["--stop-after", "fuse", "--print-ir-after", "simplify"], ["do not go together"]),
    ],
)
def test_bad_options_are_refused(
    ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refused(ingot("compile", tiny_model, "-o", tmp_path / "m.so", *arguments), *words)
    assert listing(tmp_path) == []


def test_half_precision_says_what_it_did(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.so"
    result = ingot("compile", tiny_model, "--target", "znver4", "--precision", "bf16", "-o", out)
    assert result.exit_code == 0, result.output
    for text in (result.stdout, ingot("inspect", out).stdout):
        assert re.search(r"precision +bf16: \d+ of \d+ layers multiply in it.*SQNR \d+\.\d dB, max\|error\| ", text)


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make compiling an error of its own: an output must be refused before it starts."""

    def fail(*_positional: object, **_named: object) -> None:
        raise ZeroDivisionError("compiled before looking at the output")

    monkeypatch.setattr("ingot.driver.compile", fail)


def test_bad_outputs_are_refused_before_the_work(
    ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_work(monkeypatch)
    (tmp_path / "file").write_text("")
    model = Path(shutil.copy(tiny_model, tmp_path))
    before = listing(tmp_path)
    refused(ingot("compile", model, "-o", tmp_path / "none" / "m.so"), "create the folder first")
    refused(ingot("compile", model, "-o", tmp_path / "file" / "m.so"), "name a folder, not a file")
    refused(ingot("compile", model, "-o", tmp_path), "it is a folder")
    refused(ingot("compile", model, "-o", "/dev/null"), "not a regular file")
    refused(ingot("compile", model, "-o", tmp_path / ("n" * 300)), "too long")
    refused(ingot("compile", model, "-o", model), "would replace the input")
    refused(ingot("compile", model, "-o", "-"), "this form is not text")
    refused(ingot("compile", model, "--emit", "a", "-o", tmp_path / "m.h"), "header's name")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EROFS, "a folder you may write to"), (errno.ENOSPC, "free some space")]
)
def test_a_folder_that_takes_no_files_is_refused_before_the_work(
    ingot: Ingot,
    refused: Refused,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    hint: str,
) -> None:
    def fail(**_options: object) -> None:
        raise OSError(number, "no")

    no_work(monkeypatch)
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    refused(ingot("compile", tiny_model, "-o", tmp_path / "m.so"), "cannot write to the output folder", hint)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("emit", ["so", "a"])
def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(
    ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emit: str
) -> None:
    out = tmp_path / "m.so"
    out.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import ingot.packager.artifact as artifact

    monkeypatch.setattr(artifact.os, "fsync", full)
    refused(ingot("compile", tiny_model, "--emit", emit, "-o", out), "No space left", "free some space")
    assert listing(tmp_path) == ["m.so"]
    assert out.read_bytes() == b"old"


def test_a_header_that_cannot_be_written_takes_the_library_with_it(
    ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingot.packager.artifact import Artifact

    save_one = Artifact.save

    def save_or_fail(self: Artifact, path: Path, kind: str = "so") -> Path:
        if kind == "c-header":
            raise OutputError("cannot write the output")
        return save_one(self, path, kind)

    monkeypatch.setattr(Artifact, "save", save_or_fail)
    refused(ingot("compile", tiny_model, "--emit", "a", "-o", tmp_path / "libm.a"))
    assert listing(tmp_path) == []


def test_an_interrupt_leaves_no_file(
    ingot: Ingot, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ingot.packager.artifact as artifact

    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact.os, "fsync", interrupt)
    result = ingot("compile", tiny_model, "-o", tmp_path / "m.so")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert listing(tmp_path) == []


def test_a_scalar_input_needs_no_shape(ingot: Ingot, tmp_path: Path) -> None:
    model = save(
        tmp_path / "s.onnx",
        [helper.make_node("Neg", ["x"], ["y"])],
        [value("x", [], TensorProto.FLOAT)],
        [value("y", [], TensorProto.FLOAT)],
        {},
    )
    result = ingot("compile", model, "-o", tmp_path / "s.so")
    assert result.exit_code == 0, result.output
    np.save(tmp_path / "x.npy", np.float32(3))
    result = ingot("run", tmp_path / "s.so", "--input", tmp_path / "x.npy", "-o", tmp_path / "y.npz")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "y.npz")["y"] == -3
