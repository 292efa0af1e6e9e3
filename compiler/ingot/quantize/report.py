"""What quantisation decided for each layer and what it cost: as text, JSON and HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    decision:   "int8" or another format of weights, or "float32". reason: why, in words.
    sqnr_db:    signal to quantisation noise of the layer's own result, estimated from its inputs' second moments.
    speed:      estimated time of the integer kernel over that of the float one on the target; None where both do the
                same arithmetic (depthwise layers of ARM read a quarter of the bytes).
    range:      what the layer's input may hold before it saturates.
    """

    name: str
    kind: str
    macs: int
    decision: str
    reason: str
    sqnr_db: float | None = None
    speed: float | None = None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Report:
    """All layers in the program's order, and the whole model's outcome on the calibration samples.

    format: of the quantised layers. samples: 0 where there were none. output_sqnr_db: of all outputs together. limit:
    what --max-drop asked for, and drop what was measured against it. balanced: tensors around which scale moved between
    layers, and gained_db what the outputs gained by it.
    """

    layers: tuple[LayerReport, ...]
    calibrator: str
    samples: int
    output_sqnr_db: float | None
    limit: float | None = None
    drop: float | None = None
    metric: str = ""
    measured: int = 0
    format: str = "int8"
    balanced: int = 0
    gained_db: float = 0.0

    @property
    def integer_macs(self) -> float:
        """Return the share of the layers' multiply-accumulates that are in the quantised ones."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if layer.decision != "float32") / total if total else 0.0

    def facts(self) -> list[tuple[str, str]]:
        """Return the outcome as pairs of a name and a text."""
        quantised = sum(layer.decision != "float32" for layer in self.layers)
        of_all = f"{quantised} of {len(self.layers)} in {self.format}"
        rows = [
            ("layers", f"{of_all}, {self.integer_macs:.1%} of the multiply-adds"),
            ("calibration", f"{self.samples} samples, {self.calibrator}" if self.samples else "none"),
        ]
        if self.balanced:
            rows.append(("balance", f"scale moved around {self.balanced} tensors, which gains {self.gained_db:.1f} dB"))
        if self.output_sqnr_db is not None:
            rows.append(("output", f"{self.output_sqnr_db:.1f} dB signal to quantisation noise on these samples"))
        if self.limit is not None and self.drop is not None:
            rows.append(
                ("limit", f"{self.drop:.3%} {self.metric}, allowed {self.limit:.3%}, {self.measured} models tried")
            )
        return rows

    def as_json(self) -> str:
        """Return everything as JSON."""
        data: dict[str, Any] = {**asdict(self), "integer_macs": self.integer_macs}
        return json.dumps(data, indent=1) + "\n"

    def as_text(self) -> str:
        """Return a table with a line for each layer."""
        rows = [_COLUMNS, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{name}: {text}" for name, text in self.facts())]) + "\n"

    def as_html(self) -> str:
        """Return one page that needs no other file."""

        def line(cells: Sequence[str], tag: str, style: str = "") -> str:
            return f"<tr{style}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = [line(_COLUMNS, "th")]
        for layer in self.layers:
            body.append(line(_cells(layer), "td", "" if layer.decision != "float32" else ' class="float"'))
        facts = "".join(f"<li>{html.escape(name)}: {html.escape(text)}</li>" for name, text in self.facts())
        return _PAGE.format(facts=facts, table="\n".join(body))


_COLUMNS = ("layer", "kind", "multiply-adds", "decision", "noise", "time", "range", "reason")
_PAGE = """<!doctype html>
<meta charset="utf-8"><title>Quantisation</title>
<style>
body {{ font: 15px sans-serif; margin: 2em }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #ccc; padding: 2px 8px; text-align: left }}
.float {{ background: #fff3d6 }}
</style>
<h1>Quantisation</h1>
<ul>{facts}</ul>
<table>
{table}
</table>
"""


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name[:48],
        layer.kind,
        f"{layer.macs:,}",
        layer.decision,
        "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
        "" if layer.speed is None else f"{layer.speed:.2f}x",
        "" if layer.range is None else f"{layer.range[0]:.4g} to {layer.range[1]:.4g}",
        layer.reason,
    )
