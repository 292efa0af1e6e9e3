"""Streaming models of the shared collection with their state inside: real audio, step by step, next to references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.emulator import stream_under_qemu
from ingot.target import load_target

pytestmark = pytest.mark.slow

SILERO = "silero_vad/silero_vad_op18_ifless.onnx"
SILERO_OPTIONS: dict[str, Any] = {
    "bind": {"sr": 16000},
    "shape": {"input": (1, 576), "state": (2, 1, 128)},
    "state": {"state": "stateN"},
}
# The parts of the noise suppressor, by format: file and state of the first, of the second.
DTLN = {
    "onnx": ("model_1.onnx", {"input_3": "tf_op_layer_stack_2"}, "model_2.onnx", {"input_5": "tf_op_layer_stack_5"}),
    "tflite": ("model_1.tflite", {"input_3": "Identity_1"}, "model_2.tflite", {"input_5": "Identity_1"}),
}
BLOCK, SHIFT = 512, 128


def speech_steps(folder: Path) -> list[np.ndarray]:
    """20 seconds of speech as the detector wants them: 64 samples of context, 512 new ones."""
    audio = np.load(folder / "silero_vad/speech_20s_and_reference.npz")["audio_int16"].astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(64, np.float32), audio])
    return [padded[i : i + 576][None] for i in range(0, len(audio), 512)]


def detector_by_hand(path: Path, steps: list[np.ndarray]) -> list[float]:
    """ONNX Runtime with the state fed back."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state, found = np.zeros((2, 1, 128), np.float32), []
    for step in steps:
        value, state = session.run(None, {"input": step, "state": state, "sr": np.array(16000, np.int64)})
        found.append(float(value[0, 0]))
    return found


def test_the_voice_detector_hears_the_whole_clip(shared_models: Path, tmp_path: Path) -> None:
    path = ingot.compile(shared_models / SILERO, **SILERO_OPTIONS).save(tmp_path / "silero.so")
    steps = speech_steps(shared_models)
    stored = np.load(shared_models / "silero_vad/speech_20s_and_reference.npz")["speech_probability_ifless"]
    with ingot.load(path, threads=2) as model:
        found = [float(model(step)[0, 0]) for step in steps]
        assert np.abs(found - stored).max() < 1e-4
        model.reset()
        again = [float(model(step)[0, 0]) for step in steps[:5]]
        assert again == found[:5]
        stale = float(model(steps[0])[0, 0])
        assert stale != found[0], "without a reset the state is that of the steps before"
        assert model.selftest() < 1e-4
    wanted = detector_by_hand(shared_models / SILERO, steps[:100])
    assert np.abs(np.subtract(found[:100], wanted)).max() < 1e-4


@pytest.mark.qemu
def test_the_voice_detector_on_an_arm_board(
    shared_models: Path, tmp_path: Path, qemu: Callable[[str], list[str]]
) -> None:
    qemu("aarch64")  # skips where there is none
    artifact = ingot.compile(shared_models / SILERO, target="raspberry-pi-4", selftest=False, **SILERO_OPTIONS)
    steps = speech_steps(shared_models)[40:48]
    runs = [[step] for step in steps]
    found = stream_under_qemu(artifact.save(tmp_path / "pi.so"), runs, load_target("raspberry-pi-4"), threads=2)
    wanted = detector_by_hand(shared_models / SILERO, steps)
    assert np.abs(np.subtract([float(outputs[0][0, 0]) for outputs in found], wanted)).max() < 1e-4


@pytest.mark.parametrize("kind", sorted(DTLN))
def test_the_noise_suppressor_cleans_speech(shared_models: Path, tmp_path: Path, kind: str) -> None:
    first_file, first_state, second_file, second_state = DTLN[kind]
    folder = shared_models / "dtln"
    paths = []
    for file, state in ((first_file, first_state), (second_file, second_state)):
        paths.append(ingot.compile(folder / file, state=state).save(tmp_path / f"{file}.so"))
    data = np.load(folder / "noisy_speech_and_reference.npz")
    noisy, stored = data["noisy"], data[f"cleaned_{kind}"]
    block, overlap, cleaned = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32), []
    with ingot.load(paths[0], threads=1) as first, ingot.load(paths[1], threads=1) as second:
        for start in range(0, len(noisy) - SHIFT + 1, SHIFT):
            block = np.concatenate([block[SHIFT:], noisy[start : start + SHIFT]])
            spectrum = np.fft.rfft(block)
            mask = first(np.abs(spectrum).reshape(1, 1, -1).astype(np.float32))
            estimate = np.fft.irfft(np.abs(spectrum) * mask.reshape(-1) * np.exp(1j * np.angle(spectrum)))
            result = second(estimate.reshape(1, 1, -1).astype(np.float32)).reshape(-1)
            overlap = np.concatenate([overlap[SHIFT:], np.zeros(SHIFT, np.float32)]) + result
            cleaned.append(overlap[:SHIFT].copy())
    found = np.concatenate(cleaned)
    size = (len(data["mask"]) - 1) * SHIFT  # the reference ends with the last whole block
    distance = float(np.abs(found[:size] - stored[:size]).max())
    clean, delay = data["clean"], BLOCK - SHIFT
    ratios = []
    for sound in (noisy[: size - delay], found[delay:size]):
        error = sound - clean[: len(sound)]
        ratios.append(10 * np.log10(np.sum(clean[: len(sound)] ** 2) / np.sum(error**2)))
    print(f"{kind}: signal to noise {ratios[0]:.1f} dB before, {ratios[1]:.1f} dB after; largest difference {distance}")
    assert ratios[1] > 17 > 7 > ratios[0]
    assert distance < 1e-4
