# SPDX-License-Identifier: Apache-2.0
"""The reasons for which a test of `make test` may be skipped; any other fails the run.

pytest: the conftest of each suite imports the hooks, `--strict-skips` turns them on.
C++ and scripts: `python tests/py/allowed_skips.py --gtest XML...` or `--reason TEXT`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from xml.etree import ElementTree

import pytest

# What only another machine can give. A missing package is no reason: tools/bootstrap.sh installs it.
ALLOWED = {
    r"other architectures have one path": "XGDN_CPU_ISA chooses among instruction sets of x86-64",
    r"no IPv6 here": "containers often have none",
    r"no torch_npu \S+ wheel for ": "Ascend's package exists for some Python versions on some platforms",
    r"^(Skipped: )?no CUDA: ": "tests/cuda; cuda_machine.py says where they must run",
    r"needs two GPUs, got [01]$": "tests/cuda/test_tensor_parallel.py",
    r"torch_npu \S+ needs torch ": "the package belongs to one version of torch",
}


def refused(skips: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each (test, reason) whose reason is not in the list."""
    return [
        f"{test}: skipped for a reason that allowed_skips.py does not list: {reason}"
        for test, reason in skips
        if not any(re.search(allowed, reason) for allowed in ALLOWED)
    ]


# ---- pytest ---------------------------------------------------------------------------------------------------------

_SKIPS = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a reason is not in allowed_skips.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SKIPS] = []


class _Collector:
    """Reports carry no config; a plugin of the session keeps the list."""

    def __init__(self, skips: list[tuple[str, str]]) -> None:
        self.skips = skips

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._keep(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._keep(report)

    def _keep(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips.append((report.nodeid, reason))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Collector(session.config.stash[_SKIPS]), "collector of skips")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("strict_skips") and refused(session.config.stash[_SKIPS]):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("strict_skips"):
        for line in refused(config.stash[_SKIPS]):
            terminalreporter.line(f"FAILED {line}", red=True)


# ---- C++ and scripts ------------------------------------------------------------------------------------------------


def skips_of_gtest(path: str) -> list[tuple[str, str]]:
    """The tests that did not run, disabled ones too, with their reasons."""
    skips = []
    for test in ElementTree.parse(path).iter("testcase"):
        skipped = test.find("skipped")
        if skipped is not None:
            reason = " ".join(skipped.get("message", "").split())
        elif test.get("status") == "notrun" and test.get("result") == "suppressed":
            reason = "disabled"
        else:
            continue
        skips.append((f"{test.get('classname')}.{test.get('name')}", reason))
    return skips


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gtest", metavar="XML", nargs="+", default=[])
    parser.add_argument("--reason", metavar="TEXT")
    given = parser.parse_args()
    skips = [("script", given.reason)] if given.reason else []
    for path in given.gtest:
        skips += skips_of_gtest(path)
    lines = refused(skips)
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
