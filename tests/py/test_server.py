# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve`: OpenAI's own client and plain HTTP against a live server."""

from __future__ import annotations

import json
import random
import re
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from live_server import (
    BODY_BYTES,
    CHAT,
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    KEY,
    PROMPT,
    SLOTS,
    TOKENIZER,
    TOKENS,
    engine,
    http_client,
    http_get,
    http_head,
    http_options,
    http_post,
    is_at_rest,
    live,
    metrics,
    openai_client,
    post,
    single,
    stats,
    tokens_of,
    wait_until,
    want,
    with_template,
)
from xgdn.detokenize import Detokenizer
from xgdn.server.api_error import ApiError
from xgdn.server.chat_template import ChatTemplate
from xgdn.server.schemas import Message
from xgdn.server.stop_strings import StopStrings


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def greedy(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    options = {"max_tokens": 16, "temperature": 0} | options
    return client.completions.create(model="tiny", prompt=prompt, extra_body=IGNORE_EOS, **options)


def test_a_completion_is_the_engine_s_text(client: openai.OpenAI) -> None:
    answer = greedy(client, PROMPT)
    ids = TOKENIZER.encode(PROMPT).ids
    assert answer.choices[0].text == want(PROMPT)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 16)
    assert greedy(client, ids).choices[0].text == answer.choices[0].text


def test_a_list_of_prompts_with_n_has_a_choice_for_each(client: openai.OpenAI) -> None:
    prompts = ["import os", "class A:", "é 日本"]
    answer = greedy(client, prompts, n=2, temperature=0.9, top_p=0.95, seed=7)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [
        want(prompt, temperature=0.9, top_p=0.95, seed=seed) for prompt in prompts for seed in (7, 8)
    ]
    assert answer.choices[0].text != answer.choices[1].text
    ids = [TOKENIZER.encode(prompt).ids for prompt in prompts]
    assert [c.text for c in greedy(client, ids).choices] == [want(prompt) for prompt in prompts]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    options = {"n": 2, "temperature": 0.8, "seed": 3, "max_tokens": 24}
    chunks = list(greedy(client, PROMPT, stream=True, stream_options={"include_usage": True}, **options))
    answer = greedy(client, PROMPT, **options)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    for choice in answer.choices:
        pieces = [part for chunk in chunks[:-1] for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in pieces) == choice.text
        assert [part.finish_reason for part in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert len(pieces) > 5


def test_chat_renders_the_model_s_template(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    text = want("# system: Be brief.\n# user: Hello\n# assistant:")
    options: Any = {"model": "tiny", "messages": messages, "temperature": 0, "extra_body": IGNORE_EOS}
    answer = client.chat.completions.create(max_completion_tokens=16, **options)
    assert answer.choices[0].message.content == text
    chunks = list(client.chat.completions.create(max_tokens=16, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_wherever_tokens_end(client: openai.OpenAI, url: str) -> None:
    text = want(PROMPT, 48)
    for begin, length in ((5, 1), (9, 4), (20, 9)):
        stop = text[begin : begin + length]
        cut = text[: text.index(stop)]
        choice = greedy(client, PROMPT, max_tokens=48, stop=[stop, "never to be seen"]).choices[0]
        assert (choice.text, choice.finish_reason) == (cut, "stop")
        pieces = [chunk.choices[0] for chunk in greedy(client, PROMPT, max_tokens=48, stop=stop, stream=True)]
        assert "".join(piece.text for piece in pieces) == cut
    wait_until(lambda: is_at_rest(url))


def test_a_stop_token_ends_without_its_text(client: openai.OpenAI) -> None:
    (result,) = single().generate([TOKENIZER.encode(PROMPT).ids], max_new_tokens=8)
    stop = result.tokens[3]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, extra_body={"stop_token_ids": [stop]}
    )
    count = result.tokens.index(stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == (want(PROMPT, count) if count else "")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_do_not_depend_on_the_pieces(size: int) -> None:
    def cut(text: str, *stops: str) -> tuple[str, bool]:
        strings = StopStrings(stops)
        given = ""
        for begin in range(0, len(text), size):
            given += strings.push(text[begin : begin + size])
            if strings.is_found:
                return given, True
        return given + strings.finish(), False

    assert cut("one two three", "two") == ("one ", True)
    assert cut("aab aaab", "aaab") == ("aab ", True)
    assert cut("abc", "abc", "b") == ("a", True)
    assert cut("abc", "bc", "abc") == ("", True)
    assert cut("no stop st", "stops", "stop at") == ("no stop st", False)


def test_models_and_health(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == TOKENS
    assert http_get(f"{url}/health").json() == {"status": "ok"}
    assert stats(url)["slots_total"] == SLOTS


def test_the_page_is_complete_in_itself(url: str) -> None:
    page = http_get(url)
    files = {"": page}
    kinds = {"css": "text/css", "js": "javascript", "svg": "image/svg+xml"}
    waiting = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    while waiting:
        path = waiting.pop()
        files[path] = http_get(f"{url}/{path}")
        assert kinds[path.rpartition(".")[2]] in files[path].headers["content-type"]
        imports = re.findall(r'from "\./([^"]*)"', files[path].text)
        waiting += [f"page/{name}" for name in imports if f"page/{name}" not in files]
    assert {"page/app.js", "page/chart.js", "page/style.css"} <= files.keys()
    assert page.headers["content-type"].startswith("text/html")
    for path, answer in files.items():
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text), path
        known = {"If-None-Match": answer.headers["etag"]}
        assert http_get(f"{url}/{path}", headers=known).status_code == 304
        assert http_get(f"{url}/{path}", headers={"If-None-Match": '"other"'}).content == answer.content


@pytest.mark.parametrize("path", ["page/none.js", "page/", "page/..%2f__init__.py", "page/%2e%2e/app.py", "page/%00"])
def test_the_page_has_no_other_files(url: str, path: str) -> None:
    answer = http_get(f"{url}/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "call_1", "content": "a"}


@pytest.mark.parametrize(
    ("body", "status", "code", "word"),
    [
        (b"{", 400, "invalid_json", "JSON"),
        (b"", 400, "invalid_json", "JSON"),
        (b"[]", 400, "invalid_json", "object"),
        (b"\xff\xfe", 400, "invalid_json", "JSON"),
        (b"[" * 10_000, 400, "invalid_json", "JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "invalid_json", "JSON"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 1' + b"0" * 4000 + b"}", 400, "invalid_value", "max_tokens"),
        ({"model": "tiny"}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": "a"}, 400, "missing_required_parameter", "model"),
        (GOOD | {"model": "other"}, 404, "model_not_found", "other"),
        (GOOD | {"colour": 1}, 400, "unknown_parameter", "colour"),
        (GOOD | {"prompt": {"a": 1}}, 400, "invalid_type", "prompt"),
        (GOOD | {"prompt": [1, "a"]}, 400, "invalid_type", "prompt"),
        (GOOD | {"prompt": [True]}, 400, "invalid_type", "prompt"),
        (GOOD | {"prompt": [-1]}, 400, "invalid_type", "prompt"),
        (GOOD | {"prompt": [2**31]}, 400, "invalid_type", "prompt"),
        (GOOD | {"prompt": [2**31 - 1]}, 400, "invalid_value", "token ids below"),
        (GOOD | {"prompt": ""}, 400, "empty_prompt", "at least one token"),
        (GOOD | {"prompt": [[1], []]}, 400, "empty_prompt", "at least one token"),
        (GOOD | {"prompt": []}, 400, "empty_prompt", "at least one"),
        (GOOD | {"prompt": ["a"] * 100}, 400, "invalid_value", "64"),
        (GOOD | {"prompt": [1] * 1000, "n": 128}, 400, "invalid_value", "64"),
        (GOOD | {"prompt": ["a"] * 10, "n": 10}, 400, "invalid_value", "64"),
        (GOOD | {"prompt": [1] * (TOKENS + 1)}, 400, "context_length_exceeded", str(TOKENS)),
        (GOOD | {"max_tokens": TOKENS}, 400, "context_length_exceeded", str(TOKENS)),
        (GOOD | {"prompt": "a" * BODY_BYTES}, 413, "body_too_large", str(BODY_BYTES)),
        (GOOD | {"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
        (GOOD | {"max_tokens": 2**40}, 400, "invalid_value", "max_tokens"),
        (GOOD | {"max_tokens": "3"}, 400, "invalid_type", "max_tokens"),
        (GOOD | {"max_tokens": 2.5}, 400, "invalid_type", "max_tokens"),
        (GOOD | {"temperature": -1}, 400, "invalid_value", "temperature"),
        (GOOD | {"temperature": float("nan")}, 400, "invalid_value", "temperature"),
        (GOOD | {"top_p": 0}, 400, "invalid_value", "top_p"),
        (GOOD | {"seed": 2**64}, 400, "invalid_value", "seed"),
        (GOOD | {"n": 0}, 400, "invalid_value", "n"),
        (GOOD | {"stream": 1}, 400, "invalid_type", "stream"),
        (GOOD | {"stop": ["a"] * 17}, 400, "invalid_value", "stop"),
        (GOOD | {"stop": ""}, 400, "invalid_value", "stop"),
        (GOOD | {"stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids"),
        (GOOD | {"n": SLOTS + 1}, 400, "invalid_value", f"at most {SLOTS} branches"),
        (GOOD | {"prompt": ["a", "b"], "n": SLOTS + 1}, 400, "invalid_value", f"at most {SLOTS} branches"),
        (GOOD | {"n": True}, 400, "invalid_type", "n"),
        (GOOD | {"logprobs": True}, 400, "invalid_type", "logprobs"),
        (GOOD | {"logprobs": 6}, 400, "invalid_value", "logprobs"),
        (GOOD | {"logprobs": -1}, 400, "invalid_value", "logprobs"),
        (GOOD | {"top_logprobs": 1}, 400, "unknown_parameter", "top_logprobs"),
        (CHAT | {"logprobs": 1}, 400, "invalid_type", "logprobs"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        (CHAT | {"top_logprobs": 2}, 400, "invalid_value", "'logprobs' to be true"),
        (CHAT | {"messages": "a"}, 400, "invalid_type", "messages"),
        (CHAT | {"messages": [{"role": "user", "content": 1}]}, 400, "invalid_type", "messages"),
        (GOOD | {"presence_penalty": 2.5}, 400, "invalid_value", "presence_penalty"),
        (CHAT | {"messages": []}, 400, "invalid_value", "messages"),
        (CHAT | {"messages": [{"role": "king", "content": "a"}]}, 400, "invalid_value", "messages"),
        (CHAT | {"messages": [CALL, RESULT]}, 400, "invalid_value", "no tools here"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, (dict, bytes)) else "",
)
def test_a_bad_request_has_a_reason_and_the_server_goes_on(
    url: str, body: Any, status: int, code: str, word: str
) -> None:
    path = "/v1/chat/completions" if isinstance(body, dict) and "messages" in body else "/v1/completions"
    before = metrics(url).get(f"xgdn_errors_total {code}", 0)
    answer = post(url, body, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert word in error["message"]
    assert metrics(url)[f"xgdn_errors_total {code}"] == before + 1
    assert post(url, GOOD | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("limit", ["the model's positions", "the cache"])
def test_what_exceeds_the_context_is_refused_with_both_numbers(limit: str, tmp_path: Path) -> None:
    context, cached = (100, TOKENS) if limit == "the model's positions" else (128, 128)
    with_template(tmp_path)
    if limit == "the model's positions":
        config = json.loads((CHECKPOINT / "config.json").read_text())
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    with (
        live(engine(tmp_path, cached), tmp_path) as url,
        openai_client(url) as client,
    ):

        def refused(ask: Callable[..., Any], param: str, total: int, **options: Any) -> None:
            with pytest.raises(openai.BadRequestError) as info:
                ask(model="tiny", **options)
            assert (info.value.code, info.value.param) == ("context_length_exceeded", param)
            assert f"is {context} tokens, got {total}:" in info.value.message

        messages: Any = [{"role": "user", "content": "a"}]
        size = len(tokens_of("# user: a\n# assistant:"))
        complete, chat = client.completions.create, client.chat.completions.create
        refused(complete, "prompt", context + 1, prompt=[1] * 10, max_tokens=context - 9)
        refused(complete, "prompt", context + 1, prompt=[1] * context)
        refused(complete, "prompt", context + 1, prompt=[[1], [1] * context])
        refused(chat, "messages", context + 1, messages=messages, max_tokens=context - size + 1)
        refused(chat, "messages", context + 1, messages=messages, max_completion_tokens=context - size + 1, stream=True)
        # What fits exactly; and without a limit of its own a request gets what is left.
        assert greedy(client, [1] * 10, max_tokens=context - 10).usage.total_tokens == context
        rest = client.completions.create(model="tiny", prompt=[1] * (context - 3), extra_body=IGNORE_EOS)
        assert rest.usage.completion_tokens == 3
        rest = chat(model="tiny", messages=messages, extra_body=IGNORE_EOS)
        assert rest.usage.completion_tokens == context - size


TURN: dict[str, Any] = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (GOOD | {"max_tokens": "3"}, "invalid_type", "max_tokens"),
        (GOOD | {"stop": ["a", ""]}, "invalid_value", "stop[1]"),
        (GOOD | {"stop": ["a", 1]}, "invalid_type", "stop[1]"),
        (GOOD | {"prompt": ["a"] * 100}, "invalid_value", "prompt"),
        (GOOD | {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (GOOD | {"stream": True, "stream_options": {"colour": 1}}, "unknown_parameter", "stream_options.colour"),
        (GOOD | {"top_k": -2}, "invalid_value", "top_k"),
        (CHAT | {"messages": [TURN, {"role": "user"}]}, "missing_required_parameter", "messages[1].content"),
        (CHAT | {"messages": [TURN, {"role": "king", "content": "a"}]}, "invalid_value", "messages[1].role"),
        (CHAT | {"messages": [TURN, TURN | {"content": None}]}, "invalid_type", "messages[1].content"),
        (CHAT | {"messages": [TURN | {"content": {"text": "a"}}]}, "invalid_type", "messages[0].content"),
        (
            CHAT | {"messages": [TURN | {"content": [{"type": "image_url"}]}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (CHAT | {"messages": [TURN | {"colour": 1}]}, "unknown_parameter", "messages[0].colour"),
        (CHAT | {"messages": [TURN, TURN | {"refusal": "no"}]}, "unsupported_parameter", "messages[1].refusal"),
        (CHAT | {"functions": [{}]}, "unsupported_parameter", "functions"),
        (CHAT | {"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        (CHAT | {"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        (CHAT | {"chat_template_kwargs": {"tools": 1}}, "unsupported_parameter", "chat_template_kwargs.tools"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_the_place_of_what_is_wrong_is_told(url: str, body: Any, code: str, param: str) -> None:
    answer = post(url, body, "/v1/chat/completions" if "messages" in body else "/v1/completions")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert param in error["message"]


def test_an_answer_s_message_may_be_sent_back(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": IGNORE_EOS}
    first = client.chat.completions.create(messages=[TURN], **options).choices[0].message
    text = want(f"# user: a\n# assistant: {first.content}\n# user: a\n# assistant:", 8)
    for message in (first, first.model_dump(), first.model_dump() | {"annotations": [], "tool_calls": []}):
        answer = client.chat.completions.create(messages=[TURN, message, TURN], **options)
        assert answer.choices[0].message.content == text


def test_a_developer_s_message_is_the_system_s(tmp_path: Path) -> None:
    messages = [Message(role="developer", content="Be brief."), Message(role="user", content="a")]
    text = ChatTemplate(with_template(tmp_path)).render(messages)
    assert text == "# system: Be brief.\n# user: a\n# assistant:"


def test_the_template_gets_further_variables(client: openai.OpenAI) -> None:
    extra = IGNORE_EOS | {"chat_template_kwargs": {"thought": " Well"}}
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 16, "messages": [TURN]}
    answer = client.chat.completions.create(extra_body=extra, **options)
    assert answer.choices[0].message.content == want("# user: a\n# assistant: Well")


def test_neutral_values_and_nulls_are_accepted(url: str) -> None:
    nulls = dict.fromkeys(["n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "suffix"])
    neutral = {"echo": False, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me"}
    assert post(url, GOOD | nulls | neutral).status_code == 200  # as long as it gets
    few = {"max_tokens": 4}
    tier = {"service_tier": "auto", "safety_identifier": "a", "prompt_cache_key": "a", "top_k": -1}
    stream = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert post(url, GOOD | few | tier | stream).status_code == 200
    neutral = {"parallel_tool_calls": True, "modalities": ["text"], "verbosity": "medium", "functions": []}
    assert post(url, CHAT | few | tier | neutral, "/v1/chat/completions").status_code == 200


def test_keys_paths_and_methods(url: str) -> None:
    for key in ("wrong", "the", "ключ"):
        answer = http_post(f"{url}/v1/completions", headers={"Authorization": f"Bearer {key}".encode()}, json=GOOD)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert http_get(f"{url}/v1/models").status_code == 401
    assert post(url, GOOD, "/v1/nothing").json()["error"]["code"] == "not_found"
    assert http_get(f"{url}/v1/completions").json()["error"]["code"] == "method_not_allowed"


def test_what_can_be_read_can_be_probed(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/", "/health", "/metrics", "/stats", "/v1/models", "/v1/models/tiny"):
        answer = http_head(url + path, headers=headers)
        assert (answer.status_code, answer.content) == (200, b"")
    assert http_head(f"{url}/v1/models").status_code == 401
    assert http_head(f"{url}/v1/completions", headers=headers).headers["Allow"] == "POST"


def test_headers_for_browsers_and_proxies(url: str) -> None:
    assert http_get(f"{url}/v1/models").headers["WWW-Authenticate"] == "Bearer"
    assert post(url, GOOD | {"stream": True}).headers["X-Accel-Buffering"] == "no"
    assert http_get(f"{url}/health", headers={"Origin": "http://a"}).headers.get("Access-Control-Allow-Origin") is None


def test_pages_of_allowed_origins_may_call() -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with live(engine(), allowed_origins=["http://a"]) as url:
        preflight = http_options(f"{url}/v1/completions", headers=ask | {"Origin": "http://a"})
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] == "http://a"
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
        for headers, status in (({"Authorization": f"Bearer {KEY}"}, 200), ({}, 401)):
            answer = http_post(f"{url}/v1/completions", json=GOOD, headers=headers | {"Origin": "http://a"})
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == "http://a"
        other = http_options(f"{url}/v1/completions", headers=ask | {"Origin": "http://b"})
        assert other.status_code == 400
        assert "Access-Control-Allow-Origin" not in other.headers


def test_a_model_without_template_refuses_chat(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="no chat template"):
        ChatTemplate(CHECKPOINT).render([])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(ApiError, match="unsafe"):
        ChatTemplate(tmp_path).render([])


def test_64_clients_get_what_each_would_get_alone(url: str) -> None:
    chance = random.Random(0)
    text = TOKENIZER.encode((CHECKPOINT / "held_out.txt").read_text()).ids
    begins = [chance.randrange(len(text) - 40) for _ in range(100)]
    asked = [(text[begin : begin + chance.randint(1, 40)], chance.randint(1, 12)) for begin in begins]
    asked = [chance.choice(asked) for _ in range(400)]  # each several times, beside others
    prompts, counts = zip(*asked, strict=True)
    wait_until(lambda: is_at_rest(url))
    before = metrics(url)

    with http_client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60, limits=httpx.Limits()) as http:

        def ask(index: int) -> dict[str, Any]:
            body = GOOD | IGNORE_EOS | {"prompt": prompts[index], "max_tokens": counts[index], "temperature": 0}
            document: dict[str, Any] = http.post(f"{url}/v1/completions", json=body).raise_for_status().json()
            return document

        with ThreadPoolExecutor(64) as clients:
            answers = list(clients.map(ask, range(200)))
            memory = resident_bytes()
            answers += clients.map(ask, range(200, 400))

    for prompt, count, answer in zip(prompts, counts, answers, strict=True):
        assert answer["choices"][0]["text"] == want(prompt, count)
    wait_until(lambda: is_at_rest(url))
    assert resident_bytes() - memory < 16 * 2**20
    now = metrics(url)
    gained = {name: value - before.get(name, 0) for name, value in now.items()}
    assert gained["xgdn_finished_total length"] == len(prompts)
    assert gained["xgdn_prompt_tokens_total"] == sum(a["usage"]["prompt_tokens"] for a in answers)
    assert gained["xgdn_generated_tokens_total"] == sum(a["usage"]["completion_tokens"] for a in answers) == sum(counts)
    assert gained["xgdn_time_to_first_token_seconds_count"] == len(prompts)
    assert gained["xgdn_inter_token_seconds_count"] == sum(counts) - len(prompts)


def test_an_event_that_fails_ends_its_sequence_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    push = Detokenizer.push

    def fail_once(detokenizer: Detokenizer, token: int) -> str:
        monkeypatch.setattr(Detokenizer, "push", push)
        raise RuntimeError("no text")

    monkeypatch.setattr(Detokenizer, "push", fail_once)
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda _: post(url, GOOD | IGNORE_EOS | {"temperature": 0}), range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 500]
    texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
    assert texts == {want("a")}
    wait_until(lambda: is_at_rest(url))
