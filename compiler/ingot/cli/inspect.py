"""`ingot inspect`: what is inside a model or a compiled library. Reads files as data, runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ingot.cli.options import PATH


@click.command("inspect", short_help="Show what is inside a model or a library.")
@click.argument("file", metavar="MODEL|MODEL.so", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, as_json: bool) -> None:
    """Show what is inside a model (ONNX, TFLite) or a compiled library, for any board.

    \b
      ingot inspect model.onnx
      ingot inspect model.so --json
    """
    from ingot.cli.files import is_elf

    facts = _library(file) if is_elf(file) else _model(file)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif facts["kind"] == "library":
        _show_library(facts)
    else:
        _show_model(facts)


# ------------------------------------------------------------------------------------------------------------ a model


def _model(path: Path) -> dict[str, Any]:
    from ingot.cli.model_facts import read_facts, shape_question
    from ingot.frontend.source import read_source

    source = read_source(path)
    facts = read_facts(source)

    def tensors(side: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a tuple of Tensor
        return [{"name": t.name, "dtype": t.dtype, "shape": list(t.dims)} for t in side]

    return {
        "kind": "model",
        "file": str(path),
        "file_bytes": len(source.data),
        "sha256": source.sha256,
        "format": facts.source_format,
        "version": facts.version,
        "producer": facts.producer,
        "inputs": tensors(facts.inputs),
        "outputs": tensors(facts.outputs),
        "operators": facts.operators,
        "weights": facts.weights,
        "weights_bytes": facts.weights_bytes,
        "macs": facts.macs,
        "shapes": list(shape_question(facts.inputs)),
    }


def _show_model(facts: dict[str, Any]) -> None:
    from ingot.cli.console import clean, console, number, show, size, table
    from ingot.cli.console import facts as print_facts

    out = console()
    count = sum(facts["operators"].values())
    kind = {"onnx": "ONNX", "tflite": "TFLite"}[facts["format"]]
    out.print(f"{clean(facts['file'])}  {kind} model, {size(facts['file_bytes'])}", style="bold", soft_wrap=True)
    macs = "not known" if facts["macs"] is None else f"{number(facts['macs'])} multiply-adds"
    rows = [
        ("version", clean(facts["version"])),
        ("made by", clean(facts["producer"]) or "not said"),
        ("SHA-256", facts["sha256"]),
        ("weights", f"{size(facts['weights_bytes'])}, {number(facts['weights'])} values"),
        ("work", f"{count} operators, {macs}"),
    ]
    print_facts(out, rows)
    out.print()
    _show_tensors(facts)
    out.print()
    operators = [[clean(name), str(n)] for name, n in facts["operators"].items()]
    show(out, table(("operator", "count"), operators, right=("count",)))
    for sentence in facts["shapes"]:
        out.print(f"note: {clean(sentence)}", style="yellow", soft_wrap=True)


def _show_tensors(facts: dict[str, Any]) -> None:
    from ingot.cli.console import clean, console, shape, show, table

    rows = [
        [side, clean(t["name"]), clean(t["dtype"]), shape(t["shape"]), _quantization(t)]
        for side in ("input", "output")
        for t in facts[f"{side}s"]
    ]
    columns = ["", "name", "dtype", "shape", "quantisation"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    show(console(), table(columns, rows))


def _quantization(tensor: dict[str, Any]) -> str:
    q = tensor.get("quantization")
    if not q or not q["scales"]:
        return ""
    if len(q["scales"]) > 1:
        return f"{len(q['scales'])} scales along axis {q['axis']}"
    return f"{q['scales'][0]:.6g} * (q - {q['zero_points'][0]})" if q["zero_points"][0] else f"{q['scales'][0]:.6g} * q"


# ---------------------------------------------------------------------------------------------------------- a library


def _library(path: Path) -> dict[str, Any]:
    from ingot.packager.elf import Elf
    from ingot.runtime.loader import read_metadata

    meta = read_metadata(str(path))
    data = path.read_bytes()
    elf = Elf(data, str(path))
    peak = meta["source"]["peak_bytes"]
    return {
        "kind": "library",
        "file": str(path),
        "file_bytes": len(data),
        "metadata": meta,
        "sections": [{"name": s.name, "bytes": s.size, "in_file": s.in_file} for s in elf.sections if s.name],
        "needed": list(elf.needed),
        "versions": {name: list(found) for name, found in elf.versions.items()},
        "exported": elf.exported(),
        "arena_ratio": meta["arena_bytes"] / peak if peak else None,
        "text_bytes": sum(s.size for s in elf.sections if s.name == ".text"),
    }


def _show_library(facts: dict[str, Any]) -> None:
    from ingot.cli.console import clean, console, number, precision_words, show, size, table
    from ingot.cli.console import facts as print_facts

    out, meta = console(), facts["metadata"]
    board = meta["target"]
    libc = f"{'glibc' if board['libc'] == 'gnu' else board['libc']} {board['libc_version']} or later"
    title = f"{clean(facts['file'])}  {clean(meta['name'])} for {clean(board['name'])}, {size(facts['file_bytes'])}"
    out.print(title, style="bold", soft_wrap=True)
    peak, arena = meta["source"]["peak_bytes"], meta["arena_bytes"]
    ratio = f", {facts['arena_ratio']:.2f} x the {size(peak)} that the source graph needs at least" if peak else ""
    versions = ", ".join(sorted({_newest(v) for v in facts["versions"].values() if v}))
    rows = [
        ("target", f"{board['triple']}, {board['cpu']}, {libc}"),
        ("CPU needs", " ".join(board["features"]) or "nothing beyond the architecture"),
        ("weights", f"{size(meta['weights_bytes'])}, mapped from the file"),
        ("arena", size(arena) + ratio),
        ("RAM", f"{size(meta['memory_bytes'])} for each instance, arena included"),
        ("code", f"{size(facts['text_bytes'])} .text, {meta['kernels']} kernels in {meta['steps']} steps"),
        ("work", f"{number(meta['macs'])} multiply-adds"),
        ("precision", precision_words(meta)),
        ("selftest", "stored" if meta["selftest"] else "none"),
        *_other_shapes(meta),
        *(("bound", _bound(entry)) for entry in meta["bound"]),
        *_cut(meta),
        *(("state", f"{e['input']} = {e['output']} {e['dtype']}{e['shape']}") for e in meta["states"]),
        ("exports", ", ".join(facts["exported"])),
        ("needs", ", ".join(facts["needed"]) + (f" ({versions})" if versions else "")),
        ("made by", f"{meta['compiler']}, format {meta['format']}, ABI {meta['abi']}"),
        ("source", f"{meta['source']['format']}, SHA-256 {meta['source']['sha256']}"),
    ]
    print_facts(out, [(name, clean(value)) for name, value in rows])
    out.print()
    _show_tensors(meta)
    out.print()
    sections = [
        [clean(s["name"]), size(s["bytes"]), "" if s["in_file"] else "zeros, made at load time"]
        for s in facts["sections"]
    ]
    show(out, table(("section", "size", ""), sections, right=("size",)))


def _other_shapes(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about what else the inputs may be: the sizes of a batch, or other shapes."""
    batch = meta["batch"]
    if batch is not None:
        parts = ", ".join(map(str, batch["programs"]))
        return [("batch", f"{batch['smallest']} to {batch['largest']} items, in parts of {parts}")]
    rows = [("also takes", ", ".join(map(str, bucket["inputs"]))) for bucket in meta["shapes"]]
    return rows if len(rows) <= 16 else [rows[0], ("", f"{len(rows) - 2} more"), rows[-1]]


def _bound(entry: dict[str, Any]) -> str:
    """A bound input in one line: its value if it is small."""
    values = entry["values"]
    text = f"SHA-256 {entry['sha256']}" if values is None or len(values) > 8 else ", ".join(map(str, values))
    return f"{entry['name']} {entry['dtype']}{entry['shape']} = {text}"


def _cut(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about a library of only a part of its model."""
    cut = meta["cut"]
    if cut is None:
        return []
    rows = [("a part", f"{cut['nodes'] - cut['left_out']} of the model's {cut['nodes']} nodes")]
    return rows + [("cut at", f"{entry['node']}: {entry['reason']}") for entry in cut["failed"]]


def _newest(versions: list[str]) -> str:
    """The highest of symbol versions like GLIBC_2.17."""
    return max(versions, key=lambda v: [int(part) for part in v.rpartition("_")[2].split(".") if part.isdecimal()])
