"""The result of a compilation: the shared library, what is known about it, and its other forms."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.errors import OptionError, OutputError, UnsupportedError
from ingot.packager.entry import check_program, entry_c, weights_s
from ingot.packager.header import model_h
from ingot.packager.link import Sources, archive, check_kernels, link
from ingot.packager.metadata import build_metadata, encode_metadata, memory_bytes

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported
    from ingot.packager.half_error import HalfSummary, WeightSummary
    from ingot.packager.selftest import SelfTest
    from ingot.program import Program
    from ingot.target import Target

#: What `Artifact.emit` gives: shared library, static library, C header, generated C, LLVM text, Relax text.
KINDS = ("so", "a", "c-header", "c", "llvm", "relax")


@dataclass(frozen=True)
class Artifact:
    """A compiled model.

    `library` holds the bytes of model.so, `metadata` what it says about itself, `notices` sentences the user should
    read, `header` and `entry_c` the C texts that belong to it, `sources` all that the linker was given.
    `quantization` is the `ingot.quantize.report.Report` of a model that was quantised after training, else None.
    """

    library: bytes = field(repr=False)
    metadata: dict[str, Any]
    notices: tuple[str, ...]
    header: str = field(repr=False)
    llvm_ir: str = field(repr=False)
    relax: str = field(repr=False)
    sources: Sources = field(repr=False)
    _target: Target = field(repr=False)
    quantization: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The model's name: the exported function is `ingot_<name>_api`."""
        return self.sources.name

    @property
    def entry_c(self) -> str:
        """The generated C source."""
        return self.sources.entry_c

    def emit(self, kind: str) -> bytes | str:
        """One form of the model: bytes for "so" and "a", text for "c-header", "c", "llvm" and "relax".

        Raises OptionError for any other kind; ToolchainError or OutputError where the static library cannot be made.
        """
        if kind == "so":
            return self.library
        if kind == "a":
            return archive(self.sources, self._target)
        texts = {"c-header": self.header, "c": self.entry_c, "llvm": self.llvm_ir, "relax": self.relax}
        if kind not in texts:
            raise OptionError("unknown kind of output", where="emit", found=repr(kind), allowed=", ".join(KINDS))
        return texts[kind]

    def save(self, path: str | os.PathLike[str], kind: str = "so") -> Path:
        """Write one form of the model, the shared library by default; returns the path.

        The file appears whole or not at all: it is written under another name in the same folder, then renamed.
        Raises OutputError where the folder is missing or read-only, the path is a folder, or the disk is full.
        """
        data = self.emit(kind)
        return write_file(path, data.encode("utf-8") if isinstance(data, str) else data, executable=kind == "so")


def write_file(path: str | os.PathLike[str], data: bytes, *, executable: bool = False) -> Path:
    """Replace a file at once, or leave everything as it was. Raises OutputError."""
    target = Path(path)
    temporary = target.parent / f".ingot-{secrets.token_hex(8)}.tmp"
    created = False
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        mode = 0o777 if executable else 0o666  # less the user's umask
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        created = True
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        created = False
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _output_error(error, target) from None
    finally:
        if created:
            with contextlib.suppress(OSError):
                temporary.unlink()
    return target


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some file systems cannot, which loses nothing but that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _output_error(error: OSError | ValueError, target: Path) -> OutputError:
    hints = {
        errno.ENOENT: "create the folder first",
        errno.ENOTDIR: "create the folder first",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder you may write to",
        errno.ENOSPC: "free some space, or choose another disk",
        errno.EDQUOT: "free some space, or choose another disk",
        errno.EISDIR: "name a file in it",
    }
    number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
    hint = hints.get(number or 0)
    return OutputError("cannot write the output", where=str(target), found=text or str(error), hint=hint)


def package(
    program: Program,
    imported: Imported,
    target: Target,
    *,
    precision: str,
    selftest: SelfTest | None,
    half: HalfSummary | None = None,
    few_bits: WeightSummary | None = None,
) -> Artifact:
    """Turn a lowered program into an artifact; `half` and `few_bits` say what was done, where it was asked for.

    Raises CompilerError where the program contradicts itself, ToolchainError where the linker is missing or fails,
    OutputError where the disk is full, UnsupportedError where the model is too large for a 32-bit target.
    """
    check_program(program, imported)
    check_kernels(program.objects, [k.symbol for k in program.kernels], target.elf_machine)
    if target.elf_class == 1 and len(program.weights) + memory_bytes(program) > 3 << 30:
        raise UnsupportedError(
            "the model is too large for a 32-bit address space",
            where=target.name,
            found=f"{len(program.weights)} bytes of weights, {memory_bytes(program)} of memory",
            allowed="3 GiB together",
            hint="compile for a 64-bit target",
        )
    metadata = build_metadata(program, imported, target, precision=precision, has_selftest=selftest is not None)
    if half is not None:
        metadata["half"] = half.metadata()
    if few_bits is not None:
        metadata["few_bits"] = few_bits.metadata()
    note = encode_metadata(metadata)
    files = {"weights.bin": program.weights, "metadata.json": note}
    if selftest is not None:
        files["expected.bin"] = selftest.data()
    sources = Sources(
        name=imported.name,
        entry_c=entry_c(program, imported, target, precision, selftest),
        weights_s=weights_s(imported, target, program.weights, note, selftest),
        files=files,
        objects=program.objects,
    )
    return Artifact(
        library=link(sources, target),
        metadata=metadata,
        notices=imported.notices,
        header=model_h(program, imported, target),
        llvm_ir=program.llvm_ir,
        relax=program.relax,
        sources=sources,
        _target=target,
    )
