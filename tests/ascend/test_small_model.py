# SPDX-License-Identifier: Apache-2.0
"""The accuracy gate on npu:0: held-out perplexity of the trained model beside the CPU's, all in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

from child_process import run_python
from test_probe import assert_words

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_model"


def test_perplexity_is_that_of_the_cpu_in_bf16() -> None:
    """The model's head dim is 64, which the chunk op of a newer CANN takes; here it takes bf16 states only."""
    code = f"""
import json, sys
sys.path.insert(0, "{FOLDER}")
import perplexity

windows = perplexity.held_out_windows(2)
def rows(backend, device):
    found = perplexity.figures(windows, (backend,), dtype=torch.bfloat16, device=device)
    return {{f"{{phase}} {{state}}": figure for (_, phase, state), figure in found.items()}}

exact = perplexity.by_prefill(windows, perplexity.Numbers())
print(json.dumps([exact, rows("cpu", "cpu"), rows("npu", "npu:0")]))
"""
    exact, cpu, npu = json.loads(run_python(code, FP32_STATE="1")[-1])
    assert 2 < exact < 20
    assert set(npu) == {"prefill f32", "prefill bf16", "decode f32", "decode bf16"}
    for row in ("prefill bf16", "decode bf16"):
        assert abs(npu[row] / cpu[row] - 1) < 1e-3, f"{row}: only the roundings to bf16 differ"
        assert abs(npu[row] / exact - 1) < 1e-3, f"{row}: the roundings to bf16"
    for row in ("prefill f32", "decode f32"):
        assert_words(
            npu[row], "[chunk_gated_delta_rule] backend npu cannot serve", "a Float pool, which is never downcast"
        )
