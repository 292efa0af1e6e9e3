"""The shared models with their stored inputs and reference outputs, one case each, for any test that runs models.

`inputs(models)` and `reference(models)` read at most what one run needs: the first `rows` rows of the stored data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Case:
    """One model: its file, the input of run `i`, and the outputs the reference runtime gave for it."""

    file: str
    runs: int
    inputs: Callable[[Path, int], Arrays]
    reference: Callable[[Path, int], Arrays]
    shape: dict[str, tuple[int, ...]] | None = None
    quantized: bool = False
    required: bool = True

    @property
    def id(self) -> str:
        """Short name for test ids."""
        return self.file.replace("/", "-")


def _photos(models: Path, i: int) -> np.ndarray:
    with np.load(models / "data_imagenet_photos/photos_224.npz") as data:
        return data["images"][i : i + 1]


def _caffe(models: Path, i: int) -> Arrays:
    pixels = _photos(models, i).astype(np.float32) - np.array([123.68, 116.78, 103.94], np.float32)
    return [np.ascontiguousarray(pixels[..., ::-1].transpose(0, 3, 1, 2))]


def _npz(file: str, *names: str, rank: int | None = None) -> Callable[[Path, int], Arrays]:
    def read(models: Path, i: int) -> Arrays:
        with np.load(models / file) as data:
            return [data[name][i : i + 1] for name in names]

    return read


def _nchw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _map(file: str, name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, int], Arrays]:
    def read(models: Path, i: int) -> Arrays:
        with np.load(models / file) as data:
            return [function(data[name][i : i + 1])]

    return read


def _whole(file: str, *names: str) -> Callable[[Path, int], Arrays]:
    def read(models: Path, i: int) -> Arrays:
        with np.load(models / file) as data:
            return [data[name] for name in names]

    return read


_PERSON, _CIFAR = "data_person_photos/photos_96.npz", "data_cifar_classes_photos/photos_32.npz"
_PHOTO, _KWS = "data_imagenet_photos/photos_224.npz", "data_kws/kws_features_even.npz"


def _minus_128(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.int16) - 128).astype(np.int8)


def _float(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32)


def _imagenet_norm(pixels: np.ndarray) -> np.ndarray:
    scaled = pixels.astype(np.float32) / 255 - np.array([0.485, 0.456, 0.406], np.float32)
    return _nchw(scaled / np.array([0.229, 0.224, 0.225], np.float32))


def _det(name: str, size: tuple[int, int]) -> Case:
    def read(models: Path, i: int) -> Arrays:
        with np.load(models / "ppocr_v3_det/inputs_and_reference.npz") as data:
            return [_imagenet_norm(data[f"image_{name}"][None])]

    return Case(
        "ppocr_v3_det/ch_PP-OCRv3_det_infer.onnx",
        1,
        read,
        _whole("ppocr_v3_det/inputs_and_reference.npz", f"map_{name}"),
        shape={"x": (1, 3, *size)},
        required=False,
    )


CASES: tuple[Case, ...] = (
    Case("squeezenet_fp32/squeezenet_fp32.onnx", 34, _caffe, _npz("squeezenet_fp32/reference_outputs.npz", "output")),
    Case(
        "mobilenet_v1_025_fp32/mobilenet_v1_0.25_224.tflite",
        34,
        _map(_PHOTO, "images", lambda x: (_float(x) - 127.5) / 127.5),
        _npz("mobilenet_v1_025_fp32/reference_outputs.npz", "output"),
    ),
    Case(
        "mobilenet_v1_025_uint8/mobilenet_v1_0.25_224_quant.tflite",
        34,
        _npz(_PHOTO, "images"),
        _npz("mobilenet_v1_025_uint8/reference_outputs.npz", "output"),
        quantized=True,
    ),
    Case(
        "mobilenet_v2_uint8/mobilenet_v2_1.0_224_quant.tflite",
        34,
        _npz(_PHOTO, "images"),
        _npz("mobilenet_v2_uint8/reference_outputs.npz", "output"),
        quantized=True,
    ),
    Case(
        "mobilenet_v2_ptq_int8/tf2_mobilenet_v2_1.0_224_ptq.tflite",
        34,
        _npz(_PHOTO, "images"),
        _npz("mobilenet_v2_ptq_int8/reference_outputs.npz", "output"),
        quantized=True,
        required=False,
    ),
    Case(
        "mobilenet_v2_onnx_fp32/mobilenet_v2_1.0_224.onnx",
        34,
        _map(_PHOTO, "images", lambda x: _nchw((_float(x) - 128) / 128)),
        _npz("mobilenet_v2_onnx_fp32/reference_outputs.npz", "output"),
    ),
    Case(
        "squeezenet_int8_qdq/squeezenet_int8_qdq.onnx",
        34,
        _caffe,
        _npz("squeezenet_int8_qdq/reference_outputs.npz", "output"),
        quantized=True,
    ),
    Case(
        "mnist_cnn/mnist.onnx",
        5000,
        _map("data_mnist/mnist_test_0_4999.npz", "images", lambda x: _float(x)[:, None]),
        _npz("mnist_cnn/reference_outputs.npz", "output"),
    ),
    Case(
        "mlperf_tiny_kws/kws_ref_model_float32.tflite",
        2445,
        _map(_KWS, "features", lambda x: (_float(x) - np.float32(83)) * np.float32(0.5847029)),
        _npz("mlperf_tiny_kws/reference_outputs.npz", "float32"),
    ),
    Case(
        "mlperf_tiny_kws/kws_ref_model_int8.tflite",
        2445,
        _npz(_KWS, "features"),
        _npz("mlperf_tiny_kws/reference_outputs.npz", "int8"),
        quantized=True,
    ),
    Case(
        "mlperf_tiny_vww/vww_96_float.onnx",
        24,
        _map(_PERSON, "images", lambda x: _nchw(_float(x) / 255)),
        _npz("mlperf_tiny_vww/reference_outputs.npz", "onnx_float32"),
    ),
    Case(
        "mlperf_tiny_vww/vww_96_float.tflite",
        24,
        _map(_PERSON, "images", lambda x: _float(x) / 255),
        _npz("mlperf_tiny_vww/reference_outputs.npz", "float32"),
    ),
    Case(
        "mlperf_tiny_vww/vww_96_int8.tflite",
        24,
        _map(_PERSON, "images", _minus_128),
        _npz("mlperf_tiny_vww/reference_outputs.npz", "int8"),
        quantized=True,
    ),
    Case(
        "mlperf_tiny_ic_resnet8/resnet8_float.onnx",
        12,
        _map(_CIFAR, "images", lambda x: _nchw(_float(x))),
        _npz("mlperf_tiny_ic_resnet8/reference_outputs.npz", "onnx_float32"),
    ),
    Case(
        "mlperf_tiny_ic_resnet8/resnet8_float.tflite",
        12,
        _map(_CIFAR, "images", _float),
        _npz("mlperf_tiny_ic_resnet8/reference_outputs.npz", "float32"),
    ),
    Case(
        "mlperf_tiny_ic_resnet8/resnet8_int8.tflite",
        12,
        _map(_CIFAR, "images", _minus_128),
        _npz("mlperf_tiny_ic_resnet8/reference_outputs.npz", "int8"),
        quantized=True,
    ),
    Case(
        "mlperf_tiny_ad/ad01_fp32.tflite",
        84,
        _npz("mlperf_tiny_ad/inputs_and_reference.npz", "input_float32"),
        _npz("mlperf_tiny_ad/inputs_and_reference.npz", "float32"),
    ),
    Case(
        "mlperf_tiny_ad/ad01_int8.tflite",
        84,
        _npz("mlperf_tiny_ad/inputs_and_reference.npz", "input_int8"),
        _npz("mlperf_tiny_ad/inputs_and_reference.npz", "int8"),
        quantized=True,
    ),
    Case(
        "ultraface_rfb320/version-RFB-320_simplified.onnx",
        4,
        _map("ultraface_rfb320/inputs_and_reference.npz", "images", lambda x: _nchw((_float(x) - 127) / 128)),
        # Its second output is the boxes before decoding; the stored boxes are decoded (the other file's output).
        _npz("ultraface_rfb320/inputs_and_reference.npz", "scores"),
    ),
    Case(
        "ultraface_rfb320/version-RFB-320.onnx",
        4,
        _map("ultraface_rfb320/inputs_and_reference.npz", "images", lambda x: _nchw((_float(x) - 127) / 128)),
        _npz("ultraface_rfb320/inputs_and_reference.npz", "scores", "boxes"),
        required=False,
    ),
    Case(
        "yolox_nano/yolox_nano.onnx",
        5,
        _map("yolox_nano/inputs_and_reference.npz", "images", lambda x: _nchw(_float(x)[..., ::-1])),
        _npz("yolox_nano/inputs_and_reference.npz", "onnx"),
    ),
    Case(
        "yolox_nano/yolox_nano_float16_quantize.tflite",
        1,
        _map("yolox_nano/inputs_and_reference.npz", "images", lambda x: _nchw(_float(x)[..., ::-1])),
        _npz("yolox_nano/inputs_and_reference.npz", "tflite_float16_weights"),
        required=False,
    ),
    Case(
        "deeplabv3_fp32/deeplabv3.tflite",
        1,
        lambda models, i: [
            np.load(models / "deeplabv3_fp32/inputs_and_reference.npz")["image"][None] / np.float32(127.5) - 1
        ],
        _whole("deeplabv3_fp32/inputs_and_reference.npz", "output"),
    ),
    Case(
        "hand_keypoint_mlp/keypoint_classifier.tflite",
        2225,
        _npz("hand_keypoint_mlp/features_and_reference.npz", "features"),
        _npz("hand_keypoint_mlp/features_and_reference.npz", "output"),
    ),
    Case(
        "iris_mlp/network.onnx",
        6,
        _npz("iris_mlp/inputs_and_reference.npz", "features"),
        _npz("iris_mlp/inputs_and_reference.npz", "output"),
    ),
    Case(
        "resnet8_int8_qoperator/resnet8_int8_qoperator.onnx",
        12,
        _map(_CIFAR, "images", lambda x: _nchw(_float(x))),
        _npz("resnet8_int8_qoperator/reference_outputs.npz", "output"),
        required=False,
    ),
    Case(
        "stories260k/stories260k_static64.onnx",
        1,
        _whole("stories260k/reference.npz", "input_tokens_64"),
        _whole("stories260k/reference.npz", "logits_64"),
    ),
    Case(
        "stories260k/stories260k.onnx",
        1,
        _whole("stories260k/reference.npz", "input_tokens_64"),
        _whole("stories260k/reference.npz", "logits_64"),
        shape={"tokens": (1, 64)},
        required=False,
    ),
    Case(
        "magika_v3_3/model.onnx",
        281,
        _map("magika_v3_3/features_labels_reference.npz", "features", lambda x: x.astype(np.int32)),
        _npz("magika_v3_3/features_labels_reference.npz", "output"),
        required=False,
    ),
    Case(
        "ppocr_cls/cls-model.onnx",
        10,
        _npz("ppocr_cls/inputs_and_reference.npz", "input"),
        _npz("ppocr_cls/inputs_and_reference.npz", "output"),
        shape={"x": (1, 3, 48, 192)},
        required=False,
    ),
    _det("11", (640, 640)),
    Case(
        "squeezenet_fp16/squeezenet_fp16.onnx",
        34,
        lambda models, i: [_caffe(models, i)[0].astype(np.float16)],
        _npz("squeezenet_fp16/reference_outputs.npz", "output"),
        required=False,
    ),
    Case(
        "ssd_mobilenet_v1_uint8/coco_ssd_mobilenet_v1_quant.tflite",
        5,
        _npz("ssd_mobilenet_v1_uint8/inputs_and_reference.npz", "images"),
        _npz("ssd_mobilenet_v1_uint8/inputs_and_reference.npz", "boxes", "classes", "scores", "count"),
        quantized=True,
        required=False,
    ),
    Case(
        "yamnet/yamnet.tflite",
        5,
        lambda models, i: [np.load(models / "yamnet/inputs_and_reference.npz")["waveform"][i]],
        _npz("yamnet/inputs_and_reference.npz", "scores"),
        quantized=True,
        required=False,
    ),
    Case(
        "stories260k_int8_dynamic/stories260k_int8_dynamic.onnx",
        1,
        _whole("stories260k/reference.npz", "input_tokens_64"),
        _whole("stories260k_int8_dynamic/reference.npz", "logits_64"),
        shape={"tokens": (1, 64)},
        quantized=True,
        required=False,
    ),
    Case(
        "yolox_nano/yolox_nano_dynamic_range_quantize.tflite",
        1,
        _map("yolox_nano/inputs_and_reference.npz", "images", lambda x: _nchw(_float(x)[..., ::-1])),
        _npz("yolox_nano/inputs_and_reference.npz", "tflite_dynamic_range"),
        quantized=True,
        required=False,
    ),
)
