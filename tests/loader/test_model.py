"""The Python face of a loaded model: calls, names, dtypes, shapes, threads, forks, errors."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from handmade import expected
from ingot.frontend.interface import Imported, Quantization, TensorSpec
from ingot.packager.artifact import package
from ingot.program import BufferRef, CopyStep, Program
from ingot.runtime.loader import InputError, LoadError, Model, RunError, load
from ingot.target import load_target
from loader.artifacts import HOST, library, packaged, weights_at, write

DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
SHAPES = [(), (0,), (2, 0, 4), (3, 5), (1,), (1, 2, 1, 2, 1, 2, 1, 2)]


@functools.cache
def copier() -> bytes:
    """A model with one input of each dtype, in shapes from none to eight dimensions; it returns its inputs."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(DTYPES))]
    scales = Quantization((0.5, 0.25, 1.0, 2.0, 4.0), (0, -1, 2, -128, 127), 1)
    inputs = tuple(
        TensorSpec(f"in {d}", d, s, scales if d == "int16" else None) for d, s in zip(DTYPES, shapes, strict=True)
    )
    outputs = tuple(TensorSpec(f"out {s.dtype}", s.dtype, s.shape) for s in inputs)
    sizes = [int(np.prod(s.shape)) * (2 if s.dtype == "bfloat16" else np.dtype(s.dtype).itemsize) for s in inputs]
    program = Program(
        steps=tuple(
            CopyStep(BufferRef("input", i, 0, n), BufferRef("output", i, 0, n), n, "Identity")
            for i, n in enumerate(sizes)
        ),
        objects=(),
        weights=b"",
        arena_bytes=0,
        macs=0,
    )
    imported = Imported(
        module=None,  # type: ignore[arg-type]
        weights={},
        inputs=inputs,
        outputs=outputs,
        name="copier",
        source_format="onnx",
        source_sha256="cd" * 32,
        source_peak_bytes=0,
        notices=(),
    )
    return package(program, imported, load_target(HOST), precision="fp32", selftest=None).library


@pytest.fixture
def every(tmp_path: Path) -> Model:
    return load(write(tmp_path / "copier.so", copier()), threads=1)


def check(results: object, x: np.ndarray, k: np.ndarray) -> None:
    assert isinstance(results, tuple)
    for found, wanted in zip(results, expected(x, k), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_the_model_says_about_itself(demo: Model) -> None:
    assert [(s.name, s.dtype, s.shape, s.quantization) for s in demo.inputs] == [
        ("x", np.dtype(np.float32), (97, 33), None),
        ("k", np.dtype(np.int64), (3,), None),
    ]
    assert [s.name for s in demo.outputs] == ["y", "index", "same"]
    assert demo.metadata == packaged().metadata
    assert repr(demo) == (
        "<ingot model demo: [x: float32[97, 33], k: int64[3]] -> [y: float32[97, 33], index: int64[3], "
        "same: float32[97, 33]]>"
    )


def test_calls_by_position_by_name_and_both(demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    check(demo(x, k), x, k)
    check(demo(x, k=k), x, k)
    check(demo(k=k, x=x), x, k)
    results = demo.run({"k": k, "x": x})
    assert list(results) == ["y", "index", "same"]
    check(tuple(results.values()), x, k)


def test_an_npz_file_is_a_dict(demo: Model, tmp_path: Path, x: np.ndarray, k: np.ndarray) -> None:
    np.savez(tmp_path / "in.npz", x=x, k=k)
    with np.load(tmp_path / "in.npz") as arrays:
        check(tuple(demo.run(arrays).values()), x, k)


def test_one_output_comes_without_a_tuple(every: Model) -> None:
    every.outputs = every.outputs[:1]
    every._execute = lambda arrays, targets: [np.zeros(3)]  # type: ignore[method-assign]
    assert every(*every.inputs).shape == (3,)


def test_results_are_aligned_and_never_overwritten(demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    results = [demo(x, k + i) for i in range(20)]  # more than are made at once
    for i, result in enumerate(results):
        assert all(a.ctypes.data % 64 == 0 and a.flags.carray for a in result)
        check(result, x, k + i)


def test_arrays_that_are_not_contiguous_or_not_aligned_are_copied(demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    crooked = np.ndarray(x.shape, x.dtype, raw, 1)
    crooked[:] = x
    assert not crooked.flags.aligned
    check(demo(crooked, k), x, k)
    check(demo(np.asfortranarray(x), np.repeat(k, 2)[::2]), x, k)
    x.flags.writeable = False
    check(demo(x, k), x, k)
    check(demo(x[::-1], k), x[::-1], k)


def test_every_dtype_and_rank_passes_unchanged(every: Model) -> None:
    rng = np.random.default_rng(0)
    arrays = []
    for spec in every.inputs:
        bits = rng.integers(0, 2 if spec.type == "bool" else 256, (*spec.shape, spec.dtype.itemsize), np.uint8)
        arrays.append(bits.view(spec.dtype).reshape(spec.shape))
    for spec, given, found in zip(every.outputs, arrays, every(*arrays), strict=True):
        assert (found.dtype, found.shape) == (spec.dtype, spec.shape)
        assert found.tobytes() == given.tobytes()
    assert [s.type for s in every.inputs] == list(DTYPES)
    assert every.inputs[3].quantization == {
        "scales": [0.5, 0.25, 1.0, 2.0, 4.0], "zero_points": [0, -1, 2, -128, 127], "axis": 1,
    }  # fmt: skip


def test_bfloat16_goes_in_as_bits_or_as_ml_dtypes_and_comes_out_as_bits(every: Model) -> None:
    arrays = {s.name: np.zeros(s.shape, s.dtype) for s in every.inputs}
    spec = next(s for s in every.inputs if s.type == "bfloat16")
    values = np.full(spec.shape, 1.5, ml_dtypes.bfloat16)
    for given in (values, values.view(np.uint16)):
        found = every.run({**arrays, spec.name: given})["out bfloat16"]
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found.view(ml_dtypes.bfloat16), values)
    for wrong in (np.full(spec.shape, 1.5, np.float32), np.full(spec.shape, 1.5, np.float16)):
        with pytest.raises(InputError, match="bfloat16") as caught:
            every.run({**arrays, spec.name: wrong})
        assert "ml_dtypes" in str(caught.value)


def test_lists_pass_where_numpy_gives_exactly_the_dtype(demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    check(demo(x, [10, 20, 30]), x, k)
    with pytest.raises(InputError, match="wrong dtype") as caught:
        demo(x.tolist(), k)
    assert caught.value.hint == "np.asarray(x, np.float32)"


def test_the_callers_own_output_arrays(demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    y, index = np.empty_like(x), np.empty_like(k)
    results = demo.run({"x": x, "k": k}, {"index": index, "y": y})
    assert results["y"] is y
    assert results["index"] is index
    check(tuple(results.values()), x, k)
    for bad, what in (
        (np.empty((33, 97), np.float32).T, "not C-contiguous"),
        (np.broadcast_to(np.float32(0), (97, 33)), "not C-contiguous, aligned and writeable"),
        (np.empty((97, 33)), "wrong dtype"),
        (np.empty((97, 34), np.float32), "wrong shape"),
        (y.tolist(), "not an array"),
        (x, "overlaps"),
    ):
        with pytest.raises(InputError, match=what):
            demo.run({"x": x, "k": k}, {"y": bad})
    with pytest.raises(InputError, match="overlaps"):
        demo.run({"x": x, "k": k}, {"y": y, "same": y})
    with pytest.raises(InputError, match="no output 'Y'") as caught:
        demo.run({"x": x, "k": k}, {"Y": y})
    assert caught.value.hint == "did you mean 'y'?"


X32 = np.zeros((97, 33), np.float32)
K64 = np.zeros(3, np.int64)
BAD_CALLS = {
    "nothing": ((), {}, "an input is missing", "none", "also x: float32[97, 33], k: int64[3]", None),
    "missing": ((X32,), {}, "an input is missing", "x", "also k: int64[3]", None),
    "too many": ((X32, K64, K64), {}, "too many inputs", "3", "2: x, k", None),
    "unknown": ((X32,), {"K": K64}, "the model has no input 'K'", None, "x, k", "did you mean 'k'?"),
    "far": ((X32, K64), {"something": K64}, "the model has no input 'something'", None, "x, k", None),
    "twice": ((X32,), {"x": X32}, "input 'x' is given twice, by position and by name", None, None, None),
    "float64": (
        (X32.astype(float), K64), {}, "input 'x' has the wrong dtype", "float64", "float32", "x.astype(np.float32)",
    ),
    "int32": ((X32, K64.astype("i4")), {}, "input 'k' has the wrong dtype", "int32", "int64", "x.astype(np.int64)"),
    "byte order": (
        (X32.astype(">f4"), K64), {}, "input 'x' has the wrong dtype", ">f4", "float32", "x.astype(np.float32)",
    ),
    "transposed": ((X32.T, K64), {}, "input 'x' has the wrong shape", "(33, 97)", "(97, 33)", None),
    "extra axis": ((X32[None], K64), {}, "input 'x' has the wrong shape", "(1, 97, 33)", "(97, 33)", None),
    "flat": ((X32.ravel(), K64), {}, "input 'x' has the wrong shape", "(3201,)", "(97, 33)", None),
    "scalar": ((X32, 3), {}, "input 'k' has the wrong shape", "()", "(3,)", None),
    "none": ((X32, None), {}, "input 'k' has the wrong dtype", "object", "int64", "np.asarray(x, np.int64)"),
    "a dict": (
        ({"x": X32}, K64), {}, "input 'x' has the wrong dtype", "object", "float32", "model.run(x) takes a dict",
    ),
    "strings": ((X32, ["a", "b", "c"]), {}, "input 'k' has the wrong dtype", "<U1", "int64", "np.asarray(x, np.int64)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_refused_by_name(demo: Model, case: tuple) -> None:
    arrays, names, what, found, allowed, hint = case
    with pytest.raises(InputError) as caught:
        demo(*arrays, **names)
    error = caught.value
    assert (error.what, error.found, error.allowed, error.hint) == (what, found, allowed, hint)
    assert error.where is not None
    assert error.where.startswith("model demo (")
    assert error.exit_code == 2
    assert demo(X32, K64)[0][0, 0] == 1.0  # and the model still works


def test_objects_that_refuse_to_be_arrays(demo: Model) -> None:
    class Stubborn:
        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            raise RuntimeError("on another device\nfar away")

    for value in (Stubborn(), [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match="not an array"):
            demo(value, K64)


@pytest.mark.parametrize("value", [[X32, K64], "x", 7, None])
def test_run_wants_a_dict(demo: Model, value: object) -> None:
    with pytest.raises(InputError, match="not a dict"):
        demo.run(value)  # type: ignore[arg-type]


def test_advice_about_shapes(every: Model) -> None:
    spec = next(s for s in every.inputs if s.shape == (1,) and s.type == "uint16")
    arrays = {s.name: np.zeros(s.shape, s.dtype) for s in every.inputs}
    with pytest.raises(InputError) as caught:
        every.run({**arrays, spec.name: np.zeros((), np.uint16)})
    assert caught.value.hint == "x[np.newaxis]"
    spec.shape = (1, 3, 224, 225)
    with pytest.raises(InputError) as caught:
        every.run({**arrays, spec.name: np.zeros((1, 224, 225, 3), np.uint16)})
    assert caught.value.hint == "x.transpose(0, 3, 1, 2)"


def test_selftest_passes_fails_and_is_absent(demo: Model, tmp_path: Path, every: Model) -> None:
    assert 0 <= demo.selftest() < 1e-3
    broken = bytearray(library())
    broken[weights_at(library()) + 3] ^= 0x40  # an exponent bit of the first weight
    with pytest.raises(RunError, match="selftest failed") as caught:
        load(write(tmp_path / "broken.so", bytes(broken))).selftest()
    assert caught.value.found
    assert caught.value.exit_code == 1
    with pytest.raises(RunError, match="holds no selftest") as caught:
        every.selftest()
    assert caught.value.hint == "compile without --no-selftest"


def test_a_closed_model_says_so(demo_so: Path, x: np.ndarray, k: np.ndarray) -> None:
    with load(demo_so) as model:
        model(x, k)
    model.close()
    assert "(closed)" in repr(model)
    for use in (lambda: model(x, k), lambda: model.run({"x": x, "k": k}), model.selftest):
        with pytest.raises(RunError, match="closed"):
            use()
    check(load(demo_so)(x, k), x, k)


def test_it_cannot_be_pickled_or_copied(demo: Model) -> None:
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RunError, match="pickled or copied"):
            use(demo)


@pytest.mark.parametrize("threads", [-1, 65, 1 << 40, 1.0, "2", True])
def test_threads_out_of_range(demo_so: Path, threads: object) -> None:
    with pytest.raises(InputError, match="threads"):
        load(demo_so, threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [None, 0, 1, 2, 64])
def test_threads_in_range(demo_so: Path, threads: int | None, x: np.ndarray, k: np.ndarray) -> None:
    with load(demo_so, threads=threads) as model:
        check(model(x, k), x, k)


def blocked(model: Model, x: np.ndarray) -> tuple[threading.Thread, np.ndarray]:
    """A thread inside a run of the model, which goes on when the array's first element changes."""
    gate = np.array([-77, 0, 0], np.int64)
    thread = threading.Thread(target=lambda: model(x, gate))
    thread.start()
    deadline = time.monotonic() + 20
    while not model._lock.locked():
        assert time.monotonic() < deadline
    time.sleep(0.02)
    return thread, gate


def test_threads_take_turns_and_never_see_busy(demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    holder, gate = blocked(demo, x)
    results: list[object] = []

    def work(i: int) -> None:
        for _ in range(20):
            results.append((i, demo(x, k + i)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not results, "a call overtook the one that was running"
    gate[0] = 0
    for thread in (holder, *threads):
        thread.join(60)
    assert len(results) == 80
    for i, found in results:  # type: ignore[misc]
        check(found, x, k + i)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_process_works_even_if_a_thread_was_running(
    demo_so: Path, x: np.ndarray, k: np.ndarray, threads: int
) -> None:
    model = load(demo_so, threads=threads)
    model(x, k)
    holder, gate = blocked(model, x)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(model(x, k), x, k)
            check(load(demo_so, threads=1)(x, k), x, k)
            model.close()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    done, how = 0, 0
    while not done and time.monotonic() < deadline:
        done, how = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    gate[0] = 0
    holder.join(60)
    assert done, "the child hangs"
    assert how == 0
    check(model(x, k), x, k)


def test_several_models_side_by_side(tmp_path: Path, demo: Model, x: np.ndarray, k: np.ndarray) -> None:
    other = load(write(tmp_path / "other.so", library(name="other")), threads=1)
    again = load(tmp_path / "demo.so", threads=2)
    for model in (demo, other, again):
        check(model(x, k), x, k)
    assert other.metadata["name"] == "other"
    other.close()
    check(demo(x, k), x, k)


def test_load_errors_are_not_input_errors() -> None:
    assert not issubclass(LoadError, InputError)
    assert not issubclass(InputError, LoadError)
