# SPDX-License-Identifier: Apache-2.0
"""The commands on npu:0, as a user has them: `import torch` loads torch_npu by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from xgdn.bench.server_process import running_server

MODEL = Path(__file__).parents[2] / "examples" / "tiny_model" / "checkpoint"
ON_NPU = ["--device", "npu:0", "--dtype", "bfloat16", "--state-dtype", "bfloat16"]
PROMPT = "def main("
NUM_TOKENS = 12


@pytest.fixture(autouse=True)
def autoload(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the chunk op takes the model's head dim of 64, as in a newer CANN."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    monkeypatch.setenv("EMULATED_CANN_FP32_STATE", "1")


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from xgdn.cli import app; app()", "generate", str(MODEL), "--prompt", PROMPT]
    command += ["--max-new-tokens", str(NUM_TOKENS), "--json", *options]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False, timeout=90)


def test_generate_and_serve_give_the_same_text() -> None:
    direct = generate(*ON_NPU)
    assert direct.returncode == 0, direct.stderr
    reply = json.loads(direct.stdout.splitlines()[-1])
    assert len(reply["ids"]) == NUM_TOKENS
    with running_server(MODEL, ON_NPU, None) as url:
        body = {"model": "checkpoint", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        answers = [httpx.post(f"{url}/v1/completions", json=body, timeout=60).json() for _ in range(2)]
        assert [answer["choices"][0]["text"] for answer in answers] == [reply["text"]] * 2


def test_fp32_states_are_refused_in_the_first_step() -> None:
    refused = generate(*ON_NPU[:-1], "float32")
    assert refused.returncode == 1
    assert "a Float pool, which is never downcast" in refused.stderr


def test_without_torch_npu_the_device_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    refused = generate(*ON_NPU)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("xgdn: [Engine] device: expected a name that torch knows (npu: ")
