"""Shared models that run step by step with their state fed back: the streams of sound and text they make."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import ingot

pytestmark = pytest.mark.slow


def compiled(shared_models, folder, file, **options) -> ingot.Model:
    artifact = ingot.compile(shared_models / file, selftest=False, **options)
    return ingot.load(artifact.save(folder / f"{artifact.name}.so"), threads=1)


def speech(model: ingot.Model, audio: np.ndarray) -> list[float]:
    """Silero's probability of speech for each 512 samples, which follow 64 samples of context."""
    context, state, found = np.zeros(64, np.float32), np.zeros((2, 1, 128), np.float32), []
    for start in range(0, len(audio) - 511, 512):
        block = np.concatenate([context, audio[start : start + 512]])
        out = model.run({"input": block[None], "state": state})
        state, context = out["stateN"], block[-64:]
        found.append(float(out["output"].reshape(())))
    return found


def test_speech_is_found_in_a_clip(shared_models, tmp_path):
    """The branches of this file take blocks of two sizes, so the rate must be known."""
    shape = {"input": (1, 576), "state": (2, 1, 128)}
    model = compiled(shared_models, tmp_path, "silero_vad/silero_vad.onnx", shape=shape, bind={"sr": 16000})
    with np.load(shared_models / "silero_vad/speech_20s_and_reference.npz") as data:
        audio, wanted = data["audio_int16"].astype(np.float32) / 32768, data["speech_probability"]
    found = speech(model, audio)
    assert np.abs(np.array(found) - wanted).max() <= 1e-3
    assert round(float(np.mean(np.array(found) > 0.5)), 2) == 0.70
    for name, most in (("silence", 0.0125), ("noise", 0.0205)):
        samples = np.frombuffer((shared_models / f"silero_vad/{name}_1000ms.wav").read_bytes()[44:], np.int16)
        assert max(speech(model, samples.astype(np.float32) / 32768)) <= most


def test_a_story_is_told_from_a_cache(shared_models, tmp_path):
    """Greedy decoding of two tokens, after a first one whose empty cache only ONNX Runtime takes."""
    wanted = [int(token) for token in np.load(shared_models / "stories260k/reference.npz")["greedy_ids"]]
    file = "stories260k/stories260k_kv_cache.onnx"
    names = [f"past_{kind}_{layer}" for layer in range(5) for kind in "kv"]
    session = onnxruntime.InferenceSession(str(shared_models / file), providers=["CPUExecutionProvider"])
    empty = {name: np.zeros((1, 4, 0, 8), np.float32) for name in names}
    results = session.run(None, {"tokens": np.array([[1]]), **empty})
    out = dict(zip([value.name for value in session.get_outputs()], results, strict=True))
    found = [int(out["logits"].reshape(-1).argmax())]
    for past in (1, 2):
        shape = {"tokens": (1, 1), **dict.fromkeys(names, (1, 4, past, 8))}
        model = compiled(shared_models, tmp_path, file, shape=shape)
        cache = {name: out[name.replace("past", "present")] for name in names}
        out = model.run({"tokens": np.array([[found[-1]]]), **cache})
        found.append(int(out["logits"].reshape(-1).argmax()))
    assert found in (wanted[:3], wanted[1:4])
