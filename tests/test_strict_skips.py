"""The rule that an unexpected skip fails CI, tested on small test suites of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from strict_skips import ExpectedSkip, in_ci, read_expected_skips

SUITE = """
import pytest

def test_runs():
    pass

def test_skips():
    pytest.skip("no board")

@pytest.mark.skip(reason="no camera")
@pytest.mark.parametrize("n", [1, 2])
def test_marked(n):
    pass

@pytest.mark.xfail(reason="known bug")
def test_xfails():
    assert 1 == 2
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makepyfile(test_suite=SUITE)
    pytester.makeconftest('pytest_plugins = ["strict_skips"]')
    pytester.makeini("[pytest]")
    pytester.mkdir("tests")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("CI", "true")
    return pytester


def run(suite: pytest.Pytester, expected: str, *args: str) -> pytest.RunResult:
    (suite.path / "tests" / "expected_skips.txt").write_text(expected)
    return suite.runpytest_subprocess("-p", "no:cacheprovider", *args)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_unexpected_skips_fail_the_run(suite: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = run(suite, "# nothing is expected\n", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=2, errors=2)
    result.stdout.fnmatch_lines(["*reason:  no board*", "*add the line:  test_suite.py::test_skips | no board*"])


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_expected_skips_pass(suite: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = run(
        suite,
        "test_suite.py::test_skips | board\ntest_suite.py::test_marked[* | no camera\n"
        "test_suite.py::test_xfails | known bug\n",
        *workers,
    )
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=3, xfailed=1)


def test_a_listed_test_skipped_for_another_reason_fails(suite: pytest.Pytester) -> None:
    result = run(suite, "test_suite.py::test_skips | no network\n", "-k", "test_skips")
    result.assert_outcomes(failed=1)


def test_a_whole_file_skipped_at_import_fails(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_suite="import pytest\npytest.importorskip('no_such_module')\n")
    assert run(suite, "").ret != pytest.ExitCode.OK
    assert run(suite, "test_suite.py | no_such_module\n").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_outside_ci_skips_stay_skips(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    result = run(suite, "")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=3, xfailed=1)


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("1", True), ("", False), ("0", False), ("False", False)]
)
def test_in_ci(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("CI", value)
    assert in_ci() is expected


@pytest.mark.parametrize("line", ["test_a.py::test_b", " | reason", "test_a.py::test_b |"])
def test_a_line_without_a_reason_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "expected_skips.txt"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(pytest.UsageError, match=r"expected_skips.txt:2: .*NODE ID \| REASON"):
        read_expected_skips(path)


def test_the_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "expected_skips.txt"
    path.write_text("\n# why\na.py::b[x|y] | c | d\n")
    assert read_expected_skips(path) == (ExpectedSkip("a.py::b[x|y]", "c | d"),)
