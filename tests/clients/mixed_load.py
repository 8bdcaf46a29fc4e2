# SPDX-License-Identifier: Apache-2.0
"""Requests of many clients at once, with every feature of the server mixed: none lost, none wrong, memory flat.

    PYTHONPATH=tests/py:benchmarks python tests/clients/mixed_load.py [--model FOLDER] [--requests 500] [--clients 64]

Starts `xgdn serve` with a chat template that calls tools and thinks, draws the requests from a seed, and asks them one
by one: those are the right answers. Then, `--rounds` times, all of them in another order, `--clients` at once. Every
answer must be the right one, a stream the same as the document; a client that leaves must have read its beginning; a
broken request must get its error. After each round the server is at rest and its counters grew by what the clients
saw. After the first round its memory must not grow. The share of its steps outside the model's forward is reported.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from tokenizers import Tokenizer

from json_schemas import random_schemas
from live_server import CHECKPOINT
from markdown_table import markdown
from tool_templates import HERMES
from xgdn.bench.report import machine
from xgdn.bench.server_process import running_server
from xgdn.cli.failure import fail

KEY = "the key"
NAME = "mixed"
SLOTS = 32
QUEUE = 1024  # sequences: all clients with all their choices and prompts find room
TOLERANCE = 1e-3  # of log-probabilities: another batch may round their sums differently
MEMORY_SHARE = 0.02  # by which the server's memory may grow after the first round
WORDS = (CHECKPOINT / "held_out.txt").read_text()


# ---- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    path: str
    body: dict[str, Any] | bytes
    features: frozenset[str]
    key: str = KEY
    leaves_after: int | None = None  # events of a stream

    @property
    def is_stream(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream") is True

    def content(self, *, stream: bool) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        removed = ("stream", "stream_options") if self.is_stream and not stream else ()
        return json.dumps({name: value for name, value in self.body.items() if name not in removed}).encode()


class Draw:
    """Requests by chance. `tokens_of` encodes a text."""

    def __init__(self, seed: int, tokens_of: Callable[[str], list[int]]) -> None:
        self._chance = random.Random(seed)
        self._tokens_of = tokens_of
        self._schemas = random_schemas(100, seed)

    def jobs(self, count: int) -> list[Job]:
        kinds = [self._completion, self._chat, self._response, self._broken]
        return [self._chance.choices(kinds, [4, 5, 2, 1])[0]() for _ in range(count)]

    def _maybe(self, share: float) -> bool:
        return self._chance.random() < share

    def _text(self, longest: int = 200) -> str:
        begin = self._chance.randrange(len(WORDS) - longest)
        return WORDS[begin : begin + self._chance.randint(1, longest)]

    def _completion(self) -> Job:
        prompt = self._chance.choice(
            [
                self._text,
                lambda: self._tokens_of(self._text()),
                lambda: [self._text(), self._text()],
                lambda: [self._tokens_of(self._text()), self._tokens_of(self._text())],
            ]
        )()
        body = {"prompt": prompt, "max_tokens": self._chance.randint(1, 32), **self._sampling(), **self._shape()}
        if self._maybe(0.2):
            body["logprobs"] = self._chance.randint(0, 5)
        if self._maybe(0.2):
            body["echo"] = True
            body["max_tokens"] = self._chance.randint(0, 3)
        if self._maybe(0.2):
            body |= self._structured() | {"ignore_eos": False, "max_tokens": 48}
        return self._job("/v1/completions", body)

    def _chat(self) -> Job:
        body = {
            "messages": self._messages(),
            "max_tokens": self._chance.randint(1, 32),
            **self._sampling(),
            **self._shape(),
        }
        if self._maybe(0.2):
            body |= {"logprobs": True, "top_logprobs": self._chance.randint(0, 5)}
        if self._maybe(0.6):
            body["chat_template_kwargs"] = {"enable_thinking": self._maybe(0.3)}
        if self._maybe(0.3):
            body |= {"tools": TOOLS, "tool_choice": self._chance.choice(["auto", "none", "required", CHOICE])}
            body |= {"parallel_tool_calls": self._maybe(0.5), "ignore_eos": False, "max_tokens": 64}
        elif self._maybe(0.4):
            body |= self._structured() | {"ignore_eos": False, "max_tokens": 64}
        return self._job("/v1/chat/completions", body)

    def _response(self) -> Job:
        body = {"input": self._text(), "max_output_tokens": self._chance.randint(1, 32), **self._sampling()}
        body |= {"instructions": self._text(40), "stream": self._maybe(0.5), "store": self._maybe(0.5)}
        if self._maybe(0.5):
            body["chat_template_kwargs"] = {"enable_thinking": self._maybe(0.5)}
        if self._maybe(0.3):
            tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
            body |= {"tools": tools, "tool_choice": self._chance.choice(["auto", "required"]), "max_output_tokens": 64}
        return self._job("/v1/responses", body)

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": self._text(40)}] if self._maybe(0.3) else []
        for _ in range(self._chance.randint(0, 2)):
            messages += [{"role": "user", "content": self._text(60)}, {"role": "assistant", "content": self._text(60)}]
            if self._maybe(0.3):
                messages[-1] = {"role": "assistant", "content": None, "tool_calls": CALLS}
                messages.append({"role": "tool", "tool_call_id": CALLS[0]["id"], "content": self._text(40)})
        return [*messages, {"role": "user", "content": [{"type": "text", "text": self._text(60)}]}]

    def _sampling(self) -> dict[str, Any]:
        """The fields that all three interfaces have."""
        if self._maybe(0.3):
            return {"temperature": 0}
        body: dict[str, Any] = {"temperature": round(self._chance.uniform(0.2, 1.3), 2)}
        body["seed"] = self._chance.randrange(2**31)
        options = {
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.2,
            "logit_bias": {str(self._chance.randrange(1, 1000)): 2.5},
            "bad_words": ["self"],
            "min_tokens": 1,
        }
        return body | {name: value for name, value in options.items() if self._maybe(0.2)}

    def _shape(self) -> dict[str, Any]:
        """The further fields of completions and chat."""
        body: dict[str, Any] = {"ignore_eos": self._maybe(0.7)}
        if self._maybe(0.3):
            body["n"] = self._chance.randint(2, 3)
        if self._maybe(0.3):
            body["stop"] = self._chance.choice([["\n"], [" self", "return"], "e"])
        if self._maybe(0.1):
            body["stop_token_ids"] = [self._chance.randrange(1, 1000) for _ in range(20)]
        if self._maybe(0.5):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            if self._maybe(0.2):
                body["stream_options"]["continuous_usage_stats"] = True
        elif self._maybe(0.1):
            body["prompt_logprobs"] = self._chance.randint(0, 2)
        return body

    def _structured(self) -> dict[str, Any]:
        schema = self._chance.choice(self._schemas)
        return self._chance.choice(
            [
                {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}},
                {"response_format": {"type": "json_object"}},
                {"structured_outputs": {"regex": r"[a-z]{3,9}(-\d{2})?"}},
                {"guided_choice": ["yes", "no", "perhaps"]},
                {"guided_grammar": 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,4}/'},
            ]
        )

    def _job(self, path: str, body: dict[str, Any]) -> Job:
        body = {"model": NAME, **body}
        features = {name for name, value in body.items() if value not in (None, False)} | {path}
        leaves = None
        if body.get("stream") and self._maybe(0.2):
            leaves = self._chance.randint(1, 6)
            features.add("a client that leaves")
        return Job(path, body, frozenset(features), leaves_after=leaves)

    def _broken(self) -> Job:
        path = self._chance.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses"])
        texts = {"/v1/completions": "prompt", "/v1/responses": "input"}
        good: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
        if path in texts:
            good = {"model": NAME, texts[path]: "a"}
        body: dict[str, Any] | bytes = self._chance.choice(
            [
                json.dumps(good).encode()[:-3],
                b"\xff\xfe",
                b"[]",
                good | {"temperature": 3},
                good | {"colour": 1},
                good | {"model": "other"},
                good | {"stream": "yes"},
                good | {"moderation": {"model": "other"}},
                good | {"seed": 2**64},
                good | {"logit_bias": {"a": 1}},
                {"model": NAME},
            ]
        )
        return Job(path, body, frozenset({"broken", path}), key="another" if self._maybe(0.1) else KEY)


_PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {**_PARAMETERS, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
CHOICE = {"type": "function", "function": {"name": "now"}}
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}]


# ---- what is answered -----------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """An answer's text in all its parts, and the log-probabilities of its tokens."""

    text: str = ""
    thought: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)  # name, arguments
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)

    @property
    def words(self) -> tuple[Any, ...]:
        return self.text, self.thought, self.calls, self.finish_reason

    def begins(self, whole: Choice) -> bool:
        """Whether it may be what a client has read of `whole` before it left."""
        calls = [(call, whole.calls.get(i, ["", ""])) for i, call in self.calls.items()]
        return (
            whole.text.startswith(self.text)
            and whole.thought.startswith(self.thought)
            and all(own[0] == name and arguments.startswith(own[1]) for own, (name, arguments) in calls)
        )


@dataclass
class Answer:
    status: int = 0
    error: str | None = None  # its code
    choices: dict[int, Choice] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    has_left: bool = False
    problem: str = ""  # a break of the protocol

    def choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())

    def difference(self, want: Answer) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.problem:
            return self.problem
        if (self.status, self.error) != (want.status, want.error):
            return f"status {self.status} {self.error}, expected {want.status} {want.error}"
        if self.has_left:
            wrong = [i for i, choice in self.choices.items() if not choice.begins(want.choices[i])]
            return (
                f"choice {wrong[0]} before the client left: {self.choices[wrong[0]]}, expected the beginning of "
                f"{want.choices[wrong[0]]}"
                if wrong
                else ""
            )
        if self.choices.keys() != want.choices.keys():
            return f"choices {sorted(self.choices)}, expected {sorted(want.choices)}"
        for i, choice in self.choices.items():
            if choice.words != want.choices[i].words:
                return f"choice {i}: {choice.words}, expected {want.choices[i].words}"
            if not _close(choice.logprobs, want.choices[i].logprobs):
                return f"choice {i}: log-probabilities {choice.logprobs}, expected {want.choices[i].logprobs}"
        if (self.num_prompt_tokens, self.num_tokens) != (want.num_prompt_tokens, want.num_tokens):
            got = f"{self.num_prompt_tokens} + {self.num_tokens}"
            return f"tokens {got}, expected {want.num_prompt_tokens} + {want.num_tokens}"
        return ""


def _close(left: Sequence[float], right: Sequence[float]) -> bool:
    return len(left) == len(right) and all(abs(a - b) <= TOLERANCE for a, b in zip(left, right, strict=True))


def read_document(answer: Answer, document: dict[str, Any]) -> None:
    if "output" in document:
        _read_response(answer, document)
        return
    for part in document["choices"]:
        _read_choice(answer.choice(part["index"]), part, part.get("message") or part)
    _read_usage(answer, document.get("usage"))


def read_event(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event and "choices" not in event and "type" not in event:
        answer.error = event["error"]["code"]
    elif "choices" in event:
        for part in event["choices"]:
            _read_choice(answer.choice(part["index"]), part, part.get("delta") or part)
        _read_usage(answer, event.get("usage"))
    elif event["type"] in ("response.completed", "response.incomplete", "response.failed"):
        pieces = answer.choices.pop(0, Choice())
        _read_response(answer, event["response"])
        whole = answer.choice(0)
        if (pieces.text, pieces.thought) != (whole.text, whole.thought):
            answer.problem = f"events with {pieces}, the response at their end with {whole}"
    elif event["type"] == "response.output_text.delta":
        answer.choice(0).text += event["delta"]
    elif event["type"] == "response.reasoning_text.delta":
        answer.choice(0).thought += event["delta"]


def _read_choice(choice: Choice, part: dict[str, Any], message: dict[str, Any]) -> None:
    choice.text += message.get("content") or message.get("text") or ""
    choice.thought += message.get("reasoning_content") or ""
    for i, call in enumerate(message.get("tool_calls") or []):
        own = choice.calls.setdefault(call.get("index", i), ["", ""])
        own[0] += call["function"].get("name") or ""
        own[1] += call["function"].get("arguments") or ""
    choice.finish_reason = part.get("finish_reason") or choice.finish_reason
    logprobs = part.get("logprobs") or {}
    choice.logprobs += [token["logprob"] for token in logprobs.get("content") or []]
    choice.logprobs += [it for it in logprobs.get("token_logprobs") or [] if it is not None]


def _read_response(answer: Answer, document: dict[str, Any]) -> None:
    choice = answer.choice(0)
    for item in document["output"]:
        if item["type"] == "function_call":
            choice.calls[len(choice.calls)] = [item["name"], item["arguments"]]
        for part in item.get("content") or []:
            choice.text += part["text"] if part["type"] == "output_text" else ""
            choice.thought += part["text"] if part["type"] == "reasoning_text" else ""
    choice.finish_reason = {"completed": "stop", "incomplete": "length"}.get(document["status"], document["status"])
    _read_usage(answer, document.get("usage"))


def _read_usage(answer: Answer, usage: dict[str, Any] | None) -> None:
    if usage:
        answer.num_prompt_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
        answer.num_tokens = usage.get("completion_tokens", usage.get("output_tokens"))


async def ask(http: httpx.AsyncClient, job: Job, *, stream: bool) -> Answer:
    """Send a job, as a stream only if it is one; raises nothing."""
    answer = Answer()
    headers = {"Authorization": f"Bearer {job.key}", "Content-Type": "application/json"}
    content = job.content(stream=stream)
    try:
        async with http.stream("POST", job.path, content=content, headers=headers) as response:
            answer.status = response.status_code
            if not response.headers["content-type"].startswith("text/event-stream"):
                document = json.loads(await response.aread())
                if response.status_code == 200:
                    read_document(answer, document)
                else:
                    answer.error = document["error"]["code"]
                return answer
            await _read_stream(answer, response, job.leaves_after)
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        answer.problem = repr(error)
    return answer


async def _read_stream(answer: Answer, response: httpx.Response, leaves_after: int | None) -> None:
    num_events = 0
    last = ""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        last = line.removeprefix("data: ")
        if last == "[DONE]":
            continue
        read_event(answer, json.loads(last))
        num_events += 1
        if num_events == leaves_after:
            answer.has_left = True
            return
    if last != "[DONE]" and not last.startswith('{"type"'):  # /v1/responses ends with an event
        answer.problem = f"a stream without an end: {last}"


# ---- what the server says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """The server between two rounds, at rest."""

    samples: dict[str, float]
    resident_bytes: int

    def gained(self, before: Figures, name: str) -> float:
        return self.samples.get(name, 0) - before.samples.get(name, 0)


async def figures(http: httpx.AsyncClient) -> Figures:
    deadline = time.monotonic() + 60
    while True:
        text = (await http.get("/metrics")).text
        samples = {name: float(value) for name, value in re.findall(r"^xgdn_(\S+) (\S+)$", text, re.MULTILINE)}
        held = {name: samples[name] for name in AT_REST if samples[name]}
        if not held:
            return Figures(samples, _resident_bytes())
        if time.monotonic() > deadline:
            fail(f"after a round the server still holds {held}")
        await asyncio.sleep(0.02)


AT_REST = ("requests_waiting", "requests_running", "slots_used", "kv_blocks_used")


def _resident_bytes() -> int:
    """The server is this process's only child."""
    (child,) = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def disagreements(
    before: Figures, after: Figures, answers: Sequence[Answer], wanted: Sequence[Answer]
) -> Iterator[str]:
    """Yield what the server counted otherwise than the clients.

    Of an answer that was left, it counts the prompt, and of the reply what it computed before it knew.
    """
    pairs = list(zip(answers, wanted, strict=True))
    whole = [want for answer, want in pairs if not answer.has_left]
    left = [want for answer, want in pairs if answer.has_left]
    reasons = Counter(FINISHED[choice.finish_reason] for want in whole for choice in want.choices.values())
    num_left = sum(len(want.choices) for want in left)
    num_choices = sum(reasons.values()) + num_left
    spans = {
        "prompt_tokens_total": (sum(want.num_prompt_tokens for want in wanted), 0),
        "generated_tokens_total": (sum(want.num_tokens for want in whole), sum(want.num_tokens for want in left)),
        'finished_total{reason="error"}': (0, 0),
    }
    for reason in ("stop", "length", "cancelled"):
        spans[f'finished_total{{reason="{reason}"}}'] = (reasons[reason], num_left)
    for code, count in Counter(want.error for want in wanted if want.error).items():
        spans[f'errors_total{{type="{code}"}}'] = (count, 0)
    for name, (least, open_) in spans.items():
        if not least <= (gained := after.gained(before, name)) <= least + open_:
            yield f"{name} grew by {gained:g}, by the answers it must be {least} to {least + open_}"
    finished = sum(after.gained(before, name) for name in after.samples if name.startswith("finished_total"))
    if finished != num_choices:
        yield f"{finished:g} sequences finished, {num_choices} were asked for"
    errors = sum(after.gained(before, name) for name in after.samples if name.startswith("errors_total"))
    if errors != sum(want.error is not None for want in wanted):
        yield f"{errors:g} errors were told, {sum(want.error is not None for want in wanted)} came"


FINISHED = {"stop": "stop", "length": "length", "tool_calls": "stop"}


# ---- the load -------------------------------------------------------------------------------------------------------


async def together(http: httpx.AsyncClient, jobs: Sequence[Job], order: Sequence[int], clients: int) -> list[Answer]:
    """Ask the jobs in an order, so many at once; return the answers in the order of the jobs."""
    answers: list[Answer | None] = [None] * len(jobs)
    left = iter(order)

    async def client() -> None:
        for i in left:
            answers[i] = await ask(http, jobs[i], stream=True)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answer for answer in answers if answer is not None]


async def run(url: str, jobs: Sequence[Job], clients: int, rounds: int, min_equal: float) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    problems: list[str] = []
    rows: list[list[str]] = []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as http:
        wanted = [await ask(http, job, stream=False) for job in jobs]
        problems += [f"alone: {want.problem}: {job}" for want, job in zip(wanted, jobs, strict=True) if want.problem]
        seen: list[Figures] = [await figures(http)]
        for i in range(rounds):
            order = random.Random(i).sample(range(len(jobs)), len(jobs))
            begin = time.perf_counter()
            answers = await together(http, jobs, order, clients)
            seconds = time.perf_counter() - begin
            seen.append(await figures(http))
            differences = [answer.difference(want) for answer, want in zip(answers, wanted, strict=True)]
            wrong = [f"round {i + 1}: {it}: {job}" for it, job in zip(differences, jobs, strict=True) if it]
            if len(wrong) > (1 - min_equal) * len(jobs):
                problems += wrong
            if not wrong or min_equal == 1:
                problems += [f"round {i + 1}: {it}" for it in disagreements(seen[-2], seen[-1], answers, wanted)]
            rows.append(_row(i + 1, len(answers), len(wrong), answers, seen[-2], seen[-1], seconds))
    growth = seen[-1].resident_bytes / seen[1].resident_bytes - 1
    if growth > MEMORY_SHARE:
        problems.append(f"the server's memory grew by {growth:.1%} after the first round")
    print(machine())
    print(markdown(HEADINGS, rows))
    print(f"{_statuses(wanted)}; memory {growth:+.2%} since the first round")
    if problems:
        fail("\n".join([*problems[:10], f"{len(problems)} problems"]))


HEADINGS = ["round", "answered", "wrong", "left", "seconds", "tokens/s", "steps", "outside the forward", "memory, MiB"]


def _row(
    number: int, count: int, wrong: int, answers: Sequence[Answer], before: Figures, after: Figures, seconds: float
) -> list[str]:
    overhead = 1 - after.gained(before, "forward_seconds_total") / after.gained(before, "step_seconds_total")
    return [
        str(number),
        str(count),
        str(wrong),
        str(sum(answer.has_left for answer in answers)),
        f"{seconds:.1f}",
        f"{after.gained(before, 'generated_tokens_total') / seconds:.0f}",
        f"{after.gained(before, 'steps_total'):.0f}",
        f"{overhead:.2%}",
        f"{after.resident_bytes / 2**20:.1f}",
    ]


def _statuses(answers: Sequence[Answer]) -> str:
    counts = Counter(answer.error or "answered" for answer in answers)
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


def with_template(model: Path, folder: Path) -> Path:
    """The model with the chat template of a model that calls tools and thinks, in an empty folder."""
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file.resolve())
    (folder / "chat_template.jinja").write_text(HERMES)
    return folder


def main(
    options: Annotated[list[str] | None, typer.Argument(help="Further options of `xgdn serve`, after --.")] = None,
    model: Path = CHECKPOINT,
    requests: int = 500,
    clients: int = 64,
    rounds: int = 3,
    seed: int = 0,
    dtype: str = "float32",
    min_equal: Annotated[float, typer.Option(help="Share of the answers that must be right, for bfloat16.")] = 1,
) -> None:
    """Load a server with every feature mixed."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    jobs = Draw(seed, lambda text: tokenizer.encode(text).ids).jobs(requests)
    features = Counter(feature for job in jobs for feature in job.features)
    print(", ".join(f"{name} {count}" for name, count in sorted(features.items())))
    # With an arena for each thread, glibc's memory grows by fragments for as long as threads come and go.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    fixed = ["--model-name", NAME, "--dtype", dtype, "--max-batch-size", str(SLOTS), "--max-queue", str(QUEUE)]
    fixed += ["--max-cached-tokens", str(SLOTS * 1024), "--max-stored-responses", "16"]
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(with_template(model, Path(folder)), [*fixed, *(options or [])], KEY) as url,
    ):
        asyncio.run(run(url, jobs, clients, rounds, min_equal))


if __name__ == "__main__":
    typer.run(main)
