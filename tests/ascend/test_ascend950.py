# SPDX-License-Identifier: Apache-2.0
"""An Ascend 950 above a CANN that takes fp32 states: the ops, whole models and the accuracy gate with them, and the
attention that torch_npu sends to another entry point there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import test_backend_model as models
from attention_calls import ATTENTION
from cases import Case, assert_call, assert_close, expected, make_inputs
from ledger import recorded

# Collected here, in this process and with the engines below.
from test_backend_attention import test_attention_is_the_formula  # noqa: F401
from test_backend_model import (  # noqa: F401
    test_first_tokens_are_those_of_a_prompt_alone,
    test_greedy_tokens_of_a_batch_and_again_in_its_slots,
    test_logits_are_within_the_rounding_of_bf16,
)
from test_backend_ops import DECODE, PREFILL, run_chunk, run_recurrent, wider_tolerance  # noqa: F401

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_model"


def with_fp32_states(cases: list[Case]) -> list[Case]:
    return [replace(case, state_dtype=torch.float32) for case in cases]


@pytest.fixture(scope="module", params=("qwen3_5", "qwen3_next"))
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> models.Engines:
    path = tmp_path_factory.mktemp("checkpoint")
    return models.make_engines(models.MODELS[request.param], path, torch.float32)


@pytest.mark.parametrize("case", with_fp32_states(DECODE), ids=str)
def test_recurrent_with_fp32_states(case: Case) -> None:
    x = make_inputs(case, prefill=False)
    assert_call(x, run_recurrent(x), prefill=False)


@pytest.mark.parametrize("case", with_fp32_states(PREFILL), ids=str)
def test_chunk_with_fp32_states(case: Case) -> None:
    x = make_inputs(case, prefill=True)
    assert_call(x, run_chunk(x), prefill=True)


@pytest.mark.parametrize("prefill", [True, False])
def test_states_keep_the_precision_of_fp32(prefill: bool) -> None:
    """Inputs that bf16 holds exactly, so that a state which is rounded to bf16 on its way shows."""
    lengths = (66, 3) if prefill else (1, 2, 8, 1)
    exact = {"dtype": torch.bfloat16, "beta_dtype": torch.bfloat16, "use_qk_l2norm": False}
    x = make_inputs(Case(lengths, K=128, V=128, **exact), prefill=prefill)
    (run_chunk if prefill else run_recurrent)(x)
    _, slots = expected(x, prefill=prefill)
    for slot, state in slots.items():
        assert_close(f"state of slot {slot}", x.state[slot], state, 1e-6, parts=(0,))


def test_attention_has_an_entry_point_of_its_own() -> None:
    ATTENTION[0].make().run("npu:0")  # makes the mask
    with recorded() as ledger:
        ATTENTION[0].make().run("npu:0")
    assert ledger.launches == ["IndexSelect", "IndexSelect", "FlashAttentionScoreV4", "InplaceCopy"]


def test_perplexity_for_both_types_of_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    import perplexity

    windows = perplexity.held_out_windows(2)
    exact = perplexity.by_prefill(windows, perplexity.Numbers())
    assert 2 < exact < 20
    found = perplexity.figures(windows, ("npu",), dtype=torch.bfloat16, device="npu:0")
    assert set(found) == {("npu", phase, state) for phase in ("prefill", "decode") for state in ("f32", "bf16")}
    for key, figure in found.items():
        assert abs(figure / exact - 1) < 1e-3, f"{key}: the roundings to bf16"
