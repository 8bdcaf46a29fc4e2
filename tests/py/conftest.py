# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

# Read when torch's OpenMP starts. Threads that wait for each other then sleep: spinning ones make these many small ops
# several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from allowed_skips import (  # noqa: F401  hooks of pytest
    pytest_addoption,
    pytest_configure,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_terminal_summary,
)
from cases import backends_for_cpu_tensors

if TYPE_CHECKING:
    import openai


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


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a live server of the small model, with a chat template and live_server's KEY."""
    import live_server  # here, so that the tests of the ops need no package of the server

    folder = live_server.with_template(tmp_path_factory.mktemp("chat"))
    with live_server.live(live_server.engine(), folder) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of that server. It repeats nothing, so that each error is seen."""

    from live_server import openai_client

    with openai_client(url) as it:
        yield it
