"""Instruction counts on emulated ARM boards, and llvm-mca's estimate of the inner loops. Estimates, no times.

usage: arm_estimates.py MODEL... [--targets raspberry-pi-4,raspberry-pi-5] [--write docs/arm.md] [--least 16]

A count is that of one inference on one thread: half the difference of three runs and one, so that start and loading
drop out. A loop's efficiency is the time of its multiplications alone over that of the whole loop, both by llvm-mca's
model of the core (llvm-mca 14 has one model for the Cortex-A57, A72 and A76). Loops are weighed by what they execute.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from ingot.architectures import BASELINES
from ingot.emulator import emulator_for
from ingot.errors import IngotError, ToolchainError
from ingot.packager.link import build_plugin, build_program
from ingot.runtime.loader import read_metadata
from ingot.target import Target, load_target, native_target

HERE = Path(__file__).resolve().parent
#: What the kernels' multiplications are made of.
MULTIPLICATIONS = re.compile(
    r"(fmla|fmls|[us]dot|u?s?mmla|bfdot|bfmmla|[us]mu?l[al]l?2?|[us]mull2?|[us]mlal2?|[us]adalp)$"
)
_PLUGIN_VERSIONS = range(1, 9)
_RUNS = 3


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after another, and how often."""

    executed: int
    code: bytes


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its first and last address in the file, its instructions as assembler text."""

    first: int
    last: int
    lines: tuple[str, ...]

    @property
    def multiplications(self) -> list[str]:
        """The lines that multiply."""
        return [line for line in self.lines if MULTIPLICATIONS.match(line.split()[0])]


def tool(name: str) -> str:
    """A tool of LLVM. Raises ToolchainError where it is not installed."""
    names = [name, *(f"{name}-{v}" for v in range(30, 13, -1))]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise ToolchainError(f"{name} is not installed", hint="on Debian and Ubuntu: apt install llvm")
    return found


def run_blocks(library: Path, target: Target, folder: Path, runs: int) -> list[Block]:
    """What an emulated CPU of the target executes in so many inferences on seeded inputs."""
    metadata, qemu = read_metadata(library), emulator_for(target)
    program = folder / "run_main"
    if not program.exists():
        program.write_bytes(build_program("run_main.c", target.zig_triple, BASELINES[target.arch]))
        program.chmod(0o755)
    random = np.random.default_rng(0)
    for i, spec in enumerate(metadata["inputs"]):
        values = (random.standard_normal(spec["shape"]) * 50).astype(spec["dtype"])
        (folder / f"in{i}").write_bytes(values.tobytes() * runs)
    out, machine = folder / "blocks", native_target()
    command = [str(program), str(library.resolve()), f"ingot_{metadata['name']}_api", "1", str(folder), str(runs)]
    for version in _PLUGIN_VERSIONS:
        plugin = folder / f"blocks{version}.so"
        if not plugin.exists():
            source = (HERE / "arm_blocks.c").read_bytes()
            plugin.write_bytes(
                build_plugin(source, machine.zig_triple, machine.baseline(), (f"PLUGIN_VERSION={version}",))
            )
        first, *rest = qemu.command()
        done = subprocess.run(
            [first, "-plugin", str(plugin), *rest, *command],
            env={**os.environ, "INGOT_BLOCKS": str(out)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return [_block(line) for line in out.read_text().splitlines()]
        if "plugin" not in done.stderr.lower():
            break
    raise ToolchainError("the emulated model failed", where=library.name, found=done.stderr.strip()[-200:])


def _block(line: str) -> Block:
    count, words = line.split()
    code = b"".join(struct.pack("<I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    return Block(int(count), code)


def totals(blocks: list[Block]) -> np.ndarray[Any, Any]:
    """Executed instructions: all, loads and stores, SIMD and floating point."""
    counts = np.zeros(3)
    for block in blocks:
        group = (np.frombuffer(block.code, "<u4") >> 25) & 15  # op0 of the A64 encoding
        counts += block.executed * np.array([group.size, np.sum((group & 5) == 4), np.sum((group & 7) == 7)])
    return counts


def innermost_loops(disassembly: str) -> list[Loop]:
    """The loops of an AArch64 disassembly by llvm-objdump that hold no other loop."""
    code = []
    for line in disassembly.splitlines():
        found = re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line)
        if found:
            code.append((int(found[1], 16), " ".join(found[2].split())))
    place = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (address, text) in enumerate(code):
        branch = re.match(r"(?:b\.?\w*|cbn?z|tbn?z)\s.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) <= address and int(branch[1], 16) in place:
            spans.append((place[int(branch[1], 16)], i))
    inner = [s for s in spans if not any(o != s and o[0] >= s[0] and o[1] <= s[1] for o in spans)]
    return [Loop(code[a][0], code[b][0], tuple(text for _, text in code[a : b + 1])) for a, b in inner]


def cycles(lines: list[str], target: Target) -> tuple[float, float]:
    """llvm-mca's cycles of one pass of a loop, and the least that its resources allow."""
    body = "\n".join(re.sub(r"0x[0-9a-f]+( <.*>)?$", "loop", line) if _branches(line) else line for line in lines)
    features = ",".join("+" + name for name in target.features)
    command = [tool("llvm-mca"), "-mtriple=aarch64", f"-mcpu={target.cpu}", f"-mattr={features}", "--iterations=100"]
    done = subprocess.run(command, input=f"loop:\n{body}\n", capture_output=True, text=True, check=False)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    least = re.search(r"Block RThroughput:\s+([\d.]+)", done.stdout)
    if total is None or least is None:
        raise ToolchainError("llvm-mca cannot read a loop", found=done.stderr.strip()[:200])
    return int(total[1]) / 100, float(least[1])


def _branches(line: str) -> bool:
    return re.match(r"(b\.?\w*|bl|cbn?z|tbn?z)\s", line) is not None


@dataclass(frozen=True)
class Estimate:
    """One model on one target: counts in millions, and (efficiency, share of the executed instructions) of loops."""

    model: str
    target: Target
    counts: np.ndarray[Any, Any]
    loops: list[tuple[float, float]]


def estimate(model: Path, target: Target, least: int) -> Estimate:
    """Compile, count, and analyse the loops with at least so many multiplications."""
    with tempfile.TemporaryDirectory(prefix="ingot-") as name:
        folder = Path(name)
        library = ingot.compile(model, target=target.name, selftest=False).save(folder / "model.so")
        once, thrice = (run_blocks(library, target, folder, runs) for runs in (1, _RUNS))
        counts = (totals(thrice) - totals(once)) / (_RUNS - 1) / 1e6
        features = ",".join("+" + feature for feature in target.features)
        command = [tool("llvm-objdump"), "-d", "--no-show-raw-insn", f"--mattr={features}", str(library)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        executed = _executed(library, once)
        loops = []
        for loop in innermost_loops(text):
            if len(loop.multiplications) < least:
                continue
            weight = sum(count for address, count in executed if loop.first <= address <= loop.last)
            if weight:
                spent, (_, bound) = cycles(list(loop.lines), target)[0], cycles(loop.multiplications, target)
                loops.append((bound / spent, weight / counts[0] / 1e6))
    return Estimate(model.stem, target, counts, sorted(loops))


def _executed(library: Path, blocks: list[Block]) -> list[tuple[int, int]]:
    """The blocks that lie in the library: the address in its file, and the instructions executed."""
    data, found = library.read_bytes(), []
    for block in blocks:
        place = data.find(block.code)
        if place >= 0 and block.executed:
            found.append((_address(data, place), block.executed * len(block.code) // 4))
    return found


def _address(data: bytes, place: int) -> int:
    """The virtual address of a place in a 64-bit ELF file."""
    start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    for i in range(count):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, start + i * size)
        if kind == 1 and offset <= place < offset + length:
            return int(address - offset + place)
    return place


def table(estimates: list[Estimate], peers: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        "| model | core | instructions, M | loads, stores | SIMD | peer | its instructions | ratio | ratio, memory |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for e in estimates:
        total, memory, simd = e.counts
        name, theirs, moved = peers.get(e.target.cpu, {}).get(e.model, ["-", None, None])
        cells = [name, f"{theirs:g}" if theirs else "-", f"{total / theirs:.2f}" if theirs else "-"]
        cells.append(f"{memory / moved:.2f}" if moved else "-")
        lines.append(f"| {e.model} | {e.target.cpu} | {total:.2f} | {memory:.2f} | {simd:.2f} | {' | '.join(cells)} |")
    lines += [
        "",
        "| model | core | inner loops | of all instructions | efficiency, weighed | at 85 % or more | worst |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for e in estimates:
        share = sum(weight for _, weight in e.loops)
        if not share:
            continue
        mean = sum(efficiency * weight for efficiency, weight in e.loops) / share
        good = sum(weight for efficiency, weight in e.loops if efficiency >= 0.85) / share
        cells = [f"{share:.0%}", f"{mean:.0%}", f"{good:.0%}", f"{e.loops[0][0]:.0%}"]
        lines.append(f"| {e.model} | {e.target.cpu} | {len(e.loops)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, command: str, measured: str) -> str:
    """The page that holds the tables."""
    version = subprocess.run([tool("llvm-mca"), "--version"], capture_output=True, text=True, check=True).stdout
    mca = re.search(r"version (\S+)", version)
    return f"""# ARM without a board: estimates

These are estimates, not times: no board was at hand. The first table counts the instructions that one inference
executes on an emulated CPU (qemu-user, one thread), the second lets LLVM's machine-code analyser estimate the inner
loops: the cycles of a loop's multiplications alone, over the cycles of the whole loop, weighed by what each loop
executes. Caches, branch prediction and memory are in neither.

- date: {time.strftime("%Y-%m-%d")}
- command: `{command}`
- versions: ingot {ingot.__version__}, llvm-mca {mca[1] if mca else "unknown"}
- peers: {measured}

{text}
"""


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--targets", default="raspberry-pi-4,raspberry-pi-5")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--least", type=int, default=16, help="multiplications that make a loop worth a look")
    options = parser.parse_args()
    peers = json.loads((HERE / "arm_peers.json").read_text())
    estimates: list[Estimate] = []
    try:
        for model in options.models:
            for name in options.targets.split(","):
                estimates.append(estimate(model, load_target(name), options.least))
                print(table(estimates[-1:], peers).splitlines()[2], file=sys.stderr, flush=True)
            if options.write is not None:  # after each model, as many take long
                done = " ".join(path.name for path in options.models[: options.models.index(model) + 1])
                command = f"scripts/arm_estimates --targets {options.targets} {done}"
                options.write.write_text(page(table(estimates, peers), command, peers["measured"]))
    except IngotError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(estimates, peers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
