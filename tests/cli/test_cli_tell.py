"""`ingot inspect`, `check` and `targets`: what they tell, next to what the files say."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from onnx import helper

from cli.models import save, value
from ingot.cli.console import precision_words
from ingot.errors import ToolchainError
from ingot.runtime.loader import read_metadata
from ingot.target import list_targets, load_target

Ingot = Callable[..., Result]
Refused = Callable[..., None]


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect_a_model(ingot: Ingot, tiny_model: Path) -> None:
    result = ingot("inspect", tiny_model, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["kind"] == "model"
    assert facts["format"] == "onnx"
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]}]
    assert facts["operators"]["Conv"] == 1
    assert sum(facts["operators"].values()) == 6
    assert facts["weights"] == 8 * 27 + 40
    assert facts["weights_bytes"] == 4 * (8 * 27 + 40)
    assert facts["macs"] == 64 * 8 * 27 + 40
    text = ingot("inspect", tiny_model)
    assert text.exit_code == 0
    assert "IR 8, opset ai.onnx 17" in text.stdout
    assert "N,3,8,8" in text.stdout
    assert "note: batch dimension 'N' of input 'x' set to 1; use --shape x=1,3,8,8" in text.stdout


def test_inspect_tells_which_shapes_are_needed(ingot: Ingot, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = save(tmp_path / "open.onnx", nodes, [value("x", [1, "length"])], [value("y", [1, "length"])], {})
    result = ingot("inspect", model)
    assert result.exit_code == 0, result.output
    assert "note: give --shape x=1,? with sizes of your choice" in result.stdout
    assert "not known" in result.stdout


def test_inspect_counts_the_work_of_each_kind_of_product(ingot: Ingot, tmp_path: Path) -> None:
    import numpy as np

    weights = {
        "w": np.zeros((4, 1, 3, 3), np.float32),
        "t": np.zeros((4, 6, 2, 2), np.float32),
        "g": np.zeros((7, 6 * 256), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], group=4),
        helper.make_node("ConvTranspose", ["c", "t"], ["u"], strides=[2, 2]),
        helper.make_node("Flatten", ["u"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"], transB=1),
    ]
    model = save(tmp_path / "m.onnx", nodes, [value("x", [1, 4, 8, 8])], [value("y", [1, 7])], weights)
    facts = json.loads(ingot("inspect", model, "--json").stdout)
    assert facts["macs"] == 4 * 64 * 9 + 4 * 64 * 24 + 7 * 6 * 256


def test_inspect_a_tflite_model(ingot: Ingot, shared_models: Path) -> None:
    model = shared_models / "mlperf_tiny_kws" / "kws_ref_model_int8.tflite"
    facts = json.loads(ingot("inspect", model, "--json").stdout)
    assert facts["format"] == "tflite"
    assert facts["inputs"] == [{"name": "input_1", "dtype": "int8", "shape": [None, 49, 10, 1]}]
    assert facts["operators"]["CONV_2D"] == 5
    assert facts["operators"]["DEPTHWISE_CONV_2D"] == 4
    assert 2_600_000 < facts["macs"] < 2_700_000


def test_inspect_a_library_for_any_board(ingot: Ingot, pi_so: Path) -> None:
    result = ingot("inspect", pi_so, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    meta = read_metadata(pi_so)
    assert facts["kind"] == "library"
    assert facts["metadata"] == meta
    assert facts["exported"] == ["ingot_tiny_api"]
    assert facts["arena_ratio"] == meta["arena_bytes"] / meta["source"]["peak_bytes"]
    sizes = {s["name"]: s["bytes"] for s in facts["sections"]}
    assert sizes[".ingot.weights"] == meta["weights_bytes"]
    assert sizes[".text"] == facts["text_bytes"] > 0
    assert all(name.startswith("lib") for name in facts["needed"])
    text = ingot("inspect", pi_so).stdout
    assert "tiny for raspberry-pi-4" in text
    assert f"{facts['arena_ratio']:.2f} x the" in text
    assert ".ingot.weights" in text


def test_inspect_does_not_load_a_foreign_library(ingot: Ingot, refused: Refused, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "f.c"
    body = f'fclose(fopen("{tmp_path}/ran", "w"));'
    source.write_text(f"#include <stdio.h>\n__attribute__((constructor)) static void f(void) {{ {body} }}\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "f.so", source], check=True)
    for verb in ("inspect", "check", "run", "bench"):
        refused(ingot(verb, tmp_path / "f.so"), "not a model compiled by ingot")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------ check


def answers(result: Result) -> dict[str, str]:
    """Row -> yes, no or -, of the table that `check` prints."""
    rows = [line.split("  ") for line in result.stdout.splitlines()[2:-1]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1] for row in cells if len(row) > 1 and row[1] in ("yes", "no", "-")}


def test_check_a_library_here(ingot: Ingot, tiny_so: Path, pi_so: Path) -> None:
    good, bad = ingot("check", tiny_so), ingot("check", pi_so)
    assert good.exit_code == 0, good.output
    assert set(answers(good).values()) == {"yes"}
    assert set(answers(good)) == {"architecture", "ABI", "CPU features", "libc", "RAM", "flash"}
    assert "runs on this machine" in good.stdout
    assert bad.exit_code == 1
    assert answers(bad)["architecture"] == "no"
    assert "does not run on this machine" in bad.stdout


def test_check_a_library_for_boards(ingot: Ingot, pi_so: Path, tiny_so: Path) -> None:
    same = ingot("check", pi_so, "--target", "raspberry-pi-4")
    assert same.exit_code == 0, same.output
    expected = {"architecture": "yes", "ABI": "yes", "CPU features": "yes", "libc": "yes", "RAM": "yes", "flash": "-"}
    assert answers(same) == expected
    assert ingot("check", pi_so, "--target", "raspberry-pi-5").exit_code == 0
    old = ingot("check", pi_so, "--target", "jetson-nano")
    assert old.exit_code == 1
    assert answers(old)["libc"] == "no"
    assert "glibc 2.28 or later needed" in old.stdout
    assert "glibc 2.27 there" in old.stdout
    other = ingot("check", tiny_so, "--target", "raspberry-pi-4-32bit")
    assert other.exit_code == 1
    assert answers(other)["architecture"] == answers(other)["ABI"] == "no"


def test_check_names_missing_features(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    result = ingot("compile", tiny_model, "--target", "armv8.2-a-dotprod", "--no-selftest", "-o", tmp_path / "dot.so")
    assert result.exit_code == 0, result.output
    result = ingot("check", tmp_path / "dot.so", "--target", "raspberry-pi-4")
    assert result.exit_code == 1
    assert answers(result)["CPU features"] == "no"
    missing = set(load_target("armv8.2-a-dotprod").features) - set(load_target("raspberry-pi-4").features)
    assert "dotprod" in missing
    assert all(feature in result.stdout for feature in missing)


def test_check_compares_sizes_with_what_is_given(ingot: Ingot, pi_so: Path) -> None:
    given = ["check", pi_so, "--target", "raspberry-pi-4"]
    meta, size = read_metadata(pi_so), pi_so.stat().st_size
    need = (meta["memory_bytes"] + meta["weights_bytes"]) / 2**20
    for option, row, exact in (("--ram", "RAM", need), ("--flash", "flash", size / 2**20)):
        enough, less = ingot(*given, option, exact), ingot(*given, option, exact - 1 / 2**20)
        assert (enough.exit_code, answers(enough)[row]) == (0, "yes")
        assert (less.exit_code, answers(less)[row]) == (1, "no")


def test_check_a_model(ingot: Ingot, refused: Refused, tiny_model: Path) -> None:
    result = ingot("check", tiny_model, "--shape", "x=3,3,8,8")
    assert result.exit_code == 0, result.output
    assert "can be compiled" in result.stdout
    assert "x: float32[3, 3, 8, 8]" in result.stdout
    assert ingot("check", tiny_model, "--target", "raspberry-pi-4").exit_code == 0
    with_ram = ingot("check", tiny_model, "--ram", "1", "--target", "raspberry-pi-4")
    refused(with_ram, "compile it first", "--target raspberry-pi-4")
    refused(ingot("check", tiny_model, "--shape", "q=1"), "shape of 'q'")


def test_check_refuses(ingot: Ingot, refused: Refused, tiny_so: Path, tmp_path: Path) -> None:
    (tmp_path / "half.so").write_bytes(tiny_so.read_bytes()[:3000])
    refused(ingot("check", tmp_path / "half.so"), "truncated")
    refused(ingot("check", tmp_path / "none"), "does not exist")
    refused(ingot("check", tiny_so, "--shape", "x=1"), "has its interface already")
    refused(ingot("check", tiny_so, "--target", "rasberry-pi-4"), "did you mean raspberry-pi-4")


# ---------------------------------------------------------------------------------------------------------- targets


def test_targets_lists_every_target_in_one_line(ingot: Ingot) -> None:
    result = ingot("targets")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for target in list_targets():
        (line,) = (line for line in lines if line.split()[:1] == [target.name])
        assert target.description in line
        assert target.libc_version in line
    assert lines[-1].startswith(f"{len(list_targets())} targets, and native")


@pytest.mark.parametrize("columns", ["80", "120"])
def test_targets_fits_the_terminal(ingot: Ingot, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = ingot("targets")
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    assert all(target.name in result.stdout for target in list_targets())


def test_targets_explains_every_target(ingot: Ingot) -> None:
    for target in list_targets():
        result = ingot("targets", target.name)
        assert result.exit_code == 0, result.output
        text = result.stdout
        for word in (target.description, *target.sources, target.triple, target.zig_triple, target.cpu):
            assert word in text
        assert all(cluster.name in text for cluster in target.cores)
        assert "emulator" in text


def test_targets_explains_this_machine_and_own_files(ingot: Ingot, refused: Refused, tmp_path: Path) -> None:
    assert "this machine" in ingot("targets", "native").stdout
    source = next(Path(__file__).parents[2].glob("targets/raspberry-pi-4.toml")).read_text()
    own = tmp_path / "my-board.toml"
    own.write_text(source.replace('name = "raspberry-pi-4"', 'name = "my-board"', 1))
    assert "my-board" in ingot("targets", own).stdout
    refused(ingot("targets", "rasberry-pi-4"), "did you mean raspberry-pi-4")


# --------------------------------------------------------------------------------------------------------- emulator


def test_the_emulator_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.emulator import emulator_for

    with pytest.raises(ToolchainError, match="not glibc"):
        emulator_for(load_target("armv8.0-a-musl"))
    with pytest.raises(ToolchainError, match="no emulator has all features"):
        emulator_for(load_target("sapphirerapids"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match="apt install qemu-user"):
        emulator_for(load_target("raspberry-pi-4"))


@pytest.mark.qemu
@pytest.mark.parametrize("threads", [1, 3])
def test_the_emulator_runs_a_library(
    pi_so: Path, tiny_so: Path, qemu: Callable[[str], list[str]], threads: int
) -> None:
    import numpy as np

    import ingot
    from ingot.emulator import run_under_qemu
    from ingot.errors import InputError, RunError

    qemu("aarch64")
    board = load_target("raspberry-pi-4")
    feed = np.random.default_rng(5).standard_normal((1, 3, 8, 8)).astype(np.float32)
    (found,) = run_under_qemu(pi_so, [feed], board, threads=threads)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, ingot.load(tiny_so)(feed), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="wrong number of inputs"):
        run_under_qemu(pi_so, [], board)
    with pytest.raises(InputError, match="does not fit"):
        run_under_qemu(pi_so, [feed[0]], board)
    with pytest.raises(RunError, match="threads is 65"):
        run_under_qemu(pi_so, [feed], board, threads=65)
    with pytest.raises(RunError, match="the emulated model failed"):
        run_under_qemu(tiny_so, [feed], board)


_COUNTS = {"layers": 2, "multiplied": 1, "stored": 0, "tensors": 3}


@pytest.mark.parametrize("half", [None, 3, {}, {"layers": 1}, {**_COUNTS, "errors": [5]}])
def test_what_a_library_says_of_half_precision_may_be_anything(half: object) -> None:
    assert precision_words({"precision": "bf16", "half": half}) == "bf16"
