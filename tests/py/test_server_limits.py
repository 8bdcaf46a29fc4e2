# SPDX-License-Identifier: Apache-2.0
"""Keys of `xgdn serve`, and what each of them may use."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from live_server import (
    CHAT,
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    http_get,
    live_stepped,
    metrics,
    post,
    wait_until,
    with_template,
)
from xgdn.cli import app as cli_app
from xgdn.server.api_error import ApiError
from xgdn.server.api_keys import Allowance, ApiKey, Client, Limits, read_api_keys


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_allowance_comes_back_evenly_and_may_be_overdrawn() -> None:
    clock = Clock()
    allowance = Allowance(60, clock)
    allowance.take(60)
    assert allowance.level() == 0
    assert allowance.seconds_until(1) == 1
    clock.now += 2.5
    assert allowance.level() == 2.5
    assert allowance.seconds_until(2) == 0
    allowance.take(30)
    assert allowance.seconds_until(1) == 28.5
    clock.now += 1000
    assert allowance.level() == 60


def refusal(client: Client) -> tuple[str, str]:
    with pytest.raises(ApiError) as info:
        client.admit()
    assert (info.value.status, info.value.code) == (429, "rate_limit_exceeded")
    return info.value.message, info.value.headers["Retry-After"]


def test_requests_beyond_the_limit_are_told_when_to_come_back() -> None:
    clock = Clock()
    client = Client("a", Limits(requests_per_minute=3), clock)
    for left in (2, 1, 0):
        client.admit()
        assert client.headers() == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": f"{20 * (3 - left)}s" if left else "1m0s",
        }
    assert refusal(client) == ("Rate limit reached: 3 requests per minute. Try again in 20s.", "20")
    clock.now += 19.5
    assert refusal(client) == ("Rate limit reached: 3 requests per minute. Try again in 500ms.", "1")
    clock.now += 0.5
    client.admit()


def test_tokens_are_charged_when_they_are_known() -> None:
    clock = Clock()
    client = Client("a", Limits(tokens_per_minute=600), clock)
    client.admit()
    client.charge(650)
    assert client.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert client.headers()["x-ratelimit-reset-tokens"] == "1m5s"
    assert refusal(client) == ("Rate limit reached: 600 tokens per minute. Try again in 5.1s.", "6")
    clock.now += 5.125
    client.admit()


def test_each_key_has_its_own_limits() -> None:
    keys = [ApiKey(name="few", key="one", requests_per_minute=2, tokens_per_minute=60), ApiKey(name="all", key="two")]
    with live_stepped(api_keys=keys) as (stepped, url):
        stepped.open()
        body = GOOD | IGNORE_EOS | {"prompt": [1] * 40, "max_tokens": 5}
        first = post(url, body, key="one")
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        second = post(url, body | {"stream": True}, key="one")
        assert (second.status_code, second.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        left = int(second.headers["x-ratelimit-remaining-tokens"])
        assert 60 - 45 <= left < 60  # some have come back meanwhile
        third = post(url, body, key="one")
        assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(third.headers["Retry-After"]) <= 30
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        assert http_get(f"{url}/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200
        other = post(url, body, key="two")
        assert other.status_code == 200
        assert not [name for name in other.headers if name.startswith("x-ratelimit")]
        assert post(url, body, key="three").status_code == 401


@pytest.mark.parametrize("is_stream", [False, True])
def test_concurrent_sequences_are_limited_until_they_end(is_stream: bool) -> None:
    keys = [ApiKey(name="few", key="one", concurrent_sequences=3), ApiKey(name="all", key="two")]
    body = GOOD | IGNORE_EOS | {"max_tokens": 4, "stream": is_stream}
    with ThreadPoolExecutor(1) as clients, live_stepped(api_keys=keys) as (stepped, url):
        running = clients.submit(post, url, body | {"n": 2}, key="one")
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == 2)
        refused = post(url, body | {"n": 2}, key="one")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "2 of 3 concurrent" in refused.json()["error"]["message"]
        never = post(url, body | {"n": 4}, key="one")
        assert (never.status_code, never.json()["error"]["code"]) == (400, "invalid_value")
        stepped.open()
        assert running.result().status_code == 200
        assert post(url, body | {"n": 3}, key="one").status_code == 200
        assert post(url, body | {"n": 4}, key="two").status_code == 200


def test_the_size_of_a_request_is_limited(tmp_path: Path) -> None:
    keys = [ApiKey(name="few", key="one", max_tokens=5, max_body_bytes=300), ApiKey(name="all", key="two")]
    with live_stepped(api_keys=keys, model_dir=with_template(tmp_path)) as (stepped, url):
        stepped.open()
        refused = post(url, GOOD | {"max_tokens": 6}, key="one")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        assert "at most 5 with this key, got 6" in refused.json()["error"]["message"]
        for body, path in ((GOOD, "/v1/completions"), (CHAT, "/v1/chat/completions")):
            answer = post(url, body | IGNORE_EOS, path, key="one")  # whose default is higher
            assert answer.json()["usage"]["completion_tokens"] == 5
        assert post(url, GOOD | {"prompt": "a" * 300}, key="one").status_code == 413
        assert post(url, GOOD | {"prompt": "a" * 300, "max_tokens": 6}, key="two").status_code == 200


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"name": "a", "key": "k1", "requests_per_minute": 5}, {"name": "b", "key": "k2"}]))
    first, second = read_api_keys(path)
    assert (first.name, first.key, first.requests_per_minute, second.requests_per_minute) == ("a", "k1", 5, None)
    assert "k1" not in repr(first)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "no JSON"),
        ("{}", "the file"),
        ([{"name": "a"}], "[0].key: Field required"),
        ([{"name": "a", "key": ""}], "[0].key"),
        ([{"name": "a", "key": "secret\n"}], "[0].key"),
        ([{"name": "a", "key": "secret", "rpm": 1}], "[0].rpm: Extra"),
        ([{"name": "a", "key": "secret", "max_tokens": 0}], "[0].max_tokens"),
        ([{"name": "a", "key": "secret", "max_tokens": True}], "[0].max_tokens"),
        ([{"name": "a", "key": "secret"}, {"name": "b", "key": "secret"}], "the same for 'a' and 'b'"),
        ([{"name": "a", "key": "secret"}, {"name": "a", "key": "other"}], "'a' twice"),
    ],
    ids=str,
)
def test_a_wrong_file_of_keys_is_said_without_the_keys(document: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), "--api-keys-file", str(path), "--port", "0"])
    assert result.exit_code == 1
    assert words in result.stderr
    assert "secret" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_key_option_is_said_without_the_key() -> None:
    for keys in ([""], ["schlüssel"], ["unique", "unique"]):
        options = [argument for key in keys for argument in ("--api-key", key)]
        result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), *options])
        assert result.exit_code == 1
        assert "expected" in result.stderr
        assert keys[0] == "" or keys[0] not in result.stderr
