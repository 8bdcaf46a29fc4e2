# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest

if os.environ.get("TASK_QUEUE_ENABLE") != "0":
    raise pytest.UsageError("tests/ascend needs the emulated CANN: run tests/ascend/run.sh BUILD_DIR")

# Read when torch's OpenMP starts: threads that wait for each other then sleep instead of spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch_npu  # noqa: F401  registers the device and its ops

import ledger as launch_ledger
from allowed_skips import (  # noqa: F401  hooks of pytest
    pytest_addoption,
    pytest_configure,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_terminal_summary,
)

if not os.environ.get("EMULATED_CANN_SOC", "").startswith("Ascend950"):
    collect_ignore = ["test_ascend950.py"]  # run.sh runs it in a process of its own


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def empty_ledger() -> None:
    """Keeps the ledger from growing over the whole run."""
    launch_ledger.reset()
