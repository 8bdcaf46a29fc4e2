# SPDX-License-Identifier: Apache-2.0
"""`xgdn.plan` against what an engine then takes, and on a checkpoint far beyond this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import xgdn
from checkpoints import CHECKPOINTS, make, qwen3_next
from xgdn import errors
from xgdn.cli import app

RUNNER = xgdn.RunnerOptions(max_batch_size=3, max_cached_tokens=100, max_tokens_per_step=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(CHECKPOINTS[0], tmp_path_factory.mktemp("plan"))[0]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=str)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("plans"))[0]


def run(*args: object) -> Result:
    return CliRunner(env={"FORCE_COLOR": None}).invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_plan_is_what_the_engine_takes(
    directory: Path, dtype: torch.dtype | None, state_dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    args = {"dtype": dtype, "state_dtype": state_dtype, "kv_dtype": kv_dtype, "runner": RUNNER}
    plan = xgdn.Engine.plan(directory, **args)
    engine = xgdn.Engine(directory, **args, memory_limit=plan.total_bytes)
    assert engine.memory_bytes == {
        "weights": plan.weight_bytes,
        "states": plan.state_bytes,
        "kv_cache": plan.kv_bytes,
    }
    assert plan.total_bytes == sum(engine.memory_bytes.values()) + plan.workspace_bytes
    assert plan.num_state_slots * plan.state_slot_bytes == plan.state_bytes
    assert plan.num_kv_blocks * plan.kv_block_bytes == plan.kv_bytes


def test_weights_are_counted_as_the_checkpoint_stores_them(tmp_path: Path) -> None:
    directory, reference = make(CHECKPOINTS[0], tmp_path)
    assert xgdn.plan(directory).weight_bytes == sum(p.numel() * 4 for p in reference.parameters())


def test_a_limit_below_the_plan_is_refused_with_the_numbers(checkpoint: Path) -> None:
    plan = xgdn.plan(checkpoint, runner=RUNNER)
    with pytest.raises(errors.OutOfMemory, match=f"at least {plan.total_bytes} bytes.*got 1000") as caught:
        xgdn.Engine(checkpoint, runner=RUNNER, memory_limit=1000)
    assert isinstance(caught.value, MemoryError)


def test_a_checkpoint_beyond_this_machine_is_planned_from_its_headers(tmp_path: Path) -> None:
    """The file has holes: reading the elements would take minutes and more memory than there is."""
    sizes = {"hidden_size": 8192, "vocab_size": 150000, "num_experts": 64, "moe_intermediate_size": 8192}
    with torch.device("meta"):
        model = qwen3_next(**sizes).to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    header: dict[str, object] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    plan = xgdn.plan(tmp_path, dtype=torch.bfloat16)
    assert plan.weight_bytes > 100e9
    assert 0 <= plan.weight_bytes - end < 10_000, "what is kept in float32"
    assert plan.max_sequences(1000, 80 * 10**9) == 0
    assert plan.max_sequences(1000, 2 * plan.weight_bytes) > 1000


def test_the_command_prints_the_plan(checkpoint: Path) -> None:
    options = ["--max-batch-size", 3, "--max-cached-tokens", 100, "--max-tokens-per-step", 128]
    plan = xgdn.plan(checkpoint, runner=RUNNER)
    result = run("plan", checkpoint, *options, "--memory-limit", "1GiB", "--length", 100, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["total_bytes"] == plan.total_bytes
    assert document["num_kv_blocks"] == 7
    assert document["max_sequences"] == {"100": plan.max_sequences(100, 2**30)}

    table = run("plan", checkpoint, *options, "--memory-limit", "1 GiB").stdout
    for number in (plan.weight_bytes, plan.state_bytes, plan.kv_bytes, plan.workspace_bytes, plan.total_bytes):
        assert str(number) in table
    assert f"{plan.max_sequences(512, 2**30)} sequences of 512 tokens fit" in table


def test_the_longest_sequence_is_that_of_the_model_or_of_the_cache(checkpoint: Path) -> None:
    positions = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    for max_cached_tokens, longest in ((100, 112), (positions + 1000, positions)):
        runner = xgdn.RunnerOptions(max_cached_tokens=max_cached_tokens)
        assert xgdn.plan(checkpoint, runner=runner).max_context == longest
        assert xgdn.Engine(checkpoint, runner=runner).max_context == longest
        options = ["--max-cached-tokens", max_cached_tokens]
        assert f"a sequence may have {longest} tokens" in run("plan", checkpoint, *options).stdout
        assert json.loads(run("plan", checkpoint, *options, "--json").stdout)["max_context"] == longest


def test_the_commands_refuse_what_does_not_fit(checkpoint: Path) -> None:
    refused = run("plan", checkpoint, "--memory-limit", "1KiB")
    assert refused.exit_code == 1
    assert "got 1024" in refused.stderr
    refused = run("generate", checkpoint, "--prompt-ids", "1", "--memory-limit", "1KiB")
    assert refused.exit_code == 1
    assert "memory_limit" in refused.stderr
    assert run("plan", checkpoint, "--memory-limit", "much").exit_code == 2
