"""What the model that ranks configs sees: numbers from a task's key, a config and a target.

Everything comes from the key's text, so that records of other models, and of workloads that no model here has, teach
the ranking too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.autotune.space import TEMPLATES, Encoded, decode
from ingot.schedules import conv2d, conv2d_half, winograd
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload, TileConfig
from ingot.schedules.half import HALVES
from ingot.schedules.vector import ceil_div, registers
from ingot.schedules.winograd import WinogradConfig

if TYPE_CHECKING:
    from ingot.target import Target

_NUMBER = re.compile(r"([a-z])((?:\d+)(?:[x.]\d+)*)")
#: No honest extent is larger; a record's text decides how long the arithmetic below takes.
_MOST = 1 << 24
_OPERATORS = ("conv2d", "depthwise", "matmul")
#: What stands behind an operator's name where its data and weights are whole numbers.
_WHOLE = "_int8"
_FIELDS = (
    "pixels", "block", "unroll", "lanes", "size", "tiles", "parts", "order", "group", "prefetch", "rows", "vectors",
    "down", "across", "copied",
)  # fmt: skip


def numbers_of(key: str) -> tuple[str, str, dict[str, tuple[int, ...]]] | None:
    """Return (operator, stored dtype, {letter: numbers}) of a task's key, or None for one of another form."""
    head = key.split("|")[0].split()
    if len(head) < 3:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for word in head[2:]:
        match = _NUMBER.fullmatch(word)
        if match is None:
            return None
        values = tuple(int(v) for v in re.split("[x.]", match[2]) if len(v) < 10)
        if any(v > _MOST for v in values):
            return None
        found[match[1]] = values
    return head[0], head[1], found


@lru_cache(maxsize=4096)
def workload_of(key: str) -> Conv2DWorkload | None:
    """Return the convolution that a key names (a matrix product is one too), or None where there is none."""
    parsed = numbers_of(key)
    if parsed is None:
        return None
    operator, n = parsed[0].removesuffix(_WHOLE), parsed[2]
    try:
        if operator == "matmul":
            return MatmulWorkload(n["m"], n["k"][0], n["n"][0], "float32").as_conv()
        if operator not in ("conv2d", "depthwise"):
            return None
        channels = n["i"][0] if operator == "conv2d" else n["c"][0]
        kh, kw = n["k"]
        (sh, sw), (dh, dw) = n["s"], n["d"]
        top, left, bottom, right = n["p"]
        out = n["o"][0] if operator == "conv2d" else channels
        batch, height, width = n["n"][0], n["h"][0], n["w"][0]
        window = ((kh, kw), (sh, sw), (top, left, bottom, right), (dh, dw))
        workload = Conv2DWorkload(batch, height, width, channels, out, *window, "float32")
        return workload if min(workload.out_height, workload.out_width, channels, out, kh, kw) > 0 else None
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        return None


def formula(key: str, config: Any, target: Target) -> float | None:  # noqa: ANN401 - a config
    """Return the estimated cost of a config by the formula that picks without measuring, or None where it has none."""
    workload = workload_of(key)
    if workload is None or key.startswith("depthwise"):
        return None
    if isinstance(config, TileConfig) and key.split(maxsplit=2)[1] in HALVES:
        return conv2d_half.cost(workload, config, target)
    if isinstance(config, TileConfig):
        return conv2d.cost(workload, config, target)
    if isinstance(config, WinogradConfig) and winograd.supports(workload, target):
        return winograd.cost(workload, config, target)
    return None


def vector(key: str, encoded: Encoded, target: Target) -> np.ndarray | None:
    """Return the features of one config, float32, or None for a key or config that is none of ours."""
    decoded, workload, parsed = decode(encoded), workload_of(key), numbers_of(key)
    if decoded is None or workload is None or parsed is None:
        return None
    config = decoded[0]
    values: Mapping[str, Any] = {name: getattr(config, name, 0) for name in _FIELDS}
    regs, w = registers(target), workload
    lanes = regs.lanes
    pixels, block = int(values["pixels"] or values["tiles"] or 1), int(values["block"] or lanes)
    vectors = max(1, block // lanes)
    across = ceil_div(w.out_width, pixels)
    steps = w.kernel[0] * w.kernel[1] * w.in_channels
    cost = formula(key, config, target)
    epilogue = key.partition("|")[2]
    row = [
        *(float(parsed[0].removesuffix(_WHOLE) == name) for name in _OPERATORS),
        float(parsed[0].endswith(_WHOLE)),
        float(parsed[1] in HALVES),
        *(float(isinstance(config, kind)) for kind in TEMPLATES.values()),
        *(float(v) for v in values.values()),
        *(_log(v) for v in (w.out_height, w.out_width, w.in_channels, w.out_channels, w.positions)),
        float(w.kernel[0] * w.kernel[1]),
        float(w.strides[1]),
        float(any(w.padding)),
        float(epilogue.count(".t")),
        float(len(epilogue.split())),
        float(pixels * vectors),
        float(pixels * vectors + vectors + 1) / regs.count,
        float(pixels * vectors) / (pixels + vectors),
        across * pixels / w.out_width,
        ceil_div(w.out_channels, block) * block / w.out_channels,
        _log(steps * block * 4 / (target.cache.l1d_kib * 1024)),
        _log(w.in_channels * w.out_channels * w.kernel[0] * w.kernel[1] * 4 / (max(target.cache.l2_kib, 64) * 1024)),
        _log(cost) - _log(w.macs) if cost else 0.0,
        float(lanes),
        float(regs.count),
        _log(target.core_count),
    ]
    return np.asarray(row, np.float32)


def _log(value: float) -> float:
    return math.log2(max(value, 1e-9))
