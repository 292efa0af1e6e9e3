"""Under CI, a skipped test fails unless `tests/expected_skips.txt` lists it with its reason.

A test that is skipped proves nothing, and a list that grows by itself proves less: so the list is a file under review.
The report is changed where it is made (in the worker, with xdist), so exit status, summary and closing line all agree.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

EXPECTED_SKIPS = Path("tests", "expected_skips.txt")  # below pytest's root folder


def in_ci() -> bool:
    """Whether this run is continuous integration: the variable CI is set to something other than 0 or false."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


@dataclass(frozen=True)
class ExpectedSkip:
    """One line of the list: the test's node id (a trailing * matches any rest) and a text its skip reason contains."""

    node: str
    reason: str

    def matches(self, nodeid: str, reason: str) -> bool:
        """Whether a test `nodeid` skipped for `reason` is the one this line expects."""
        same = nodeid.startswith(self.node[:-1]) if self.node.endswith("*") else nodeid == self.node
        return same and self.reason in reason


def read_expected_skips(path: Path) -> tuple[ExpectedSkip, ...]:
    """Read the list: `NODE ID | REASON` lines, blank lines and # comments. Raises pytest.UsageError for a bad line."""
    expected = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        node, bar, reason = text.partition(" | ")
        if not bar or not node.strip() or not reason.strip():
            raise pytest.UsageError(f"{path}:{number}: found {text!r}, needed 'NODE ID | REASON'")
        expected.append(ExpectedSkip(node.strip(), reason.strip()))
    return tuple(expected)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason given with a skip or an expected failure, without pytest's own prefixes."""
    if getattr(report, "wasxfail", None) is not None:
        return f"xfail: {report.wasxfail}"  # type: ignore[union-attr]
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


class StrictSkips:
    """The pytest plugin. Registered only under CI."""

    def __init__(self, expected: tuple[ExpectedSkip, ...]) -> None:
        self.expected = expected

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped:
            return
        reason = skip_reason(report)
        if any(line.matches(report.nodeid, reason) for line in self.expected):
            return
        report.outcome = "failed"
        if hasattr(report, "wasxfail"):
            del report.wasxfail
        report.longrepr = (
            f"skipped, and {EXPECTED_SKIPS} does not expect it\n"
            f"  test:    {report.nodeid}\n  reason:  {reason}\n"
            f"  to do:   let the test run here, or add the line:  {report.nodeid} | {reason}"
        )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn an unexpected skip of a test into a failure."""
        report = yield
        self._judge(report)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Turn an unexpected skip of a whole file (importorskip at its top) into a failure."""
        report = yield
        self._judge(report)
        return report


def pytest_configure(config: pytest.Config) -> None:
    """Switch the rule on under CI."""
    if in_ci():
        config.pluginmanager.register(
            StrictSkips(read_expected_skips(config.rootpath / EXPECTED_SKIPS)), "ingot-strict-skips"
        )
