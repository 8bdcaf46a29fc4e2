# SPDX-License-Identifier: Apache-2.0
"""The accuracy gate on npu:0: held-out perplexity of the trained model beside the CPU's, both in bfloat16."""

from __future__ import annotations

from pathlib import Path

from test_probe import run_python

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_model"


def test_perplexity_is_that_of_the_cpu_in_bf16() -> None:
    """The model's head dim is 64, which the chunk op of a newer CANN takes; the op's inputs are always bf16."""
    code = f"""
import sys
sys.path.insert(0, "{FOLDER}")
import perplexity

windows = perplexity.held_out_windows(2)
options = {{"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}}
print(perplexity.by_prefill(windows, device="npu:0", **options))
print(perplexity.by_prefill(windows, **options))
print(perplexity.by_prefill(windows))
"""
    npu, cpu, exact = map(float, run_python(code, FP32_STATE="1"))
    assert 2 < exact < 20
    assert abs(npu / cpu - 1) < 5e-4, "the CPU keeps the logits and the MLP's gate in float32, torch_npu rounds them"
    assert abs(npu / exact - 1) < 1e-3, "the roundings to bf16"
