# SPDX-License-Identifier: Apache-2.0
"""Whole tiny models on npu:0 against the same models on the CPU, in bfloat16 on both.

The two round at different places, so each differs from the model in float32 by noise of the same size. What the CPU's
bf16 engine differs from float32 by is measured, and stated here as the unit: the npu engine may differ from float32 by
twice that (another order of roundings, and q, k, beta and the read-out rounded once more), and its token may differ
from the CPU's where the CPU's own margin between its two best tokens is within twice that on both logits, so four
times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
import ledger
import xgdn
from child_process import run_python, task_queue_environment
from xgdn import runtime

HEAD_DIMS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
DENSE, MOE, NEXT = (checkpoints.CHECKPOINTS[i] for i in (0, 2, 4))
MODELS = {
    "qwen3_5": replace(DENSE, changes=HEAD_DIMS),
    "qwen3_5-1_to_3_heads": replace(DENSE, changes=HEAD_DIMS | {"linear_num_value_heads": 6}),
    "qwen3_5_moe": replace(MOE, changes=MOE.changes | HEAD_DIMS),
    "qwen3_next": replace(NEXT, changes=NEXT.changes | HEAD_DIMS),
}
PROMPT_LENGTHS = (3, 65, 7, 130)
NEW_TOKENS = 6


@dataclass
class Engines:
    npu: xgdn.Engine
    cpu: xgdn.Engine
    exact: xgdn.Engine  # float32 on the CPU

    def noise(self, prompt: list[int], engine: xgdn.Engine) -> Tensor:
        return engine.prompt_logits(prompt).cpu() - self.exact.prompt_logits(prompt)


def make_engines(model: checkpoints.Tiny, path: Path, state_dtype: torch.dtype) -> Engines:
    directory, _ = checkpoints.make(model, path)
    runner = xgdn.RunnerOptions(max_batch_size=64, max_cached_tokens=4096)
    options = {"dtype": torch.bfloat16, "state_dtype": state_dtype, "runner": runner}
    return Engines(
        npu=xgdn.Engine(directory, device="npu:0", **options),
        cpu=xgdn.Engine(directory, **options),
        exact=xgdn.Engine(directory, dtype=torch.float32),
    )


@pytest.fixture(scope="module", params=MODELS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return make_engines(MODELS[request.param], tmp_path_factory.mktemp("checkpoint"), torch.bfloat16)


def make_prompts() -> list[list[int]]:
    return [torch.randint(0, 128, (length,)).tolist() for length in PROMPT_LENGTHS]


def test_logits_are_within_the_rounding_of_bf16(engines: Engines) -> None:
    for prompt in make_prompts():
        got, unit = (engines.noise(prompt, engine) for engine in (engines.npu, engines.cpu))
        # Of a token in the middle: one whose experts flip on a near tie may be anywhere, on either device.
        npu, cpu = (noise.norm(dim=-1).median() for noise in (got, unit))
        assert npu <= 2 * cpu, f"{len(prompt)} tokens: off by {npu:.4g}, the CPU by {cpu:.4g}"
        assert npu <= 0.1 * engines.exact.prompt_logits(prompt).norm(dim=-1).median()


def compared_tokens(engines: Engines, prompt: list[int], got: list[int], want: list[int]) -> int:
    """How many tokens are equal; where they part, the CPU's choice must have been a near tie."""
    equal = next((i for i, (x, y) in enumerate(zip(got, want, strict=True)) if x != y), len(want))
    if equal < len(want):
        so_far = prompt + want[:equal]
        logits = engines.cpu.prompt_logits(so_far)[-1]
        bound = 4 * engines.noise(so_far, engines.cpu)[-1].abs().max()
        margin = logits[want[equal]] - logits[got[equal]]
        assert margin <= bound, f"token {equal}: got {got[equal]}, want {want[equal]}, margin {margin} > {bound}"
    return equal


def test_greedy_tokens_of_a_batch_and_again_in_its_slots(engines: Engines) -> None:
    prompts = make_prompts()
    want = [r.tokens for r in engines.cpu.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)]
    free = engines.npu.num_free_slots
    first, again = (engines.npu.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True) for _ in range(2))
    assert all(result.error == "" for result in first + again)
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert engines.npu.num_free_slots == free
    equal = [compared_tokens(engines, *each) for each in zip(prompts, [r.tokens for r in first], want, strict=True)]
    assert sum(equal) >= len(prompts) * NEW_TOKENS // 2, equal


def test_first_tokens_are_those_of_a_prompt_alone(engines: Engines) -> None:
    """Ragged prompts in one prefill, against each prompt by itself."""
    prompts = make_prompts()
    together = engines.npu.generate(prompts, max_new_tokens=2, ignore_eos=True)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = engines.npu.generate([prompt], max_new_tokens=2, ignore_eos=True)
        assert alone.tokens[0] == result.tokens[0]


def test_a_step_or_a_pool_of_another_device_is_an_error(tmp_path: Path) -> None:
    directory, _ = checkpoints.make(MODELS["qwen3_5"], tmp_path)
    decoder = runtime.load_decoder(
        str(directory), dtype=torch.bfloat16, state_dtype=torch.bfloat16, device=torch.device("npu")
    )
    assert decoder.device == "npu:0"
    kv = runtime.KvCache(decoder, num_blocks=2)

    def run(device: str, pool_device: str) -> Tensor:
        states = runtime.StatePool(decoder.state_specs(), num_slots=1, device=pool_device)
        builder = runtime.BatchBuilder(num_slots=1, num_kv_blocks=2, vocab_size=128, has_attention=True, device=device)
        step = runtime.SequenceStep(
            kind=runtime.SegmentKind.PREFILL, tokens=[1, 2], state_slots=[0], has_initial_state=False, kv_blocks=[0]
        )
        return decoder.forward(builder.build([step]).input, states, kv)

    assert run("npu:0", "npu:0").shape == (1, 128)
    with pytest.raises(xgdn.errors.DeviceError, match="input: expected a step built for npu:0, got one on cpu"):
        run("cpu", "npu:0")
    with pytest.raises(xgdn.errors.DeviceError, match=r"conv_state: expected a tensor on npu:0 .*, got one on cpu"):
        run("npu:0", "cpu")


# What a failing kernel does to the engine.

FAILS = "RecurrentGatedDeltaRule"


def test_a_kernel_that_fails_ends_the_requests_of_its_step(engines: Engines) -> None:
    """Operators run where they are called, so the device goes on."""
    prompt = make_prompts()[0]
    (want,) = engines.npu.generate([prompt], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    first = engines.npu.submit(xgdn.Request(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True))
    engines.npu.step()
    second = engines.npu.submit(xgdn.Request(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True))
    with ledger.switched(FAIL=FAILS):
        events = engines.npu.step()
    assert [(event.id, event.finish_reason) for event in events] == [
        (first, xgdn.FinishReason.ERROR),
        (second, xgdn.FinishReason.ERROR),
    ]
    assert all("aclnn" + FAILS in event.error for event in events)
    assert engines.npu.is_idle()
    (again,) = engines.npu.generate([prompt], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert (again.tokens, again.error) == (want.tokens, "")


@pytest.mark.parametrize(
    ("op", "steps_before"),
    [("ChunkGatedDeltaRule", 0), ("ChunkGatedDeltaRule", 1), (FAILS, 4), ("Matmul", 5)],
    ids=["first piece of a prompt", "another piece", "decode", "decode, an op of ATen"],
)
def test_after_an_error_of_the_task_queue_nobody_gets_a_wrong_token(tmp_path: Path, op: str, steps_before: int) -> None:
    """torch_npu's default mode: it raises the error once, at a later wait, and drops all that follows in silence.

    The model has no full attention, whose trial call the emulation now and then refuses in this mode.
    """
    layers = {"layer_types": ["linear_attention"] * 4}
    directory, _ = checkpoints.make(replace(DENSE, changes=HEAD_DIMS | layers), tmp_path)
    code = f"""
import ledger, xgdn

engine = xgdn.Engine("{directory}", device="npu:0", dtype=torch.bfloat16, state_dtype=torch.bfloat16,
                     runner=xgdn.RunnerOptions(max_batch_size=2, max_tokens_per_step=64))
print(engine.device_error == "")
request = xgdn.Request([1] * 150, max_new_tokens=12, ignore_eos=True)
want = engine.generate([[1] * 150], max_new_tokens=12, ignore_eos=True)[0].tokens
ids = [engine.submit(request) for _ in range(3)]  # the third waits for a slot
tokens, ended = {{id: [] for id in ids}}, {{}}

def step():
    for event in engine.step():
        tokens[event.id] += event.tokens
        if event.finish_reason != xgdn.FinishReason.RUNNING:
            ended[event.id] = event

for _ in range({steps_before}):
    step()
with ledger.switched(FAIL="{op}"):
    while not engine.is_idle():
        step()
print(all(tokens[id] == want[: len(tokens[id])] and len(tokens[id]) < 12 for id in ids))
print(all(ended[id].finish_reason == xgdn.FinishReason.ERROR and "aclnn{op}" in ended[id].error for id in ids))
(later,) = engine.generate([[1] * 150], max_new_tokens=12, ignore_eos=True, raise_on_error=False)
print(engine.device_error == later.error)
print(later.tokens, later.finish_reason, "npu:0 that has stopped" in later.error, "aclnn{op}" in later.error)
print(engine.num_free_slots)
"""
    assert run_python(code, environment=task_queue_environment()) == [
        "True",
        "True",
        "True",
        "True",
        "[] FinishReason.ERROR True True",
        "2",
    ]


def test_a_server_tells_that_its_device_has_stopped(tmp_path: Path) -> None:
    layers = {"layer_types": ["linear_attention"] * 4}
    directory, _ = checkpoints.make(replace(DENSE, changes=HEAD_DIMS | layers), tmp_path)
    code = f"""
import httpx, ledger, xgdn
from live_server import KEY, live, post

engine = xgdn.Engine("{directory}", device="npu:0", dtype=torch.bfloat16, state_dtype=torch.bfloat16,
                     runner=xgdn.RunnerOptions(max_batch_size=2, max_tokens_per_step=64))
body = {{"model": "tiny", "prompt": [1] * 150, "max_tokens": 4, "ignore_eos": True}}
with live(engine) as url:
    print(post(url, body).status_code, httpx.get(f"{{url}}/health").status_code)
    with ledger.switched(FAIL="{FAILS}"):
        print(post(url, body).json()["error"]["code"])
    health = httpx.get(f"{{url}}/health", headers={{"Authorization": f"Bearer {{KEY}}"}})
    print(health.status_code, "npu:0 that has stopped" in health.json()["reason"])
    print(post(url, body).json()["error"]["code"])
"""
    answers = run_python(code, environment=task_queue_environment())
    assert answers == ["200 200", "engine_error", "503 True", "engine_stopped"]
