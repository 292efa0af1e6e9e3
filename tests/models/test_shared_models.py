"""The shared models on this machine: stored reference outputs, known facts, memory, transposes."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ingot
from frontend.shared_cases import CASES, Case
from models.conftest import case_of, error, run
from models.facts import FACTS, Fact

TOLERANCE = 1e-4
#: Reference outputs that are stored as float16 are that much off themselves, relative to the largest.
HALF = 2.0**-11

#: The runtime that made these references computes int8 weights with int8 activations; we widen the weights to float32.
DYNAMIC_RANGE = {"mlperf_tiny_kws/kws_ref_model_float32.tflite": 0.05}
#: Layers that hand on float16 round more often than a runtime that widens whole chains to float32.
HALVES = {"squeezenet_fp16/squeezenet_fp16.onnx": 2e-3}
#: The stored outputs came from another build of ONNX Runtime, whose answers today's does not repeat: compared live.
LIVE = {"magika_v3_3/model.onnx"}
#: Transposed convolutions put zeros between the pixels, in memory.
SPREAD = {"ppocr_v3_det/ch_PP-OCRv3_det_infer.onnx": 1.6}

FLOAT = [case for case in CASES if not case.quantized]
QUANTIZED = [case for case in CASES if case.quantized]

#: How far a quantised model's outputs may be from the reference runtime's (in the output's own units). Deep nets that
#: end in softmax move by whole percents when single roundings inside fall the other way; the known facts bind them.
STEPS = {
    "mobilenet_v1_025_uint8/mobilenet_v1_0.25_224_quant.tflite": 0,
    "mobilenet_v2_uint8/mobilenet_v2_1.0_224_quant.tflite": 20,
    "mobilenet_v2_ptq_int8/tf2_mobilenet_v2_1.0_224_ptq.tflite": 20,
    "squeezenet_int8_qdq/squeezenet_int8_qdq.onnx": 0.08,
    "mlperf_tiny_kws/kws_ref_model_int8.tflite": 0,
    "mlperf_tiny_vww/vww_96_int8.tflite": 0,
    # LiteRT's built-in kernels, which made these two references, round otherwise than its reference kernels.
    "mlperf_tiny_ic_resnet8/resnet8_int8.tflite": 12,
    "mlperf_tiny_ad/ad01_int8.tflite": 4,
    # Scores near one another change places, and their boxes with them.
    "ssd_mobilenet_v1_uint8/coco_ssd_mobilenet_v1_quant.tflite": 5,
    "yamnet/yamnet.tflite": 0.03,
    "stories260k_int8_dynamic/stories260k_int8_dynamic.onnx": 0.01,
    # The runtime that made this reference rounds activations to int8; we do not.
    "yolox_nano/yolox_nano_dynamic_range_quantize.tflite": 1.6,
}

#: Integer models that equal LiteRT's reference kernels bit for bit, with the number of inputs compared: those kernels
#: are slow. What a model computes in float at its end may be off by this much.
EXACT = {
    "mobilenet_v1_025_uint8/mobilenet_v1_0.25_224_quant.tflite": (8, 0.0),
    "mobilenet_v2_uint8/mobilenet_v2_1.0_224_quant.tflite": (3, 0.0),
    "mobilenet_v2_ptq_int8/tf2_mobilenet_v2_1.0_224_ptq.tflite": (3, 0.0),
    "mlperf_tiny_kws/kws_ref_model_int8.tflite": (100, 0.0),
    "mlperf_tiny_vww/vww_96_int8.tflite": (24, 0.0),
    "mlperf_tiny_ic_resnet8/resnet8_int8.tflite": (12, 0.0),
    "mlperf_tiny_ad/ad01_int8.tflite": (84, 0.0),
    "ssd_mobilenet_v1_uint8/coco_ssd_mobilenet_v1_quant.tflite": (2, 1e-6),
}

pytestmark = pytest.mark.slow


def ids(cases):
    return [case.id if isinstance(case, Case) else case.file.replace("/", "-") for case in cases]


@pytest.mark.parametrize("case", FLOAT, ids=ids(FLOAT))
def test_float_models_reproduce_the_reference(build, shared_models, case):
    model = ingot.load(build(case).path, threads=1)
    tolerance = {**DYNAMIC_RANGE, **HALVES}.get(case.file, TOLERANCE)
    for i in range(min(case.runs, 4)):
        feeds = case.inputs(shared_models, i)
        outputs = run(model, feeds)
        references = case.reference(shared_models, i)
        if case.file in LIVE:
            references = _onnxruntime(shared_models / case.file, feeds)
        assert len(outputs) >= len(references)
        for got, want in zip(outputs, references, strict=False):
            assert error(got, want) <= tolerance + (HALF if want.dtype == np.float16 else 0)


def _onnxruntime(path, feeds):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, feeds, strict=True)))


@pytest.mark.parametrize("case", QUANTIZED, ids=ids(QUANTIZED))
def test_quantized_models_are_near_the_reference(build, shared_models, case):
    model = ingot.load(build(case).path, threads=1)
    off = []
    for i in range(min(case.runs, 12)):
        outputs = run(model, case.inputs(shared_models, i))
        for got, want in zip(outputs, case.reference(shared_models, i), strict=True):
            assert got.dtype == want.dtype
            off.append(np.abs(got.astype(np.float64).reshape(want.shape) - want.astype(np.float64)).max())
    print(f"{case.file}: largest difference {max(off):g}")
    assert max(off) <= STEPS[case.file]


@pytest.mark.parametrize("file", EXACT)
def test_integer_models_equal_the_reference_kernels_bit_for_bit(build, shared_models, file):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    kind = litert.OpResolverType.BUILTIN_REF
    judge = litert.Interpreter(str(shared_models / file), experimental_op_resolver_type=kind, num_threads=1)
    judge.allocate_tensors()
    (case,) = [case for case in CASES if case.file == file]
    model, (runs, off) = ingot.load(build(case).path, threads=1), EXACT[file]
    for i in range(min(runs, case.runs)):
        feeds = case.inputs(shared_models, i)
        for detail, array in zip(judge.get_input_details(), feeds, strict=True):
            judge.set_tensor(detail["index"], array.reshape(detail["shape"]))
        judge.invoke()
        for got, detail in zip(run(model, feeds), judge.get_output_details(), strict=True):
            want = judge.get_tensor(detail["index"])
            difference = np.abs(got.astype(np.float64).reshape(want.shape) - want.astype(np.float64))
            assert difference.max() <= off, f"input {i} of {file}"


@pytest.mark.parametrize("fact", FACTS, ids=ids(FACTS))
def test_known_facts(build, shared_models, fact: Fact):
    (case,) = [case for case in CASES if case.file == fact.file]
    model = ingot.load(build(case).path)
    rows = [run(model, case.inputs(shared_models, i)) for i in range(fact.runs or case.runs)]
    outputs = [np.concatenate([row[k].reshape(1, *row[k].shape) for row in rows]) for k in range(len(rows[0]))]
    found = fact.of(shared_models, outputs)
    assert found == (pytest.approx(fact.known, abs=fact.within) if fact.within else fact.known)


def test_every_required_model_has_a_fact_or_a_reference():
    covered = {fact.file for fact in FACTS} | {case.file for case in CASES}
    assert {case.file for case in CASES if case.required} <= covered
    assert {fact.file for fact in FACTS} <= {case.file for case in CASES}
    assert set(STEPS) == {case.file for case in QUANTIZED}


def _source_transposes(shared_models, file):
    manifest = json.loads((shared_models / "MANIFEST.json").read_text())
    (entry,) = [f for m in manifest["models"] for f in m["files"] if f["path"] == file]
    operators = entry["operators"]
    return operators.get("Transpose", 0) + operators.get("TRANSPOSE", 0)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_the_arena_is_near_the_lower_bound(build, case):
    built = build(case)
    print(f"{case.file}: arena {built.metadata['arena_bytes']}, ratio {built.ratio:.3f}")
    assert built.ratio <= SPREAD.get(case.file, 1.10)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_at_most_two_transposes_are_added(build, shared_models, case):
    assert build(case).transposes <= _source_transposes(shared_models, case.file) + 2


def test_table(build, shared_models):
    """Print what each model costs: pytest -rP shows it."""
    row = "{:62} {:>8} {:>9} {:>6} {:>4} {:>4} {:>5} {:>5} {:>5}"
    lines = [row.format("model", "error", "arena", "ratio", "T", "src", "kern", "steps", "s")]
    for case in CASES:
        built, meta = build(case), build(case).metadata
        outputs = run(ingot.load(built.path, threads=1), case.inputs(shared_models, 0))
        worst = max(error(g, w) for g, w in zip(outputs, case.reference(shared_models, 0), strict=False))
        own = _source_transposes(shared_models, case.file)
        counts = (built.transposes, own, meta["kernels"], meta["steps"], f"{built.seconds:.1f}")
        lines.append(row.format(case.file, f"{worst:.1e}", meta["arena_bytes"], f"{built.ratio:.3f}", *counts))
    print("\n".join(lines))
    assert len(lines) == len(CASES) + 1


@pytest.mark.parametrize("name", ["mnist.onnx", "resnet8_float.tflite", "vww_96_int8", "stories260k_static64"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_do_not_change_a_bit(build, shared_models, name, threads):
    case = case_of(name)
    feeds = case.inputs(shared_models, 0)
    one = run(ingot.load(build(case).path, threads=1), feeds)
    many = run(ingot.load(build(case).path, threads=threads), feeds)
    for a, b in zip(one, many, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["mnist.onnx", "vww_96_int8", "keypoint"])
@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
def test_other_levels_of_this_machine(build, shared_models, name, target):
    case = case_of(name)
    model = ingot.load(build(case, target).path, threads=1)
    for got, want in zip(run(model, case.inputs(shared_models, 0)), case.reference(shared_models, 0), strict=True):
        if case.quantized:
            assert np.abs(got.astype(int) - want.astype(int)).max() <= STEPS[case.file]
        else:
            assert error(got, want) <= TOLERANCE
