"""Runs a planned program on this machine without the packager: kernels in a bare library, steps called from Python."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ingot.packager.codegen import generate_object
from ingot.passes.pipeline import run
from ingot.passes.state import State
from ingot.program import BufferRef, CopyStep
from ingot.target import load_target


def aligned(nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def compile_state(imported, target: str = "native") -> State:
    state = State(imported.module, imported.weights, imported, load_target(target))
    return run(state)


def _ask_for_tiles() -> None:
    """Ask Linux for AMX tiles as the runtime does, arch_prctl(ARCH_REQ_XCOMP_PERM, 18); a CPU without them has none."""
    ctypes.CDLL(None).syscall(158, 0x1023, 18)


class Executable:
    """A planned program on this machine: its kernels in a library, its steps called from here."""

    def __init__(self, state: State, folder: Path) -> None:
        assert state.program is not None
        self.program, self.imported = state.program, state.imported
        self.weights = aligned(len(self.program.weights))
        self.weights[:] = np.frombuffer(self.program.weights, np.uint8)
        self.library = None
        if "amx-tile" in state.target.features:
            _ask_for_tiles()
        if state.lowered.kernels:
            code, _ = generate_object({k.symbol: k.function for k in state.lowered.kernels}, state.target)
            # A folder of its own: the dynamic linker gives a known path the library it loaded there before.
            place = Path(tempfile.mkdtemp(dir=folder))
            (place / "k.o").write_bytes(code)
            subprocess.run(["gcc", "-shared", "-o", str(place / "k.so"), str(place / "k.o"), "-lm"], check=True)
            self.library = ctypes.CDLL(str(place / "k.so"))

    def run(self, feeds: Sequence[np.ndarray], pieces: int = 1) -> list[np.ndarray]:
        """Run once from the first state; kernels' ranges in `pieces`, in order; outputs cut to the size they have."""
        specs = self.imported.user_outputs
        outputs = [aligned(int(np.prod(s.shape, dtype=np.int64)) * np.dtype(s.dtype).itemsize) for s in specs]
        arena = aligned(self.program.arena_bytes)
        arena[:] = 0xAB  # whatever was there before must not matter
        for out in outputs:
            out[:] = 0xCD
        halves = [aligned(self.program.state_bytes) for _ in range(2)]
        if self.program.initial_state is not None:
            start = self.program.initial_state
            halves[0][:] = self.weights[start : start + self.program.state_bytes]
        inputs = [np.ascontiguousarray(f) for f in feeds]

        def address(ref: BufferRef) -> int:
            base = {
                "input": lambda: inputs[ref.index],
                "output": lambda: outputs[ref.index],
                "arena": lambda: arena,
                "weight": lambda: self.weights,
                "state": lambda: halves[ref.index],
            }
            return int(base[ref.place]().ctypes.data) + ref.offset

        for step in self.program.steps:
            if isinstance(step, CopyStep):
                ctypes.memmove(address(step.destination), address(step.source), step.bytes)
                continue
            function = getattr(self.library, step.kernel.symbol)
            cuts = [step.kernel.extent * i // pieces for i in range(pieces + 1)]
            for begin, end in pairwise(cuts):
                if begin < end:
                    function(*[ctypes.c_void_p(address(a)) for a in step.args], begin, end)
        found = [o.view(s.dtype).reshape(s.shape) for o, s in zip(outputs, specs, strict=True)]
        for item in self.imported.counts:  # what does not exist is cut off
            place = self.imported.user_output_places.index(item.output)
            start = self.program.counters[item.counter]
            count = int(halves[1][start : start + 8].view(np.int64)[0])
            found[place] = np.take(found[place], range(count), item.axis)
        return found


def execute(state: State, feeds: Sequence[np.ndarray], folder: Path, pieces: int = 1) -> list[np.ndarray]:
    """Compile the program's kernels and run it once."""
    return Executable(state, folder).run(feeds, pieces)
