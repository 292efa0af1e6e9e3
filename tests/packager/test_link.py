"""What comes out of the linker: one export, nothing needed but libc, the same bytes wherever and whenever."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ingot
from handmade import HOST, compile_c, handmade
from ingot.errors import CompilerError, OutputError, ToolchainError
from ingot.packager import link as link_module
from ingot.packager.artifact import Artifact, package
from ingot.packager.elf import SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, Elf
from ingot.packager.link import check_kernels, link
from ingot.target import load_target

TARGETS = ["x86-64-v2", "x86-64-v3-musl", "raspberry-pi-4", "raspberry-pi-3-32bit", "visionfive-2"]
RUNTIME_TEXT_LIMIT = 48 << 10


def build(target: str, name: str = "demo") -> Artifact:
    program, imported, board, selftest = handmade(target, name)
    return package(program, imported, board, precision="fp32", selftest=selftest)


@pytest.mark.parametrize("target", TARGETS)
def test_promises_of_an_artifact(target: str) -> None:
    artifact, board = build(target), load_target(target)
    elf = Elf(artifact.library)
    assert elf.exported() == ["ingot_demo_api"]
    if board.libc == "gnu":
        assert set(elf.needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
        needed = [v for versions in elf.versions.values() for v in versions if v.startswith("GLIBC_")]
        assert needed
        newest = max(tuple(map(int, v[6:].split("."))) for v in needed)
        assert newest <= tuple(map(int, board.libc_version.split(".")))
    else:
        assert elf.needed == ("libc.so",)
    weights, note, text = (elf.section(n) for n in (".ingot.weights", ".note.ingot", ".text"))
    assert weights is not None
    assert weights.flags == SHF_ALLOC
    assert (weights.offset % board.page_bytes, weights.address % board.page_bytes) == (0, 0)
    assert bytes(elf.contents(weights)) == handmade(target)[0].weights
    assert note is not None
    assert not note.flags & SHF_ALLOC
    assert text is not None
    assert text.size < RUNTIME_TEXT_LIMIT
    assert not any(s.flags & SHF_WRITE and s.flags & SHF_EXECINSTR for s in elf.sections)
    assert not [s.name for s in elf.sections if "debug" in s.name or s.name == ".symtab"]
    # Nothing runs at load, and nothing is per thread.
    assert not {".init_array", ".fini_array", ".ctors", ".tdata", ".tbss"} & {s.name for s in elf.sections}


def test_nothing_of_this_machine_is_inside() -> None:
    library = build(HOST).library
    for word in (str(Path.home()), str(Path.cwd()), tempfile.gettempdir(), "entry.c", os.uname().nodename, sys.prefix):
        assert word.encode() not in library or len(word) < 4, word


BUILD = """
import sys
from handmade import handmade
from ingot.packager.artifact import package
program, imported, target, selftest = handmade(sys.argv[1])
artifact = package(program, imported, target, precision="fp32", selftest=selftest)
artifact.save("model.so")
artifact.save("libmodel.a", "a")
"""


@pytest.mark.parametrize("target", ["x86-64-v2", "raspberry-pi-3-32bit"])
def test_two_builds_are_byte_identical(target: str, tmp_path: Path) -> None:
    """In other folders, at another time, under another user's environment, in another process."""
    digests = []
    for i, folder in enumerate((tmp_path / "a", tmp_path / "a much longer folder ü" / "b")):
        temporary = folder / "tmp"
        temporary.mkdir(parents=True)
        changes = {"TMPDIR": str(temporary), "PYTHONHASHSEED": str(i), "TZ": "Asia/Tokyo" if i else "UTC"}
        if i:
            (folder / "include").mkdir()
            (folder / "include" / "pthread.h").write_text("#error the user's own header\n")
            changes |= {"CPATH": str(folder / "include"), "SOURCE_DATE_EPOCH": "1234567890", "LANG": "de_DE.UTF-8"}
        path = os.pathsep.join(str(p) for p in (Path(ingot.__file__).parent.parent, Path(__file__).parent.parent))
        environment = {**os.environ, **changes, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", BUILD, target], cwd=folder, env=environment, check=True)
        digests.append([hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("model.so", "libmodel.a")])
        assert not list(temporary.iterdir())
    assert digests[0] == digests[1]


def test_a_change_of_the_weights_alone_is_seen() -> None:
    program, imported, board, selftest = handmade()
    libraries = []
    for weights in (program.weights, bytes(len(program.weights))):
        artifact = package(replace(program, weights=weights), imported, board, precision="fp32", selftest=selftest)
        section = Elf(artifact.library).section(".ingot.weights")
        assert section is not None
        assert bytes(Elf(artifact.library).contents(section)) == weights
        libraries.append(artifact.library)
    assert libraries[0] != libraries[1]


MAIN = """
#include "one.h"
#include "two.h"
#include <stdio.h>
#include <string.h>
static int check(const ingot_api *api, const char *name, unsigned long long bytes) {
    const ingot_model_info *info;
    ingot_model *model = NULL;
    double error = 1;
    if (api->abi_version != INGOT_ABI_VERSION || api->describe(&info) != INGOT_OK) return 1;
    if (strcmp(info->name, name) != 0 || info->memory_bytes != bytes) return 2;
    if (api->create(NULL, &model) != INGOT_OK) return 3;
    if (api->selftest(model, &error) != INGOT_OK || error > 1e-5) return 4;
    return api->destroy(model) != INGOT_OK ? 5 : 0;
}
int main(void) {
    int one = check(ingot_one_api(), "one", INGOT_ONE_MEMORY_BYTES);
    int two = check(ingot_two_api(), "two", INGOT_TWO_MEMORY_BYTES);
    printf("%d %d %d %d\\n", one, two, INGOT_ONE_N_INPUTS, INGOT_TWO_N_OUTPUTS);
    return ingot_one_api() == ingot_two_api();
}
"""


@pytest.mark.parametrize(
    ("compiler", "source", "flags"),
    [
        ("gcc", "main.c", ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wpedantic")),
        ("g++", "main.cpp", ("-std=c++11", "-Wall", "-Wextra", "-Werror")),
        ("gcc", "main.c", ("-std=c11", "-static-pie", "-fPIE")),
    ],
)
def test_two_models_in_one_program(
    compiler: str, source: str, flags: tuple[str, ...], gcc: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        artifact = build(HOST, name)
        artifact.save(tmp_path / f"lib{name}.a", "a")
        artifact.save(tmp_path / f"{name}.h", "c-header")
    (tmp_path / source).write_text(MAIN)
    program = Path(gcc).with_name(compiler)
    command = [program, *flags, source, "libone.a", "libtwo.a", "-o", "main", "-lm", "-lpthread"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout == "0 0 2 3\n"


def test_a_library_with_a_model_inside_exports_nothing_of_it(gcc: str, tmp_path: Path) -> None:
    build(HOST).save(tmp_path / "libdemo.a", "a")
    (tmp_path / "own.c").write_text(
        "const void *ingot_demo_api(void);\nconst void *own(void);\n"
        "const void *own(void) { return ingot_demo_api(); }\n"
    )
    command = [gcc, "-shared", "-fPIC", "own.c", "libdemo.a", "-o", "own.so", "-lm", "-lpthread"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ours = [s for s in Elf((tmp_path / "own.so").read_bytes()).exported() if "ingot" in s]
    assert ours == ["ingot_demo_api"]


# ---- what kernels may call ----


def kernel_object(body: str, target: str = HOST) -> bytes:
    board = load_target(target)
    source = f"#include <stdint.h>\nvoid ingot_demo_k(float *p, int32_t b, int32_t e) {{ {body} }}\n"
    return compile_c(source, board.zig_triple, board.baseline())


def test_kernels_may_call_math_memory_and_compiler_helpers() -> None:
    bodies = {
        HOST: "for (; b < e; b++) p[b] = __builtin_expf(p[b]) + __builtin_tanh(p[b]);"
        "__builtin_memcpy(p + 100, p, e * 4u);",
        "raspberry-pi-3-32bit": "volatile int64_t *q = (int64_t *)p; q[0] = q[1] / q[2]; p[8] = (float)q[3];",
    }
    for target, body in bodies.items():
        data = kernel_object(body, target)
        assert Elf(data).undefined()
        check_kernels([data], ["ingot_demo_k"], load_target(target).elf_machine)


@pytest.mark.parametrize(("divisor", "helpers"), [("e", False), ("(float)((__int128)p[1] / e)", True)])
def test_the_library_of_compiler_helpers_is_built_only_where_it_is_needed(
    divisor: str, helpers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes zig seconds, on the first compilation on a machine."""
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path))
    program, imported, board, selftest = handmade("raspberry-pi-4")
    extra = compile_c(
        f"#include <stdint.h>\nvoid ingot_demo_x(float *p, int32_t e) {{ *p /= {divisor}; (void)e; }}\n",
        board.zig_triple,
        board.baseline(),
    )
    program = replace(program, objects=(*program.objects, extra))
    package(program, imported, board, precision="fp32", selftest=selftest)
    assert bool(list(tmp_path.rglob("libcompiler_rt.a"))) == helpers
    assert not list(tmp_path.rglob("libubsan_rt.a"))


@pytest.mark.parametrize("name", ["malloc", "puts", "__TVMFuncCall", "TVMBackendAllocWorkspace", "pthread_create"])
def test_kernels_may_call_nothing_else(name: str) -> None:
    data = kernel_object(f"extern void {name}(float *); {name}(p); (void)b; (void)e;")
    with pytest.raises(CompilerError, match="functions that the target does not have") as error:
        check_kernels([data], ["ingot_demo_k"], load_target(HOST).elf_machine)
    assert name in str(error.value)


def test_kernel_objects_are_checked() -> None:
    program, _, board, _ = handmade()
    symbols = [k.symbol for k in program.kernels]
    with pytest.raises(CompilerError, match="missing from the object"):
        check_kernels(program.objects, [*symbols, "ingot_demo_more"], board.elf_machine)
    with pytest.raises(CompilerError, match="another machine"):
        check_kernels(program.objects, symbols, 243)
    with pytest.raises(CompilerError, match="cannot be read"):
        check_kernels([b"garbage"], symbols, board.elf_machine)
    # Functions of one object may be called from another.
    caller = kernel_object("extern void ingot_demo_helper(float *); ingot_demo_helper(p); (void)b; (void)e;")
    with pytest.raises(CompilerError):
        check_kernels([caller], [], board.elf_machine)
    helper = compile_c("void ingot_demo_helper(float *p) { *p = 0; }\n", board.zig_triple, board.baseline())
    check_kernels([caller, helper], ["ingot_demo_k"], board.elf_machine)


# ---- when the toolchain fails ----


@pytest.fixture
def fake_zig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that replaces the toolchain by a shell script."""

    def install(script: str) -> None:
        path = tmp_path / "zig"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(link_module, "zig_path", lambda: path)

    return install


def test_a_failing_toolchain_says_why(fake_zig: Callable[[str], None]) -> None:
    fake_zig('echo "note: irrelevant" >&2; echo "entry.c:1:2: error: no such thing" >&2; exit 3')
    with pytest.raises(ToolchainError, match="failed with status 3") as error:
        build(HOST)
    assert error.value.found == "entry.c:1:2: error: no such thing"


def test_a_silent_failure_is_a_failure(fake_zig: Callable[[str], None]) -> None:
    fake_zig("kill -9 $$")
    with pytest.raises(ToolchainError, match="status -9") as error:
        build(HOST)
    assert error.value.found == "no message"


@pytest.mark.parametrize("text", ["error: NoSpaceLeft", "ld.lld: error: x: No space left on device"])
def test_a_full_disk_is_named(text: str, fake_zig: Callable[[str], None]) -> None:
    fake_zig(f'echo "{text}" >&2; exit 1')
    with pytest.raises(OutputError, match="disk is full"):
        build(HOST)


def test_a_hanging_toolchain_is_stopped(fake_zig: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_TIME_LIMIT_S", 0.2)
    fake_zig("exec sleep 30")
    with pytest.raises(ToolchainError, match="too long"):
        build(HOST)


def test_a_toolchain_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "zig_path", lambda: tmp_path / "nothing")
    with pytest.raises(ToolchainError, match="cannot be started"):
        build(HOST)


def test_a_missing_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    link_module.zig_path.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        with pytest.raises(ToolchainError, match="linker is missing") as error:
            build(HOST)
    finally:
        link_module.zig_path.cache_clear()
    assert error.value.hint == "install it: pip install ziglang"


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(OutputError, match="temporary files") as error:
        build(HOST)
    assert "TMPDIR" in (error.value.hint or "")


def test_a_linker_that_loses_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, board = build(HOST).sources, load_target(HOST)
    files = dict(sources.files, **{"weights.bin": b"other weights"})
    text = sources.weights_s.replace(".ingot.weights", ".rodata.weights")
    with pytest.raises(CompilerError, match="weights"):
        link(replace(sources, weights_s=text), board)
    with pytest.raises(CompilerError, match="metadata"):
        link(replace(sources, weights_s=sources.weights_s.replace(".note.ingot", ".note.other")), board)
    # Three things hide a kernel; one alone would do.
    text = sources.entry_c.replace("visibility push(hidden)", "visibility push(default)")
    assert Elf(link(replace(sources, entry_c=text, files=files), board)).exported() == ["ingot_demo_api"]
    monkeypatch.setattr(link_module, "hide_symbols", lambda data, _: data)
    monkeypatch.setattr(link_module, "_LINK", tuple(f for f in link_module._LINK if "version-script" not in f))
    with pytest.raises(CompilerError, match="exports more"):
        link(replace(sources, entry_c=text), board)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallback = tmp_path / "fallback"
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert link_module._cache_folder(fallback) == tmp_path / "cache" / "ingot" / "zig"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert link_module._cache_folder(fallback) == fallback
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", "/the/users/own")
    assert link_module._environment(tmp_path)["ZIG_GLOBAL_CACHE_DIR"] == "/the/users/own"


@pytest.mark.slow
def test_builds_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build(HOST).library
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert build(HOST).library == library
