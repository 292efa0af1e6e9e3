"""Configs as plain dicts, for logs, and as points that a search moves between."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from ingot.schedules.batch_matmul import BatchMatmulConfig
from ingot.schedules.conv2d import TileConfig
from ingot.schedules.conv2d_amx import TilesConfig
from ingot.schedules.depthwise import DepthwiseConfig
from ingot.schedules.depthwise_int8 import DepthwiseInt8Config
from ingot.schedules.rows import RowsConfig
from ingot.schedules.winograd import WinogradConfig

#: The name of each config's template in logs.
TEMPLATES: dict[str, type] = {
    "tile": TileConfig,
    "winograd": WinogradConfig,
    "depthwise": DepthwiseConfig,
    "depthwise_int8": DepthwiseInt8Config,
    "rows": RowsConfig,
    "batch_matmul": BatchMatmulConfig,
    "amx": TilesConfig,
}
_NAMES = {kind: name for name, kind in TEMPLATES.items()}

Encoded = Mapping[str, int | str]


def encode(config: Any) -> dict[str, int | str]:  # noqa: ANN401 - a frozen dataclass of ints
    """Return a config as {"template": its name, field: value, ...}."""
    return {"template": _NAMES[type(config)], **{f.name: int(getattr(config, f.name)) for f in fields(config)}}


def decode(encoded: Encoded) -> tuple[Any, int] | None:
    """Return (config, number of fields skipped because they are unknown), or None if it is no config.

    Fields that are missing get their defaults, so that records survive a config that has grown; one that lacks a field
    without default is of no use.
    """
    kind = TEMPLATES.get(str(encoded.get("template")))
    if kind is None:
        return None
    values, skipped = {}, 0
    known = {f.name: f for f in fields(kind)}
    for name, value in encoded.items():
        if name in known and type(value) is int:
            values[name] = value
        elif name != "template":
            skipped += 1
    if any(f.name not in values and f.default is MISSING for f in known.values()):
        return None
    return kind(**values), skipped


class Space:
    """A finite set of configs, with the moves of an evolutionary search. Deterministic for a given `random.Random`."""

    def __init__(self, configs: Sequence[Any]) -> None:
        self.configs: list[Any] = list(dict.fromkeys(configs))
        self._known = set(self.configs)

    def __len__(self) -> int:
        """Return how many configs there are."""
        return len(self.configs)

    def __contains__(self, config: object) -> bool:
        """Say whether a config is one of the space."""
        return config in self._known

    def index(self, config: Any) -> int:  # noqa: ANN401
        """Return the position of a config in the space's own order."""
        return self.configs.index(config)

    def neighbours(self, config: Any) -> list[Any]:  # noqa: ANN401
        """Return the configs of the same template that differ in one field, the nearest values first."""
        found = []
        for other in self.configs:
            if type(other) is not type(config) or other == config:
                continue
            changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(other, f.name)]
            if len(changed) == 1:
                found.append((abs(getattr(config, changed[0]) - getattr(other, changed[0])), changed[0], other))
        return [other for _, _, other in sorted(found, key=lambda item: item[:2])]

    def mutate(self, config: Any, generator: random.Random) -> Any:  # noqa: ANN401
        """Return a neighbour, near ones more often; now and then any config at all."""
        near = self.neighbours(config)
        if not near or generator.random() < 0.1:
            return generator.choice(self.configs)
        return near[min(int(generator.expovariate(4 / len(near))), len(near) - 1)]

    def cross(self, a: Any, b: Any, generator: random.Random) -> Any:  # noqa: ANN401
        """Return a config with each field from one of two parents if there is such a one, else a mutation of one."""
        if type(a) is type(b):
            child = type(a)(**{f.name: getattr(generator.choice((a, b)), f.name) for f in fields(a)})
            if child in self:
                return child
        return self.mutate(generator.choice((a, b)), generator)


__all__ = ["TEMPLATES", "Encoded", "Space", "decode", "encode"]
