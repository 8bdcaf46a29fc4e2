# SPDX-License-Identifier: Apache-2.0
"""What of the GPU benchmarks needs no GPU: cases and their truth, providers, limits, tables, options."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import gpu.model
import gpu.ops
import gpu.peers
import gpu.replay
import xgdn
from gpu.cases import (
    Attention,
    Case,
    Decode,
    DecodeStep,
    Heads,
    Prefill,
    ReplayDecode,
    ReplayPrefill,
    check,
    ragged,
)
from kernels.compare import WrongResult

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_model" / "checkpoint"
RUN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"
FEW = {"heads": Heads(2, 4), "device": "cpu"}
SMALL = {**FEW, "rotated_bytes": 1}
CASES = {
    "decode f32": lambda: Decode(3, torch.float32, **SMALL),
    "decode bf16": lambda: Decode(3, torch.bfloat16, **SMALL),
    "verify": lambda: Decode(2, torch.bfloat16, tokens=4, **SMALL),
    "replay decode f32": lambda: ReplayDecode(5, torch.float32, **SMALL),
    "replay decode bf16": lambda: ReplayDecode(3, torch.bfloat16, **SMALL),
    "replay verify": lambda: ReplayDecode(5, torch.float32, tokens=4, **SMALL),
    "decode step f32": lambda: DecodeStep(2, torch.float32, **SMALL),
    "decode step bf16": lambda: DecodeStep(2, torch.bfloat16, **SMALL),
    "prefill": lambda: Prefill([70, 0, 3], **FEW),
    "replay prefill f32": lambda: ReplayPrefill([64, 16], torch.float32, in_ring=0, **FEW),
    "replay prefill bf16": lambda: ReplayPrefill([64, 0, 16], torch.bfloat16, in_ring=5, **FEW),
    "attention of decodes": lambda: Attention(2, 1, 37, device="cpu", rotated_bytes=1),
    "attention of a prompt": lambda: Attention(1, 21, 21, device="cpu", rotated_bytes=1),
}


@pytest.mark.parametrize("kind", CASES)
def test_providers_are_right_and_wrong_ones_are_found(kind: str) -> None:
    case: Case = CASES[kind]()
    truth = case.truth()
    for provider in case.providers() + gpu.peers.sdpa(case):
        check(case, provider, truth)
        results = provider.result()
        for i, result in enumerate(results):
            for wrong in (result.roll(1, dims=-1), result * torch.nan, 1.02 * result):
                given = (*results[:i], wrong, *results[i + 1 :])
                broken = dataclasses.replace(provider, call=lambda _: None, result=lambda given=given: given)
                with pytest.raises(WrongResult, match=r"errors .* expected at most"):
                    check(case, broken, truth)


def test_no_state_is_in_two_parts() -> None:
    case = Decode(3, torch.float32, tokens=4, **SMALL)
    assert case.streams is not None
    slots = case.streams.flatten().tolist()
    assert sorted(slots) == list(range(1, len(case.pool)))


def test_ragged_prompts_add_up() -> None:
    lengths = ragged(4096)
    assert len(lengths) == 32
    assert sum(lengths) == 4096
    assert min(lengths) >= 16
    assert max(lengths) > 4 * min(lengths)


def test_the_limit_is_the_longer_of_bytes_and_flops() -> None:
    case = SimpleNamespace(work=gpu.cases.Work(bytes=4e9, flops=1e9))
    assert gpu.ops.limit_of(case, 4000, 1000) == (pytest.approx(1000), "copy")
    case.work = gpu.cases.Work(bytes=4e3, flops=1e12)
    assert gpu.ops.limit_of(case, 4000, 500) == (pytest.approx(2000), "gemm")


def test_times_are_of_a_call() -> None:
    times = gpu.replay.per_call([4.0, 2.0, 9.0], 2)
    assert (times.min, times.median) == (1000, 2000)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and times that nobody measured."""

    def time_replays(call: Callable[[int], object], parts: int) -> gpu.replay.Times:
        for i in range(parts):
            call(i)
        return gpu.replay.Times(3.0, 4.0)

    device = SimpleNamespace(copy_gb_s=4000.0, gemm_tflop_s=700.0)
    rooflines = SimpleNamespace(measure_device=lambda: device, time_stream=lambda pool, tables: 2.0)
    monkeypatch.setitem(sys.modules, "gpu.rooflines", rooflines)
    monkeypatch.setattr(gpu, "rooflines", rooflines, raising=False)
    monkeypatch.setattr(gpu.replay, "time_replays", time_replays)


@pytest.mark.usefixtures("without_gpu")
def test_a_case_is_measured_with_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is missing and one that is wrong are named, and the others go on."""
    peers = {"fla": gpu.peers.fla, "copies": _copies_its_states, "wrong": _wrong, "sdpa": gpu.peers.sdpa}
    monkeypatch.setattr(gpu.ops, "PEERS", peers)
    benchmark = gpu.ops.OpsBenchmark([*peers], peer_seconds=60)
    rows = benchmark.run(CASES["decode f32"]())
    assert [row.provider for row in rows] == ["xgdn recurrent_gated_delta_rule", "xgdn packed_decode", "copies"]
    assert {(row.limit, row.share) for row in rows} == {("rmw", 0.5)}
    assert rows[0].gb_s == pytest.approx(3 * 4 * 128 * 128 * 4 * 2 / 4e3)
    rows = benchmark.run(CASES["attention of decodes"]())
    assert [row.provider for row in rows] == ["xgdn paged_attention", "torch sdpa, no table"]
    assert [line.split(":")[0] for line in benchmark.left_out] == [
        "fla",
        "decode B=3 2x4 f32, wrong",
        "attention B=2 T=1 C=37, wrong",
    ]
    json.dumps([row.document() for row in rows])
    gpu.ops.table(rows)


def _wrong(case: Case) -> list[gpu.cases.Provider]:
    return [dataclasses.replace(p, call=lambda _: None, name="wrong") for p in case.providers()[:1]]


def _copies_its_states(case: Case) -> list[gpu.cases.Provider]:
    """One that reads the states once, when it is made."""
    if not isinstance(case, Decode):
        return []
    first, own = case.pool.clone(), case.providers()[0]

    def call(i: int) -> None:
        case.pool.copy_(first)
        own.call(i)

    return [dataclasses.replace(own, name="copies", call=call)]


@pytest.mark.usefixtures("without_gpu")
def test_peers_get_no_case_when_their_time_is_over() -> None:
    benchmark = gpu.ops.OpsBenchmark(["sdpa"], peer_seconds=0)
    rows = benchmark.run(CASES["attention of decodes"]())
    assert [row.provider for row in rows] == ["xgdn paged_attention"]
    assert benchmark.without_time == ["attention B=2 T=1 C=37"]


def test_names_of_cases_are_their_titles() -> None:
    names = [name for name, _ in gpu.ops.case_makers([1, 8])]
    assert len(set(names)) == len(names)
    assert {
        "decode B=8 bf16",
        "decode step B=1 f32",
        "verify T=4 B=128 bf16",
        "prefill 16x32 64K ragged 32",
        "replay prefill 16x32 4K x8 bf16 ring 5",
    } <= {*names}
    assert Decode(1, torch.float32, **SMALL).title == "decode B=1 2x4 f32"
    assert Decode(2, torch.bfloat16, tokens=4, **SMALL).title == "verify T=4 B=2 2x4 bf16"
    prefill = ReplayPrefill([16, 16], torch.float32, in_ring=5, **FEW)
    assert prefill.title == "replay prefill 2x4 32 x2 f32 ring 5"


def test_bytes_of_a_step() -> None:
    assert gpu.model.step_bytes(weights=100, states=10, kv_rows=5) == 125
    row = gpu.model.row_of("decode", 8, "xgdn", [2.0, 4.0, 3.0], limit=1.5)
    assert (row.min, row.median, row.share) == (2.0, 3.0, 0.5)
    assert row.tokens_per_second == pytest.approx(8 / 3e-3)
    gpu.model.table([row, gpu.model.row_of("prompt", 16, "transformers", [1.0])])


def test_a_model_is_measured() -> None:
    args = xgdn.EngineArgs(dtype=torch.float32)
    rows = gpu.model.decode_rows(CHECKPOINT, [1, 3], args, prompt_tokens=20, steps=3, copy_gb_s=50)
    rows += gpu.model.prompt_rows(CHECKPOINT, [30], "cpu")
    assert [(row.kind, row.size) for row in rows] == [("decode", 1), ("decode", 3), ("prompt", 30)]
    one, three, prompt = rows
    assert 0 < one.min <= one.median
    assert one.limit is not None
    assert three.limit is not None
    assert 0 < one.limit < three.limit < 3 * one.limit
    assert prompt.share is None
    assert gpu.model.check_logits(CHECKPOINT, "cpu") == 0


@pytest.mark.parametrize(
    ("app", "arguments", "message"),
    [
        (gpu.ops.app, ["--peers", "fla,nobody"], "got 'nobody'"),
        (gpu.ops.app, ["--decode", "0"], "expected counts"),
        (gpu.model.app, [".", "--batch", "x"], "expected ids"),
    ],
)
def test_options_are_checked(app: object, arguments: list[str], message: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert message in result.output


def test_the_sanitizers_selection_names_tests_that_exist() -> None:
    selected = re.search("SELECTED='(.*?)'", RUN.read_text(), re.DOTALL)
    assert selected is not None
    suite = "".join(file.read_text() for file in (RUN.parents[2] / "tests" / "cuda").glob("test_*.py"))
    names = re.findall(r"\w*_\w+", selected[1])
    assert len(names) > 8
    assert [name for name in names if name not in suite] == []


def test_the_script_names_its_parts() -> None:
    done = subprocess.run(["bash", RUN, "--part", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected --part build-test|sanitize|ops|model, got 'nothing'" in done.stderr
