# SPDX-License-Identifier: Apache-2.0
"""/v1/sessions: whatever a session goes through over HTTP, its answers are those to its tokens alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import xgdn
from live_server import (
    CHAT,
    CHECKPOINT,
    GOOD,
    KEY,
    PROMPT,
    TEMPLATE,
    engine,
    http_client,
    is_at_rest,
    live,
    live_stepped,
    metrics,
    single,
    tokens_of,
    wait_until,
    want,
    with_template,
)
from xgdn.server.api_keys import ApiKey, Client, Limits
from xgdn.server.metrics import Metrics
from xgdn.server.session_schemas import CreateSessionBody
from xgdn.server.sessions import Sessions
from xgdn.server.settings import Settings

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
OTHER_KEY = "another key"
KEYS = [ApiKey(name="tests", key=KEY), ApiKey(name="../other", key=OTHER_KEY, open_sessions=2)]


class Api:
    """The paths of sessions, with one of the keys."""

    def __init__(self, url: str, key: str = KEY) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._client = http_client(base_url=url, headers=headers, timeout=60)

    def ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        return self._client.request(method, path, content=json.dumps(body) if method == "POST" else None)

    def __call__(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        answer = self.ask(method, f"/v1/{path}", **body)
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def error(self, method: str, path: str, **body: Any) -> tuple[int, str]:
        answer = self.ask(method, f"/v1/{path}", **body)
        return answer.status_code, answer.json()["error"]["code"]

    def open(self, **body: Any) -> str:
        return str(self("POST", "sessions", **body)["id"])

    def complete(self, session: str, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        return self("POST", "completions", **GOOD | GREEDY | {"prompt": prompt, "session_id": session} | fields)

    def stream(self, **body: Any) -> Any:
        return self._client.stream("POST", "/v1/completions", content=json.dumps(body | {"stream": True}))


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


@pytest.fixture(scope="module")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "replay"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, session_dir: Path) -> Iterator[str]:
    served = engine(prefix_cache_slots=16, replay_states=request.param)
    folder = with_template(tmp_path_factory.mktemp("sessions"), TEMPLATE)
    with live(served, folder, api_keys=KEYS, session_dir=session_dir, max_sessions=6, max_session_files=3) as address:
        yield address


@pytest.fixture
def api(url: str, session_dir: Path) -> Iterator[Api]:
    yield Api(url)
    for key in (KEY, OTHER_KEY):
        each = Api(url, key)
        for session in each("GET", "sessions")["data"]:
            each("DELETE", f"sessions/{session['id']}")
        for file in each("GET", "session_files")["data"]:
            each("DELETE", f"session_files/{file['file']}")
    wait_until(lambda: is_at_rest(url))
    assert metrics(url)["xgdn_sessions"] == 0


def replies(api: Api, session: str, count: int = 3, **fields: Any) -> list[int]:
    """Turns of a session, each with the answer to all tokens so far; return these."""
    ids: list[int] = []
    for turn in range(count):
        prompt = f"{PROMPT}, x{turn}):\n    "
        answer = api.complete(session, prompt, **fields)
        ids += tokens_of(prompt)
        assert text_of(answer) == want(ids, 8)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        ids += tokens_after(ids)
        assert api("GET", f"sessions/{session}")["num_tokens"] == len(ids)
    return ids


def tokens_after(ids: list[int], count: int = 8) -> list[int]:
    (result,) = single().generate([ids], max_new_tokens=count, ignore_eos=True)
    return list(result.tokens)


def test_a_session_goes_on(api: Api) -> None:
    session = api.open(id="mine")
    assert session == "mine"
    replies(api, session)
    document = api("GET", "sessions/mine")
    assert document["object"] == "session"
    assert not document["is_busy"]
    assert 0 <= document["cached_tokens"] < document["num_tokens"]
    assert api("GET", "sessions")["data"] == [{k: v for k, v in document.items() if k != "cached_tokens"}]
    assert api("DELETE", "sessions/mine") == {"id": "mine", "object": "session", "deleted": True}
    assert api.error("GET", "sessions/mine") == (404, "session_not_found")


def test_forks_and_truncated_sessions_go_their_own_ways(api: Api) -> None:
    session = api.open()
    ids = replies(api, session)
    fork = api("POST", f"sessions/{session}/fork", id="fork")
    assert (fork["id"], fork["num_tokens"]) == ("fork", len(ids))
    for count in (len(ids) - 1, len(ids) - 9, 20, 0):
        document = api("POST", f"sessions/{session}/truncate", num_tokens=count)
        assert document["num_tokens"] == count
        assert document["cached_tokens"] <= count
        assert text_of(api.complete(session, [7, 8])) == want([*ids[:count], 7, 8], 8)
        assert api("GET", f"sessions/{session}")["num_tokens"] == count + 10
    assert text_of(api.complete("fork", "", max_tokens=4)) == want(ids, 4), "it goes on from what it has"


def test_files_bring_a_session_back(api: Api, url: str, session_dir: Path) -> None:
    session = api.open(id="saved")
    ids = replies(api, session)
    document = api("POST", "sessions/saved/save")
    (file,) = (session_dir / "key-tests").iterdir()
    assert document["file"] == "saved"
    assert (file.name, document["bytes"]) == ("saved.safetensors", file.stat().st_size)
    assert api("GET", "session_files")["data"] == [document]
    api("DELETE", "sessions/saved")
    loaded = api("POST", "sessions", id="again", file="saved")
    assert loaded["num_tokens"] == len(ids)
    assert text_of(api.complete("again", [7, 8])) == want([*ids, 7, 8], 8)

    other = Api(url, OTHER_KEY)
    assert other.error("POST", "sessions", file="saved") == (404, "session_file_not_found")
    assert other("GET", "session_files")["data"] == []
    own = other.open(id="own")
    other("POST", f"sessions/{own}/save", file="saved")  # of the same name, elsewhere
    assert [it.name for it in session_dir.rglob("*.safetensors")] == ["saved.safetensors"] * 2
    assert {it.parent for it in session_dir.rglob("*.safetensors")} == {
        session_dir / "key-tests", session_dir / "key-..%2Fother"
    }  # fmt: skip
    file.write_bytes(file.read_bytes()[:-1])
    answer = api.ask("POST", "/v1/sessions", file="saved")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_session_file")
    assert str(session_dir) not in answer.text
    for name in ("a", "b"):
        api("POST", "sessions/again/save", file=name)
    assert api.error("POST", "sessions/again/save", file="c") == (409, "too_many_session_files")
    api("POST", "sessions/again/save", file="b")  # in place of the other
    assert api("DELETE", "session_files/a") == {"file": "a", "object": "session.file", "deleted": True}
    assert api.error("DELETE", "session_files/a") == (404, "session_file_not_found")


def test_a_chat_is_kept_as_a_whole(api: Api) -> None:
    session = api.open()
    messages: list[dict[str, str]] = []
    cached = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"{PROMPT}, x{turn}): pass " * (1 if turn else 30)})
        body = CHAT | GREEDY | {"messages": messages, "session_id": session}
        answer = api("POST", "chat/completions", **body)
        text = "".join(f"# {it['role']}: {it['content']}\n" for it in messages) + "# assistant:"
        assert answer["choices"][0]["message"]["content"] == want(text, 8)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        assert api("GET", f"sessions/{session}")["num_tokens"] == answer["usage"]["total_tokens"]
    assert cached[0] == 0 < cached[2]


def test_a_stream_is_kept_before_its_end_is_told(api: Api) -> None:
    session = api.open()
    ids = tokens_of(PROMPT)
    with api.stream(**GOOD | GREEDY | {"prompt": PROMPT, "session_id": session}) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    document = api("GET", f"sessions/{session}")
    assert (document["num_tokens"], document["is_busy"]) == (len(ids) + 8, False)
    assert text_of(api.complete(session, [9])) == want([*ids, *tokens_after(ids), 9], 8)


def test_a_session_is_in_one_request_at_a_time(tmp_path: Path) -> None:
    """Which changes nothing where it fails, or its client leaves."""
    with live_stepped(prefix_cache_slots=4, session_dir=tmp_path) as (stepped, url):
        api = Api(url)
        body = GOOD | GREEDY | {"prompt": PROMPT, "session_id": api.open(id="busy")}
        with api.stream(**body) as answer:
            stepped.allow(2)
            lines = answer.iter_lines()  # which closes the connection when it is dropped
            next(lines)
            assert api.error("POST", "completions", **body) == (409, "session_busy")
            wrong: list[tuple[str, dict[str, Any]]] = [("fork", {}), ("truncate", {"num_tokens": 0}), ("save", {})]
            for action, fields in wrong:
                assert api.error("POST", f"sessions/busy/{action}", **fields) == (409, "session_busy")
            assert api.error("DELETE", "sessions/busy") == (409, "session_busy")
            assert api("GET", "sessions/busy")["is_busy"]
        wait_until(lambda: not api("GET", "sessions/busy")["is_busy"])
        assert api("GET", "sessions/busy")["num_tokens"] == 0
        stepped.open()
        wait_until(lambda: is_at_rest(url))
        stepped.failures = 1
        assert api.error("POST", "completions", **body) == (500, "engine_error")
        assert api("GET", "sessions/busy")["num_tokens"] == 0
        assert text_of(api.complete("busy", PROMPT)) == want(PROMPT, 8)


def test_sessions_at_once(api: Api) -> None:
    """Each with the bits of its own tokens, whatever the others do."""

    def run(index: int) -> int:
        session = api.open(id=f"s{index}")
        ids = list(range(1 + index, 40 + 3 * index))
        assert text_of(api.complete(session, ids)) == want(ids, 8)
        ids += tokens_after(ids)
        for turn in range(4):
            if turn == 2:
                ids = ids[: len(ids) - 5]
                api("POST", f"sessions/{session}/truncate", num_tokens=len(ids))
            answer = api.complete(session, [turn + 1, index + 1])
            ids += [turn + 1, index + 1]
            assert text_of(answer) == want(ids, 8)
            ids += tokens_after(ids)
        return int(api("GET", f"sessions/{session}")["num_tokens"]) - len(ids)

    for index in range(5):
        ids = list(range(1 + index, 40 + 3 * index))
        want(ids, 8)  # from now on the single engine is read alone
    with ThreadPoolExecutor(5) as clients:
        assert list(clients.map(run, range(5))) == [0] * 5


def test_what_another_key_has_is_not_there(api: Api, url: str) -> None:
    other = Api(url, OTHER_KEY)
    session = api.open(id="secret")
    for method, path, body in (
        ("GET", "sessions/secret", {}),
        ("DELETE", "sessions/secret", {}),
        ("POST", "sessions/secret/fork", {}),
        ("POST", "sessions/secret/save", {}),
        ("POST", "sessions/secret/truncate", {"num_tokens": 0}),
        ("POST", "completions", GOOD | {"session_id": session}),
        ("POST", "chat/completions", CHAT | {"session_id": session}),
    ):
        assert other.error(method, path, **body) == (404, "session_not_found")
    assert other("GET", "sessions")["data"] == []
    assert other.open(id="secret") == "secret"  # a name is a client's own
    other.open()
    assert other.error("POST", "sessions") == (429, "too_many_sessions")
    assert [it["id"] for it in api("GET", "sessions")["data"]] == ["secret"]
    assert Api(url, "no key").error("GET", "sessions") == (401, "invalid_api_key")


def test_a_name_is_no_path(api: Api, session_dir: Path) -> None:
    session = api.open()
    before = sorted(session_dir.rglob("*"))
    for name in ("", ".", "..", "../x", "a/b", "a.b", "-a", "a" * 65, "ä", "a\n", "a\x00"):
        for path, body in (
            ("sessions", {"id": name}),
            ("sessions", {"file": name}),
            (f"sessions/{session}/fork", {"id": name}),
            (f"sessions/{session}/save", {"file": name}),
            ("completions", GOOD | {"session_id": name}),
        ):
            assert api.error("POST", path, **body) == (400, "invalid_value"), name
    for path in ("..%2F..%2Fx", "%2e%2e%2fx", "a.b", "%00"):
        assert api.ask("DELETE", f"/v1/session_files/{path}").status_code == 404
    assert sorted(session_dir.rglob("*")) == before


def test_what_cannot_be_asked(api: Api) -> None:
    session = api.open(id="s")
    ids = replies(api, session, 1)
    assert api.error("POST", "sessions", id="s") == (409, "session_exists")
    assert api.error("POST", "sessions/s/fork", id="s") == (409, "session_exists")
    assert api.error("POST", "sessions/none/fork") == (404, "session_not_found")
    assert api.error("POST", "sessions", file="none") == (404, "session_file_not_found")
    for count, code in ((len(ids) + 1, "invalid_value"), (-1, "invalid_value"), ("1", "invalid_type")):
        assert api.error("POST", "sessions/s/truncate", num_tokens=count) == (400, code)
    assert api.error("POST", "sessions/s/truncate") == (400, "missing_required_parameter")
    assert api.error("POST", "sessions", ids="s") == (400, "unknown_parameter")
    wrong: list[tuple[str, Any]] = [("n", 2), ("echo", True), ("prompt_logprobs", 1), ("prompt", ["a", "b"])]
    for field, value in wrong:
        assert api.error("POST", "completions", **GOOD | {"session_id": "s", field: value}) == (400, "invalid_value")
    assert api.error("POST", "completions", **GOOD | {"session_id": "s", "max_tokens": 1024}) == (
        400, "context_length_exceeded"
    )  # fmt: skip
    assert api.error("POST", "completions", **GOOD, session_id="none") == (404, "session_not_found")
    document = api("GET", "sessions/s")
    assert (document["num_tokens"], document["is_busy"]) == (len(ids), False)
    for i in range(5):
        api.open(id=f"more{i}")
    assert api.error("POST", "sessions") == (429, "too_many_sessions")
    assert api.error("POST", "sessions/s/fork") == (429, "too_many_sessions")


def test_idle_sessions_are_closed() -> None:
    with live(engine(prefix_cache_slots=4), session_idle_seconds=0.2) as url:
        api = Api(url)
        session = api.open()
        with api.stream(**GOOD | GREEDY | {"max_tokens": 900, "session_id": session}) as answer:
            begin = time.monotonic()
            for _ in answer.iter_lines():
                if time.monotonic() - begin > 0.6:
                    break
            assert api("GET", "sessions")["data"], "it is in use"
        wait_until(lambda: metrics(url)["xgdn_sessions_expired_total"] == 1)
        assert api.error("GET", f"sessions/{session}") == (404, "session_not_found")
        assert metrics(url)["xgdn_sessions"] == 0


def test_the_count_of_sessions_is_that_of_those_in_use() -> None:
    """By a clock of the test's own: whoever opens one finds the room of the idle ones."""
    now = [0.0]
    settings = Settings(CHECKPOINT, "tiny", max_sessions=2, session_idle_seconds=10)
    sessions = Sessions(engine(prefix_cache_slots=4), settings, Metrics(), clock=lambda: now[0])
    client = Client(None, Limits())
    for name, then in (("a", 0.0), ("b", 6.0), ("c", 12.0)):
        now[0] = then
        sessions.create(client, CreateSessionBody(id=name))
    assert [it["id"] for it in sessions.summaries(client)] == ["b", "c"]


def test_without_a_cache_or_a_directory_there_is_nothing() -> None:
    with live(engine()) as url:
        assert Api(url).error("POST", "sessions") == (501, "sessions_disabled")
        assert Api(url)("GET", "sessions")["data"] == []
        assert metrics(url)["xgdn_sessions"] == 0
    with live(engine(prefix_cache_slots=2)) as url:
        api = Api(url)
        api.open(id="s")
        assert api.error("POST", "sessions/s/save") == (501, "no_session_dir")
        assert api.error("POST", "sessions", file="s") == (501, "no_session_dir")
        assert api.error("DELETE", "session_files/s") == (501, "no_session_dir")
        assert api("GET", "session_files")["data"] == []


def test_a_closed_session_gives_its_state_back() -> None:
    """A fork does not keep the session that it came from."""
    served = engine(prefix_cache_slots=1, replay_states=True)
    parent = xgdn.Session(served)
    parent.generate(range(1, 60), max_new_tokens=2)
    fork = parent.fork()
    kept = fork.num_kept
    del parent
    fork.set_tokens([])
    other = xgdn.Session(served)
    other.generate(range(100, 160), max_new_tokens=2)
    assert (kept, other.num_kept) == (60, 61), "the one slot is free for it"
