# SPDX-License-Identifier: Apache-2.0
"""Several processes that share a model against one that has all of it: the same tokens, whatever is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import xgdn
from rank_processes import run_ranks

PROGRAM = Path(__file__).parent / "tensor_parallel_ranks.py"
WORLDS = (2, 4)
NAMES = [tiny.name for tiny in checkpoints.CHECKPOINTS]
# Which of them four ranks cannot share: value heads that are 2 or 6.
NOT_BY_FOUR = {"qwen3_5-moe", "qwen3_5-tied-bf16-sharded"}

# Rows of every rank's part are multiples of 32 numbers, which the kernels of bfloat16 products take.
EVEN = checkpoints.Tiny(
    "even", checkpoints.qwen3_5, {"intermediate_size": 128, "linear_num_value_heads": 8}, dtype=torch.bfloat16
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for tiny in checkpoints.CHECKPOINTS:
        checkpoints.make(tiny, folder)
    return folder


@pytest.fixture(scope="module", params=WORLDS, ids="{}-ranks".format)
def seen(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    world: int = request.param
    files = tmp_path_factory.mktemp("files")
    checkpoints.make(EVEN, files)
    return {"world": world, **run_ranks(world, PROGRAM, folder, files)}


def of_both(seen: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return seen[f"{name}/{seen['world']}"], seen[f"{name}/1"]


def tokens_of(replies: list[dict[str, Any]]) -> list[list[int]]:
    assert [reply["error"] for reply in replies] == [""] * len(replies)
    return [reply["tokens"] for reply in replies]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(seen: dict[str, Any], name: str) -> None:
    """With prompts in pieces, sequences that wait, preemption and cached prefixes."""
    if seen["world"] == 4 and name in NOT_BY_FOUR:
        assert "expected one of 1, 2, into which the model can be split, got 4" in seen["errors"][name]
        assert "linear_num_value_heads" in seen["errors"][name]
        return
    many, one = of_both(seen, f"batched/{name}")
    assert tokens_of(many["replies"]) == tokens_of(one["replies"])
    assert many["num_preemptions"] == one["num_preemptions"] > 0
    assert many["num_found"] == one["num_found"] > 0
    torch.testing.assert_close(torch.tensor(many["logits"]), torch.tensor(one["logits"]), rtol=1e-4, atol=1e-5)


def test_memory_of_a_rank(seen: dict[str, Any]) -> None:
    """Everything is split but norms, routers and what small weights are shared; keys and values as far as heads go."""
    world = seen["world"]
    many, one = of_both(seen, "batched/qwen3_next-mixed")
    assert many["memory"]["weights"] < one["memory"]["weights"] * (1.25 / world)
    assert many["memory"]["kv_cache"] == one["memory"]["kv_cache"] // 2  # of two heads, which four ranks share
    many, one = of_both(seen, "batched/qwen3_5-wrapper")  # one key head, which all share, and 8 value heads
    assert one["memory"]["states"] // world < many["memory"]["states"] < one["memory"]["states"] * (1.5 / world)


def test_sampled_tokens(seen: dict[str, Any]) -> None:
    """By candidates and by whole rows, one request alone and all in one batch."""
    many, one = of_both(seen, "sampled")
    assert {name: tokens_of(many[name]) for name in many} == {name: tokens_of(one[name]) for name in one}
    assert len({tuple(map(tuple, tokens_of(one[name]))) for name in one}) == len(one), "requests that differ in nothing"
    for name, field in [("logprobs", "logprobs"), ("prompt", "prompt_logprobs"), ("prompt", "hidden")]:
        expected = torch.tensor(one[name][0][field])
        assert expected.numel() > 0
        torch.testing.assert_close(torch.tensor(many[name][0][field]), expected, rtol=1e-4, atol=1e-4)


def test_neighbours_in_a_batch_change_no_bit(seen: dict[str, Any]) -> None:
    """Sums over ranks are added in one order, wherever a token lies among those of its step."""
    many, _ = of_both(seen, "beside")
    assert all(reply["logprobs"] for reply in many["alone"])
    assert many["alone"] == many["together"]


def test_drafts(seen: dict[str, Any]) -> None:
    many, one = of_both(seen, "drafted")
    assert tokens_of(many["replies"]) == tokens_of(one["replies"])
    assert many["num_right"] == one["num_right"] > 0


@pytest.mark.parametrize("states", [False, True], ids=["plain", "replay"])
def test_sessions(seen: dict[str, Any], states: bool) -> None:
    """Those written by several ranks go on in one process, and the other way round; heads that ranks share included."""
    steps = [seen[f"session/{states}/{step}"] for step in range(4)]
    assert len({json.dumps(step) for step in steps}) == 1, steps
    assert steps[0]["found"] == steps[0]["kept"] >= 256


def test_plan_of_a_rank(folder: Path) -> None:
    whole = xgdn.plan(folder / "qwen3_5-dense")
    half = xgdn.plan(folder / "qwen3_5-dense", tensor_parallel=2)
    assert half.weight_bytes < 0.6 * whole.weight_bytes
    assert half.state_slot_bytes * 2 == whole.state_slot_bytes
    assert half.kv_block_bytes * 2 == whole.kv_block_bytes
    for world in (0, 3, 8, -1):
        with pytest.raises(xgdn.errors.RequestError, match=rf"expected one of 1, 2, 4, into which .* got {world}"):
            xgdn.plan(folder / "qwen3_5-dense", tensor_parallel=world)


def test_groups_that_cannot_be_split(folder: Path) -> None:
    """Rows of 64 numbers in one group."""
    with pytest.raises(
        xgdn.errors.UnsupportedError, match=r"out_proj.weight cannot be split between ranks.*groups of 64"
    ):
        xgdn.Engine(folder / "qwen3_5-dense", tensor_parallel=2, quantize="int8")
