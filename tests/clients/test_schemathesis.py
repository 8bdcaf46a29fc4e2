# SPDX-License-Identifier: Apache-2.0
"""schemathesis: requests made from the server's OpenAPI description, and from what it forbids."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from served import KEY, Reference, serve

SEEDS = (1, 2)
# What fits the schema may be refused all the same: messages that the template cannot render, a field without one
# that it needs. A further check says that the refusal has the form of an error.
EXCLUDED = "positive_data_acceptance"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_is_as_its_description_says(
    environments: Path, reference: Reference, tmp_path: Path, seed: int
) -> None:
    # A short context: an answer of a chat without a limit takes all of it.
    with serve(reference.model_dir, "--max-batch-size", "8", "--max-cached-tokens", "256") as (_, server):
        command = [str(environments / "schemathesis/bin/schemathesis"), "run", f"{server.address}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {KEY}", "--checks", "all", "--exclude-checks", EXCLUDED]
        command += ["--continue-on-failure", "--max-examples", "40", "--seed", str(seed), "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stdout
        assert server.metric('errors_total{type="internal_error"}') == 0
        server.wait_until(server.is_at_rest)
