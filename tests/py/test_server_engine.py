# SPDX-License-Identifier: Apache-2.0
"""What `xgdn serve` asks of its engine: branches, cancels, full queues, failing steps; and what it counts."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from live_server import (
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    KEY,
    PROMPT,
    SLOTS,
    TOKENIZER,
    continuation,
    engine,
    http_get,
    http_post,
    is_at_rest,
    live,
    live_stepped,
    metrics,
    post,
    single,
    stats,
    tokens_of,
    wait_until,
    want,
)

SERVING = Path(__file__).parents[2] / "docs/serving.md"
SAMPLED = GOOD | IGNORE_EOS | {"temperature": 0.9, "seed": 7}


def test_the_choices_of_a_prompt_share_its_computation() -> None:
    with live_stepped() as (stepped, url):
        stepped.open()
        answer = post(url, SAMPLED | {"prompt": list(range(1, 201)), "n": 4, "max_tokens": 9}).json()
        # 200 tokens in pieces of 64; at the fork the first branch waits for the others.
        assert stepped.num_steps == 4 + 1 + 8
        wait_until(lambda: is_at_rest(url))
        now = metrics(url)
    assert answer["usage"] == {
        "prompt_tokens": 200,
        "completion_tokens": 36,
        "total_tokens": 236,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert now["xgdn_steps_total"] == 13
    assert now["xgdn_prompt_tokens_total"] == 200
    assert now["xgdn_generated_tokens_total"] == 36
    assert now["xgdn_finished_total length"] == 4
    assert now["xgdn_time_to_first_token_seconds_count"] == 4
    assert now["xgdn_inter_token_seconds_count"] == 36 - 4


def test_the_choices_of_a_prompt_begin_together() -> None:
    with ThreadPoolExecutor(1) as clients, live_stepped() as (stepped, url):
        answer = clients.submit(post, url, SAMPLED | {"prompt": list(range(1, 101)), "n": 4, "max_tokens": 2})
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == 4)
        stepped.allow(1)  # a piece of the prompt
        wait_until(lambda: metrics(url)["xgdn_requests_running"] == 4)
        assert metrics(url)["xgdn_slots_used"] == 4
        stepped.open()
        assert answer.result().status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_ends_its_own_choice(is_stream: bool) -> None:
    texts = [want(PROMPT, 40, temperature=0.9, seed=seed) for seed in (7, 8, 9)]
    # A text that the second choice comes to and the others do not.
    stop = next(
        s for i in range(5, 30) if not any((s := texts[1][i : i + 6]) in other for other in (texts[0], texts[2]))
    )
    body = SAMPLED | {"prompt": PROMPT, "n": 3, "max_tokens": 40, "stop": stop, "stream": is_stream}
    with live_stepped() as (stepped, url):
        stepped.open()
        answer = post(url, body)
        if is_stream:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            got = [choice for event in events for choice in event["choices"]]
        else:
            got = answer.json()["choices"]
        wait_until(lambda: is_at_rest(url))
        assert metrics(url)["xgdn_finished_total stop"] == 1
        assert metrics(url)["xgdn_finished_total length"] == 2
    ended = ["".join(c["text"] for c in got if c["index"] == index) for index in range(3)]
    assert ended == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    assert [c["finish_reason"] for i in range(3) for c in got if c["index"] == i and c["finish_reason"]] == [
        "length", "stop", "length"
    ]  # fmt: skip
    assert stepped.cancelled == {1}


def test_tokens_up_to_a_stop_string_are_counted() -> None:
    """Those that it hides too, and none that the step under way computes beyond it."""
    ids = tokens_of(PROMPT)
    (result,) = single().generate([ids], max_new_tokens=48, ignore_eos=True)
    stop = want(PROMPT, 48)[20:29]
    count = next(n for n in range(49) if stop in want(PROMPT, 48) and stop in TOKENIZER.decode(result.tokens[:n]))
    with live_stepped() as (stepped, url):
        stepped.open()
        answer = post(
            url, GOOD | IGNORE_EOS | {"prompt": PROMPT, "temperature": 0, "max_tokens": 48, "stop": stop}
        ).json()
        wait_until(lambda: is_at_rest(url))
        assert answer["usage"]["completion_tokens"] == count < 48
        assert metrics(url)["xgdn_generated_tokens_total"] == count
        assert metrics(url)["xgdn_inter_token_seconds_count"] == count - 1


def test_a_request_whose_logits_are_not_finite_says_so(tmp_path: Path) -> None:
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors")
    with live(engine(tmp_path), tmp_path) as url:
        for body in (GOOD, GOOD | {"max_tokens": 0, "prompt": list(range(1, 70))}):
            answer = post(url, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "numerics_error")
            assert "[step] request" in answer.json()["error"]["message"]
        stream = post(url, GOOD | {"stream": True}).text
        assert '"code": "numerics_error"' in stream
        wait_until(lambda: is_at_rest(url))
        assert metrics(url)["xgdn_errors_total numerics_error"] == 3
        assert http_get(f"{url}/health").status_code == 200


def test_preemptions_are_counted() -> None:
    counts = [150 + 10 * i for i in range(SLOTS)]
    ids = tokens_of("a")
    (longest,) = single().generate([ids], max_new_tokens=counts[-1], ignore_eos=True)
    with ThreadPoolExecutor(SLOTS) as clients, live_stepped() as (stepped, url):
        bodies = [GOOD | IGNORE_EOS | {"temperature": 0, "max_tokens": count} for count in counts]
        answers = [clients.submit(post, url, body) for body in bodies]
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == SLOTS)
        assert metrics(url)["xgdn_preemptions_total"] == 0
        stepped.open()
        for count, answer in zip(counts, answers, strict=True):
            assert answer.result().json()["choices"][0]["text"] == continuation(ids, longest.tokens[:count])
        wait_until(lambda: is_at_rest(url))
        assert metrics(url)["xgdn_preemptions_total"] == stepped.num_preemptions > 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_its_slots_with_the_next_step(is_stream: bool) -> None:
    body = json.dumps(GOOD | IGNORE_EOS | {"max_tokens": 100, "n": 2, "stream": is_stream}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {len(body)}"]
    with live_stepped() as (stepped, url):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            stepped.allow(1)
            wait_until(lambda: metrics(url)["xgdn_slots_used"] == 2)
        wait_until(lambda: metrics(url).get("xgdn_finished_total cancelled") == 2)
        stepped.allow(1)  # not enough for a request that goes on
        wait_until(lambda: is_at_rest(url))
        assert stepped.num_steps == 2


READ_A_STREAM = """
import sys, httpx
url, body, key = sys.argv[1:]
with httpx.stream("POST", url, content=body, headers={"Authorization": key}, timeout=60) as answer:
    for line in answer.iter_lines():
        print(line, flush=True)
"""


def test_a_killed_client_frees_its_slot_and_the_others_go_on() -> None:
    with ThreadPoolExecutor(1) as clients, live_stepped() as (stepped, url):
        body = GOOD | IGNORE_EOS | {"temperature": 0, "max_tokens": 200, "stream": True}
        args = [f"{url}/v1/completions", json.dumps(body), f"Bearer {KEY}"]
        with subprocess.Popen([sys.executable, "-c", READ_A_STREAM, *args], stdout=subprocess.PIPE) as client:
            other = clients.submit(
                post, url, GOOD | IGNORE_EOS | {"prompt": PROMPT, "temperature": 0, "max_tokens": 60}
            )
            wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == 2)
            stepped.allow(20)
            assert client.stdout is not None
            assert client.stdout.readline().startswith(b"data: ")
            client.kill()
        wait_until(lambda: metrics(url).get("xgdn_finished_total cancelled") == 1)
        stepped.open()
        assert other.result().json()["choices"][0]["text"] == want(PROMPT, 60)
        wait_until(lambda: is_at_rest(url))
        assert stepped.num_steps < 100, "the killed one did not run to its end"
        assert post(url, GOOD).status_code == 200


def test_a_flood_is_refused_beyond_the_queue_and_the_accepted_ones_finish() -> None:
    room, num_clients = SLOTS + 2, 60
    with ThreadPoolExecutor(num_clients) as clients, live_stepped(max_queue=2) as (stepped, url):
        body = GOOD | IGNORE_EOS | {"temperature": 0, "max_tokens": 5}
        answers = [clients.submit(post, url, body) for _ in range(num_clients)]
        wait_until(lambda: metrics(url).get("xgdn_errors_total queue_full") == num_clients - room)
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == room)
        stepped.open()
        codes = sorted(answer.result().status_code for answer in answers)
        assert codes == [200] * room + [429] * (num_clients - room)
        for answer in answers:
            if answer.result().status_code == 200:
                assert answer.result().json()["choices"][0]["text"] == want("a", 5)
            else:
                assert answer.result().json()["error"]["code"] == "queue_full"
                assert answer.result().headers["Retry-After"] == "1"
        wait_until(lambda: is_at_rest(url))
        assert metrics(url)["xgdn_finished_total length"] == room
        assert post(url, body).json()["choices"][0]["text"] == want("a", 5)


def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    with live_stepped(max_body_bytes=1000) as (stepped, url):
        stepped.open()
        answer = http_post(
            f"{url}/v1/completions",
            content=(b" " * 100 for _ in range(100)),
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert post(url, GOOD).status_code == 200


@pytest.mark.parametrize("failure", [RuntimeError("the step broke"), SystemExit("the step broke")], ids=repr)
def test_a_failing_step_ends_its_requests_alone(failure: BaseException) -> None:
    with ThreadPoolExecutor(SLOTS) as clients, live_stepped(max_queue=2) as (stepped, url):
        stepped.failure = failure
        answers = [clients.submit(post, url, GOOD | {"max_tokens": 2}) for _ in range(SLOTS)]
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == SLOTS)
        stepped.failures = 1
        stepped.open()
        for answer in answers:
            assert answer.result().status_code == 500
            assert "the step broke" in answer.result().json()["error"]["message"]
        assert post(url, GOOD).status_code == 200
        wait_until(lambda: is_at_rest(url))
        assert metrics(url)["xgdn_errors_total engine_error"] == SLOTS

        stepped.close()
        stream = clients.submit(post, url, GOOD | {"stream": True})
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == 1)
        stepped.failures = 1
        stepped.open()
        events = stream.result().text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert events[-2:] == ["data: [DONE]", ""]
        assert metrics(url)["xgdn_errors_total engine_error"] == SLOTS + 1
        assert post(url, GOOD).status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stopped_device_is_told_everywhere(is_stream: bool) -> None:
    with ThreadPoolExecutor(1) as clients, live_stepped() as (stepped, url):
        running = clients.submit(post, url, GOOD | IGNORE_EOS | {"max_tokens": 50, "stream": is_stream})
        stepped.allow(2)
        wait_until(lambda: metrics(url)["xgdn_generated_tokens_total"] == 2)
        assert http_get(f"{url}/health").status_code == 200
        assert metrics(url)["xgdn_healthy"] == 1
        assert stats(url)["stopped"] == ""
        stepped.device_error = "npu:0 broke"
        stepped.open()
        answer = running.result()
        error = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: ")) if is_stream else answer.json()
        assert (answer.status_code, error["error"]["code"]) == (200 if is_stream else 500, "engine_error")
        assert "broke" in error["error"]["message"]

        health = http_get(f"{url}/health", headers={"Authorization": f"Bearer {KEY}"})
        assert (health.status_code, health.json()["status"]) == (503, "stopped")
        assert "broke" in health.json()["reason"]
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            outside = http_get(f"{url}/health", headers=headers)
            assert (outside.status_code, outside.json()) == (503, {"status": "stopped"})
        ready = http_get(f"{url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "engine_stopped"})
        assert health.json()["reason"] in stats(url)["stopped"]
        refused = post(url, GOOD | {"stream": is_stream})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
        assert refused.json()["error"]["type"] == "server_error"
        assert health.json()["reason"] in refused.json()["error"]["message"]
        now = metrics(url)
        assert (now["xgdn_healthy"], now["xgdn_requests_running"], now["xgdn_requests_waiting"]) == (0, 0, 0)
        assert now["xgdn_finished_total error"] == 1
        assert (now["xgdn_errors_total engine_error"], now["xgdn_errors_total engine_stopped"]) == (1, 1)


def test_the_documentation_names_every_metric() -> None:
    with live_stepped() as (stepped, url):
        stepped.open()
        post(url, GOOD | {"max_tokens": 1})
        post(url, {})
        page = http_get(f"{url}/metrics").text
    kinds = dict(re.findall(r"^# TYPE (xgdn_\w+) (\w+)$", page, re.M))
    labels = dict(re.findall(r"^(xgdn_\w+)\{(\w+)=\"", page, re.M))
    documented = {}
    for names, kind in re.findall(r"^\| (`xgdn_.*) \| (\w+) \|", SERVING.read_text(), re.M):
        for name, label in re.findall(r"`(xgdn_\w+)(?:\{(\w+)\})?`", names):
            documented[name] = kind
            assert labels.get(name, "") == label
    assert {name: kind for name, kind in kinds.items() if not name.endswith("_created")} == documented
