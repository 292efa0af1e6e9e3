"""The run of all shared models on an emulated board, on one of them, and the page it writes."""

from __future__ import annotations

import pytest

from models import board_runs
from models.board_runs import Result, judge, read, write_page
from models.conftest import case_of


@pytest.mark.slow
@pytest.mark.qemu
def test_a_model_on_the_board(shared_models, qemu, tmp_path, monkeypatch):
    qemu("aarch64")
    monkeypatch.setattr(board_runs, "MODELS", shared_models)
    case = case_of("iris_mlp")
    result = judge(case, "raspberry-pi-4", tmp_path)
    assert result.good, result
    monkeypatch.setattr(board_runs, "allowed_for", lambda *_: -1.0)
    assert not judge(case, "raspberry-pi-4", tmp_path).good, "what is allowed decides"


def test_the_page_and_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(board_runs, "PAGE", tmp_path / "models.md")
    good = Result("a.onnx", "raspberry-pi-4", 1e-6, 1e-4, 3.0)
    bad = Result("b.onnx", "raspberry-pi-4", -1, 1e-4, 3.0, "RunError: it ended by SIGILL")
    assert good.good
    assert not bad.good
    write_page([bad, good], ["a.onnx", "b.onnx", "c.onnx"])
    text = (tmp_path / "models.md").read_text()
    assert "1 of the 2 models" in text
    assert text.endswith("| c.onnx | not run yet | |\n")
    assert "| a.onnx | 1e-06 | 0.0001 |\n| b.onnx | RunError: it ended by SIGILL | 0.0001 |" in text
    assert read(tmp_path / "none.jsonl") == {}
