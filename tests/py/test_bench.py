# SPDX-License-Identifier: Apache-2.0
"""The benchmarks refuse wrong results and print what they measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kernels.cases
import kernels.experts
import kernels.layer
import kernels.linear
import kernels.ops
import xgdn
from bench import app as kernels_app
from kernels import xgdn_ops
from kernels.cases import DecodeCase, DecodeStepCase, PrefillCase, VerifyCase
from kernels.compare import WrongResult, check, relative_error
from xgdn.bench.turns import take_turns
from xgdn.cli import app

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_model/checkpoint"

CASES = {
    "decode": lambda: DecodeCase(2, torch.float32),
    "decode_step": lambda: DecodeStepCase(2, torch.float32),
    "verify": lambda: VerifyCase(1, 3, torch.bfloat16),
    "prefill": lambda: PrefillCase([65, 3]),
}


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pools of states that fit a cache."""
    monkeypatch.setattr(kernels.cases, "BYTES_BEYOND_CACHES", 2**20)


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("kind", CASES)
def test_own_providers_are_right_and_a_wrong_one_is_found(kind: str) -> None:
    case = CASES[kind]()
    truth = case.truth_of_step() if kind == "decode_step" else case.truth()
    for provider in getattr(xgdn_ops, kind)(case):
        check(provider, truth)
        out, states = provider.result()
        for wrong in ((out.roll(1, dims=1), states), (out, states.transpose(2, 3)), (out * torch.nan, states)):
            broken = dataclasses.replace(provider, call=lambda _: None, result=lambda wrong=wrong: wrong)
            with pytest.raises(WrongResult, match="differs from the float64 recurrence"):
                check(broken, truth)


@pytest.mark.usefixtures("small_pools")
def test_truth_leaves_the_inputs_alone() -> None:
    case = DecodeCase(1, torch.float32)
    before = case.pool.first.clone()
    case.truth()
    assert torch.equal(case.pool.first, before)


def test_providers_take_turns() -> None:
    order: list[str] = []
    times = take_turns([lambda _: order.append("a"), lambda _: order.append("b")], seconds=0)
    assert "".join(order[2:]) == "ab" * 5  # after one call each that estimates the time
    assert [len(taken) for taken in times] == [5, 5]


@pytest.mark.parametrize("command", ["ops", "layer", "linear", "attention"])
def test_every_kernel_benchmark_has_json(command: str) -> None:
    result = CliRunner(env={"FORCE_COLOR": None}).invoke(kernels_app, [command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.stdout


@pytest.mark.usefixtures("small_pools")
def test_bench_ops_prints_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cases, "GEMM_SIZE", 128)
    arguments = "ops --decode 1 --verify 1 --prefill 64 --threads 1 --seconds 0 --json"
    result = CliRunner().invoke(kernels_app, arguments.split())
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["machine"]["torch"] == torch.__version__
    cases = [row["case"] for row in document["rows"]]
    assert set(cases) == {
        "decode B=1 f32",
        "decode B=1 bf16",
        "decode step B=1 f32",
        "decode step B=1 bf16",
        "verify B=1 T=4 f32",
        "verify B=1 T=4 bf16",
        "prefill T=64 bf16",
        "prefill T=64 f32",
    }
    for row in document["rows"]:
        assert 0 < row["min"] <= row["median"]
        assert row["share"] == pytest.approx(row["roofline"] / row["median"])


def test_bench_ops_refuses_counts_that_are_none() -> None:
    result = CliRunner().invoke(kernels_app, ["ops", "--decode", "1,0"])
    assert result.exit_code == 2
    assert "expected counts like 1,8,32" in result.output


def test_bench_model_prints_one_document() -> None:
    options = ["--batch", "1,3", "--threads", "1", "--prompt-tokens", "70", "--steps", "3", "--json"]
    result = CliRunner().invoke(app, ["bench", "model", str(CHECKPOINT), *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert len(row["times"]) >= 3
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["median"])
        assert 0 < min(row["times"]) <= row["median"] <= max(row["times"])
        assert 0 < row["engine"] < 1
        assert row["roofline"] > 0
        assert row["prefill"] > 0


# Calls in a decode step of the tiny model: six GDN layers and two of attention, each with an MLP.
TINY_CALLS = {
    ("rms_norm", (1, 256)): 1,
    ("rms_norm", (4, 64)): 2,
    ("rms_norm", (2, 64)): 2,
    ("rms_norm_linear", (776, 256)): 6,
    ("rms_norm_linear", (768, 256)): 2,
    ("rms_norm_linear", (1024, 256)): 8,
    ("linear", (256, 256)): 8,
    ("linear", (256, 512)): 8,
    ("linear", (2048, 256)): 1,
    ("sigmoid_and_mul", (4, 64)): 2,
    ("gdn_decode_step", (4, 64, 64)): 6,
    ("store_kv", (2, 64)): 2,
    ("paged_attention", (4, 2, 64)): 2,
}
PROMPT_OPS = {"causal_conv1d", "gdn_gating", "chunk_gated_delta_rule", "rms_norm_gated"}


def test_bench_model_profile_counts_the_ops_of_a_step() -> None:
    options = ["--batch", "3", "--threads", "1", "--prompt-tokens", "70", "--steps", "3", "--profile", "--json"]
    result = CliRunner().invoke(app, ["bench", "model", str(CHECKPOINT), *options])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    prompt, decode = row["profiles"]
    assert (prompt["kind"], prompt["steps"], prompt["tokens"]) == ("prompt", 1, 210)
    assert {op["op"] for op in prompt["ops"]} == {op for op, _ in TINY_CALLS} - {"gdn_decode_step"} | PROMPT_OPS
    assert (decode["kind"], decode["steps"], decode["tokens"]) == ("decode", len(row["times"]), 3)
    assert {(op["op"], tuple(op["sizes"])): op["calls"] for op in decode["ops"]} == TINY_CALLS
    mean = 1e3 * sum(row["times"]) / len(row["times"])
    for profile in (prompt, decode):
        assert all(op["inside"] > 0 and op["before"] > 0 for op in profile["ops"])
        in_all = sum(op["inside"] + op["before"] for op in profile["ops"])
        assert 0 < in_all < profile["step"]
        assert in_all + profile["after"] == pytest.approx(profile["step"])
    assert decode["step"] <= mean <= 1.5 * decode["step"]  # what lies between two steps is in their times


def test_bench_model_profile_prints_a_table_for_each_kind_of_step() -> None:
    options = ["--batch", "1", "--threads", "1", "--prompt-tokens", "70", "--steps", "3"]
    plain = CliRunner().invoke(app, ["bench", "model", str(CHECKPOINT), *options])
    assert "us before" not in plain.output
    result = CliRunner().invoke(app, ["bench", "model", str(CHECKPOINT), *options, "--profile"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    decode = lines[next(i for i, line in enumerate(lines) if line[:1] == ["decode,"]) :]
    assert ["linear", "2,048", "x", "256", "1"] in [line[:5] for line in decode]
    times = [float(line[-4].replace(",", "")) for line in decode if len(line) > 6 and "%" in line[-2]]
    assert len(times) == len(TINY_CALLS)
    assert times == sorted(times, reverse=True)
    assert [line[:2] for line in decode[-2:]] == [["between", "ops"], ["after", "the"]]


def test_bench_linear_prints_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.linear, "BYTES_BEYOND_CACHES", 2**20)
    options = ["--tokens", "1,17", "--threads", "1", "--seconds", "0", "--json"]
    result = CliRunner().invoke(kernels_app, ["linear", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["tokens"] for row in rows] == [1, 17] * 4
    for row in rows:
        assert 0 < row["min"] <= row["median"]
        assert row["ratio"] == pytest.approx(row["torch_median"] / row["median"])
        assert row["share"] == pytest.approx(row["roofline"] / row["median"])
        assert 0 < row["error"] < 2.5e-3


def test_bench_linear_refuses_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(1.01 * x, weight.t(), out=out)

    monkeypatch.setattr(xgdn.ops, "linear", off)
    result = CliRunner().invoke(kernels_app, ["linear", "--tokens", "1", "--threads", "1", "--seconds", "0"])
    assert result.exit_code == 1
    assert "linear of 1 tokens: expected an error of at most 0.0025, got 1.0e-02" in result.output


@pytest.fixture
def small_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.experts, "BYTES_BEYOND_CACHES", 2**20)
    monkeypatch.delitem(kernels.experts.SHAPES, "Qwen3-Next")
    monkeypatch.setitem(kernels.experts.SHAPES, "narrow", kernels.experts.Shape(6, 128, 64, 2))


@pytest.mark.usefixtures("small_mixture")
def test_bench_experts_prints_one_document() -> None:
    options = ["--tokens", "1,17", "--threads", "1", "--seconds", "0", "--json"]
    result = CliRunner().invoke(kernels_app, ["experts", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["format"], row["tokens"]) for row in rows] == [
        (f, t) for f in ("bf16", "int8", "int4") for t in (1, 17)
    ]
    for row in rows:
        assert row["visited"] == (2 if row["tokens"] == 1 else 6)
        assert 0 < row["min"] <= row["median"]
        assert row["share"] == pytest.approx(row["roofline"] / row["median"])
        assert row["gflops"] * row["median"] * 1e3 == pytest.approx(row["tokens"] * 2 * 3 * 64 * 128 * 2)
        if row["format"] == "bf16":
            faster = min(row["loop_median"], row["grouped_median"])
            assert row["ratio"] == pytest.approx(faster / row["median"])
        else:
            assert row["ratio"] is row["loop_min"] is row["grouped_min"] is None
        assert 0 < row["error"] < 6e-3


@pytest.mark.usefixtures("small_mixture")
def test_bench_experts_compares_three_ways_of_one_mixture() -> None:
    shape = kernels.experts.SHAPES["narrow"]
    call, weights = kernels.experts._calls(shape, 9)[0], kernels.experts._Weights(shape, "bf16")
    want = weights.truth(call)
    for way in (kernels.experts._one_by_one, kernels.experts._grouped):
        assert relative_error(way(call, *weights.tensors), want) < 1.2e-2


@pytest.mark.usefixtures("small_mixture")
def test_bench_experts_refuses_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = xgdn.ops.moe_experts
    monkeypatch.setattr(xgdn.ops, "moe_experts", lambda *args, out: out.copy_(1.02 * experts(*args)))
    result = CliRunner().invoke(kernels_app, ["experts", "--tokens", "3", "--threads", "1", "--seconds", "0"])
    assert result.exit_code == 1
    assert "experts of 3 tokens: expected an error of at most 0.006, got 2" in result.output


def test_bench_attention_prints_one_document() -> None:
    options = ["--tokens", "1,17", "--context", "5,40", "--threads", "1", "--seconds", "0", "--json"]
    result = CliRunner().invoke(kernels_app, ["attention", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    cases = [(row["tokens"], row["context"], row["kv_dtype"]) for row in rows]
    assert cases == [(*sizes, dtype) for sizes in ((1, 5), (1, 40), (17, 40)) for dtype in ("bfloat16", "int8")]
    for row in rows:
        assert 0 < row["min"] <= row["median"]
        assert row["ratio"] == pytest.approx(row["torch_median"] / row["median"])
        assert 0 < row["error"] < (2.5e-3 if row["kv_dtype"] == "bfloat16" else 3e-3)
    pairs = sum(range(24, 41))  # what 17 tokens see
    assert rows[4]["gflops"] * rows[4]["median"] * 1e3 == pytest.approx(4 * 8 * 256 * pairs)


def test_bench_attention_refuses_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = xgdn.ops.paged_attention
    monkeypatch.setattr(xgdn.ops, "paged_attention", lambda *args, **options: 1.01 * attend(*args, **options))
    options = ["--tokens", "3", "--context", "9", "--threads", "1", "--seconds", "0"]
    result = CliRunner().invoke(kernels_app, ["attention", *options])
    assert result.exit_code == 1
    assert "attention of 3 tokens: expected an error of at most 0.0025, got 1.0e-02" in result.output


def test_bench_attention_refuses_other_keys_and_values() -> None:
    result = CliRunner().invoke(kernels_app, ["attention", "--kv-dtype", "int8,int4"])
    assert result.exit_code == 2
    assert "expected bfloat16 or int8, got 'int4'" in result.output


@pytest.mark.usefixtures("small_pools")
def test_bench_layer_prints_one_document() -> None:
    result = CliRunner().invoke(kernels_app, ["layer", "--batch", "1", "--threads", "1", "--seconds", "0", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["state_dtype"] for row in rows] == ["f32", "bf16"]
    for row in rows:
        assert row["between"] == pytest.approx(row["layer"] - row["projections"])
        assert row["rule"] == pytest.approx(row["with_rule"] - row["projections"])
