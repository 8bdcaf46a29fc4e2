# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

# Read when torch's OpenMP starts. Threads that wait for each other then sleep: spinning ones make these many small ops
# several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from cases import backends_for_cpu_tensors


@pytest.fixture(params=backends_for_cpu_tensors())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of this build that serves CPU tensors, by name."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of ATen's threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
