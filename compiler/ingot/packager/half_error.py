"""The error of half precision, or of weights in few bits, against float32, measured while compiling.

The kernels are generated once more for the machine that compiles, with portable arithmetic in place of instructions it
lacks (`schedules.llvm_forms`), and run on the selftest's seeded input: every value is rounded where the target rounds
it, and only the order of float32 sums differs. The outputs are compared with the selftest's, which an independent
interpreter computed in float32. The run has a process of its own, as the interpreter has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, tirx

from ingot.errors import IngotError
from ingot.packager.apart import TIME_LIMIT_S, ask
from ingot.packager.artifact import package
from ingot.packager.codegen import generate_code
from ingot.packager.selftest import SelfTest, random_inputs
from ingot.target import native_target

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported
    from ingot.program import Program

    Array = np.ndarray[Any, Any]

#: The selftest allows this many times the measured error.
_SELFTEST_MARGIN = 2.0


@dataclass(frozen=True)
class OutputError:
    """The error of one output on one input, over the elements the selftest stores.

    sqnr_db: 10 log10(sum reference^2 / sum error^2); None if the error is 0 or an output is not finite. max_error:
    max|error|, max_reference: max|reference|; None if an output is not finite.
    """

    name: str
    sqnr_db: float | None
    max_error: float | None
    max_reference: float | None


@dataclass(frozen=True)
class HalfSummary:
    """What `--precision bf16` or fp16 did.

    layers: convolutions and products with constant weights. multiplied: those that multiply in the format. stored:
    those that only store their weights in it. tensors: how many tensors between kernels are stored in it. errors: by
    output of float dtype; empty where it was not measured, and `why_not` says why.
    """

    layers: int
    multiplied: int
    stored: int
    tensors: int
    errors: tuple[OutputError, ...]
    why_not: str

    def metadata(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "layers": self.layers,
            "multiplied": self.multiplied,
            "stored": self.stored,
            "tensors": self.tensors,
            "errors": [asdict(error) for error in self.errors],
        }


@dataclass(frozen=True)
class WeightSummary:
    """What `--weights` did.

    format: of the weights. layers: convolutions, products with constant weights and looked-up tables. stored: those in
    the format. errors and why_not: as in `HalfSummary`.
    """

    format: str
    layers: int
    stored: int
    errors: tuple[OutputError, ...]
    why_not: str

    def metadata(self) -> dict[str, Any]:
        """Return plain JSON types."""
        errors = [asdict(error) for error in self.errors]
        return {"format": self.format, "layers": self.layers, "stored": self.stored, "errors": errors}


def measure(
    program: Program,
    functions: Mapping[str, Any],
    imported: Imported,
    precision: str,
    selftest: SelfTest | None,
    *,
    custom: bool,
) -> tuple[tuple[OutputError, ...], str]:
    """Return the error of each float output, or nothing and the reason. Raises nothing.

    functions: the kernels of `program` before code generation, by symbol. custom: it has operators of the user's own.
    """
    if selftest is None:
        return (), "without a selftest there is nothing to compare with"
    if custom:
        return (), "an operator of the user's own is compiled for the target only"
    foreign = _foreign_intrinsics(functions)
    try:
        host = native_target()
        if foreign:
            return (), f"a kernel uses an instruction that has no portable form ({foreign})"
        code = generate_code(dict(functions), host)
        here = replace(program, objects=(code,)) if functions else program
        artifact = package(here, imported, host, precision=precision, selftest=None)
        outputs = _run(artifact.library, imported, selftest.seed)
    except subprocess.TimeoutExpired:
        return (), f"the model took longer than {TIME_LIMIT_S} s"
    except IngotError as error:
        return (), str(error).splitlines()[0]
    except (OSError, ValueError, KeyError) as error:
        return (), str(error)[:200]
    return _compare(imported, outputs, selftest), ""


def widened(selftest: SelfTest, imported: Imported, errors: tuple[OutputError, ...]) -> SelfTest:
    """Return the selftest with tolerances no smaller than a margin over the measured errors."""
    by_name = {e.name: e for e in errors}
    outputs = []
    for spec, output in zip(imported.outputs, selftest.outputs, strict=True):
        error, tolerance = by_name.get(spec.name), output.tolerance
        if error is not None and error.max_error is not None and error.max_reference:
            tolerance = max(tolerance, _SELFTEST_MARGIN * error.max_error / error.max_reference)
        outputs.append(replace(output, tolerance=tolerance))
    return replace(selftest, outputs=tuple(outputs))


def _foreign_intrinsics(functions: Mapping[str, Any]) -> str:
    """Return the name of an LLVM intrinsic of one architecture that a kernel calls, or ""."""
    found: set[str] = set()
    name_of = tvm.get_global_func("target.llvm_get_intrinsic_name")

    def visit(expr: Any) -> None:  # noqa: ANN401
        if str(getattr(expr.op, "name", "")) in ("tirx.call_llvm_pure_intrin", "tirx.call_llvm_intrin"):
            name = str(name_of(int(expr.args[0]))) if isinstance(expr.args[0], tirx.IntImm) else str(expr.args[0])
            if any(name.startswith(f"llvm.{arch}.") for arch in ("x86", "aarch64", "arm", "riscv")):
                found.add(name)

    for function in functions.values():
        tvm_ffi.structural_walk(function, [(ir.Call, visit)])
    return min(found, default="")


def _run(library: bytes, imported: Imported, seed: int) -> list[Array]:
    """Return the outputs of a library for this machine, computed in a process of its own."""
    specs = [{"name": s.name, "dtype": s.dtype, "shape": s.shape} for s in imported.inputs]
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        path, answer = Path(folder) / "model.so", Path(folder) / "answer.npz"
        path.write_bytes(library)
        found = ask("ingot.packager.half_error", {"inputs": specs, "seed": seed}, path, answer, answer=answer)
        return [found[f"output_{i}"] for i in range(len(found))]


def _compare(imported: Imported, outputs: list[Array], selftest: SelfTest) -> tuple[OutputError, ...]:
    found = []
    for spec, array, stored in zip(imported.outputs, outputs, selftest.outputs, strict=True):
        if not spec.dtype.startswith(("float", "bfloat")):
            continue
        mine = _real(array.reshape(-1)[:: stored.stride], spec.dtype)
        want = _real(stored.values, spec.dtype)
        if not (np.isfinite(mine).all() and np.isfinite(want).all()) or not want.size:
            found.append(OutputError(spec.name, None, None, None))
            continue
        noise, signal = float(np.sum((mine - want) ** 2)), float(np.sum(want**2))
        sqnr = round(10 * float(np.log10(signal / noise)), 1) if noise and signal else None
        largest = float(np.max(np.abs(mine - want)))
        found.append(OutputError(spec.name, sqnr, float(f"{largest:.3g}"), float(f"{np.max(np.abs(want)):.3g}")))
    return tuple(found)


def _real(values: Array, dtype: str) -> Array:
    bits = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        bits = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


def main() -> int:
    """Answer one request on standard input (JSON: inputs, seed): run the library argv[1], write the .npz argv[2]."""
    from ingot.frontend.interface import TensorSpec
    from ingot.runtime.loader import load

    request = json.load(sys.stdin)
    specs = [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in request["inputs"]]
    with load(sys.argv[1], threads=1) as model:
        outputs = model.run(random_inputs(specs, request["seed"]))
    np.savez(sys.argv[2], **{f"output_{i}": np.asarray(a) for i, a in enumerate(outputs.values())})  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
