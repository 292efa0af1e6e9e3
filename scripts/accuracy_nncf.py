"""One quantisation by OpenVINO's NNCF, in an environment of its own: MODEL CALIBRATION.npy DATA.npy OUT.npz."""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    model_path, calibration, data, out = sys.argv[1:]
    import nncf
    import openvino

    samples, judged = np.load(calibration), np.load(data)
    core = openvino.Core()
    model = core.read_model(model_path)
    shape = list(samples.shape[1:])
    if model.inputs[0].partial_shape.is_dynamic:
        model.reshape({model.inputs[0]: shape})
    dataset = nncf.Dataset([sample.reshape(shape) for sample in samples])
    # Mixed: weights per channel, activations symmetric or not as the layer before them suggests.
    quantized = nncf.quantize(model, dataset, preset=nncf.QuantizationPreset.MIXED, subset_size=len(samples))
    compiled = core.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.savez(out, output=np.stack([compiled(sample)[0] for sample in judged]))


if __name__ == "__main__":
    main()
