"""One quantisation by OpenVINO's NNCF, in an environment of its own: MODEL SAMPLES.npz OUT.xml [DATA.npy OUTPUTS.npz].

SAMPLES.npz holds an array for each input, in the model's order, with the samples along the first dimension. With
DATA.npy, samples of a model of one input, the first outputs of the quantised model on them go into OUTPUTS.npz.
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    model_path, calibration, out, *judged = sys.argv[1:]
    import nncf
    import openvino

    with np.load(calibration, allow_pickle=False) as archive:
        arrays = [archive[name] for name in archive.files]
    core = openvino.Core()
    model = core.read_model(model_path)
    shapes = [list(array.shape[1:]) for array in arrays]
    if any(port.partial_shape.is_dynamic for port in model.inputs):
        model.reshape(dict(zip(model.inputs, shapes, strict=True)))
    dataset = nncf.Dataset(list(zip(*arrays, strict=True)))
    # Mixed: weights per channel, activations symmetric or not as the layer before them suggests.
    preset, count = nncf.QuantizationPreset.MIXED, len(arrays[0])
    quantized = nncf.quantize(model, dataset, preset=preset, subset_size=count)
    openvino.save_model(quantized, out, compress_to_fp16=False)
    if judged:
        data, outputs = judged
        compiled = core.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        np.savez(outputs, output=np.stack([compiled(sample)[0] for sample in np.load(data)]))


if __name__ == "__main__":
    main()
