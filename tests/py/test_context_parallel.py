# SPDX-License-Identifier: Apache-2.0
"""A prompt whose slices lie on three processes against the same pieces in one."""

from __future__ import annotations

from pathlib import Path

from rank_processes import run_ranks


def test_slices_of_a_prompt() -> None:
    document = run_ranks(3, Path(__file__).parent / "context_parallel_ranks.py")
    assert len(document["seen"]) == 4
    for name, seen in document["seen"].items():
        for rank, (got, want) in enumerate(zip(seen["ranks"], seen["one"], strict=True)):
            assert got.pop("untouched"), name
            assert got == want, f"{name}: rank {rank}"
    none, too_many = document["refused"]
    assert "expected a multiple of 64 tokens on rank 0 of 3, got 0" in none
    assert "got 65" in too_many
