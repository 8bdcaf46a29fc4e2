# SPDX-License-Identifier: Apache-2.0
"""What tests/install/run.sh hands to the tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", required=True, help="the program that examples/embed_server builds")
    parser.addoption("--model", required=True, help="a folder that tiny_model.py wrote")
    parser.addoption("--prompt", required=True, help="its token ids")
    parser.addoption("--expected", required=True, help="and what transformers generates from them")
