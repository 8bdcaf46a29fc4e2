# SPDX-License-Identifier: Apache-2.0
"""Skips the suite, with the backend's own sentence, where the cuda backend cannot serve; fails it where it should."""

from __future__ import annotations

import pytest
import torch

import xgdn
from allowed_skips import (  # noqa: F401  hooks of pytest
    pytest_addoption,
    pytest_configure,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_terminal_summary,
)
from cuda_machine import CudaMachine


@pytest.fixture(autouse=True)
def cuda() -> None:
    if "cuda" not in xgdn.available_backends():
        why_not = next(row.why_not for row in xgdn.doctor() if row.backend == "cuda")
        if not CudaMachine.here().may_skip(why_not):
            pytest.fail(f"this machine has a GPU, and yet: {why_not}", pytrace=False)
        pytest.skip(f"no CUDA: {why_not}")
    torch.manual_seed(0)
