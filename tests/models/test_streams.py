"""Shared models that run step by step with their state fed back: the streams of sound and text they make."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import ingot

pytestmark = pytest.mark.slow

Step = Callable[..., tuple[np.ndarray, ...]]


def compiled(shared_models, folder, file, **options) -> ingot.Model:
    artifact = ingot.compile(shared_models / file, selftest=False, **options)
    return ingot.load(artifact.save(folder / f"{artifact.name}.so"), threads=1)


def decibels(clean: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10((clean**2).sum() / ((clean - other) ** 2).sum()))


def denoise(first: Step, second: Step, noisy: np.ndarray) -> np.ndarray:
    """Blocks of 512 samples, 128 new ones each: a mask on the spectrum, then a second net on the samples."""
    states = [np.zeros((1, 2, 128, 2), np.float32), np.zeros((1, 2, 128, 2), np.float32)]
    block, joined, out = np.zeros(512, np.float32), np.zeros(512, np.float32), []
    for start in range(0, len(noisy) - 384 - 127, 128):
        block = np.concatenate([block[128:], noisy[start : start + 128]])
        spectrum = np.fft.rfft(block)
        mask, states[0] = first(np.abs(spectrum).astype(np.float32).reshape(1, 1, 257), states[0])
        estimate = np.fft.irfft(spectrum * mask.reshape(-1)).astype(np.float32).reshape(1, 1, 512)
        cleaned, states[1] = second(estimate, states[1])
        joined = np.concatenate([joined[128:], np.zeros(128, np.float32)]) + cleaned.reshape(-1)
        out.append(joined[:128].copy())
    return np.concatenate(out)


@pytest.mark.parametrize(
    ("files", "reference", "tolerance"),
    [
        (("model_1.onnx", "model_2.onnx"), "cleaned_onnx", 1e-4),
        (("model_1.tflite", "model_2.tflite"), "cleaned_tflite", 1e-4),
        # The reference runtime rounds activations to int8 in these; we do not.
        (("model_quant_1.tflite", "model_quant_2.tflite"), "cleaned_tflite_dynamic_range", 0.02),
    ],
)
def test_noise_is_removed_from_speech(shared_models, tmp_path, files, reference, tolerance):
    with np.load(shared_models / "dtln/noisy_speech_and_reference.npz") as data:
        clean, noisy, wanted = data["clean"], data["noisy"], data[reference]
    models = [compiled(shared_models, tmp_path, f"dtln/{file}") for file in files]
    found = denoise(*models, noisy)
    count = min(len(found), len(wanted))
    print(files, float(np.abs(found[:count] - wanted[:count]).max()), float(np.abs(wanted).max()))
    assert np.abs(found[:count] - wanted[:count]).max() <= tolerance * np.abs(wanted).max()
    assert round(decibels(clean, noisy)) == 6
    assert decibels(clean[: count - 384], found[384:count]) > 17


def speech(model: ingot.Model, audio: np.ndarray, rate: bool) -> list[float]:
    """Silero's probability of speech for each 512 samples, which follow 64 samples of context."""
    context, state, found = np.zeros(64, np.float32), np.zeros((2, 1, 128), np.float32), []
    for start in range(0, len(audio) - 511, 512):
        block = np.concatenate([context, audio[start : start + 512]])
        feeds = {"input": block[None], "state": state}
        out = model.run({**feeds, "sr": np.array(16000, np.int64)} if rate else feeds)
        state, context = out["stateN"], block[-64:]
        found.append(float(out["output"].reshape(())))
    return found


def test_speech_is_found_in_a_clip(shared_models, tmp_path):
    shape = {"input": (1, 576), "state": (2, 1, 128)}
    model = compiled(shared_models, tmp_path, "silero_vad/silero_vad_op18_ifless.onnx", shape=shape)
    with np.load(shared_models / "silero_vad/speech_20s_and_reference.npz") as data:
        audio, wanted = data["audio_int16"].astype(np.float32) / 32768, data["speech_probability_ifless"]
    found = speech(model, audio, rate=True)
    assert np.abs(np.array(found) - wanted).max() <= 1e-3
    assert round(float(np.mean(np.array(found) > 0.5)), 2) == 0.70
    for name, most in (("silence", 0.012), ("noise", 0.020)):
        samples = np.frombuffer((shared_models / f"silero_vad/{name}_1000ms.wav").read_bytes()[44:], np.int16)
        assert max(speech(model, samples.astype(np.float32) / 32768, rate=True)) <= most


def test_a_story_is_told_from_a_cache(shared_models, tmp_path):
    """Greedy decoding, a token at a time, for the first three lengths of the cache."""
    wanted = np.load(shared_models / "stories260k/reference.npz")["greedy_ids"]
    file, found = "stories260k/stories260k_kv_cache.onnx", [1]
    names = [f"past_{kind}_{layer}" for layer in range(5) for kind in "kv"]
    cache: dict[str, np.ndarray] = {}
    for past in range(3):
        shape = {"tokens": (1, 1), **dict.fromkeys(names, (1, 4, past, 8))}
        model = compiled(shared_models, tmp_path, file, shape=shape)
        out = model.run({"tokens": np.array([[found[-1]]]), **cache})
        cache = {name: out[name.replace("past", "present")] for name in names}
        found.append(int(out["logits"].reshape(-1).argmax()))
    assert found[1:] == [int(token) for token in wanted[1:4]] or found[1:] == [int(token) for token in wanted[:3]]
