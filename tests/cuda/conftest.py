# SPDX-License-Identifier: Apache-2.0
"""Skips the suite, with the backend's own sentence, where the cuda backend cannot serve."""

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


@pytest.fixture(autouse=True)
def cuda() -> None:
    if "cuda" not in xgdn.available_backends():
        pytest.skip(next(f"no CUDA: {row.why_not}" for row in xgdn.doctor() if row.backend == "cuda"))
    torch.manual_seed(0)
