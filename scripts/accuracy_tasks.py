"""What scripts/accuracy judges: models, their inputs in two halves, and what a person would look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Metric = Callable[[Array, Array, Array], str]  # float outputs, quantised outputs, sample numbers -> text


@dataclass(frozen=True)
class Task:
    """One model.

    data: all samples of its one input, [N, ...]. folds: (samples to calibrate on, samples to judge), in turn.
    metric: (first outputs of the float model, of the quantised one, their sample numbers) -> a short text.
    """

    name: str
    file: str
    data: Array
    folds: tuple[tuple[Array, Array], ...]
    metric: Metric


def halves(count: int, most: int = 100, gap: int = 0, shuffle: bool = True) -> tuple[tuple[Array, Array], ...]:
    """Two halves: each is judged by a model calibrated on at most `most` samples of the other.

    Without shuffling the halves are the first and the second; `gap` samples next to the border calibrate nothing, for
    samples that overlap with their neighbours.
    """
    order = np.random.default_rng(0).permutation(count) if shuffle else np.arange(count)
    first, second = order[: count // 2], order[count // 2 :]
    return (first[: len(first) - gap][:most], np.sort(second)), (second[gap:][:most], np.sort(first))


def top1(labels: Array) -> Metric:
    """Right answers of the float and the quantised model."""

    def text(reference: Array, outputs: Array, index: Array) -> str:
        wanted = labels[index]
        before = (reference.reshape(len(index), -1).argmax(1) == wanted).mean()
        after = (outputs.reshape(len(index), -1).argmax(1) == wanted).mean()
        return f"top-1 {before:.2%} to {after:.2%}"

    return text


def photos(models: Path, names: Array) -> Metric:
    """Photos right before and after, and those lost: any of the accepted classes counts."""
    accepted = {p["photo"]: p["accepted_imagenet_ids"] for p in json.loads((models / _LABELS).read_text())}

    def text(reference: Array, outputs: Array, index: Array) -> str:
        def right(scores: Array) -> Array:
            rows = scores.reshape(len(index), -1)
            return np.array(
                [
                    int(r.argmax()) - (rows.shape[1] - 1000) in accepted[str(names[i])]
                    for r, i in zip(rows, index, strict=True)
                ]
            )

        before, after = right(reference), right(outputs)
        return f"photos right {before.sum()} to {after.sum()}, lost {(before & ~after).sum()}"

    return text


def reconstruction(data: Array) -> Metric:
    """Mean squared error of the reconstruction before and after."""

    def text(reference: Array, outputs: Array, index: Array) -> str:
        before, after = (
            float(((data[index] - x.reshape(data[index].shape)) ** 2).mean()) for x in (reference, outputs)
        )
        return f"error {before:.2f} to {after:.2f}"

    return text


def next_token(reference: Array, outputs: Array, index: Array) -> str:
    """Places with the same likeliest token."""
    same = reference.argmax(-1) == outputs.argmax(-1)
    return f"next token same at {same.sum()} of {same.size}"


def objects(reference: Array, outputs: Array, index: Array) -> str:
    """Boxes over a score of one half: how many of them are over it before and after."""
    before, after = (x[..., 4] * x[..., 5:].max(-1) > 0.5 for x in (reference, outputs))
    return f"boxes {before.sum()} to {after.sum()}, common {(before & after).sum()}"


_LABELS = "data_imagenet_photos/labels.json"


def _caffe(pixels: Array) -> Array:
    return (pixels.astype(np.float32) - np.array([123.68, 116.78, 103.94], np.float32))[..., ::-1]


def _nchw(pixels: Array) -> Array:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def tasks(models: Path) -> list[Task]:
    """All tasks, the small models first."""

    def stored(file: str) -> dict[str, Array]:
        with np.load(models / file) as data:
            return {name: data[name] for name in data.files}

    digits, words = stored("data_mnist/mnist_test_0_4999.npz"), stored("data_kws/kws_features_even.npz")
    people, cifar = stored("data_person_photos/photos_96.npz"), stored("data_cifar_classes_photos/photos_32.npz")
    sounds = stored("mlperf_tiny_ad/inputs_and_reference.npz")["input_float32"]
    pictures = stored("data_imagenet_photos/photos_224.npz")
    images, names = pictures["images"], pictures["names"]
    tokens = stored("stories260k/reference.npz")["greedy_ids"].astype(np.int64)
    story = np.stack([np.concatenate([[1], tokens[:63]]), *(tokens[i : i + 64] for i in range(64, 137, 8))])[:, None]
    scenes = stored("yolox_nano/inputs_and_reference.npz")["images"]
    float_people, float_cifar = people["images"].astype(np.float32) / 255, cifar["images"].astype(np.float32)
    many, few = halves(len(images)), halves(len(people["images"]))
    handful = halves(len(cifar["images"]))
    mobile = (images.astype(np.float32) - 128) / 128
    return [
        Task(
            "MNIST CNN",
            "mnist_cnn/mnist.onnx",
            digits["images"].astype(np.float32).reshape(-1, 1, 1, 28, 28),
            halves(5000),
            top1(digits["labels"]),
        ),
        Task(
            "KWS DS-CNN (TFLite)",
            "mlperf_tiny_kws/kws_ref_model_float32.tflite",
            ((words["features"].astype(np.float32) - 83) * np.float32(0.5847029)).reshape(-1, 1, 49, 10, 1),
            halves(2445),
            top1(words["labels"]),
        ),
        Task(
            "AD autoencoder (TFLite)",
            "mlperf_tiny_ad/ad01_fp32.tflite",
            sounds[:, None],
            halves(84, gap=5, shuffle=False),
            reconstruction(sounds[:, None]),
        ),
        Task(
            "ResNet-8",
            "mlperf_tiny_ic_resnet8/resnet8_float.onnx",
            _nchw(float_cifar)[:, None],
            handful,
            top1(cifar["labels"]),
        ),
        Task(
            "ResNet-8 (TFLite)",
            "mlperf_tiny_ic_resnet8/resnet8_float.tflite",
            float_cifar[:, None],
            handful,
            top1(cifar["labels"]),
        ),
        Task(
            "VWW MobileNetV1",
            "mlperf_tiny_vww/vww_96_float.onnx",
            _nchw(float_people)[:, None],
            few,
            top1(people["labels"]),
        ),
        Task(
            "VWW MobileNetV1 (TFLite)",
            "mlperf_tiny_vww/vww_96_float.tflite",
            float_people[:, None],
            few,
            top1(people["labels"]),
        ),
        Task(
            "stories260k",
            "stories260k/stories260k_static64.onnx",
            story,
            ((np.arange(1, len(story)), np.array([0])),),
            next_token,
        ),
        Task(
            "SqueezeNet",
            "squeezenet_fp32/squeezenet_fp32.onnx",
            _nchw(_caffe(images))[:, None],
            many,
            photos(models, names),
        ),
        Task(
            "MobileNetV1 0.25 (TFLite)",
            "mobilenet_v1_025_fp32/mobilenet_v1_0.25_224.tflite",
            ((images.astype(np.float32) - 127.5) / 127.5)[:, None],
            many,
            photos(models, names),
        ),
        Task(
            "MobileNetV2",
            "mobilenet_v2_onnx_fp32/mobilenet_v2_1.0_224.onnx",
            _nchw(mobile)[:, None],
            many,
            photos(models, names),
        ),
        Task(
            "YOLOX-Nano",
            "yolox_nano/yolox_nano.onnx",
            _nchw(scenes.astype(np.float32)[..., ::-1])[:, None],
            halves(5),
            objects,
        ),
    ]
