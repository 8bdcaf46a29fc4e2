# SPDX-License-Identifier: Apache-2.0
"""Echo, log-probabilities of prompts, embeddings and tokens of a server, against transformers and the tokenizer."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from live_server import (
    CHAT,
    CHECKPOINT,
    GOOD,
    KEY,
    PROMPT,
    TOKENIZER,
    TOKENS,
    engine,
    http_get,
    live,
    openai_client,
    post,
    tokens_of,
    want,
    with_template,
)

TEXT = "def é(self):\n    return 日本 + 1"


@cache
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@cache
def truth(ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities `[T, vocab]` behind each token, by transformers."""
    with torch.no_grad():
        return model()(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = with_template(tmp_path_factory.mktemp("model"))
    with live(engine(folder, prefix_cache_slots=4), folder) as address:
        yield address


def completion(url: str, prompt: Any, **fields: Any) -> Any:
    answer = post(url, GOOD | {"prompt": prompt, "temperature": 0, "echo": True} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_reports_every_token_of_prompt_and_reply(url: str, max_tokens: int) -> None:
    ids = tokens_of(TEXT)
    for prompt in (TEXT, ids):
        document = completion(url, prompt, max_tokens=max_tokens, logprobs=2)
        (choice,) = document["choices"]
        reply = want(TEXT, max_tokens) if max_tokens else ""
        assert (choice["text"], choice["finish_reason"]) == (TEXT + reply, "length")
        assert document["usage"]["completion_tokens"] == max_tokens
        logprobs = choice["logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {len(ids) + max_tokens}
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        expected = truth(tuple(ids))
        for i, token in enumerate(ids[1:], start=1):
            top = logprobs["top_logprobs"][i]
            assert abs(logprobs["token_logprobs"][i] - float(expected[i - 1, token])) < 1e-4
            assert abs(max(top.values()) - float(expected[i - 1].max())) < 1e-4
            assert logprobs["token_logprobs"][i] in top.values()
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        pieces = [choice["text"][begin:end] for begin, end in zip(offsets, [*offsets[1:], None], strict=True)]
        assert "".join(pieces) == choice["text"]
        whole = [i for i, name in enumerate(logprobs["tokens"]) if not name.startswith("bytes:")]
        assert len(whole) > 5
        assert all(logprobs["tokens"][i] == pieces[i] for i in whole if i + 1 not in whole or pieces[i])


def test_a_stream_echoes_the_same(url: str) -> None:
    fields = {"max_tokens": 6, "logprobs": 1, "n": 2, "seed": 5, "temperature": 0.8}
    document = completion(url, TEXT, **fields)
    body = GOOD | {"prompt": TEXT, "echo": True, "stream": True} | fields
    events = [line[6:] for line in post(url, body).text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    for want_choice in document["choices"]:
        pieces = [choice for choice in choices if choice["index"] == want_choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == want_choice["text"]
        for name, values in want_choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_the_token_that_ends_an_echoed_reply_is_reported(url: str) -> None:
    ids = tokens_of(PROMPT)
    first = int(truth(tuple(ids))[-1].argmax())
    document = completion(url, ids, max_tokens=4, logprobs=1, stop_token_ids=[first])
    (choice,) = document["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "stop")
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert abs(choice["logprobs"]["token_logprobs"][-1] - float(truth(tuple(ids))[-1, first])) < 1e-4


def test_special_tokens_of_a_prompt_are_entries_with_their_names(url: str) -> None:
    ids = [0, *tokens_of(PROMPT), 0]
    (choice,) = completion(url, ids, max_tokens=1, logprobs=0)["choices"]
    name = TOKENIZER.id_to_token(0)
    assert choice["text"].startswith(f"{name}{PROMPT}{name}")
    assert choice["logprobs"]["tokens"][0] == choice["logprobs"]["tokens"][len(ids) - 1] == name
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1


def test_echo_of_several_prompts_without_logprobs(url: str) -> None:
    document = completion(url, [PROMPT, TEXT], max_tokens=3, n=2)
    texts = [choice["text"] for choice in document["choices"]]
    assert texts == [it + want(it, 3) for it in (PROMPT, PROMPT, TEXT, TEXT)]
    assert all(choice["logprobs"] is None for choice in document["choices"])


def test_prompt_logprobs_by_token_id(url: str) -> None:
    ids = tokens_of(TEXT)
    (choice,) = completion(url, ids, echo=False, max_tokens=2, prompt_logprobs=3)["choices"]
    reports = choice["prompt_logprobs"]
    assert choice["text"] == want(TEXT, 2)
    assert len(reports) == len(ids)
    assert reports[0] is None
    for i, token in enumerate(ids[1:], start=1):
        expected = truth(tuple(ids))[i - 1]
        assert abs(reports[i][str(token)]["logprob"] - float(expected[token])) < 1e-4
        best = min(reports[i].values(), key=lambda entry: entry["rank"] or math.inf)
        assert abs(best["logprob"] - float(expected.max())) < 1e-4
        assert len(reports[i]) in (3, 4)
    chat = post(url, CHAT | {"prompt_logprobs": 0, "max_tokens": 1}, "/v1/chat/completions").json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_what_cannot_be_reported_is_refused(url: str) -> None:
    for fields, words in (
        ({"prompt_logprobs": 1, "stream": True}, "'stream' to be false"),
        ({"prompt_logprobs": 21}, "'prompt_logprobs'"),
        ({"max_tokens": 0, "n": 2}, "n: expected 1 with max_new_tokens=0"),
        ({"echo": 1}, "'echo'"),
    ):
        answer = post(url, GOOD | fields)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    assert post(url, CHAT | {"max_tokens": 0}, "/v1/chat/completions").status_code == 400


def embedder(folder: Path, modules: Any = None, **pooling: Any) -> Path:
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    kinds = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    default = [{"idx": i, "path": paths[i], "type": f"sentence_transformers.models.{kinds[i]}"} for i in range(3)]
    (folder / "modules.json").write_text(json.dumps(default if modules is None else modules))
    (folder / "1_Pooling").mkdir()
    config = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False} | pooling
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def test_embeddings_are_the_normalized_hidden_state_of_the_last_token(tmp_path: Path) -> None:
    texts = [PROMPT, TEXT, "a" * 200]
    with live(engine(embedder(tmp_path)), tmp_path) as url:
        client = openai_client(url)
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
        ids = [tokens_of(text) for text in texts]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        for i, entry in enumerate(answer.data):
            with torch.no_grad():
                hidden = model().model(torch.tensor([ids[i]])).last_hidden_state[0, -1].double()
            assert entry.index == i
            got = torch.tensor(entry.embedding, dtype=torch.double)
            assert torch.allclose(got, hidden / hidden.norm(), atol=1e-5)
        # The client asks for base64 unless it is told otherwise, and decodes it. Alone, as what it is compared with:
        # beside others f32 sums may have another order.
        alone = [client.embeddings.create(model="tiny", input=i, encoding_format="float").data[0] for i in ids[:2]]
        decoded = client.embeddings.create(model="tiny", input=ids[1]).data[0].embedding
        assert decoded == pytest.approx(alone[1].embedding, abs=1e-7)
        raw = post(url, {"model": "tiny", "input": texts[0], "encoding_format": "base64"}, "/v1/embeddings").json()
        data = base64.b64decode(raw["data"][0]["embedding"])
        assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(alone[0].embedding, abs=1e-7)
        for fields, word in (
            ({"input": ""}, "at least one token"),
            ({"input": [99999]}, "token ids below"),
            ({"dimensions": 8}, "'dimensions' is not supported"),
            ({"input": 1}, "'input': expected a string"),
            ({"input": "a " * TOKENS * 2}, "context length"),
        ):
            refused = post(url, {"model": "tiny", "input": "a"} | fields, "/v1/embeddings")
            assert refused.status_code == 400
            assert word in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("modules", "pooling", "word"),
    [
        ([{"type": "a.b.Transformer"}], {}, "its modules.json has Transformer"),
        (
            None,
            {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True},
            "pools by pooling_mode_mean_tokens",
        ),
    ],
)
def test_other_models_refuse_embeddings(tmp_path: Path, url: str, modules: Any, pooling: Any, word: str) -> None:
    body = {"model": "tiny", "input": "a"}
    error = post(url, body, "/v1/embeddings").json()["error"]
    assert error["code"] == "no_embeddings"
    assert "it has no modules.json" in error["message"]
    with live(engine(embedder(tmp_path, modules, **pooling)), tmp_path) as other:
        answer = post(other, body, "/v1/embeddings")
        assert answer.status_code == 400
        assert word in answer.json()["error"]["message"]


def test_texts_become_tokens_and_tokens_texts(url: str) -> None:
    answer = post(url, {"prompt": TEXT, "return_token_strs": True}, "/tokenize").json()
    encoding = TOKENIZER.encode(TEXT)
    assert answer == {
        "count": len(encoding.ids),
        "max_model_len": TOKENS,
        "tokens": encoding.ids,
        "token_strs": encoding.tokens,
    }
    assert post(url, {"tokens": encoding.ids}, "/detokenize").json() == {"prompt": TEXT}
    name = TOKENIZER.id_to_token(0)
    assert post(url, {"prompt": name, "add_special_tokens": False}, "/tokenize").json()["tokens"] == [0]
    assert post(url, {"tokens": [0]}, "/detokenize").json() == {"prompt": name}
    chat = post(url, {"messages": CHAT["messages"]}, "/tokenize").json()
    used = post(url, CHAT | {"max_tokens": 1}, "/v1/chat/completions").json()["usage"]
    assert chat["count"] == used["prompt_tokens"]
    info = http_get(f"{url}/tokenizer_info", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert "# assistant:" in info["chat_template"]
    assert {"eos_token", "bos_token", "pad_token"} <= info.keys()


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/tokenize", {}, "missing_required_parameter"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "invalid_value"),
        ("/tokenize", {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "invalid_value"),
        ("/tokenize", {"prompt": "a", "more": 1}, "unknown_parameter"),
        ("/tokenize", {"prompt": "a " * TOKENS * 2}, "context_length_exceeded"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value"),
        ("/detokenize", {"tokens": "a"}, "invalid_type"),
    ],
)
def test_bad_texts_and_tokens_are_refused(url: str, path: str, body: Any, code: str) -> None:
    answer = post(url, body, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert post(url, {"prompt": "a"}, "/tokenize", key="wrong").status_code == 401
    assert post(url, {"prompt": "a", "model": "other"}, "/tokenize").json()["error"]["code"] == "model_not_found"
