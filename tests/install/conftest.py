# SPDX-License-Identifier: Apache-2.0
"""What tests/install/run.sh hands to the tests."""

import pytest

import allowed_skips
from allowed_skips import (  # noqa: F401  hooks of pytest
    pytest_configure,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_terminal_summary,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    allowed_skips.pytest_addoption(parser)
    parser.addoption("--server", required=True, help="the program that examples/embed_server builds")
    parser.addoption("--model", required=True, help="a folder that tiny_model.py wrote")
    parser.addoption("--prompt", required=True, help="its token ids")
    parser.addoption("--expected", required=True, help="and what transformers generates from them")
