"""Intel's tile instructions for the tests, on any x86-64 machine: the CPU's own, or emulated where it has none."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ingot.target import Target, load_target

_SOURCE = Path(__file__).with_name("amx_emulator.c")
_FEATURES = ("amx-tile", "amx-int8", "amx-bf16")
#: Bytes before and after an array that no instruction may touch.
ZONE = 4096


def board() -> Target:
    """AVX2, which the machines of the tests have, and tiles."""
    plain = load_target("x86-64-v3")
    return plain.model_copy(update={"features": (*plain.features, *_FEATURES)})


class Tiles:
    """The running instructions. native: the CPU's own, for which nothing is counted and no fault written down."""

    def __init__(self, library: ctypes.CDLL, native: bool) -> None:
        self.library, self.native = library, native
        self.kept: list[np.ndarray] = []

    def fenced(self, array: np.ndarray) -> np.ndarray:
        """A copy of an array between zones that no instruction may touch; what is in them is NaN, or 127."""
        raw = np.full(array.nbytes + 2 * ZONE, 0x7F, np.uint8)
        inside = raw[ZONE : ZONE + array.nbytes].view(array.dtype).reshape(array.shape)
        inside[...] = array
        for first, last in ((0, ZONE), (ZONE + array.nbytes, raw.size)):
            ends = [ctypes.c_void_p(raw.ctypes.data + place) for place in (first, last)]
            assert self.library.amx_forbid(*ends)
        self.kept.append(raw)
        return inside

    def check(self) -> None:
        """Fail if an instruction would have faulted or touched a zone, or if a thread still holds tiles."""
        assert self.library.amx_faults() == b""
        assert self.count("ldtilecfg") == self.count("tilerelease")
        assert not self.library.amx_is_configured()
        for raw in self.kept:
            assert np.all(raw[:ZONE] == 0x7F)
            assert np.all(raw[-ZONE:] == 0x7F)

    def count(self, name: str) -> int:
        """How often an instruction ran so far."""
        return int(self.library.amx_count(name.encode()))

    def reset(self) -> None:
        """Forget zones, faults and counts."""
        self.kept.clear()
        self.library.amx_reset()


def build(folder: Path) -> ctypes.CDLL:
    """Compile the emulator."""
    path = folder / "amx_emulator.so"
    command = [
        "gcc",
        "-std=gnu11",
        "-O2",
        "-mavx2",
        "-mfma",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        str(_SOURCE),
        "-o",
    ]
    subprocess.run([*command, str(path), "-lm"], check=True)
    library = ctypes.CDLL(str(path))
    library.amx_faults.restype = ctypes.c_char_p
    library.amx_count.restype = ctypes.c_long
    library.amx_count.argtypes = [ctypes.c_char_p]
    return library


@contextmanager
def running(library: ctypes.CDLL) -> Iterator[Tiles]:
    """The instructions of the library `build` makes, for as long as this lasts."""
    found = library.amx_start()
    assert found >= 0, "Linux refuses tiles"
    library.amx_reset()
    try:
        yield Tiles(library, found == 1)
    finally:
        if found == 0:
            library.amx_stop()
