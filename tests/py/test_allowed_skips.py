# SPDX-License-Identifier: Apache-2.0
"""The gate itself: what is skipped for no good reason fails it, and nothing may hang it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import allowed_skips
from cuda_machine import CudaMachine

pytest_plugins = "pytester"

HOOKS = "from allowed_skips import *\n"
REASON = "no IPv6 here"


@pytest.mark.parametrize(
    ("body", "options", "failed"),
    [
        (f"def test(): pytest.skip({REASON!r})", ["--strict-skips"], False),
        ("def test(): pytest.skip('no browser')", ["--strict-skips"], True),
        ("def test(): pytest.skip('no browser')", [], False),
        ("@pytest.mark.skipif(True, reason='no browser')\ndef test(): pass", ["--strict-skips"], True),
        ("pytest.importorskip('no_such_module')\ndef test(): pass", ["--strict-skips"], True),
        ("@pytest.fixture\ndef it(): pytest.skip('no browser')\ndef test(it): pass", ["--strict-skips"], True),
        ("@pytest.mark.xfail(reason='known')\ndef test(): assert False", ["--strict-skips"], False),
        ("def test(): pass", ["--strict-skips"], False),
    ],
)
def test_a_skip_needs_a_listed_reason(pytester: pytest.Pytester, body: str, options: list[str], failed: bool) -> None:
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(f"import pytest\n{body}", test_more="def test_runs(): pass")
    result = pytester.runpytest(*options)
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK)
    refusals = [line for line in result.outlines if "allowed_skips.py does not list" in line]
    assert len(refusals) == failed
    assert all("no browser" in line or "no_such_module" in line for line in refusals)


GTEST = """<testsuites><testsuite name="Suite">
<testcase name="a" status="run" result="completed" classname="Suite"/>
<testcase name="b" status="run" result="skipped" classname="Suite"><skipped message="a.cpp:3&#x0A;{reason}"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("reason", [REASON, "no GPU"])
def test_cpp_tests_and_scripts_ask_the_same_list(tmp_path: Path, reason: str) -> None:
    report = tmp_path / "gtest.xml"
    report.write_text(GTEST.format(reason=reason))
    for options in (["--gtest", str(report)], ["--reason", reason]):
        command = [sys.executable, str(allowed_skips.__file__), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, reason in done.stdout) == ((0, False) if reason == REASON else (1, True))


NO_DEVICE = "torch sees no CUDA device"
NOT_BUILT = "this build of xgdn has no CUDA backend: its torch has no CUDA, or there was no nvcc"


@pytest.mark.parametrize(
    ("machine", "why_not", "may"),
    [
        (CudaMachine(torch_has_cuda=False, has_gpu=True, has_nvcc=True), "this torch was built without CUDA", True),
        (CudaMachine(torch_has_cuda=True, has_gpu=False, has_nvcc=True), NO_DEVICE, True),
        (CudaMachine(torch_has_cuda=True, has_gpu=True, has_nvcc=False), NOT_BUILT, True),
        (CudaMachine(torch_has_cuda=True, has_gpu=True, has_nvcc=True), NOT_BUILT, False),
        (CudaMachine(torch_has_cuda=True, has_gpu=True, has_nvcc=False), NO_DEVICE, False),
    ],
)
def test_a_machine_with_a_gpu_does_not_pass_by_skipping(machine: CudaMachine, why_not: str, may: bool) -> None:
    assert machine.may_skip(why_not) is may
    assert not allowed_skips.refused([("a test", f"Skipped: no CUDA: {why_not}")])


def test_a_test_that_hangs_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import time\ndef test_hangs(): time.sleep(60)\ndef test_runs(): pass")
    result = pytester.runpytest_subprocess("--timeout=0.2")
    result.assert_outcomes(failed=1, passed=1)


def test_the_suites_have_a_time_limit(pytestconfig: pytest.Config) -> None:
    """The first fails a test; the second, of C, ends a process whose test does not come back to Python."""
    limit, end = (float(pytestconfig.getini(name)) for name in ("timeout", "faulthandler_timeout"))
    assert 0 < limit < end <= 600
    assert pytestconfig.getini("faulthandler_exit_on_timeout") is True
