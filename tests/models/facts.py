"""What is known about each shared model on its stored data: accuracies, counts of objects, classes seen.

A `Fact` runs the model on every stored row and returns something a person can check; `known` is what the files say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[np.ndarray]  # the model's outputs, each with one row per run


@dataclass(frozen=True)
class Fact:
    """`file`: the case's model file. `of(models, outputs)` must return `known`, or a number `within` so much of it."""

    file: str
    of: Callable[[Path, Rows], Any]
    known: Any
    runs: int | None = None  # None: every stored row
    within: float = 0.0


def _stored(models: Path, file: str, name: str) -> np.ndarray:
    with np.load(models / file) as data:
        return np.asarray(data[name])


def photos_right(models: Path, outputs: Rows) -> int:
    """Top-1 hits on the ImageNet photos; models with 1001 classes have the background first."""
    labels = json.loads((models / "data_imagenet_photos/labels.json").read_text())
    accepted = {item["photo"]: item["accepted_imagenet_ids"] for item in labels}
    names = _stored(models, "data_imagenet_photos/photos_224.npz", "names")
    scores = outputs[0].reshape(len(names), -1)
    top = scores.argmax(1) - (scores.shape[1] - 1000)
    return sum(int(t) in accepted[str(n)] for t, n in zip(top, names, strict=True))


def right(file: str, labels: str = "labels") -> Callable[[Path, Rows], int]:
    """Hits against stored labels."""

    def count(models: Path, outputs: Rows) -> int:
        wanted = _stored(models, file, labels)
        return int((outputs[0].reshape(len(wanted), -1).argmax(1) == wanted).sum())

    return count


def accuracy(file: str) -> Callable[[Path, Rows], float]:
    """Accuracy against stored labels, to four digits."""
    count = right(file)
    return lambda models, outputs: round(count(models, outputs) / len(outputs[0]), 4)


def reconstruction(models: Path, outputs: Rows) -> float:
    """Mean squared error between windows and their reconstruction, to two digits."""
    inputs = _stored(models, "mlperf_tiny_ad/inputs_and_reference.npz", "input_float32")
    return round(float(((inputs - outputs[0].reshape(inputs.shape)) ** 2).mean()), 2)


def faces(models: Path, outputs: Rows) -> list[int]:
    """Faces per photo: score over 0.7, after non-maximum suppression at 0.3."""
    boxes = _stored(models, "ultraface_rfb320/inputs_and_reference.npz", "boxes")
    scores = outputs[0].reshape(*boxes.shape[:2], 2)[..., 1]
    if len(outputs) > 1 and np.abs(outputs[1]).max() < 2:  # decoded boxes; the simplified file gives them undecoded
        boxes = outputs[1].reshape(boxes.shape)
    return [_suppressed(b[s > 0.7], s[s > 0.7]) for b, s in zip(boxes, scores, strict=True)]


def _suppressed(boxes: np.ndarray, scores: np.ndarray) -> int:
    order = list(np.argsort(-scores))
    count = 0
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    while order:
        best, count = order.pop(0), count + 1
        low, high = np.maximum(boxes[best, :2], boxes[order, :2]), np.minimum(boxes[best, 2:], boxes[order, 2:])
        both = np.prod(np.maximum(high - low, 0), axis=1)
        order = [o for o, b in zip(order, both, strict=True) if b / (area[best] + area[o] - b) <= 0.3]
    return count


#: The classes of COCO that appear in the stored photos.
COCO = {0: "person", 15: "cat", 16: "dog", 17: "horse", 46: "banana"}


def objects(models: Path, outputs: Rows) -> list[list[str]]:
    """Classes with an object score over one half, per photo."""
    predictions = outputs[0].reshape(-1, 3549, 85)
    scores = predictions[..., 4:5] * predictions[..., 5:]
    return [sorted({COCO.get(int(c), str(c)) for c in np.argwhere(s > 0.5)[:, 1]}) for s in scores]


def segments(models: Path, outputs: Rows) -> tuple[list[int], float]:
    """Classes seen, and the share of pixels that agree with the stored class map."""
    wanted = _stored(models, "deeplabv3_fp32/inputs_and_reference.npz", "classes")
    classes = outputs[0].reshape(257, 257, 21).argmax(-1)
    return sorted(int(c) for c in np.unique(classes)), round(float((classes == wanted).mean()), 3)


def next_tokens(models: Path, outputs: Rows) -> int:
    """Places at which the likeliest next token is that of the greedy story."""
    story = _stored(models, "stories260k/reference.npz", "greedy_ids")
    tokens = _stored(models, "stories260k/reference.npz", "input_tokens_64")[0]
    likeliest = outputs[0].reshape(64, -1).argmax(-1)
    assert list(story[:63]) == list(tokens[1:]) or list(story[:64]) == list(tokens)
    wanted = story[:64] if list(story[:63]) == list(tokens[1:]) else story[1:65]
    return int((likeliest == wanted).sum())


#: The classes of the label map of the SSD that appear in the stored photos.
SSD = {0: "person", 16: "cat", 17: "dog", 18: "horse", 51: "banana"}


def detections(models: Path, outputs: Rows) -> list[list[str]]:
    """Classes of the boxes with a score over one half, per photo."""
    classes, scores = (outputs[i].reshape(-1, 10) for i in (1, 2))
    rows = zip(classes, scores, strict=True)
    return [sorted({SSD.get(int(c), str(c)) for c in row[score > 0.5]}) for row, score in rows]


def sounds(models: Path, outputs: Rows) -> list[str]:
    """The likeliest sound of each window."""
    names = (models / "yamnet/labels.txt").read_text().split("\n")
    return [names[int(i)] for i in outputs[0].reshape(-1, 521).argmax(1)]


def published(models: Path, outputs: Rows) -> tuple[int, int]:
    """File types as the model's authors publish them, and those of their test files that are right."""
    file = "magika_v3_3/features_labels_reference.npz"
    kinds, labels, scores = (_stored(models, file, name) for name in ("target_labels", "labels", "published_score"))
    right_ = kinds[outputs[0].reshape(len(labels), -1).argmax(1)] == labels
    return int(right_[scores >= 0].sum()), int(right_[scores < 0].sum())


def same_tokens(models: Path, outputs: Rows) -> int:
    """Places at which the likeliest next token is that of the float model."""
    wanted = _stored(models, "stories260k/reference.npz", "logits_64").reshape(64, -1)
    return int((outputs[0].reshape(64, -1).argmax(-1) == wanted.argmax(-1)).sum())


def text_regions(models: Path, outputs: Rows) -> int:
    """Connected regions of more than 30 pixels with a text probability over 0.3."""
    wanted = outputs[0].reshape(outputs[0].shape[-2:]) > 0.3
    seen, count = np.zeros_like(wanted), 0
    for start in map(tuple, np.argwhere(wanted)):
        if seen[start]:
            continue
        stack, size = [start], 0
        seen[start] = True
        while stack:
            y, x = stack.pop()
            size += 1
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < wanted.shape[0] and 0 <= near[1] < wanted.shape[1]
                if inside and wanted[near] and not seen[near]:
                    seen[near] = True
                    stack.append(near)
        count += size > 30
    return count


_PERSON, _CIFAR = "data_person_photos/photos_96.npz", "data_cifar_classes_photos/photos_32.npz"

_HANDS = "hand_keypoint_mlp/features_and_reference.npz"

FACTS: tuple[Fact, ...] = (
    Fact("squeezenet_fp32/squeezenet_fp32.onnx", photos_right, 30),
    Fact("mobilenet_v1_025_fp32/mobilenet_v1_0.25_224.tflite", photos_right, 28),
    Fact("mobilenet_v1_025_uint8/mobilenet_v1_0.25_224_quant.tflite", photos_right, 30),
    Fact("mobilenet_v2_uint8/mobilenet_v2_1.0_224_quant.tflite", photos_right, 32),
    Fact("mobilenet_v2_ptq_int8/tf2_mobilenet_v2_1.0_224_ptq.tflite", photos_right, 32),
    Fact("mobilenet_v2_onnx_fp32/mobilenet_v2_1.0_224.onnx", photos_right, 31),
    Fact("squeezenet_int8_qdq/squeezenet_int8_qdq.onnx", photos_right, 30),
    Fact("mnist_cnn/mnist.onnx", accuracy("data_mnist/mnist_test_0_4999.npz"), 0.9830),
    Fact("mlperf_tiny_kws/kws_ref_model_int8.tflite", accuracy("data_kws/kws_features_even.npz"), 0.9182),
    # The reference runtime rounds activations to int8 in this model; we do not.
    Fact(
        "mlperf_tiny_kws/kws_ref_model_float32.tflite",
        accuracy("data_kws/kws_features_even.npz"),
        0.9198,
        within=0.002,
    ),
    Fact("mlperf_tiny_vww/vww_96_float.onnx", right(_PERSON), 22),
    Fact("mlperf_tiny_vww/vww_96_float.tflite", right(_PERSON), 22),
    Fact("mlperf_tiny_vww/vww_96_int8.tflite", right(_PERSON), 22),
    Fact("mlperf_tiny_ic_resnet8/resnet8_float.onnx", right(_CIFAR), 8),
    Fact("mlperf_tiny_ic_resnet8/resnet8_float.tflite", right(_CIFAR), 8),
    Fact("mlperf_tiny_ic_resnet8/resnet8_int8.tflite", right(_CIFAR), 7),
    Fact("mlperf_tiny_ad/ad01_fp32.tflite", reconstruction, 101.61),
    Fact("ultraface_rfb320/version-RFB-320_simplified.onnx", faces, [4, 2, 5, 10]),
    Fact("ultraface_rfb320/version-RFB-320.onnx", faces, [4, 2, 5, 10]),
    Fact(
        "yolox_nano/yolox_nano.onnx",
        objects,
        [["dog", "person"], ["cat"], ["horse", "person"], ["cat"], ["banana"]],
    ),
    Fact("deeplabv3_fp32/deeplabv3.tflite", segments, ([0, 13, 15], 1.0)),
    Fact(
        "hand_keypoint_mlp/keypoint_classifier.tflite", accuracy("hand_keypoint_mlp/features_and_reference.npz"), 0.9676
    ),
    Fact("iris_mlp/network.onnx", right("iris_mlp/inputs_and_reference.npz"), 6),
    Fact("stories260k/stories260k_static64.onnx", next_tokens, 64),
    Fact("stories260k/stories260k.onnx", next_tokens, 64),
    Fact("stories260k_int8_dynamic/stories260k_int8_dynamic.onnx", same_tokens, 62),
    Fact("squeezenet_fp16/squeezenet_fp16.onnx", photos_right, 30),
    Fact(
        "ssd_mobilenet_v1_uint8/coco_ssd_mobilenet_v1_quant.tflite",
        detections,
        [["dog", "person"], ["cat"], ["horse", "person"], ["cat"], ["banana"]],
    ),
    Fact("yamnet/yamnet.tflite", sounds, ["Speech"] * 4 + ["Silence"]),
    Fact("yolox_nano/yolox_nano_dynamic_range_quantize.tflite", objects, [["dog", "person"]], runs=1),
    Fact("yolox_nano/yolox_nano_float16_quantize.tflite", objects, [["dog", "person"]], runs=1),
    Fact("resnet8_int8_qoperator/resnet8_int8_qoperator.onnx", right(_CIFAR), 8),
    Fact("magika_v3_3/model.onnx", published, (129, 150)),
    Fact("ppocr_cls/cls-model.onnx", right("ppocr_cls/inputs_and_reference.npz"), 10),
    Fact("ppocr_v3_det/ch_PP-OCRv3_det_infer.onnx", text_regions, 16),
)
