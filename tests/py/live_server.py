# SPDX-License-Identifier: Apache-2.0
"""A live server around the example's small model, for the tests of `xgdn serve`."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

import xgdn
from xgdn.server.api_keys import ApiKey
from xgdn.server.app import create_app
from xgdn.server.settings import Settings

if TYPE_CHECKING:
    import openai

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_model/checkpoint"
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
TEMPLATE = """
{%- for message in messages %}
{%- if message.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}
{{- "# " + message.role + ": " + message.content + "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "# assistant:" }}{% endif %}
{%- if thought %}{{ thought }}{% endif %}
"""
# The same for tools, calls and thoughts.
TOOL_TEMPLATE = """{%- if tools %}{{ "<tool_call>" + tools|tojson }}{% endif %}""" + TEMPLATE.replace(
    """{{ raise_exception("no tools here") }}""", ""
).replace("message.content +", """(message.reasoning_content or "") + message.content + message.tool_calls|string +""")
PROMPT = "def __init__(self"
KEY = "the key"
SLOTS, TOKENS, QUEUE, BODY_BYTES = 8, 1024, 56, 20_000

# Plain HTTP. Reading the certificates of the system, which nobody asks for, takes longer than most requests here.
http_client = partial(httpx.Client, verify=False)
http_get, http_head, http_options, http_post = (
    partial(ask, verify=False) for ask in (httpx.get, httpx.head, httpx.options, httpx.post)
)


def engine(
    model_dir: Path = CHECKPOINT, max_cached_tokens: int = TOKENS, prefix_cache_slots: int = 0, **options: Any
) -> xgdn.Engine:
    torch.set_num_threads(1)
    runner = xgdn.RunnerOptions(
        max_batch_size=SLOTS,
        max_cached_tokens=max_cached_tokens,
        max_tokens_per_step=64,
        prefix_cache_slots=prefix_cache_slots,
    )
    return xgdn.Engine(model_dir, dtype=torch.float32, runner=runner, **options)


@cache
def single() -> xgdn.Engine:
    """What a request must give when it runs by itself."""
    return engine()


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """The checkpoint with a chat template, in an empty folder."""
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@contextmanager
def live(served: Any, model_dir: Path = CHECKPOINT, tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    keys = [ApiKey(name="tests", key=KEY)]
    settings = {"max_queue": QUEUE, "max_body_bytes": BODY_BYTES, "api_keys": keys} | settings
    app = create_app(served, tokenizer, Settings(model_dir, "tiny", **settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def metrics(url: str) -> dict[str, float]:
    """Samples by name, or by name and label value: `xgdn_errors_total queue_full`."""
    families = text_string_to_metric_families(http_get(f"{url}/metrics").text)
    return {" ".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def stats(url: str, path: str = "/stats", key: str = KEY) -> Any:
    """The JSON document with the page's figures, or of the error."""
    return http_get(url + path, headers={"Authorization": f"Bearer {key}"}).json()


def is_at_rest(url: str) -> bool:
    now = metrics(url)
    gauges = ("slots_used", "kv_blocks_used", "requests_running", "requests_waiting")
    return all(now[f"xgdn_{name}"] == 0 for name in gauges)


def post(url: str, body: Any, path: str = "/v1/completions", key: str = KEY) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http_post(url + path, content=content, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def openai_client(url: str) -> openai.OpenAI:
    """OpenAI's own client. It repeats nothing, so that each error is seen."""
    import openai  # here, so that other clients need not load it

    client = http_client(timeout=60)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=client)


def tokens_of(prompt: str | list[int]) -> list[int]:
    ids: list[int] = TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt
    return ids


def continuation(ids: list[int], tokens: list[int]) -> str:
    return str(TOKENIZER.decode(ids + tokens))[len(TOKENIZER.decode(ids)) :]


def want(prompt: str | list[int], count: int = 16, **sampling: Any) -> str:
    ids = tokens_of(prompt)
    return continuation(ids, _generated(tuple(ids), count, tuple(sampling.items())))


@cache
def _generated(ids: tuple[int, ...], count: int, sampling: tuple[tuple[str, Any], ...]) -> list[int]:
    params = xgdn.SamplingParams(**dict(sampling))
    (result,) = single().generate([list(ids)], max_new_tokens=count, sampling=params, ignore_eos=True)
    return list(result.tokens)


IGNORE_EOS = {"ignore_eos": True}


GOOD: dict[str, Any] = {"model": "tiny", "prompt": "a"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


class SteppedEngine:
    """The engine with a gate before each step, and steps that fail, devices that stop, on demand."""

    def __init__(self, prefix_cache_slots: int) -> None:
        self._served = engine(prefix_cache_slots=prefix_cache_slots)
        self._allowed = threading.Semaphore(0)
        self._is_open = False
        self.failures = 0
        self.failure: BaseException = RuntimeError("the step broke")
        self.device_error = ""
        self.num_steps = 0
        self.cancelled: set[int | None] = set()  # branches

    def allow(self, num_steps: int) -> None:
        self._allowed.release(num_steps)

    def open(self) -> None:
        self._is_open = True
        self.allow(1)

    def close(self) -> None:
        """Hold the steps that have not begun."""
        self._is_open = False
        while self._allowed.acquire(blocking=False):
            pass

    def loop(self, *, after_step: Callable[[Any], None], **hooks: Any) -> Any:
        def report(counters: xgdn.engine.EngineCounters) -> None:
            names = (
                "num_free_slots",
                "num_free_kv_blocks",
                "num_preemptions",
                "prefix_cache",
                "speculation",
                "last_step",
            )
            values = {name: getattr(counters, name) for name in names}
            after_step(SimpleNamespace(device_error=self.device_error or counters.device_error, **values))

        loop = self._served.loop(before_step=self._pass_gate, after_step=report, **hooks)

        def cancel(request_id: int, branch: int | None = None) -> bool:
            self.cancelled.add(branch)
            return loop.cancel(request_id, branch)

        return SimpleNamespace(submit=loop.submit, cancel=cancel, stop=loop.stop)

    def _pass_gate(self) -> None:
        assert self._is_open or self._allowed.acquire(timeout=60)
        self.num_steps += 1
        if self.failures:
            self.failures -= 1
            raise self.failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served, name)


@contextmanager
def live_stepped(
    model_dir: Path = CHECKPOINT, *, prefix_cache_slots: int = 0, **settings: Any
) -> Iterator[tuple[SteppedEngine, str]]:
    """A server whose steps wait to be allowed."""
    stepped = SteppedEngine(prefix_cache_slots)
    with live(stepped, model_dir, **settings) as url:
        try:
            yield stepped, url
        finally:
            stepped.open()
