# SPDX-License-Identifier: Apache-2.0
"""The examples run, and the demo tells a difference from none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from checkpoints import CHECKPOINTS, make

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PROMPT_SIZES", (3, 70))
    monkeypatch.setattr(module, "NEW_TOKENS", 4)
    monkeypatch.setattr(module, "NUM_WINDOWS", 1)
    monkeypatch.setattr(module, "WINDOW", 128)
    monkeypatch.setattr(module, "WRITING_TOKENS", 8)
    return module


def test_demo_agrees_with_transformers(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert out.count(": identical") == 2
    assert "2 of 2 continuations of at most 4 tokens are identical" in out
    assert "gdn_decode_step: cpu" in out


def test_demo_fails_when_one_token_differs(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_transformers = demo.run_transformers

    def with_a_wrong_token(*args: object, **options: object) -> object:
        run = run_transformers(*args, **options)
        run.tokens[-1][-1] += 1
        return run

    monkeypatch.setattr(demo, "run_transformers", with_a_wrong_token)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert out.count(": identical") == 1
    assert out.count(": DIFFERENT") == 1


def test_demo_fails_when_the_perplexity_differs(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    perplexity = demo.perplexity
    factors = iter((1.0, 1.001))
    monkeypatch.setattr(demo, "perplexity", lambda *args: perplexity(*args) * next(factors))
    assert demo.main() == 1


def test_minimal_example(tmp_path: Path) -> None:
    directory, _ = make(CHECKPOINTS[0], tmp_path)
    program = [sys.executable, str(EXAMPLES / "generate.py"), str(directory)]
    lines = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("] LENGTH") for line in lines)
