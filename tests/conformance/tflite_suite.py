"""Every TFLite operator through the compiler, in every dtype that LiteRT has a kernel for; LiteRT is the judge.

A case's model is run by LiteRT's own kernels, imported, compiled to machine code and run on the same inputs. Results:
    pass      dtypes, shapes and values are LiteRT's: floats within the case's tolerance, 8-bit outputs within one step
              of their scale, 16-bit ones within 1/512 of their range (`steps` says what was found; 0 is exact)
    refused   UnsupportedError: one sentence that says what is not supported
    wrong     outputs differ
    raw       any other exception
    none      LiteRT has no such kernel
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
BASELINE = FOLDER / "tflite_passing.txt"
STATUSES = ("pass", "refused", "wrong", "raw", "none")
#: How far a stored integer may be from LiteRT's.
STEPS = {"int8": 1, "uint8": 1, "int16": 128}
#: Operators that LiteRT mostly has no kernel for.
STABLEHLO = [
    f"STABLEHLO_{name}"
    for name in (
        "ABS", "ADD", "AND", "BROADCAST_IN_DIM", "CBRT", "CLAMP", "COMPARE", "CONCATENATE", "CONVERT", "CONVOLUTION",
        "COSINE", "DIVIDE", "DOT_GENERAL", "DYNAMIC_SLICE", "DYNAMIC_UPDATE_SLICE", "EXPONENTIAL", "FLOOR", "GATHER",
        "IOTA", "LOG", "LOGISTIC", "MAXIMUM", "MINIMUM", "MULTIPLY", "NEGATE", "OR", "PAD", "POWER", "REMAINDER",
        "RESHAPE", "RSQRT", "SELECT", "SHIFT_LEFT", "SLICE", "SUBTRACT", "TANH", "TRANSPOSE",
    )
]  # fmt: skip
#: Operators that have tests of their own: their results are states or complex numbers, more than one operator tells,
#: or the judge is numpy.
ELSEWHERE = {
    "ASSIGN_VARIABLE": "test_tflite_variables.py",
    "CALL_ONCE": "test_tflite_variables.py",
    "COMPLEX_ABS": "test_tflite_more.py",
    "DENSIFY": "test_tflite_stored.py",
    "IF": "test_tflite_control.py",
    "IMAG": "test_tflite_more.py",
    "READ_VARIABLE": "test_tflite_variables.py",
    "REAL": "test_tflite_more.py",
    "RFFT2D": "test_tflite_more.py",
    "VAR_HANDLE": "test_tflite_variables.py",
    "STABLEHLO_COMPOSITE": "test_tflite_control.py",
    "WHILE": "test_tflite_control.py",
    **dict.fromkeys(STABLEHLO, "test_tflite_stablehlo.py"),
}
# Cases in one compiled model: one link for all of them.
TOGETHER = 40

if __name__ == "__main__":
    sys.path[:] = [str(FOLDER.parent), *(item for item in sys.path if item != str(FOLDER))]

from conformance.tflite_cases import Case, model_of  # noqa: E402 - its own folder must be off the path
from conformance.tflite_list import cases  # noqa: E402


@dataclass(frozen=True)
class Result:
    """What became of one case."""

    name: str
    operator: str
    kind: str
    status: str
    detail: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Judged:
    """A case with what LiteRT computes."""

    case: Case
    expected: tuple[np.ndarray, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The outputs' shapes."""
        return [array.shape for array in self.expected]


def litert(data: bytes, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of LiteRT's built-in kernels on a model."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(model_content=data, experimental_op_resolver_type=kind)
    runner.allocate_tensors()
    for detail, array in zip(runner.get_input_details(), feeds, strict=True):
        runner.set_tensor(detail["index"], array)
    runner.invoke()
    return [runner.get_tensor(detail["index"]) for detail in runner.get_output_details()]


def judge(case: Case) -> Judged | Result:
    """What LiteRT computes, or that it has no such kernel."""
    try:
        return Judged(case, tuple(litert(case.model(real=True), case.feeds())))
    except (RuntimeError, ValueError) as error:
        return Result(case.name, case.operator, case.kind, "none", " ".join(str(error).split())[:200])


def compare(judged: Judged, found: Sequence[np.ndarray]) -> Result:
    """Hold outputs against LiteRT's."""
    case, steps, problem = judged.case, 0, ""
    for index, (left, right) in enumerate(zip(found, judged.expected, strict=True)):
        if left.dtype != right.dtype or left.shape != right.shape:
            problem = f"output {index}: {left.dtype}{list(left.shape)} instead of {right.dtype}{list(right.shape)}"
        elif left.dtype.kind in "fc":
            if not np.allclose(left, right, rtol=case.rtol, atol=case.atol, equal_nan=True):
                with np.errstate(all="ignore"):
                    problem = f"output {index}: off by {np.nanmax(np.abs(left - right))}"
        else:
            apart = int(np.abs(left.astype(np.int64) - right.astype(np.int64)).max(initial=0))
            steps = max(steps, apart)
            if apart > (STEPS.get(left.dtype.name, 0) if case.is_quantised(index) else 0):
                problem = f"output {index}: off by {apart} steps"
    return Result(case.name, case.operator, case.kind, "wrong" if problem else "pass", problem, steps)


def run_together(group: Sequence[Judged], folder: Path) -> list[Result]:
    """Compile the cases as one model, run it, compare each."""
    from ingot.frontend import import_model
    from passes.execute import Executable, compile_state

    path = folder / "cases.tflite"
    path.write_bytes(model_of([item.case for item in group], [item.shapes for item in group]))
    program = Executable(compile_state(import_model(path)), folder)
    outputs = iter(program.run([feed for item in group for feed in item.case.feeds()]))
    return [compare(item, [next(outputs) for _ in item.expected]) for item in group]


def run_case(judged: Judged, folder: Path) -> Result:
    """One case on its own, whatever becomes of it."""
    from ingot.errors import UnsupportedError

    case = judged.case
    try:
        return run_together([judged], folder)[0]
    except UnsupportedError as error:
        return Result(case.name, case.operator, case.kind, "refused", " | ".join(str(error).splitlines()))
    except Exception as error:  # whatever it is, it is the result
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        return Result(case.name, case.operator, case.kind, "raw", detail)


def _imports(judged: Judged, folder: Path) -> bool:
    from ingot.errors import IngotError
    from ingot.frontend import import_model

    path = folder / "case.tflite"
    path.write_bytes(judged.case.model(judged.shapes))
    try:
        import_model(path)
    except IngotError:
        return False
    return True


def run_cases(chosen: Sequence[Case], folder: Path) -> Iterator[Result]:
    """Run cases, those that import together in one model where that works; yield results as they come."""
    waiting: list[Judged] = []
    for case in chosen:
        judged = judge(case)
        if isinstance(judged, Result):
            yield judged
        elif case.alone or not _imports(judged, folder):
            yield run_case(judged, folder)
        else:
            waiting.append(judged)
    for first in range(0, len(waiting), TOGETHER):
        group = waiting[first : first + TOGETHER]
        try:
            yield from run_together(group, folder)
        except Exception:  # one of them fails: which one?
            for judged in group:
                yield run_case(judged, folder)


def sample(chosen: Sequence[Case]) -> list[Case]:
    """The first form of each operator in each dtype."""
    found: dict[tuple[str, str], Case] = {}
    for case in chosen:
        found.setdefault((case.operator, case.kind), case)
    return list(found.values())


def passing() -> list[str]:
    """The names of the cases that passed when the baseline was last written."""
    return BASELINE.read_text().splitlines()


def refusals() -> dict[str, str]:
    """Why each operator of the schema without a case is refused."""
    import tflite

    from ingot.frontend.tflite_ops import why_refused

    covered = {case.operator for case in cases()} | set(ELSEWHERE)
    names = {name for name, number in vars(tflite.BuiltinOperator).items() if isinstance(number, int)}
    return {name: why_refused(name) for name in sorted(names - covered - {"CUSTOM"})}


def summary(results: Sequence[Result]) -> str:
    """The numbers, in one line."""
    counts = Counter(result.status for result in results)
    exact = sum(result.status == "pass" and not result.steps for result in results)
    return f"{len(results)} cases: {', '.join(f'{s} {counts[s]}' for s in STATUSES)} ({exact} of them without a step)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; see --help."""
    parser = argparse.ArgumentParser(description="every TFLite operator through the compiler, LiteRT being the judge")
    parser.add_argument("names", nargs="*", help="only cases whose name begins with one of these")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--write", action="store_true", help="rewrite the list of passing cases and docs/operators.md")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if not options.names or case.name.startswith(tuple(options.names))]
    results = []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for result in run_cases(chosen, Path(folder)):
            results.append(result)
            if result.status not in ("pass", "none"):
                print(f"{result.status:8s} {result.name}: {result.detail}", flush=True)
    listed = sorted(results, key=lambda item: item.name)
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in listed], indent=0))
    if options.write:
        from conformance.operator_table import write_tflite_table

        BASELINE.write_text("".join(f"{item.name}\n" for item in listed if item.status == "pass"))
        write_tflite_table(listed, refusals(), ELSEWHERE, FOLDER.parent.parent / "docs" / "operators.md")
    print(summary(listed))
    return 1 if any(item.status in ("wrong", "raw") for item in listed) else 0


if __name__ == "__main__":
    sys.exit(main())
