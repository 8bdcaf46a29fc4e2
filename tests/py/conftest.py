# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

import xgdn


@pytest.fixture(params=xgdn.available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of this build, by name."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
