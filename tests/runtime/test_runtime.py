"""The C ABI: every status, threads, forks, sanitizers, other architectures. The checks themselves are in driver.c."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from handmade import HOST, handmade
from ingot.architectures import FEATURES
from ingot.packager.artifact import package
from ingot.packager.link import zig_path

HERE = Path(__file__).resolve().parent
RUNTIME = HERE.parent.parent / "compiler" / "ingot" / "runtime"
STRICT = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror")
CASES = re.findall(r'\{"(\w+)", case_\w+\}', (HERE / "driver.c").read_text())
FOREIGN = [("raspberry-pi-4", "aarch64"), ("raspberry-pi-3-32bit", "arm"), ("visionfive-2", "riscv64")]
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for x86-64 run on x86-64 only")

Build = Callable[[str], Path]


def run(command: list[str | Path], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **(env or {})}
    )


def test_driver_has_cases() -> None:
    assert len(CASES) >= 14


@pytest.mark.parametrize("case", CASES)
def test_native(case: str, demo: Build, driver: Build) -> None:
    done = run([driver(HOST), demo(HOST), case])
    assert done.returncode == 0, done.stderr
    assert f"ok {case}" in done.stdout


def test_every_feature_of_this_machine(demo: Build, driver: Build) -> None:
    done = run([driver(HOST), demo("native"), "create", "selftest"])
    assert done.returncode == 0, done.stderr


@on_x86
def test_musl_statically_linked(tmp_path: Path) -> None:
    """Another libc, another threads implementation, and no dynamic loader at all."""
    program, imported, target, selftest = handmade("x86-64-v3-musl")
    package(program, imported, target, precision="fp32", selftest=selftest).save(tmp_path / "libdemo.a", "a")
    command = [
        zig_path(),
        "cc",
        "-target",
        target.zig_triple,
        *STRICT,
        "-fno-sanitize=undefined",
        "-static",
        "-DLINKED",
    ]
    command += [f"-I{RUNTIME}", HERE / "driver.c", tmp_path / "libdemo.a", "-o", tmp_path / "driver"]
    subprocess.run(command, check=True)
    cases = [c for c in CASES if c != "time"]
    done = run([tmp_path / "driver", "-", *cases])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok ") == len(cases)


@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.parametrize(("target", "arch"), FOREIGN)
def test_foreign(target: str, arch: str, demo: Build, driver: Build, qemu: Callable[[str], list[str]]) -> None:
    # qemu-user shares the address space limit with its guest and cannot fork a program with threads reliably.
    cases = [c for c in CASES if c not in ("no_threads", "fork", "time")]
    done = run([*qemu(arch), driver(target), demo(target), *cases])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for case in cases for word in ("ok", case)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        # AddressSanitizer's shadow needs the address space that no_threads takes away.
        (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), {"allocations", "time", "no_threads"}),
        # ThreadSanitizer supports no threads after a fork.
        (("-fsanitize=thread",), {"allocations", "time", "no_threads", "fork"}),
        (("-O3", "-Wshadow", "-Wpointer-arith", "-Wcast-qual", "-Wundef"), {"allocations", "time"}),
    ],
    ids=["address-undefined", "thread", "gcc-strict"],
)
def test_sanitizers(flags: tuple[str, ...], left_out: set[str], native_sources: Path, gcc: str, tmp_path: Path) -> None:
    sources = [native_sources / name for name in ("entry.c", "kernels.c", "weights.S")]
    program = tmp_path / "driver"
    built = subprocess.run(
        [
            gcc,
            *STRICT,
            *flags,
            "-DLINKED",
            f"-I{RUNTIME}",
            HERE / "driver.c",
            *sources,
            "-o",
            program,
            "-lm",
            "-lpthread",
        ],
        cwd=native_sources,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = run([program, "-", *(c for c in CASES if c not in left_out)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    assert done.stdout.count("ok ") == len(CASES) - len(left_out)


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("target", "arch", "cpu", "missing"),
    [
        ("armv8.2-a-dotprod", "aarch64", "cortex-a53", "lse.* dotprod"),
        ("raspberry-pi-3-32bit", "arm", "cortex-a9", "vfp4"),
        ("x86-64-v3", "x86_64", "Nehalem", "avx avx2"),
    ],
)
def test_cpu_without_a_feature(
    target: str, arch: str, cpu: str, missing: str, demo: Build, driver: Build, qemu: Callable[[str], list[str]]
) -> None:
    prefix = qemu(arch) or [shutil.which(f"qemu-{arch}") or ""]
    if not prefix[0]:
        pytest.skip(f"no emulator for {arch}; Debian has qemu-user")
    done = run([*prefix, "-cpu", cpu, driver(target), demo(target), "selftest"])
    assert done.returncode == 1
    wanted = rf"create: this CPU lacks.* {missing}.*, which the model needs: .* for '{target}'"
    assert re.search(wanted, done.stderr), done.stderr
    done = run([*prefix, "-cpu", "max", driver(target), demo(target), "selftest"])
    assert done.returncode == 0, done.stderr


# ---- units of cpu.c ----

UNIT = """
#define RT_INSTANCE_BYTES 0
#include "rt.h"
static const ingot_model_info rt_info = {{.features = "", .target = ""}};
#pragma GCC diagnostic ignored "-Wunused-function"
#include "cpu.c"
#include <stdarg.h>
#include <stdio.h>
static ingot_status rt_fail(char *text, size_t size, ingot_status status, const char *format, ...) {{
    (void)text, (void)size, (void)format;
    return status;
}}
int main(int argc, char **argv) {{
    (void)argc, (void)argv;
    {body}
    return rt_check_cpu(NULL, 0);
}}
"""


def run_unit(gcc: str, folder: Path, body: str, *arguments: str | Path) -> str:
    (folder / "unit.c").write_text(UNIT.format(body=body))
    flags = ["-Wno-unused-function", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        [gcc, *STRICT, *flags, f"-I{RUNTIME}", "unit.c", "-o", "unit"], cwd=folder, check=True, capture_output=True
    )
    done = run([folder / "unit", *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


CGROUPS = {
    "none": ("0::/\n", {}, 0),
    "v2": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "v2 exact": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2 no limit": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 0),
    "v2 below one": ("0::/a\n", {"a/cpu.max": "1000 100000\n"}, 1),
    "v2 the parent is tighter": (
        "0::/a/b\n",
        {"cpu.max": "max 1", "a/cpu.max": "300000 100000", "a/b/cpu.max": "9 1"},
        3,
    ),
    "v2 hidden path": ("0::/kubepods/x\n", {"cpu.max": "400000 100000"}, 4),
    "v1": (
        "5:cpu,cpuacct:/d\n3:memory:/\n",
        {"cpu/d/cpu.cfs_quota_us": "250000", "cpu/d/cpu.cfs_period_us": "100000"},
        3,
    ),
    "v1 no limit": ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 0),
    "v1 other controller": ("5:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, 0),
    "both": (
        "5:cpuacct,cpu:/\n0::/s\n",
        {"cpu/cpu.cfs_quota_us": "500", "cpu/cpu.cfs_period_us": "100", "s/cpu.max": "700 100"},
        5,
    ),
    "garbage": ("::\n:::\nabc\n0::/x\n", {"x/cpu.max": "a b", "cpu.max": ""}, 0),
    "zero period": ("0::/\n", {"cpu.max": "100 0"}, 0),
    "long path": ("0::/" + "p" * 2000 + "\n", {"cpu.max": "100000 100000"}, 0),
}


def test_cgroup_limits(gcc: str, tmp_path: Path) -> None:
    arguments = []
    for i, (lines, files, _) in enumerate(CGROUPS.values()):
        mount = tmp_path / f"case{i}"
        mount.mkdir()
        (tmp_path / f"self{i}").write_text(lines)
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text)
        arguments += [tmp_path / f"self{i}", mount]
    body = 'for (int i = 1; i + 1 < argc; i += 2) printf("%lld\\n", (long long)rt_cgroup_limit(argv[i], argv[i + 1]));'
    found = [int(x) for x in run_unit(gcc, tmp_path, body, *arguments).split()]
    assert dict(zip(CGROUPS, found, strict=True)) == {name: limit for name, (_, _, limit) in CGROUPS.items()}


def test_affinity_is_respected(gcc: str, tmp_path: Path) -> None:
    body = """
    cpu_set_t one;
    rt_cpus cpus;
    printf("%d ", (int)rt_affinity(cpus));
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    printf("%d %d %d\\n", (int)rt_affinity(cpus), (int)rt_cpu_count(true), (int)rt_cpu_count(false));
    """
    assert run_unit(gcc, tmp_path, body) == f"{len(os.sched_getaffinity(0))} 1 1 1\n"


# Capacities of five CPUs ("": no file), and which of them are fast; the last one is outside the affinity.
CAPACITIES: dict[str, tuple[list[str], list[int]]] = {
    "alike": (["1024"] * 5, [0, 1, 2, 3]),
    "little ones first, as on rk3588 and rk3399": (["397", "397", "1024", "1024", "1024"], [2, 3]),
    "three kinds": (["280", "866", "1024", "866", "280"], [1, 2, 3]),
    "near enough": (["768", "1024", "767", "1024", "1024"], [0, 1, 3]),
    "the best is not ours": (["400", "300", "400", "299", "1024"], [0, 1, 2]),
    "Linux does not say": (["", "", "", "", ""], [0, 1, 2, 3]),
    "one unknown": (["1024", "400", "", "400", "400"], [0, 1, 2, 3]),
    "nonsense": (["1024", "400", "fast", "400", "400"], [0, 1, 2, 3]),
    "zero": (["1024", "0", "400", "400", "400"], [0, 1, 2, 3]),
    "too large": (["1024", "400", "99999999999999999999", "400", "400"], [0, 1, 2, 3]),
}
PLACES = (0, 1, 63, 100, 101)  # the five CPUs' numbers


def capacities(folder: Path, texts: Sequence[str]) -> Path:
    """A folder like Linux's of CPUs, with the capacities that it states."""
    for place, text in zip(PLACES, texts, strict=True):
        path = folder / f"cpu{place}" / "cpu_capacity"
        path.parent.mkdir(parents=True)
        if text:
            path.write_text(text + "\n")
    return folder


def test_slow_cores_are_known_by_their_capacity(gcc: str, tmp_path: Path) -> None:
    folders = [capacities(tmp_path / f"case{i}", texts) for i, (texts, _) in enumerate(CAPACITIES.values())]
    body = """
    for (int i = 1; i < argc; i++) {
        const int places[] = {0, 1, 63, 100};
        rt_cpus cpus = {0};
        for (int k = 0; k < 4; k++) cpus[places[k] / RT_WORD_BITS] |= 1UL << places[k] % RT_WORD_BITS;
        printf("%d", (int)rt_fast_only(cpus, 4, argv[i]));
        for (int cpu = 0; cpu < RT_CPUS; cpu++)
            if (cpus[cpu / RT_WORD_BITS] >> cpu % RT_WORD_BITS & 1) printf(" %d", cpu);
        printf("\\n");
    }
    """
    lines = run_unit(gcc, tmp_path, body, *folders).splitlines()
    for line, (name, (_, wanted)) in zip(lines, CAPACITIES.items(), strict=True):
        assert [int(x) for x in line.split()] == [len(wanted), *(PLACES[i] for i in wanted)], name


# A machine of the CPUs in PLACES, whatever this one has, and a kernel whose iterations can be counted.
BOARD = """
static int board(pid_t pid, size_t size, cpu_set_t *set) {{
    const int places[] = {{0, 1, 63, 100, 101}};
    (void)pid;
    for (int i = 0; i < 5; i++) CPU_SET_S(places[i], size, set);
    return 0;
}}
static int kept, kept_on;
static int keep(pthread_t thread, size_t size, const cpu_set_t *set) {{
    (void)thread;
    kept++, kept_on = CPU_COUNT_S(size, set);
    return 0;
}}
static atomic_int seen[1000];
static void step(const rt_frame *frame, int32_t begin, int32_t end) {{
    (void)frame;
    for (int32_t i = begin; i < end; i++) seen[i]++;
}}
#define sched_getaffinity board
#define pthread_setaffinity_np keep
#include "cpu.c"
#include "pool.c"
#undef RT_SYSFS_CPUS
"""


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["397", "397", "1024", "1024", "1024"], "3 5: 0/0 1/3 2/3 0/0 0/0"),
        (["1024"] * 5, "5 5: 0/0 0/0 0/0 0/0 0/0"),
        ([""] * 5, "5 5: 0/0 0/0 0/0 0/0 0/0"),
    ],
    ids=["big.LITTLE", "alike", "unknown"],
)
def test_threads_are_kept_on_fast_cores(
    gcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], wanted: str
) -> None:
    """As many threads as there are fast cores by default; more than those go anywhere. Every iteration is done once."""
    source = (RUNTIME / "cpu.c").read_text("utf-8")
    fake = capacities(tmp_path / "cpus", texts)
    assert source.count('"/sys/devices/system/cpu"') == source.count('"/sys/fs/cgroup"') == 1
    source = source.replace("/sys/devices/system/cpu", str(fake)).replace("/sys/fs/cgroup", str(tmp_path))
    (tmp_path / "cpu.c").write_text(source, "utf-8")
    monkeypatch.setitem(globals(), "UNIT", UNIT.replace('#include "cpu.c"', BOARD))
    body = """
    printf("%d %d:", (int)rt_cpu_count(true), (int)rt_cpu_count(false));
    for (int32_t threads = 1; threads <= 5; threads++) {
        static rt_pool pool;
        const rt_frame frame = {.pool = &pool};
        kept = kept_on = 0;
        if (rt_pool_start(&pool, threads, NULL, 0) != INGOT_OK) return 2;
        printf(" %d/%d", kept, kept_on);
        for (int k = 0; k < 50; k++) ingot_parallel(&frame, step, 0, 1000, 7);
        rt_pool_stop(&pool);
        for (int i = 0; i < 1000; i++) if (seen[i] != 50 * threads) return 3;
    }
    """
    assert run_unit(gcc, tmp_path, body) == wanted


TILES = """
#include "ingot_features.h"
static long answer, asked[3];
static long kernel(long call, long request, long component) {{
    asked[0] = call, asked[1] = request, asked[2] = component;
    errno = EPERM;
    return answer;
}}
#define syscall kernel
#define rt_cpu_has(cpu, name, length) ((void)(cpu), true)
#include "cpu.c"
"""


@on_x86
@pytest.mark.parametrize("refused", [True, False])
def test_linux_is_asked_for_tiles(gcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """The process asks before it runs a kernel; a refusal is one error that says what to do."""
    unit = UNIT.replace('#include "cpu.c"', "#include <errno.h>" + TILES)
    unit = unit.replace('.features = "", .target = ""', '.features = "avx2 amx-tile", .target = "board"')
    unit = unit.replace("(void)text, (void)size, (void)format;", "va_list rest; va_start(rest, format);")
    unit = unit.replace("    return status;", "    vsnprintf(text, size, format, rest); va_end(rest); return status;")
    monkeypatch.setitem(globals(), "UNIT", unit)
    body = f"""
    char text[512] = "";
    answer = {-1 if refused else 0};
    int status = (int)rt_check_cpu(text, sizeof text);
    printf("%d %d %ld %ld %s", status != INGOT_OK, asked[0] == SYS_arch_prctl, asked[1], asked[2], text);
    answer = 0;
    """
    found = run_unit(gcc, tmp_path, body)
    assert found.startswith(f"{int(refused)} 1 {0x1023} 18 ")
    assert ("refused this process AMX tiles (errno 1)" in found and "'board'" in found) is refused


@on_x86
def test_features_agree_with_the_kernel(gcc: str, tmp_path: Path) -> None:
    body = """
    rt_cpu cpu;
    rt_read_cpu(&cpu);
    for (size_t i = 0; i < sizeof rt_features / sizeof rt_features[0]; i++) {
        const char *name = rt_features[i].name;
        printf("%s %d\\n", name, (int)rt_cpu_has(&cpu, name, strlen(name)));
    }
    printf("unknown %d\\n", (int)rt_cpu_has(&cpu, "avx51", 5));
    """
    found = {
        name: value == "1" for name, value in (line.split() for line in run_unit(gcc, tmp_path, body).splitlines())
    }
    assert not found.pop("unknown")
    assert set(found) == set(FEATURES["x86_64"])
    # /proc/cpuinfo names some features in its own way.
    names = {"sse3": "pni", "bmi": "bmi1", "lzcnt": "abm", "avxvnni": "avx_vnni"}
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
    for name, present in found.items():
        known = {names.get(name, name), name.replace(".", "_").replace("-", "_"), name.replace("avx512", "avx512_")}
        assert present == bool(known & flags), name


def test_every_feature_name_is_known_to_the_runtime() -> None:
    text = (RUNTIME / "ingot_features.h").read_text()
    for arch, names in FEATURES.items():
        missing = [name for name in names if f'{{"{name}",' not in text]
        assert not missing, arch
