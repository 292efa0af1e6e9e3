"""Mixed precision: how few layers must stay in float for the whole model to stay within a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ingot.quantize.affine import Affine, Array
from ingot.quantize.graph import Layer
from ingot.quantize.patches import Moments, as_rows
from ingot.quantize.weights import QuantizedWeights


def layer_noise(layer: Layer, moments: Moments | None, affine: Affine, quantized: QuantizedWeights) -> float:
    """Return the noise power over the signal power that quantising one layer adds to its own result.

    With C the covariance of its inputs, w the float weights, v the stored ones and s the step of the inputs, the
    signal is tr(w C w^T), the noise tr((w - v) C (w - v)^T) + |w|^2 s^2 / 12. Without C, inputs count as independent.
    """
    rows = as_rows(layer).astype(np.float64)
    real = as_rows(layer, quantized.stored).astype(np.float64) * quantized.scales.astype(np.float64)[:, None]
    difference = rows - real
    covariance = moments.covariance() if moments is not None else None
    spread = 1.0 if covariance is not None else (affine.scale * 255 / 6) ** 2
    signal = _power(rows, covariance) * spread
    noise = _power(difference, covariance) * spread + affine.scale**2 / 12 * float((rows**2).sum())
    return noise / signal if signal > 0 else 0.0


def relative_power(rows: Array, difference: Array, covariance: Array | None) -> float:
    """Return the power of what a difference of weights adds to a layer's result, over the result's own."""
    signal = _power(rows, covariance)
    return _power(difference, covariance) / signal if signal > 0 else 0.0


def _power(rows: Array, covariance: Array | None) -> float:
    if covariance is None:
        return float((rows.astype(np.float64) ** 2).sum())
    if covariance.ndim == 3:
        return float(np.einsum("ck,ckl,cl->", rows, covariance, rows))
    return float(np.sum((rows @ covariance) * rows))


def decibels(noise: float) -> float:
    """Return noise power over signal power as decibels of signal to noise."""
    return round(float(-10 * np.log10(max(noise, 1e-20))), 2)


def fewest(order: Sequence[str], within: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """Return the shortest beginning of `order` that keeps a model within its limit when it stays in float.

    order: layers, the noisiest first. within: compiles and measures a model. Halving the interval needs as many models
    as the number of layers has binary digits; all layers in float are within any limit.
    """
    if within(frozenset()):
        return frozenset()
    low, high = 0, len(order)  # `low` is not enough, `high` is
    while high - low > 1:
        middle = (low + high) // 2
        if within(frozenset(order[:middle])):
            high = middle
        else:
            low = middle
    return frozenset(order[:high])


def relative_error(reference: Sequence[Sequence[Array]], outputs: Sequence[Sequence[Array]]) -> float:
    """Return |outputs - reference| / |reference| over all float outputs of all samples, as a root of powers.

    Outputs count alike, whatever their size and scale: each one's noise is divided by its own signal.
    """
    shares = []
    for wanted, found in zip(zip(*reference, strict=True), zip(*outputs, strict=True), strict=True):
        if wanted[0].dtype.kind != "f":
            continue
        signal = sum(float(np.sum(np.square(a, dtype=np.float64))) for a in wanted)
        pairs = zip(wanted, found, strict=True)
        noise = sum(float(np.sum(np.square(a.astype(np.float64) - b.astype(np.float64)))) for a, b in pairs)
        shares.append(noise / signal if signal > 0 else float(noise > 0))
    return float(np.sqrt(np.mean(shares))) if shares else 0.0


def accuracy(outputs: Sequence[Sequence[Array]], labels: Array) -> float:
    """Return the share of samples whose largest element of the first output is the labelled one."""
    hits = [int(np.argmax(out[0])) == int(label) for out, label in zip(outputs, labels, strict=True)]
    return float(np.mean(hits))
