# SPDX-License-Identifier: Apache-2.0
"""A profile holds the ops of its thread between its start and its end, and nothing else."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import xgdn
from xgdn import _C
from xgdn.bench.op_times import RecordedStep, record_ops, step_profile


def multiply(outputs: int = 32, width: int = 64, tokens: int = 2) -> None:
    xgdn.ops.linear(torch.ones(tokens, width), torch.ones(outputs, width))


def test_calls_are_told_apart_by_op_and_sizes_but_not_by_tokens() -> None:
    def call() -> str:
        multiply(tokens=2)
        xgdn.ops.silu_and_mul(torch.ones(2, 48), torch.ones(2, 48))
        multiply(tokens=5)
        multiply(outputs=96)
        return "result"

    result, seconds, ops = record_ops(call)
    assert result == "result"
    assert [(op.op, op.sizes, op.calls) for op in ops] == [
        ("linear", [32, 64], 2),
        ("silu_and_mul", [48], 1),
        ("linear", [96, 64], 1),
    ]
    assert all(op.seconds > 0 and op.seconds_before > 0 for op in ops)
    assert sum(op.seconds + op.seconds_before for op in ops) <= seconds


def test_time_between_ops_counts_before_the_next_one() -> None:
    def call() -> None:
        multiply()
        time.sleep(0.05)
        multiply(outputs=96)
        time.sleep(0.05)

    _, seconds, (first, second) = record_ops(call)
    assert first.seconds_before < 0.05 <= second.seconds_before
    assert seconds >= first.seconds + second.seconds + second.seconds_before + 0.05


def test_nothing_is_recorded_before_a_start_after_the_end_and_in_other_threads() -> None:
    assert _C.stop_op_profile() == []
    multiply()
    _C.start_op_profile()
    other = threading.Thread(target=multiply)
    other.start()
    other.join()
    assert _C.stop_op_profile() == []
    multiply()
    _, _, ops = record_ops(multiply)
    assert [op.calls for op in ops] == [1]
    assert _C.stop_op_profile() == []


def test_a_call_that_raises_ends_the_profile() -> None:
    with pytest.raises(ValueError, match="linear"):
        record_ops(lambda: xgdn.ops.linear(torch.ones(2, 64), torch.ones(32, 60)))
    multiply()
    assert _C.stop_op_profile() == []


def test_a_step_profile_is_the_mean_of_its_steps() -> None:
    steps = [RecordedStep(tokens, *record_ops(call)[1:]) for tokens, call in ((2, multiply), (4, lambda: None))]
    profile = step_profile("decode", steps)
    (row,) = profile.ops
    assert (profile.steps, profile.tokens, row.calls) == (2, 3.0, 0.5)
    assert profile.step == pytest.approx(1e6 * sum(step.seconds for step in steps) / 2)
    assert row.inside == pytest.approx(1e6 * steps[0].ops[0].seconds / 2)
    assert profile.after == pytest.approx(profile.step - row.inside - row.before)
