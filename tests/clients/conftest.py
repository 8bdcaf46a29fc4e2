# SPDX-License-Identifier: Apache-2.0
"""The servers that the clients call. Each environment has pytest of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from served import ROOT, Reference, Server, serve


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--environments", type=Path, default=ROOT / "build/clients", help="the folder of run.sh")


@pytest.fixture(scope="session")
def environments(request: pytest.FixtureRequest) -> Path:
    """The folder with an environment per client."""
    folder: Path = request.config.getoption("--environments")
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    it = Reference(tmp_path_factory.mktemp("model") / "tiny")
    yield it
    it.stop()


@pytest.fixture(scope="session")
def server(reference: Reference) -> Iterator[Server]:
    """A server of the small model, at rest again when the tests have ended."""
    with serve(reference.model_dir, "--max-batch-size", "8") as (_, it):
        yield it
        it.wait_until(it.is_at_rest)


@pytest.fixture(scope="session")
def narrow_server(reference: Reference) -> Iterator[Server]:
    """A server of one sequence at a time, none of which waits."""
    with serve(reference.model_dir, "--max-batch-size", "1", "--max-queue", "0") as (_, it):
        yield it
