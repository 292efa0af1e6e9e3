"""The selftest an artifact carries: a seeded input, and what an independent interpreter answers to it.

The generator exists twice, here and in runtime/selftest.c, and gives the same bits: a counter-based splitmix64 whose
values every element type holds exactly. The interpreter reads the ORIGINAL model file, so that the test judges the
whole compiler. It runs in a process of its own: a crash or a hang in it costs the selftest, not the compilation.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.packager.apart import TIME_LIMIT_S, Question

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported, TensorSpec

    Array = np.ndarray[Any, Any]

#: At most this many elements of each output are stored, evenly strided.
STORED_ELEMENTS = 1024
#: Share of max|expected| by which a float output may differ, by precision of the compiled model; the last one where
#: weights are stored in few bits.
_FLOAT_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2, "int8": 2.5e-1}
_FEW_BITS_TOLERANCE = 2.5e-1
#: The same where the source itself is quantised: interpreters round in other places, and one step is a large error.
_QUANTIZED_SOURCE_TOLERANCE = 2.5e-1
#: Share of the 255 steps by which an 8-bit output may differ, and share of the elements of other integer outputs.
_BYTE_TOLERANCE, _INTEGER_TOLERANCE = 1e-1, 1e-2
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SelfTestOutput:
    """Elements 0, stride, 2 * stride, ... of one flattened output, in its own dtype (bfloat16 as uint16 bits)."""

    values: Array
    stride: int
    tolerance: float


@dataclass(frozen=True)
class SelfTest:
    """What the artifact stores: the seed of the inputs and the expected outputs, in the model's order.

    `outputs` are those of the last of `runs` runs with these inputs, from a fresh state.
    """

    seed: int
    outputs: tuple[SelfTestOutput, ...]
    runs: int = 1

    def offsets(self) -> list[int]:
        """Where each output's values start in `data()`, in bytes."""
        result, at = [], 0
        for output in self.outputs:
            result.append(at)
            at += -(-output.values.nbytes // 8) * 8
        return result

    def data(self) -> bytes:
        """All stored values, little-endian, each output padded to 8 bytes."""
        parts = []
        for output in self.outputs:
            raw = output.values.astype(output.values.dtype.newbyteorder("<"), copy=False).tobytes()
            parts.append(raw + bytes(-len(raw) % 8))
        return b"".join(parts)


def random_bits(seed: int, tensor: int, count: int) -> Array:
    """`count` uint64 values for input number `tensor`: splitmix64 of a counter."""
    golden, mix1, mix2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    start = np.uint64((seed + tensor * 0xD1342543DE82EF95) & _MASK)
    z = np.arange(1, count + 1, dtype=np.uint64) * golden + start
    z = (z ^ (z >> np.uint64(30))) * mix1
    z = (z ^ (z >> np.uint64(27))) * mix2
    result: Array = z ^ (z >> np.uint64(31))
    return result


def _top(bits: Array, count: int) -> Array:
    result: Array = (bits >> np.uint64(64 - count)).astype(np.int64)
    return result


def random_input(spec: TensorSpec, seed: int, tensor: int) -> Array:
    """The selftest's value of one input, of the spec's shape and dtype (bfloat16 as uint16 bits).

    Floats are uniform in [-1, 1); 8-bit integers take their whole range; other integers and bools are 0 or 1, which is
    safe where they are indices.
    """
    bits = random_bits(seed, tensor, int(np.prod(spec.shape, dtype=np.int64)))
    values: Array
    if spec.dtype in ("int8", "uint8"):
        values = _top(bits, 8).astype(np.uint8).view(spec.dtype)
    elif spec.dtype == "bfloat16":
        values = (((_top(bits, 8) - 128) / 128).astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    elif spec.dtype == "float16":
        values = ((_top(bits, 11) - 1024) / 1024).astype(np.float16)
    elif spec.dtype in ("float32", "float64"):
        values = ((_top(bits, 24) - (1 << 23)) / (1 << 23)).astype(spec.dtype)
    else:
        values = _top(bits, 1).astype(spec.dtype)
    return values.reshape(spec.shape)


def random_inputs(specs: Sequence[TensorSpec], seed: int) -> dict[str, Array]:
    """The selftest's inputs by name."""
    return {spec.name: random_input(spec, seed, i) for i, spec in enumerate(specs)}


# ------------------------------------------------------------------------------------------- independent interpreters


def _typed(feeds: dict[str, Array], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    import ml_dtypes

    return {s.name: feeds[s.name].view(ml_dtypes.bfloat16) if s.dtype == "bfloat16" else feeds[s.name] for s in inputs}


def _is_tflite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"TFL3"


def _run_onnxruntime(path: Path, feeds: dict[str, Array], _: int) -> list[Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Without it, on x86 without VNNI, sums of two products of 8-bit integers saturate in 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, feeds)]


def _run_onnx_reference(path: Path, feeds: dict[str, Array], _: int) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    return [np.asarray(v) for v in ReferenceEvaluator(str(path)).run(None, feeds)]


def _run_litert(path: Path, feeds: dict[str, Array], times: int) -> list[Array]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    slots = interpreter.get_input_details()
    for slot, array in zip(slots, feeds.values(), strict=True):
        if tuple(slot["shape"]) != array.shape:
            interpreter.resize_tensor_input(slot["index"], array.shape, strict=True)
    interpreter.allocate_tensors()
    for _ in range(times):
        for slot, array in zip(slots, feeds.values(), strict=True):
            interpreter.set_tensor(slot["index"], array)
        interpreter.invoke()
    return [np.asarray(interpreter.get_tensor(slot["index"])) for slot in interpreter.get_output_details()]


def _source_is_quantized(path: Path) -> bool:
    if _is_tflite(path):
        from ai_edge_litert.interpreter import Interpreter

        details = Interpreter(model_path=str(path)).get_tensor_details()
        return any(d["dtype"] in (np.int8, np.uint8) for d in details)
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.graph.node)


def source_inputs(feeds: dict[str, Array], fixed: Sequence[tuple[int, str, Array]]) -> dict[str, Array]:
    """All inputs of the source model in its order: `feeds`, in order, with (position, name, value) put between them."""
    names = list(feeds)
    values = dict(feeds)
    for position, name, value in sorted(fixed, key=lambda item: item[0]):
        names.insert(position, name)
        values[name] = value
    return {name: values[name] for name in names}


def expected_outputs(
    path: str | Path,
    inputs: Sequence[TensorSpec],
    feeds: dict[str, Array],
    fixed: Sequence[tuple[int, str, Array]] = (),
    times: int = 1,
) -> list[Array] | None:
    """What an independent interpreter answers: ONNX Runtime or onnx.reference for ONNX, LiteRT for TFLite.

    `feeds` holds an array per input, by name; `fixed` the source's other inputs, see `source_inputs`. A TFLite model
    that keeps variables answers after `times` runs.
    Arrays in the model's order; None if no interpreter is installed or each of them fails.
    """
    path = Path(path)
    runners = (_run_litert,) if _is_tflite(path) else (_run_onnxruntime, _run_onnx_reference)
    for runner in runners:
        try:
            return runner(path, source_inputs(_typed(feeds, inputs), fixed), times)
        except Exception as error:  # whatever a foreign interpreter raises, the next one may work
            print(f"{runner.__name__[5:]}: {type(error).__name__}: {error}", file=sys.stderr)
    return None


def interpret(path: Path, inputs: Sequence[TensorSpec], feeds: dict[str, Array]) -> list[Array] | None:
    """What an independent interpreter in a process of its own answers to these inputs; None if none does."""
    fixed = [{"name": spec.name, "dtype": spec.dtype, "position": i} for i, spec in enumerate(inputs)]
    request = {"path": str(path.absolute()), "inputs": [], "seed": 0, "fixed": fixed, "next": [], "outputs": None}
    with contextlib.closing(_Inquiry({**request, "runs": 1, "times": 1}, list(feeds.values()))) as inquiry:
        answer = inquiry.answer()
    return None if isinstance(answer, str) else answer[0]


# ------------------------------------------------------------------------------------------------------ the selftest


def store(array: Array, spec: TensorSpec, tolerance: float) -> SelfTestOutput:
    """Keep evenly strided elements of an output."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if spec.dtype == "bfloat16":
        flat = flat.view(np.uint16)
    stride = max(1, -(-flat.size // STORED_ELEMENTS))
    return SelfTestOutput(np.ascontiguousarray(flat[::stride]), stride, tolerance)


def _tolerance(spec: TensorSpec, precision: str, *, quantized: bool) -> float:
    if spec.dtype in ("int8", "uint8"):
        return _BYTE_TOLERANCE
    if not spec.dtype.endswith(("16", "32", "64")) or "int" in spec.dtype:
        return _INTEGER_TOLERANCE
    allowed = _FEW_BITS_TOLERANCE if "+" in precision else _FLOAT_TOLERANCE.get(precision, 1e-3)
    return max(allowed, _QUANTIZED_SOURCE_TOLERANCE if quantized else 0.0)


class _Inquiry:
    """One request to `main`, at work in a process of its own while this one goes on; `close` ends it.

    values: those of the request's `fixed`, in order. Raises nothing: what goes wrong is the answer.
    """

    def __init__(self, request: dict[str, Any], values: Sequence[Array]) -> None:
        self._open = contextlib.ExitStack()
        self._why_not = ""
        try:
            folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="ingot-")))
            answer, fixed = folder / "answer.npz", folder / "fixed.npz"
            np.savez(fixed, **{f"fixed_{i}": _stored(value) for i, value in enumerate(values)})  # type: ignore[arg-type]
            self._question = Question("ingot.packager.selftest", request, answer, fixed, answer=answer)
            self._open.callback(self._question.close)
        except OSError as error:
            self._why_not = str(error)

    def answer(self) -> tuple[list[Array], bool] | str:
        """The outputs and whether the source is quantised, or why there are none. Waits for them."""
        if self._why_not:
            return self._why_not
        try:
            found = self._question.arrays()
            return [found[f"output_{i}"] for i in range(len(found) - 1)], bool(found["quantized"])
        except subprocess.TimeoutExpired:
            return f"the interpreter took longer than {TIME_LIMIT_S} s"
        except (OSError, ValueError, KeyError) as error:
            return str(error)

    def close(self) -> None:
        """End the process and remove its files."""
        self._open.close()


class Reference(_Inquiry):
    """What an interpreter of the source answers to the selftest's input: `build_selftest` takes it."""

    def __init__(self, path: str | Path, imported: Imported) -> None:
        self.seed = int(imported.source_sha256[:16] or "0", 16)
        specs = [{"name": s.name, "dtype": s.dtype, "shape": s.shape} for s in imported.user_inputs]
        fed = [s for s in imported.states if s.in_source]
        kept = [(imported.source_position(s.input), imported.inputs[s.input], s.initial) for s in fed]
        known = [*kept, *((b.position, b.spec, b.value) for b in imported.bound)]
        # A second run shows that the first has left what it should; nobody can feed one half of the states by hand.
        self.runs = 2 if imported.states and len(fed) in (0, len(imported.states)) else 1
        request = {
            "path": str(Path(path).absolute()),
            "inputs": specs,
            "seed": self.seed,
            "fixed": [{"name": spec.name, "dtype": spec.dtype, "position": place} for place, spec, _ in known],
            "next": [s.output for s in fed],
            "outputs": list(imported.cut.outputs) if imported.cut is not None else None,
            "runs": self.runs if fed else 1,
            "times": 1 if fed else self.runs,
        }
        super().__init__(request, [value for _, _, value in known])


def build_selftest(reference: Reference, imported: Imported, *, precision: str) -> tuple[SelfTest | None, str | None]:
    """The selftest of a model, or None and a sentence that says why there is none. Raises nothing."""
    answer = reference.answer()
    if isinstance(answer, str):
        return None, _notice(answer)
    arrays, quantized = answer
    added = {item.counter for item in imported.counts} | {s.output for s in imported.states if not s.in_source}
    sources = len(imported.outputs) - len(added)
    if len(arrays) != sources:
        return None, _notice(f"the interpreter gives {len(arrays)} outputs, the model has {sources}")
    outputs = []
    kept_outputs = {s.output for s in imported.states}
    axes = {item.output: item.axis for item in imported.counts}
    for index, (array, spec) in enumerate(zip(arrays, imported.outputs, strict=False)):  # what was added comes last
        if index in kept_outputs:
            continue
        dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        if index in axes and array.ndim == len(spec.shape):
            array = _filled(array, spec, axes[index])
        if array.shape != spec.shape or array.dtype.name != dtype:
            found = f"{array.dtype.name} {list(array.shape)}"
            return None, _notice(
                f"for output '{spec.name}' the interpreter gives {found}, not {dtype} {list(spec.shape)}"
            )
        outputs.append(store(array, spec, _tolerance(spec, precision, quantized=quantized)))
    return SelfTest(reference.seed, tuple(outputs), reference.runs), None


def _filled(array: Array, spec: TensorSpec, axis: int) -> Array:
    """An array with zeros behind its last entry along an axis, as an output has them whose size depends on data."""
    missing = spec.shape[axis] - array.shape[axis]
    return np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing > 0 else array


def _stored(array: Array) -> Array:
    """An array as a .npz file can hold it: bfloat16 as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _notice(why: str) -> str:
    return f"the artifact has no selftest: {why}"


def main() -> int:
    """Answer one request on standard input (JSON, see `build_selftest`) with the .npz file named first.

    The second argument names a .npz file with the values of the inputs `fixed`: first those of the state, whose next
    values are the outputs `next`, then bound ones.
    """
    import ml_dtypes

    from ingot.frontend.interface import TensorSpec

    request = json.load(sys.stdin)
    inputs = [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in request["inputs"]]
    path = Path(request["path"])
    if request["outputs"] is not None:
        from ingot.packager.source_part import write_part

        whole, path = path, Path(sys.argv[2]).with_name("part")
        given = [entry["name"] for entry in (*request["inputs"], *request["fixed"])]
        write_part(whole, request["outputs"], given, path)
    fixed = []
    with np.load(sys.argv[2], allow_pickle=False) as file:
        for i, entry in enumerate(request["fixed"]):
            value = file[f"fixed_{i}"]
            typed = value.view(ml_dtypes.bfloat16) if entry["dtype"] == "bfloat16" else value
            fixed.append((entry["position"], entry["name"], typed))
    arrays: list[Array] | None = None
    for _ in range(request["runs"]):
        feeds = random_inputs(inputs, request["seed"])
        arrays = expected_outputs(path, inputs, feeds, fixed, request["times"])
        if arrays is None:
            return 1
        for i, output in enumerate(request["next"]):
            fixed[i] = (*fixed[i][:2], arrays[output])
    named = {f"output_{i}": _stored(array) for i, array in enumerate(arrays or [])}
    np.savez(sys.argv[1], quantized=np.array(_source_is_quantized(path)), **named)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
