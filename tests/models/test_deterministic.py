"""Two compiles of the same model are the same bytes, wherever and whenever they run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ingot
from models.conftest import case_of

pytestmark = pytest.mark.slow

SCRIPT = """
import hashlib, sys
import ingot
artifact = ingot.compile(sys.argv[1], target=sys.argv[2])
print(hashlib.sha256(artifact.library).hexdigest(), *(
    hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()
    for data in map(artifact.emit, ("a", "c-header", "llvm", "relax"))
))
"""


def in_another_process(repo, path, target, folder, seed):
    """The digests of every form of the artifact, compiled by a new Python elsewhere."""
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": str(repo / "compiler"),
        "TMPDIR": str(folder),
        "TZ": "Asia/Tokyo",
    }
    command = [sys.executable, "-c", SCRIPT, str(path), target]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize(
    ("name", "target"),
    [("mnist.onnx", "native"), ("vww_96_int8", "raspberry-pi-4"), ("ic_resnet8/resnet8_float.onnx", "x86-64-v3")],
)
def test_other_processes_folders_and_hash_seeds(repo, shared_models, tmp_path, name, target):
    path = shared_models / case_of(name).file
    one = in_another_process(repo, path, target, tmp_path / "one", 1)
    two = in_another_process(repo, path, target, tmp_path / "two", 2)
    assert one == two
    here = hashlib.sha256(ingot.compile(path, target=target).library).hexdigest()
    assert here == one[0]


@pytest.mark.parametrize("name", ["mnist.onnx", "kws_ref_model_int8", "stories260k_static64"])
def test_the_same_process_twice(build, shared_models, name):
    case = case_of(name)
    again = ingot.compile(shared_models / case.file, shape=case.shape, selftest=False)
    assert again.library == build(case).library


def test_a_copy_of_the_model_elsewhere_gives_the_same_bytes(build, shared_models, tmp_path):
    case = case_of("mnist.onnx")
    copy = tmp_path / "mnist.onnx"
    copy.write_bytes((shared_models / case.file).read_bytes())
    assert ingot.compile(copy, selftest=False).library == build(case).library


def test_no_path_of_this_machine_is_in_the_file(build, repo, shared_models, tmp_path):
    library = build(case_of("mnist.onnx")).library
    for text in (str(repo), str(shared_models), str(tmp_path.parent), str(Path.home()), os.uname().nodename):
        if len(text) > 3:
            assert text.encode() not in library, text
