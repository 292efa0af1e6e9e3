"""Quantisation after training by other tools, each as its own documentation has it: for scripts/accuracy and bench."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ingot.arrays import npz_bytes

Array = np.ndarray[Any, Any]
#: Arrays by input name, in the model's order, with the samples along a first dimension: [N, *the input's shape].
Samples = dict[str, Array]
REPO = Path(__file__).resolve().parent.parent


def sqnr(reference: Array, other: Array) -> float:
    """Signal to quantisation noise over all outputs, in decibels."""
    signal = reference.astype(np.float64).reshape(-1)
    noise = signal - other.astype(np.float64).reshape(-1)
    return float(10 * np.log10(np.sum(signal**2) / max(float(np.sum(noise**2)), 1e-30)))


def prepared(model: Path, folder: Path) -> Path:
    """The model as the other tools like it best, in `folder`: a recent opset, constants folded. TFLite as it is."""
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if model.suffix != ".onnx":
        return model
    raised, ready = folder / "raised.onnx", folder / "ready.onnx"
    loaded = onnx.load(model)
    if loaded.opset_import[0].version < 13:
        loaded = version_converter.convert_version(loaded, 17)
    onnx.save(loaded, raised)
    quant_pre_process(str(raised), str(ready), skip_symbolic_shape=True)
    return ready


class _Reader:
    """ONNX Runtime's calibration reader."""

    def __init__(self, samples: Samples) -> None:
        self.feeds: Iterator[dict[str, Array]] = iter(
            [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


def by_onnxruntime(model: Path, samples: Samples, out: Path, method: str, *, reduce_range: bool = False) -> None:
    """Write the QDQ model of ONNX Runtime's static quantisation: unsigned activations, weights per output channel.

    method: a name of its CalibrationMethod. reduce_range: weights of 7 bits. Raises RuntimeError for a model that is
    not ONNX, and whatever the tool raises.
    """
    from onnxruntime import quantization as q

    if model.suffix != ".onnx":
        raise RuntimeError("reads ONNX only")
    with tempfile.TemporaryDirectory() as folder:
        q.quantize_static(
            str(prepared(model, Path(folder))),
            str(out),
            _Reader(samples),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            calibrate_method=q.CalibrationMethod[method],
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            # It fails on biases of one dimension with several scales.
            extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
        )


def by_nncf(python: str, model: Path, samples: Samples, out: Path, judged: Array | None = None) -> Array | None:
    """Write the OpenVINO model (.xml, .bin) of NNCF's quantisation; `python` has nncf and openvino.

    With `judged`, samples [N, ...] of a model of one input, returns the first outputs of the quantised model on them.
    Raises RuntimeError with the last line that the tool wrote where it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration, data, outputs = (folder / file for file in ("samples.npz", "data.npy", "outputs.npz"))
        calibration.write_bytes(npz_bytes(samples))
        script = str(REPO / "scripts" / "quantise_nncf.py")
        command = [python, script, str(prepared(model, folder)), str(calibration), str(out)]
        if judged is not None:
            np.save(data, judged)
            command += [str(data), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:])[:200])
        return None if judged is None else np.asarray(np.load(outputs)["output"])
