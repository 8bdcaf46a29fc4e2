# SPDX-License-Identifier: Apache-2.0
"""The engine as a service: bad requests, cancelling, seeds, isolation, damaged checkpoints, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import xgdn
from checkpoints import CHECKPOINTS, Tiny, make
from xgdn import errors
from xgdn.runtime import load_decoder

PROMPTS = [[5, 17, 3], list(range(70)), [9] * 130, [1]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(CHECKPOINTS[0], tmp_path_factory.mktemp("engine"))[0]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> xgdn.Engine:
    return xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=1024))


def request(prompt: list[int], **options: object) -> xgdn.Request:
    return xgdn.Request(prompt, **options)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (request([]), errors.RequestError, ["prompt", "at least one token"]),
        (request([3, 128]), errors.RangeError, ["prompt", "0..127", "128", "index 1"]),
        (request([-1]), errors.RangeError, ["0..127", "-1"]),
        (request([1], max_new_tokens=-1), errors.RequestError, ["max_new_tokens", "-1"]),
        (request([1] * 1020, max_new_tokens=8), errors.RequestError, ["1024", "1020", "8"]),
        (request([1], sampling=xgdn.SamplingParams(temperature=-1.0)), errors.RequestError, ["temperature", "-1"]),
        (request([1], sampling=xgdn.SamplingParams(temperature=float("nan"))), errors.RequestError, ["temperature"]),
        (request([1], sampling=xgdn.SamplingParams(top_p=0.0)), errors.RequestError, ["top_p", "0"]),
        (request([1], sampling=xgdn.SamplingParams(top_k=-2)), errors.RequestError, ["top_k", "-2"]),
    ],
)
def test_bad_requests_are_refused_with_a_sentence(
    engine: xgdn.Engine, bad: xgdn.Request, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        engine.submit(bad)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert engine.is_idle()


def test_no_request_is_longer_than_the_model_has_positions(checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "short"
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    engine = xgdn.Engine(directory)
    with pytest.raises(errors.RequestError, match=r"at most 20, the model's max_position_embeddings, got 15 \+ 6"):
        engine.submit(request([1] * 15, max_new_tokens=6))
    assert len(engine.generate([[1] * 15], max_new_tokens=5, ignore_eos=True)[0].tokens) == 5


def test_a_refused_prompt_refuses_the_whole_call(engine: xgdn.Engine) -> None:
    with pytest.raises(errors.RequestError):
        engine.generate([[1, 2], []])
    assert engine.is_idle()


def test_cancel_frees_everything_and_leaves_the_others_alone(engine: xgdn.Engine) -> None:
    alone = [r.tokens for r in engine.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)]
    ids = [engine.submit(request(p, max_new_tokens=12, ignore_eos=True)) for p in PROMPTS]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    ended: dict[int, xgdn.FinishReason] = {}
    steps = 0
    while not engine.is_idle():
        for event in engine.step():
            tokens[event.id] += event.tokens
            if event.finish_reason != xgdn.FinishReason.RUNNING:
                ended[event.id] = event.finish_reason
        steps += 1
        if steps == 3:
            assert engine.cancel(ids[1])
    assert not engine.cancel(ids[1])
    assert ended.pop(ids[1]) == xgdn.FinishReason.CANCELLED
    assert set(ended.values()) == {xgdn.FinishReason.LENGTH}
    for i in (0, 2, 3):
        assert tokens[ids[i]] == alone[i]
    assert tokens[ids[1]] == alone[1][:3]
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (4, 64)


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(engine: xgdn.Engine) -> None:
    sampling = xgdn.SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=5)
    alone = engine.generate([PROMPTS[1]], max_new_tokens=20, sampling=sampling, ignore_eos=True)[0].tokens
    together = engine.generate(PROMPTS, max_new_tokens=20, sampling=sampling, ignore_eos=True)[1].tokens
    other = xgdn.SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=6)
    assert together == alone
    assert engine.generate([PROMPTS[1]], max_new_tokens=20, sampling=other, ignore_eos=True)[0].tokens != alone


@pytest.mark.parametrize("model", CHECKPOINTS, ids=str)
def test_steps_that_start_ahead_choose_the_same_tokens(model: Tiny, tmp_path: Path) -> None:
    directory, _ = make(model, tmp_path)
    tokens = []
    for run_ahead in (True, False, None):
        runner = xgdn.RunnerOptions(max_batch_size=3, max_cached_tokens=1024, run_ahead=run_ahead)
        assert runner.run_ahead is run_ahead
        engine = xgdn.Engine(directory, runner=runner)
        for i, prompt in enumerate(PROMPTS):
            engine.submit(request(prompt, max_new_tokens=20 + i, ignore_eos=True))
        replies: dict[int, list[int]] = {}
        num_ahead = 0
        while not engine.is_idle():
            for event in engine.step():
                replies.setdefault(event.id, []).extend(event.tokens)
            num_ahead += engine.last_step.started_ahead
        assert num_ahead > 20 if run_ahead else num_ahead == 0
        tokens.append(replies)
    assert tokens[0] == tokens[1] == tokens[2]


def test_preempted_requests_go_on_with_the_same_tokens(checkpoint: Path, engine: xgdn.Engine) -> None:
    want = [r.tokens for r in engine.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)]
    tight = xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=256))
    for _ in range(2):
        before = tight.num_preemptions
        assert [r.tokens for r in tight.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)] == want
        assert tight.num_preemptions > before
    assert (tight.num_free_slots, tight.num_free_kv_blocks) == (4, 16)
    assert engine.num_preemptions == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_keys_and_values_are_the_same_however_a_prompt_comes(checkpoint: Path, dtype: torch.dtype) -> None:
    """In pieces of any size, with others or alone, and across preemptions."""

    def tokens(**sizes: int) -> list[list[int]]:
        runner = xgdn.RunnerOptions(**{"max_batch_size": 4, "max_cached_tokens": 1024, **sizes})
        engine = xgdn.Engine(checkpoint, runner=runner, dtype=dtype, kv_dtype=torch.int8)
        assert [r.tokens for r in engine.generate(PROMPTS[2:], max_new_tokens=40, ignore_eos=True)] == want[2:]
        got = [r.tokens for r in engine.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)]
        assert (engine.num_preemptions > 0) == (sizes.get("max_cached_tokens") == 256)
        return got

    alone = xgdn.Engine(checkpoint, dtype=dtype, kv_dtype=torch.int8)
    want = [alone.generate([prompt], max_new_tokens=40, ignore_eos=True)[0].tokens for prompt in PROMPTS]
    assert tokens() == want
    assert tokens(max_tokens_per_step=64) == want
    assert tokens(max_cached_tokens=256, kv_block_size=8) == want


def test_int8_keys_and_values_are_near_those_of_activations(checkpoint: Path, engine: xgdn.Engine) -> None:
    rounded = xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_cached_tokens=1024), kv_dtype=torch.int8)
    got, want = (it.prompt_logits(PROMPTS[1]) for it in (rounded, engine))
    assert 1e-4 < (got - want).norm() / want.norm() < 3e-2
    assert rounded.memory_bytes["kv_cache"] < 0.4 * engine.memory_bytes["kv_cache"]  # of float32
    same = xgdn.Engine(checkpoint, kv_dtype=torch.float32)
    assert torch.equal(same.prompt_logits(PROMPTS[1]), want)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_other_keys_and_values_are_refused(checkpoint: Path, kv_dtype: torch.dtype) -> None:
    for call in (xgdn.Engine, xgdn.plan):
        with pytest.raises(errors.UnsupportedError, match=r"\[Engine\] kv_dtype: expected int8 or .*Float, got "):
            call(checkpoint, kv_dtype=kv_dtype)


def test_stop_tokens_end_a_request(engine: xgdn.Engine) -> None:
    free = engine.generate([PROMPTS[0]], max_new_tokens=12, ignore_eos=True)[0].tokens
    stop = free[4]
    first = free.index(stop)
    result = engine.generate([PROMPTS[0]], max_new_tokens=12, stop_token_ids=[stop])[0]
    assert result.tokens == free[: first + 1]
    assert result.finish_reason == xgdn.FinishReason.STOP


def test_stream_reports_prefill_and_every_token(checkpoint: Path) -> None:
    engine = xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_tokens_per_step=64))
    events = list(engine.stream([request([9] * 130, max_new_tokens=3, ignore_eos=True)]))
    assert [e.num_prefilled for e in events] == [64, 128, 130, 130, 130]
    assert [len(e.tokens) for e in events] == [0, 0, 1, 1, 1]
    assert events[-1].finish_reason == xgdn.FinishReason.LENGTH


def test_nan_in_one_request_never_reaches_another(checkpoint: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN poisons the state, the cache and the slot of its own request only."""
    directory = tmp_path / "poisoned"
    shutil.copytree(checkpoint, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][100] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    clean = xgdn.Engine(directory, runner=xgdn.RunnerOptions(max_batch_size=8))
    want = [r.tokens for r in clean.generate(PROMPTS, max_new_tokens=10, ignore_eos=True)]

    engine = xgdn.Engine(directory, runner=xgdn.RunnerOptions(max_batch_size=3, max_cached_tokens=512))
    bad = [[7, 100, 8], [100] * 80]
    for _ in range(3):
        prompts = [bad[0], *PROMPTS[:2], bad[1], *PROMPTS[2:]]
        results = engine.generate(prompts, max_new_tokens=10, ignore_eos=True, raise_on_error=False)
        for i in (0, 3):
            assert results[i].finish_reason == xgdn.FinishReason.ERROR
            assert "NaN" in results[i].error
        assert [results[i].tokens for i in (1, 2, 4, 5)] == want
    assert engine.num_free_slots == 3

    with pytest.raises(errors.GenerationError, match=r"\[generate\] result 1: .*NaN"):
        engine.generate([PROMPTS[0], bad[0]], max_new_tokens=10, ignore_eos=True)
    assert engine.is_idle()
    assert engine.num_free_slots == 3


# ---- threads and signals --------------------------------------------------------------------------------------------


def test_threads_share_the_steps(engine: xgdn.Engine) -> None:
    """generate and stream of several threads, a thread that steps for itself, and one that reads the figures."""
    want = [r.tokens for r in engine.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)]
    is_done = threading.Event()

    def generate(i: int) -> list[int]:
        return engine.generate([PROMPTS[i]], max_new_tokens=20, ignore_eos=True)[0].tokens

    def stream(i: int) -> list[int]:
        events = engine.stream([request(PROMPTS[i], max_new_tokens=20, ignore_eos=True)])
        return [token for event in events for token in event.tokens]

    def step(i: int) -> list[int]:
        id, tokens = engine.submit(request(PROMPTS[i], max_new_tokens=20, ignore_eos=True)), []
        while len(tokens) < 20:
            for event in engine.step():
                assert event.id == id  # others' events are theirs
                tokens += event.tokens
        return tokens

    def watch() -> None:
        while not is_done.is_set():
            assert 0 <= engine.num_free_slots <= 4
            assert engine.device_error == ""

    with ThreadPoolExecutor(10) as pool:
        watching = pool.submit(watch)
        jobs = [(i, pool.submit(how, i)) for i in range(4) for how in (generate, stream)] + [(1, pool.submit(step, 1))]
        for i, job in jobs:
            assert job.result() == want[i]
        is_done.set()
        watching.result()
    assert engine.is_idle()
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (4, 64)


def test_streams_of_two_threads_run_side_by_side(engine: xgdn.Engine) -> None:
    """Neither waits for the other's end: while one has events, so has the other."""
    order: list[int] = []
    barrier = threading.Barrier(2)

    def stream(i: int) -> None:
        barrier.wait()
        for _ in engine.stream([request(PROMPTS[0], max_new_tokens=200, ignore_eos=True)]):
            order.append(i)

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = ([place for place, i in enumerate(order) if i == stream] for stream in range(2))
    # A busy machine hands events over in bursts; but nobody has the last before the other has half of theirs.
    assert first[-1] > second[99]
    assert second[-1] > first[99]


def test_events_of_others_wait_for_the_next_step(engine: xgdn.Engine) -> None:
    (want,) = engine.generate([PROMPTS[0]], max_new_tokens=3, ignore_eos=True)
    id = engine.submit(request(PROMPTS[0], max_new_tokens=3, ignore_eos=True))
    engine.generate([PROMPTS[1]], max_new_tokens=20, ignore_eos=True)
    events = engine.step()
    assert {event.id for event in events} == {id}
    assert [token for event in events for token in event.tokens] == want.tokens
    assert engine.is_idle()


def test_a_closed_stream_cancels_its_requests(engine: xgdn.Engine) -> None:
    events = engine.stream([request(p, max_new_tokens=50, ignore_eos=True) for p in PROMPTS[:2]])
    next(events)
    assert not engine.is_idle()
    events.close()
    assert engine.is_idle()
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (4, 64)
    assert engine.step() == []


@pytest.fixture
def python_handles_ctrl_c() -> Iterator[None]:
    """As in a terminal; whoever runs the tests in the background may have Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_ctrl_c_acts_within_a_step(engine: xgdn.Engine, how: str) -> None:
    (want,) = engine.generate([PROMPTS[0]], max_new_tokens=8, ignore_eos=True)
    other = engine.submit(request(PROMPTS[0], max_new_tokens=8, ignore_eos=True))
    long = request(PROMPTS[1], max_new_tokens=900, ignore_eos=True)

    def interrupt() -> None:
        while engine.num_free_slots == 4:  # until it runs
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    def run() -> None:
        thread.start()
        if how == "generate":
            engine.generate([long.prompt], max_new_tokens=900, ignore_eos=True)
        else:
            list(engine.stream([long]))

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    thread.join()
    tokens = [token for event in engine.step() for token in event.tokens]
    while not engine.is_idle():
        events = engine.step()
        assert {event.id for event in events} == {other}
        tokens += [token for event in events for token in event.tokens]
    assert tokens == want.tokens
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (4, 64)


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def write_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def damaged_truncated(d: Path) -> None:
    path = d / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damaged_huge_header(d: Path) -> None:
    write_header(d / "model.safetensors", b"{}", length=2 << 30)


def damaged_beyond_the_file(d: Path) -> None:
    write_header(
        d / "model.safetensors", b'{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}', b"0" * 8
    )


def damaged_wrong_size(d: Path) -> None:
    write_header(
        d / "model.safetensors",
        b'{"model.norm.weight":{"dtype":"F32","shape":[63],"data_offsets":[0,256]}}',
        b"0" * 256,
    )


def damaged_overlap(d: Path) -> None:
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    header = '{"a":' + entry % (0, 8) + ',"b":' + entry % (4, 12) + "}"
    write_header(d / "model.safetensors", header.encode(), b"0" * 12)


def damaged_missing_tensor(d: Path) -> None:
    weights = load_file(d / "model.safetensors")
    del weights["model.layers.1.linear_attn.A_log"]
    save_file(weights, d / "model.safetensors")


def damaged_shape(d: Path) -> None:
    weights = load_file(d / "model.safetensors")
    weights["model.layers.1.linear_attn.in_proj_z.weight"] = torch.zeros(32, 64)
    save_file(weights, d / "model.safetensors")


def damaged_index_escape(d: Path) -> None:
    (d / "model.safetensors").rename(d / "model-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model-00001.safetensors"}}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))


def damaged_no_weights(d: Path) -> None:
    (d / "model.safetensors").unlink()


def damaged_architecture(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (d / "config.json").write_text(json.dumps(config))


def damaged_config(d: Path) -> None:
    (d / "config.json").write_text('{"model_type": "qwen3_5_text"')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_truncated, ["model.safetensors"]),
        (damaged_huge_header, ["header", str(2 << 30)]),
        (damaged_beyond_the_file, ["model.norm.weight", "256"]),
        (damaged_wrong_size, ["model.norm.weight"]),
        (damaged_overlap, ["overlap"]),
        (damaged_missing_tensor, ["model.layers.1.linear_attn.A_log"]),
        (damaged_shape, ["in_proj_z.weight", "[64, 64]", "[32, 64]"]),
        (damaged_index_escape, ["../model-00001.safetensors"]),
        (damaged_no_weights, ["model.safetensors"]),
        (damaged_architecture, ["architectures", "LlamaForCausalLM"]),
        (damaged_config, ["config.json"]),
    ],
    ids=lambda value: value.__name__.removeprefix("damaged_") if callable(value) else "",
)
def test_damaged_checkpoints_are_refused_with_a_sentence(
    checkpoint: Path, tmp_path: Path, damage: object, words: list[str]
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint, directory)
    damage(directory)
    with pytest.raises((errors.CheckpointError, errors.UnsupportedError)) as caught:
        xgdn.Engine(directory)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("prefill", "decode"), [("reference", "cpu"), ("cpu", "reference")])
def test_the_backend_of_a_phase_serves_every_op_of_the_model(checkpoint: Path, prefill: str, decode: str) -> None:
    engine = xgdn.Engine(checkpoint, prefill_backend=prefill, decode_backend=decode)
    engine.generate([list(range(1, 20))], max_new_tokens=2)
    assert xgdn.last_backend("gdn_decode_step") == decode
    engine.prompt_logits([1, 2, 3])
    assert {op: xgdn.last_backend(op) for op in ("chunk_gated_delta_rule", "causal_conv1d")} == {
        "chunk_gated_delta_rule": prefill,
        "causal_conv1d": prefill,
    }
    ops = ("gdn_gating", "linear", "paged_attention", "rms_norm", "rms_norm_gated", "rms_norm_linear")
    assert {op: xgdn.last_backend(op) for op in ops} == dict.fromkeys(ops, decode)


@pytest.mark.parametrize("phase", ["prefill_backend", "decode_backend"])
def test_an_unknown_backend_is_refused_before_loading(checkpoint: Path, phase: str) -> None:
    with pytest.raises(errors.UnsupportedError, match="gpu"):
        xgdn.Engine(checkpoint, **{phase: "gpu"})


@pytest.mark.parametrize("device", ["nonsense", "cuda:63", torch.device("cuda:63"), "meta:x"])
def test_an_unusable_device_is_refused(checkpoint: Path, device: torch.device | str) -> None:
    with pytest.raises(errors.DeviceError, match=f"device: expected .*{device}"):
        xgdn.Engine(checkpoint, device=device)
    with pytest.raises(errors.DeviceError, match=f"device: expected .*{device}"):
        load_decoder(str(checkpoint), state_dtype=torch.float32, device=device)


def test_a_device_is_named_or_given(checkpoint: Path) -> None:
    first, second = (xgdn.Engine(checkpoint, device=device) for device in ("cpu", torch.device("cpu")))
    torch.testing.assert_close(first.prompt_logits([1, 2, 3]), second.prompt_logits([1, 2, 3]))
    with pytest.raises(TypeError):
        xgdn.Engine(checkpoint, device=0)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="nowhere"):
        xgdn.Engine(tmp_path / "nowhere")


# ---- memory ---------------------------------------------------------------------------------------------------------

PEAK_SCRIPT = """
import sys, threading, time, torch, xgdn

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

before = resident("VmRSS")
engine = xgdn.Engine(sys.argv[1], runner=xgdn.RunnerOptions(max_batch_size=2, max_cached_tokens=256))
engine.prompt_logits([1, 2, 3])  # touches every weight
engine.generate([[1, 2, 3], [4]], max_new_tokens=2)
print(resident("VmHWM") - before, *engine.memory_bytes.values())
"""


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_peak_memory_of_loading(tmp_path: Path, family: str) -> None:
    """Weights are copied once, with their source pages dropped: at most 1.15 x weights + pools."""
    import checkpoints

    sizes = {"vocab_size": 20000, "hidden_size": 1024, "intermediate_size": 3072, "linear_num_key_heads": 8}
    sizes |= {"linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    sizes |= {"moe_intermediate_size": 1024} if family == "qwen3_next" else {}
    model = getattr(checkpoints, family)(**sizes)
    model.save_pretrained(tmp_path)
    del model
    out = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    peak, *parts = map(int, out.split())
    assert sum(parts) > 200e6
    assert peak <= 1.15 * sum(parts), f"peak {peak / 1e6:.0f} MB over {sum(parts) / 1e6:.0f} MB of weights and pools"
