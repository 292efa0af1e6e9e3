"""`ingot run`: a compiled model on arrays or images from files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ingot.cli.options import MAX_THREADS, PATH
from ingot.errors import InputError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from ingot.images import Preprocessing
    from ingot.runtime.loader import Model, TensorSpec

    Array = np.ndarray[Any, Any]

_MAX_LABEL_BYTES = 16 << 20


@click.command("run", short_help="Run a compiled model on files.")
@click.argument("library", metavar="MODEL.so", type=PATH)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A .npy, .npz, .png or .jpg file for an input. Repeatable; a .npz file can hold all of them.",
)
@click.option("-o", "--output", type=PATH, help="Write all outputs to this .npz file.")
@click.option("--output-dir", type=PATH, help="Write each output to a .npy file in this folder.")
@click.option("--top", type=click.IntRange(1, 1000), metavar="N", help="Rank the N largest values of the first output.")
@click.option("--labels", type=PATH, help="Text file with the name of one class in each line, for --top.")
@click.option(
    "--stream",
    is_flag=True,
    help="Run once for each row of the inputs' arrays (.npy, with a first axis more than the model's), state kept.",
)
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Default: as many as this process may use.")
@click.option("--mean", metavar="M[,M,M]", help="Images: (pixel * scale - mean) / std. One value, or one per channel.")
@click.option("--std", metavar="S[,S,S]", help="Images: see --mean.")
@click.option("--scale", metavar="X", help="Images: see --mean. Default: 1/255.")
@click.option(
    "--resize",
    type=click.Choice(("stretch", "crop", "pad")),
    default="stretch",
    show_default=True,
    help="Images of another size: change the proportions, cut the edges off, or add black ones.",
)
@click.option("--layout", type=click.Choice(("nchw", "nhwc")), help="Images: where the shape does not tell.")
@click.option("--bgr", is_flag=True, help="Images: the model wants blue first.")
def command(
    library: Path,
    inputs: Sequence[str],
    output: Path | None,
    output_dir: Path | None,
    top: int | None,
    labels: Path | None,
    stream: bool,
    threads: int | None,
    mean: str | None,
    std: str | None,
    scale: str | None,
    resize: str,
    layout: str | None,
    bgr: bool,
) -> None:
    """Run MODEL.so, a model compiled for this machine, on files.

    A model that keeps state starts from its first one. 8-bit inputs take an image's pixels as they are, unless --mean,
    --std or --scale is given.

    \b
      ingot run model.so --input x=x.npy -o out.npz
      ingot run model.so --input photo.jpg --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --top 5 --labels names.txt
    """
    import ingot
    from ingot.cli.files import check_output, new_folder
    from ingot.images import Preprocessing, parse_numbers

    scales = parse_numbers("--scale", scale)
    if scales is not None and len(scales) != 1:
        raise OptionError("--scale takes one number", where="--scale", found=repr(scale))
    how = Preprocessing(
        parse_numbers("--mean", mean), parse_numbers("--std", std), scales and scales[0], resize, layout, bgr
    )
    if output is not None:
        check_output(output, inputs=(library,))
    with ingot.load(str(library), threads=threads) as model:
        names = None if labels is None else _read_labels(labels, model.outputs[0])
        outputs = _stream(model, inputs) if stream else model.run(_read_inputs(model, inputs, how))
        if output is not None:
            _write_archive(output, outputs)
        files: dict[str, Path] = {}
        if output_dir is not None:
            with new_folder(output_dir):
                files = _write_folder(output_dir, outputs)
        _show(model, outputs, files, output)
        if top is not None or names is not None:
            _rank(model.outputs[0], outputs[model.outputs[0].name], top or 5, names)


# ------------------------------------------------------------------------------------------------------------- inputs


def _read_inputs(model: Model, given: Sequence[str], how: Preprocessing) -> dict[str, Array]:
    """Arrays by name. What is missing, extra or does not fit is left for the model to refuse."""
    from ingot.arrays import Archive, kind_of, load_npy
    from ingot.images import load_image

    specs = {spec.name: spec for spec in model.inputs}
    arrays: dict[str, Array] = {}

    def put(name: str, array: Array) -> None:
        if name in arrays:
            raise InputError(f"input {name!r} is given twice", where="--input")
        arrays[name] = array

    for text in given:
        name, path = _split(text, specs)
        kind = kind_of(path)
        if kind == "npz":
            with Archive(path) as archive:
                if name is None:
                    for item in archive.names:
                        # An array the model does not know gets an empty one: the model refuses it by its name.
                        put(item, archive.load(item, specs[item]) if item in specs else np.empty(0))
                else:
                    put(name, archive.load(_choose(archive.names, name, path), specs[name]))
            continue
        if name is None:
            name = _only(specs, text)
        if name not in specs:
            put(name, np.empty(0))
        else:
            put(name, load_npy(path, specs[name]) if kind == "npy" else load_image(path, specs[name], how))
    return arrays


def _stream(model: Model, given: Sequence[str]) -> dict[str, Array]:
    """The outputs of a run for each row of the inputs, stacked on a first axis. Raises InputError."""
    from ingot.arrays import load_any

    specs = {spec.name: spec for spec in model.inputs}
    arrays: dict[str, Array] = {}
    for text in given:
        name, path = _split(text, specs)
        name = _only(specs, text) if name is None else name
        if name in arrays:
            raise InputError(f"input {name!r} is given twice", where="--input")
        arrays[name] = load_any(path)
        wanted = specs[name].shape if name in specs else arrays[name].shape[1:]  # the model refuses other names
        if arrays[name].ndim == 0 or arrays[name].shape[1:] != wanted:
            found, allowed = str(list(arrays[name].shape)), f"[runs, {str(list(wanted))[1:]}"
            raise InputError(f"input {name!r} has no row for each run", where=str(path), found=found, allowed=allowed)
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        found = ", ".join(f"{name}: {len(array)}" for name, array in arrays.items()) or "no inputs"
        raise InputError("the inputs do not tell the number of runs", where="--stream", found=found)
    runs = [model.run({name: array[i] for name, array in arrays.items()}) for i in range(counts.pop())]
    return {spec.name: np.stack([outputs[spec.name] for outputs in runs]) for spec in model.outputs}


def _split(text: str, specs: dict[str, TensorSpec]) -> tuple[str | None, Path]:
    """The name, if one is given, and the path. Names of inputs and files may hold '=' themselves."""
    known = [name for name in specs if text.startswith(f"{name}=")]
    if known:
        name = max(known, key=len)
        return name, Path(text[len(name) + 1 :])
    name, equals, rest = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        return None, Path(text)
    return name, Path(rest)


def _only(specs: dict[str, TensorSpec], text: str) -> str:
    if len(specs) == 1:
        return next(iter(specs))
    raise InputError(
        "the model has several inputs, and --input does not say which",
        where="--input",
        found=repr(text[:80]),
        allowed=", ".join(map(repr, specs.values())),
        hint=f"--input {next(iter(specs), 'NAME')}=FILE",
    )


def _choose(names: Sequence[str], wanted: str, path: Path) -> str:
    """Which array of a .npz file is meant for one input: that of its name, or the only one."""
    if wanted in names:
        return wanted
    if len(names) == 1:
        return names[0]
    found = ", ".join(names)[:200] or "none"
    raise InputError("the .npz file has no array of this name", where=str(path), found=found, allowed=wanted)


def _read_labels(path: Path, spec: TensorSpec) -> list[str]:
    """One label per class of the output. Raises InputError where their number differs."""
    try:
        if not path.is_file():
            raise InputError("the labels are not a file", where=str(path), allowed="a text file, one name in each line")
        with path.open("rb") as file:
            data = file.read(_MAX_LABEL_BYTES + 1)
    except OSError as error:
        found = error.strerror or str(error)
        raise InputError("cannot read the labels", where=str(path), found=found) from None
    if len(data) > _MAX_LABEL_BYTES:
        raise InputError("the labels file is too large", where=str(path), allowed=f"{_MAX_LABEL_BYTES} bytes")
    labels = data.decode("utf-8", "replace").strip("\n").splitlines()
    classes = spec.shape[-1] if spec.shape else 1
    if len(labels) != classes:
        hint = "some models have a class 0 for the background: put a line before the first" if classes > 1 else None
        raise InputError(
            "the labels do not fit the model",
            where=str(path),
            found=f"{len(labels)} lines",
            allowed=f"{classes}, one for each class of output {spec!r}",
            hint=hint,
        )
    return [label.strip() for label in labels]


# ------------------------------------------------------------------------------------------------------------ outputs


def _write_archive(path: Path, outputs: dict[str, Array]) -> None:
    from ingot.arrays import npz_bytes
    from ingot.packager.artifact import write_file

    write_file(path, npz_bytes(outputs))


def _write_folder(folder: Path, outputs: dict[str, Array]) -> dict[str, Path]:
    """Write one .npy file per output, named after it as far as a file name can be."""
    from ingot.arrays import npy_bytes
    from ingot.packager.artifact import write_file

    files: dict[str, Path] = {}
    for i, (name, array) in enumerate(outputs.items()):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:100] or f"output{i}"
        path = folder / f"{plain}.npy"
        if path in files.values():
            path = folder / f"{plain}_{i}.npy"
        files[name] = write_file(path, npy_bytes(array))
    return files


def _show(model: Model, outputs: dict[str, Array], files: dict[str, Path], archive: Path | None) -> None:
    from ingot.cli.console import clean, console, shape, show, table

    out = console()
    rows = []
    for spec in model.outputs:
        array = outputs[spec.name]
        place = files.get(spec.name) or archive
        rows.append(
            [clean(spec.name), spec.type, shape(spec.shape), *_statistics(array, spec), clean(place) if place else ""]
        )
    columns = ["output", "dtype", "shape", "min", "mean", "max", "file"]
    if not files and archive is None:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    show(out, table(columns, rows, right=("min", "mean", "max")))


def _numbers(array: Array, spec: TensorSpec) -> Array:
    if spec.type == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _statistics(array: Array, spec: TensorSpec) -> tuple[str, str, str]:
    if not array.size:
        return "", "", ""
    values = _numbers(array, spec).astype(np.float64)
    return f"{values.min():.4g}", f"{values.mean():.4g}", f"{values.max():.4g}"


def _rank(spec: TensorSpec, array: Array, count: int, labels: list[str] | None) -> None:
    """Print the largest values along the last axis, for each row of the output."""
    from ingot.cli.console import console

    out = console()
    values = _numbers(array, spec).astype(np.float64)
    q = spec.quantization
    if q is not None and len(q["scales"]) == 1:
        values = (values - q["zero_points"][0]) * q["scales"][0]
    classes = spec.shape[-1] if spec.shape else 1
    rows = values.reshape(-1, classes)
    for i, row in enumerate(rows[:16]):
        if len(rows) > 1:
            out.print(f"row {i} of {len(rows)}")
        _rank_row(out, row, count, labels)
    if len(rows) > 16:
        out.print(f"and {len(rows) - 16} more rows; -o writes all of them")


def _rank_row(out: Console, row: Array, count: int, labels: list[str] | None) -> None:
    from ingot.cli.console import clean, show, table

    # Stable, so that equal values keep their order; NaN goes last.
    order = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")[:count]
    columns = ["rank", "class", "value"] + (["label"] if labels else [])
    lines = []
    for rank, index in enumerate(order, 1):
        line = [str(rank), str(index), f"{row[index]:.4f}"]
        lines.append([*line, clean(labels[index])] if labels else line)
    show(out, table(columns, lines, right=("rank", "class", "value")))
