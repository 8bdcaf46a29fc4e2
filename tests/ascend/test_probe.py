# SPDX-License-Identifier: Apache-2.0
"""What the probe finds and says, in a process of its own for each kind of CANN: it runs once per process."""

from __future__ import annotations

from child_process import run_python

RECURRENT = "npu::npu_recurrent_gated_delta_rule"
VLLM_ASCEND = "_C_ascend::npu_recurrent_gated_delta_rule"

# One call of each delta rule, as test_backend_ops.py makes and checks them; "ok", or the sentence of the error.
CALLS = """
from cases import Case, assert_call, make_inputs
from attention_calls import ATTENTION, EXPERTS
import test_backend_ops as calls

def attempt(run, case, prefill):
    x = make_inputs(case, prefill=prefill)
    try:
        assert_call(x, run(x), prefill=prefill)
        print("ok")
    except NotImplementedError as error:
        print(" ".join(str(error).split()))

def recurrent(state_dtype=torch.bfloat16):
    case = Case((2, 1, 4, 0, 3), dtype=torch.bfloat16, state_dtype=state_dtype)
    attempt(calls.run_recurrent, case, False)

def chunk(K=128, state_dtype=torch.bfloat16):
    attempt(calls.run_chunk, Case((66, 3), K=K, V=K, dtype=torch.bfloat16, state_dtype=state_dtype), True)

def attention_or_experts(op):
    call = (ATTENTION if op == "paged_attention" else EXPERTS)[0].make()
    try:
        call.run("npu:0")
        print("ok")
    except NotImplementedError as error:
        print(" ".join(str(error).split()))

def doctor():
    sentences = {r.why_not for r in xgdn.doctor() if r.backend == "npu" and r.op == "recurrent_gated_delta_rule"}
    print(*sentences)
"""


def assert_words(line: str, *words: str) -> None:
    assert all(word in line for word in words), line


def test_an_ordinary_cann() -> None:
    ran, report = run_python(CALLS + "recurrent()\ndoctor()")
    assert ran == "ok"
    assert_words(report, f"recurrent: {RECURRENT}, lengths L1..LB", "f32 state: no (", "chunk: yes")
    assert_words(report, "attention: yes; experts: yes")
    assert_words(report, "error code is 161002: ", "Tensor state not implemented for DT_FLOAT")  # CANN's own words


def test_absent_attention_and_experts_leave_the_rest() -> None:
    for absent, op, other in (
        ("FlashAttentionVarLenScore", "paged_attention", "experts: yes"),
        ("MoeInitRoutingV3", "moe_experts", "attention: yes"),
    ):
        ran, refused, report = run_python(CALLS + f"recurrent()\nattention_or_experts('{op}')\ndoctor()", ABSENT=absent)
        assert ran == "ok"
        assert_words(refused, f"npu: it failed: aclnn{absent}", "not in libopapi.so", "cpu: ", "reference: ")
        assert_words(report, "recurrent: " + RECURRENT, other)


def test_a_package_that_reads_lengths_with_their_start() -> None:
    decoded, prefilled, report = run_python(CALLS + "recurrent()\nchunk()\ndoctor()", LENGTHS="bplus1")
    assert (decoded, prefilled) == ("ok", "ok")
    assert_words(report, f"recurrent: {RECURRENT}, lengths start, L1..LB")


def test_a_cann_with_fp32_states_serves_them() -> None:
    wide, narrow, small_heads, report = run_python(
        CALLS + "recurrent(torch.float32)\nrecurrent()\nchunk(64)\ndoctor()", FP32_STATE="1"
    )
    assert (wide, narrow, small_heads) == ("ok", "ok", "ok")
    assert_words(report, "f32 state: yes", "head dims below 128: yes")


def test_an_ascend950_takes_fp32_states_in_both_ops() -> None:
    code = (
        CALLS + "recurrent(torch.float32)\nchunk(64, torch.float32)\nattention_or_experts('paged_attention')\ndoctor()"
    )
    *ran, report = run_python(code, SOC="Ascend950PR_9589", FP32_STATE="1")
    assert ran == ["ok", "ok", "ok"]
    assert_words(report, "f32 state: yes; chunk: yes, f32 state: yes, head dims below 128: yes; attention: yes")


def test_an_absent_recurrent_op_leaves_the_chunk_op() -> None:
    refused, prefilled, report = run_python(CALLS + "recurrent()\nchunk()\ndoctor()", ABSENT="RecurrentGatedDeltaRule")
    assert_words(refused, "npu: it failed: aclnnRecurrentGatedDeltaRule", "not in libopapi.so", "cpu: ")
    assert prefilled == "ok"
    assert_words(report, "recurrent: it failed", "chunk: yes")


def test_a_broken_chunk_op_leaves_the_recurrent_op() -> None:
    decoded, refused, report = run_python(CALLS + "recurrent()\nchunk()\ndoctor()", CHUNK_BROKEN="1")
    assert decoded == "ok"
    assert_words(refused, "npu: it failed: call aclnnChunkGatedDeltaRule failed", "cpu: ")
    assert_words(report, "chunk: no (it failed")


def test_another_privateuse1_backend_is_named() -> None:
    code = """
torch.utils.rename_privateuse1_backend("other")
for report in xgdn.doctor():
    if report.backend == "npu":
        print(report.why_not)
"""
    assert set(run_python(code, preamble="import torch")) == {
        "the PrivateUse1 backend of this process is 'other', expected 'npu'"
    }


def test_a_process_without_a_device() -> None:
    (line,) = run_python("print(*{r.why_not for r in xgdn.doctor() if r.backend == 'npu'})", preamble="import torch")
    assert line == "no PrivateUse1 backend is loaded (import torch_npu)"


# torch_npu's schema under vllm-ascend's name; the kernel works on copies on the CPU, and wants [start, L1..LB].
VLLM_ASCEND_PACKAGE = """
import reference
schema = str(torch.ops.npu.npu_recurrent_gated_delta_rule.default._schema)
package = torch.library.Library("_C_ascend", "DEF")
package.define("npu_recurrent_gated_delta_rule" + schema[schema.index("("):])

def kernel(query, key, value, state, *, beta, scale, actual_seq_lengths, ssm_state_indices, num_accepted_tokens, g,
           gk=None):
    first, *lengths = actual_seq_lengths.tolist()
    slots = ssm_state_indices.tolist()
    pool, out = state.cpu(), torch.full(value.shape, torch.nan)
    for length, accepted in zip(lengths, num_accepted_tokens.tolist()):
        rows = slice(first, first + length)
        tokens = (t[rows].cpu() for t in (query, key, value, g, beta))
        out[rows], after = reference.gated_delta_rule(
            *tokens, pool[slots[first + accepted - 1]], scale=scale, use_qk_l2norm=False)
        for t in range(length):
            pool[slots[first + t]] = after[t + 1].to(pool.dtype)
        first += length
    state.copy_(pool)
    return out.bfloat16().npu()

package.impl("npu_recurrent_gated_delta_rule", kernel, "PrivateUse1")
"""


def test_the_op_of_vllm_ascend_is_taken_where_torch_npus_does_not_work() -> None:
    ran, report = run_python(VLLM_ASCEND_PACKAGE + CALLS + "recurrent()\ndoctor()", ABSENT="RecurrentGatedDeltaRule")
    assert ran == "ok"
    assert_words(report, f"recurrent: {VLLM_ASCEND}, lengths start, L1..LB", "f32 state: yes")


def test_torch_npus_op_goes_before_that_of_vllm_ascend() -> None:
    ran, report = run_python(VLLM_ASCEND_PACKAGE + CALLS + "recurrent()\ndoctor()")
    assert ran == "ok"
    assert_words(report, f"recurrent: {RECURRENT}, lengths L1..LB")


def test_look_alikes_are_recognised_and_not_called() -> None:
    package = """
libraries = [torch.library.Library("_C_ascend", "DEF"), torch.library.Library("npu", "FRAGMENT")]
libraries[0].define("npu_recurrent_gated_delta_rule_310(Tensor query, Tensor key) -> Tensor")
libraries[1].define("recurrent_gated_delta_rule(Tensor mix_qkv, Tensor state) -> Tensor")
"""
    (refused,) = run_python(package + CALLS + "recurrent()", ABSENT="RecurrentGatedDeltaRule")
    assert_words(
        refused,
        "found _C_ascend::npu_recurrent_gated_delta_rule_310, which takes fp16 states and is not routed",
        "found npu::recurrent_gated_delta_rule, which takes packed inputs with beta logits and is not routed",
    )


def test_doctor_shows_what_the_probe_found() -> None:
    lines = run_python("from xgdn.cli import app\napp(['doctor'], standalone_mode=False)")
    (line,) = [line for line in lines if line.startswith("npu: ")]
    assert_words(line, f"recurrent: {RECURRENT}, lengths L1..LB", "f32 state: no (", "chunk: yes")
