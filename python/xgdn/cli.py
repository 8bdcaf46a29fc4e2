# SPDX-License-Identifier: Apache-2.0
"""The command line: `xgdn generate`, `xgdn serve`, `xgdn plan`, `xgdn bench` and `xgdn doctor`."""

import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

import xgdn
from xgdn.detokenize import Detokenizer
from xgdn.progress import Bar
from xgdn.sampling_defaults import SamplingDefaults, first_given, read_sampling_defaults
from xgdn.tokenizer_files import eos_token_ids, load_tokenizer
from xgdn.vocabulary import Vocabulary

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Serves models with the gated delta rule (Qwen3-Next, Qwen3.5)."
)

bench_app = typer.Typer(no_args_is_help=True, help="Measures beside the machine's limit, after a check of the results.")
app.add_typer(bench_app, name="bench")

_MAX = 2**31 - 1  # of ids and counts
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StateDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


# Options of every command that loads an engine.
ModelArgument = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Directory with config.json and safetensors.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and activations; default the checkpoint's.")]
StateDtypeOption = Annotated[StateDtype, typer.Option(help="Of the delta-rule states.")]
DeviceOption = Annotated[str, typer.Option(help="Of weights, activations and pools: cpu or npu:0.")]
PrefillBackendOption = Annotated[str, typer.Option(help="Runs prompts; see `xgdn doctor`.")]
DecodeBackendOption = Annotated[str, typer.Option(help="Runs single tokens; see `xgdn doctor`.")]
MaxBatchSizeOption = Annotated[int, typer.Option(min=0, max=_MAX, metavar="N", help="Sequences that run at once.")]
MaxCachedTokensOption = Annotated[int, typer.Option(min=0, max=_MAX, metavar="N", help="Size of the KV cache.")]
MaxTokensPerStepOption = Annotated[int, typer.Option(min=0, max=_MAX, metavar="N", help="Longest piece of a prompt.")]
MemoryLimitOption = Annotated[str, typer.Option(metavar="BYTES", help="Refuse to exceed it: 8GiB, 500MiB, 123456.")]
GenerationConfigOption = Annotated[
    str,
    typer.Option(
        metavar="auto|none|PATH",
        help="Where temperature, top_k and top_p come from when nothing else sets them: auto is the model's "
        "generation_config.json.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document.")]


class Reply:
    """What has been generated for one branch of a prompt: ids, and text where there is a tokenizer."""

    def __init__(self, index: int, branch: int, request: xgdn.Request, vocabulary: Vocabulary | None) -> None:
        self.name = f"{index}.{branch}" if request.n > 1 else str(index)
        self.index = index
        self.branch = branch
        self.prompt = request.prompt
        self.tokens: list[int] = []
        self.logprobs: list[xgdn.Logprobs] | None = None if request.sampling.logprobs is None else []
        self.text = ""
        self._detokenizer = None if vocabulary is None else Detokenizer(vocabulary, self.prompt)
        self._begin = time.perf_counter()
        self._token_times: list[float] = []

    def apply(self, event: xgdn.RequestEvent) -> str:
        """Book an event and return what it adds to the output."""
        piece = ""
        if event.token is not None:
            self._token_times.append(time.perf_counter())
            self.tokens.append(event.token)
            if self.logprobs is not None and event.logprobs is not None:
                self.logprobs.append(event.logprobs)
            if self._detokenizer is None:
                piece = f" {event.token}" if self.text else str(event.token)
            else:
                piece = self._detokenizer.push(event.token)
        if event.finish_reason != xgdn.FinishReason.RUNNING and self._detokenizer is not None:
            piece += self._detokenizer.finish()
        self.text += piece
        return piece

    def document(self, event: xgdn.RequestEvent) -> dict[str, object]:
        """The reply as a JSON object, with the event that ended it."""
        times = self._token_times
        return {
            "index": self.index,
            "branch": self.branch,
            "prompt_ids": self.prompt,
            "ids": self.tokens,
            "logprobs": None if self.logprobs is None else [_logprobs_document(it) for it in self.logprobs],
            "text": None if self._detokenizer is None else self.text,
            "finish_reason": event.finish_reason.name.lower(),
            "error": event.error or None,
            "seconds_to_first_token": times[0] - self._begin if times else None,
            "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        }


def _logprobs_document(logprobs: xgdn.Logprobs) -> dict[str, object]:
    top = [{"id": rival.token, "logprob": rival.logprob} for rival in logprobs.top]
    return {"logprob": logprobs.chosen, "top": top}


def _fail(message: object) -> NoReturn:
    typer.echo(f"xgdn: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (xgdn.errors.Error, RuntimeError) as error:  # RuntimeError: torch's own, such as an allocation that fails
        _fail(error)
    except MemoryError as error:
        _fail(f"out of memory ({error}); --max-batch-size and --max-cached-tokens size the pools")


def _parse_ids(text: str, option: str) -> list[int]:
    try:
        ids = [int(word) for word in text.split(",")] if text.strip() else []
    except ValueError:
        raise typer.BadParameter(f"expected ids like 1,2,3, got {text!r}", param_hint=option) from None
    if any(abs(token) > _MAX for token in ids):
        raise typer.BadParameter(f"expected 32-bit ids, got {text!r}", param_hint=option)
    return ids


def _load_tokenizer(model: Path) -> Tokenizer:
    path = model / "tokenizer.json"
    if not path.is_file():
        _fail(f"{path} is missing, so text cannot be read; `xgdn generate` takes token ids with --prompt-ids")
    try:
        return load_tokenizer(model)
    except ValueError as error:
        _fail(error)


def _eos_token_ids(model: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        return eos_token_ids(model, tokenizer)
    except ValueError as error:
        _fail(error)


def _sampling_defaults(source: str, model: Path) -> SamplingDefaults:
    try:
        defaults = read_sampling_defaults(source, model)
    except ValueError as error:
        _fail(error)
    for problem in defaults.problems:
        typer.echo(f"xgdn: {problem}", err=True)
    return defaults


def _parse_bytes(text: str) -> int | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,15}) ?(KiB|MiB|GiB|TiB|)", text)
    if match is None:
        raise typer.BadParameter(f"expected bytes like 8GiB or 123456, got {text!r}", param_hint="--memory-limit")
    return int(match[1]) * _UNITS[match[2]]


def _readable(num_bytes: int) -> str:
    unit = next((unit for unit in reversed(_UNITS) if num_bytes >= _UNITS[unit]), "")
    return f"{num_bytes / _UNITS[unit]:.2f} {unit}" if unit else str(num_bytes)


def _print_plan(planned: xgdn.Plan, limit: int | None, fits: dict[str, int]) -> None:
    slots = f"{planned.num_state_slots} sequences of {planned.state_slot_bytes}"
    blocks = f"{planned.num_kv_blocks} blocks of {planned.kv_block_bytes}, {planned.kv_block_size} tokens each"
    table = Table("what", "bytes", "", "made of")
    for what, num_bytes, parts in [
        ("weights", planned.weight_bytes, ""),
        ("states", planned.state_bytes, slots),
        ("KV cache", planned.kv_bytes, blocks),
        ("largest step", planned.workspace_bytes, "at most"),
        ("total", planned.total_bytes, "" if limit is None else f"of {limit}"),
    ]:
        table.add_row(what, Text(str(num_bytes), justify="right"), _readable(num_bytes), parts)
    console = Console()
    console.print(table)
    if planned.max_context:
        console.print(f"a sequence may have {planned.max_context} tokens")
    for length, count in fits.items():
        console.print(Text(f"{count} sequences of {length} tokens fit into {limit} bytes"), soft_wrap=True)


def _load_engine(
    model: Path,
    runner: xgdn.RunnerOptions,
    dtype: Dtype | None,
    state_dtype: StateDtype,
    device: str,
    prefill_backend: str,
    decode_backend: str,
    memory_limit: int | None,
) -> xgdn.Engine:
    loading = Bar("loading layers")
    try:
        return xgdn.Engine(
            model,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            state_dtype=getattr(torch, state_dtype.value),
            device=device,
            runner=runner,
            prefill_backend=prefill_backend,
            decode_backend=decode_backend,
            on_layer_loaded=loading.update,
            memory_limit=memory_limit,
        )
    finally:
        loading.hide()


def _run(engine: xgdn.Engine, requests: Sequence[xgdn.Request], vocabulary: Vocabulary | None, as_json: bool) -> bool:
    """Print the replies as they come; False when one of them ended with an error."""
    is_single = sum(request.n for request in requests) == 1 and not as_json
    ids = [engine.submit(request) for request in requests]
    replies = {
        (ids[index], branch): Reply(index, branch, request, vocabulary)
        for index, request in enumerate(requests)
        for branch in range(request.n)
    }
    bar = Bar("reading prompts")
    num_prefilled = dict.fromkeys(ids, 0)
    num_prompt_tokens = sum(len(request.prompt) for request in requests)
    bar.update(0, num_prompt_tokens)
    succeeded = True
    try:
        while not engine.is_idle():
            events = engine.step()
            num_prefilled.update((event.id, event.num_prefilled) for event in events)
            bar.update(sum(num_prefilled.values()), num_prompt_tokens)
            for event in events:
                reply = replies[event.id, event.branch]
                piece = reply.apply(event)
                is_finished = event.finish_reason != xgdn.FinishReason.RUNNING
                if is_finished or (is_single and piece):
                    bar.hide()
                if is_single:
                    typer.echo(piece, nl=is_finished and bool(reply.text))
                elif is_finished:
                    typer.echo(json.dumps(reply.document(event)) if as_json else f"[{reply.name}] {reply.text}")
                if event.error:
                    succeeded = False
                    typer.echo(f"xgdn: prompt {reply.name}: {event.error}", err=True)
    finally:
        bar.hide()
    return succeeded


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, taken as it is; repeatable.")] = None,
    prompt_ids: Annotated[list[str] | None, typer.Option(help="A prompt as token ids: 1,2,3; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, max=_MAX, metavar="N", help="Longest reply.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token. Default the model's, else 0.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MAX, metavar="N", help="Sample among the k likeliest; 0: all. Default the model's, else 0."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest that reach this share. Default the model's, else 1."),
    ] = None,
    generation_config: GenerationConfigOption = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=_MAX, metavar="N", help="Of the random choice; counts up within --n.")
    ] = 0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=_MAX, metavar="N", help="Replies to each prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MAX, metavar="K", help="With --json: of each token, and of the K likeliest beside it, up to 20."
        ),
    ] = None,
    dtype: DtypeOption = None,
    state_dtype: StateDtypeOption = StateDtype.float32,
    device: DeviceOption = "cpu",
    prefill_backend: PrefillBackendOption = "auto",
    decode_backend: DecodeBackendOption = "auto",
    max_batch_size: MaxBatchSizeOption = 32,
    max_cached_tokens: MaxCachedTokensOption = 16384,
    max_tokens_per_step: MaxTokensPerStepOption = 512,
    memory_limit: MemoryLimitOption = "",
    stop_token_ids: Annotated[str, typer.Option(help="Further token ids that end a reply: 1,2,3.")] = "",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document per reply.")] = False,
) -> None:
    """Continue prompts. Text comes out for text, token ids for token ids.

    A single reply appears as it is generated, several as they are finished, with their numbers: [2] replies to the
    third prompt, with --n [2.1] is the second reply to it.
    """
    if bool(prompt) == bool(prompt_ids):
        raise typer.BadParameter("give prompts either as --prompt or as --prompt-ids")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("expected --json with it", param_hint="--logprobs")
    stop_ids = _parse_ids(stop_token_ids, "--stop-token-ids")
    limit = _parse_bytes(memory_limit)
    defaults = _sampling_defaults(generation_config, model)
    tokenizer = _load_tokenizer(model) if prompt or (model / "tokenizer.json").is_file() else None
    if tokenizer is not None and not ignore_eos:
        stop_ids += _eos_token_ids(model, tokenizer)
    if prompt and tokenizer is not None:
        prompts = [tokenizer.encode(text).ids for text in prompt]
    else:
        prompts = [_parse_ids(text, "--prompt-ids") for text in prompt_ids or []]

    with _errors_in_one_line():
        engine = _load_engine(
            model,
            xgdn.RunnerOptions(
                max_batch_size=max_batch_size,
                max_cached_tokens=max_cached_tokens,
                max_tokens_per_step=max_tokens_per_step,
            ),
            dtype,
            state_dtype,
            device,
            prefill_backend,
            decode_backend,
            limit,
        )
        asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        recommended = defaults.without(name for name, value in asked.items() if value is not None)
        if recommended.values():
            typer.echo(f"xgdn: {recommended}, as the model's generation_config.json says", err=True)
        requests = [
            xgdn.Request(
                ids,
                max_new_tokens=max_new_tokens,
                sampling=xgdn.SamplingParams(
                    temperature=first_given(temperature, defaults.temperature, 0.0),
                    top_k=first_given(top_k, defaults.top_k, 0),
                    top_p=first_given(top_p, defaults.top_p, 1.0),
                    seed=seed,
                    logprobs=logprobs,
                ),
                stop_token_ids=stop_ids,
                ignore_eos=ignore_eos,
                n=n,
            )
            for ids in prompts
        ]
        vocabulary = Vocabulary(tokenizer) if tokenizer is not None and (prompt or as_json) else None
        succeeded = _run(engine, requests, vocabulary, as_json)
    if not succeeded:
        raise typer.Exit(1)


@app.command()
def plan(
    model: ModelArgument,
    dtype: DtypeOption = None,
    state_dtype: StateDtypeOption = StateDtype.float32,
    max_batch_size: MaxBatchSizeOption = 32,
    max_cached_tokens: MaxCachedTokensOption = 16384,
    max_tokens_per_step: MaxTokensPerStepOption = 512,
    memory_limit: MemoryLimitOption = "",
    length: Annotated[
        list[int] | None, typer.Option(min=1, max=_MAX, metavar="N", help="Tokens of a sequence; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the memory that a model would take, and how many sequences fit into a limit, before anything is loaded."""
    limit = _parse_bytes(memory_limit)
    with _errors_in_one_line():
        planned = xgdn.plan(
            model,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            state_dtype=getattr(torch, state_dtype.value),
            runner=xgdn.RunnerOptions(
                max_batch_size=max_batch_size,
                max_cached_tokens=max_cached_tokens,
                max_tokens_per_step=max_tokens_per_step,
            ),
        )
    lengths = length or [512, 2048, 8192]
    fits = {} if limit is None else {str(n): planned.max_sequences(n, limit) for n in lengths}
    if as_json:
        names = [name for name in dir(planned) if name.endswith("_bytes") or name.startswith(("num_", "max_context"))]
        numbers = {name: getattr(planned, name) for name in names}
        typer.echo(json.dumps({**numbers, "memory_limit": limit, "max_sequences": fits}))
    else:
        _print_plan(planned, limit, fits)
    if limit is not None and planned.total_bytes > limit:
        _fail(f"expected {planned.total_bytes} bytes to fit into --memory-limit, got {limit}")


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at, or a name for several; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; default the folder's name.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="XGDN_API_KEY", help="What clients of /v1 must present; default nothing.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages that may call: http://localhost:3000, or * for all; repeatable. Default none.",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, max=_MAX, metavar="N", help="Sequences that wait before further ones are refused.")
    ] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1, max=_MAX, metavar="N", help="Of a request.")] = 4 * 2**20,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, max=_MAX, metavar="N", help="How long running requests may go on after SIGTERM.")
    ] = 30,
    generation_config: GenerationConfigOption = "auto",
    dtype: DtypeOption = None,
    state_dtype: StateDtypeOption = StateDtype.float32,
    device: DeviceOption = "cpu",
    prefill_backend: PrefillBackendOption = "auto",
    decode_backend: DecodeBackendOption = "auto",
    max_batch_size: MaxBatchSizeOption = 32,
    max_cached_tokens: MaxCachedTokensOption = 16384,
    max_tokens_per_step: MaxTokensPerStepOption = 512,
    memory_limit: MemoryLimitOption = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document with the address when requests are taken.")
    ] = False,
) -> None:
    """Serve a model over HTTP as OpenAI does: /v1/completions, /v1/chat/completions, /v1/models.

    Beside them: /health, /metrics for Prometheus, and a page at / that shows the engine and takes a prompt.
    """
    try:
        from xgdn.server.app import Settings, create_app
        from xgdn.server.serve import address_of, bind
        from xgdn.server.serve import serve as serve_app
    except ModuleNotFoundError as error:
        _fail(f"`xgdn serve` needs {error.name}, which is not installed: pip install 'xgdn[serve]'")

    limit = _parse_bytes(memory_limit)
    tokenizer = _load_tokenizer(model)
    settings = Settings(
        model_dir=model,
        model_name=model_name or model.resolve().name,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        api_key=api_key,
        allowed_origins=allow_origin or (),
        sampling_defaults=_sampling_defaults(generation_config, model),
    )
    try:
        listeners = bind(host, port)  # before the model is loaded, which may take long
    except OSError as error:
        _fail(f"{host}:{port}: {error.strerror}")
    with _errors_in_one_line():
        engine = _load_engine(
            model,
            xgdn.RunnerOptions(
                max_batch_size=max_batch_size,
                max_cached_tokens=max_cached_tokens,
                max_tokens_per_step=max_tokens_per_step,
            ),
            dtype,
            state_dtype,
            device,
            prefill_backend,
            decode_backend,
            limit,
        )
    try:
        server_app = create_app(engine, tokenizer, settings)
    except ValueError as error:
        _fail(error)

    if settings.sampling_defaults.values():
        typer.echo(f"xgdn: requests without them get {settings.sampling_defaults} (generation_config.json)", err=True)

    if server_app.state.problem:
        typer.echo(f"xgdn: chat is not served: {server_app.state.problem}", err=True)

    def announce() -> None:
        addresses = [address_of(listener) for listener in listeners]
        if as_json:
            where = {"address": addresses[0], "addresses": addresses, "model": settings.model_name}
            typer.echo(json.dumps(where))
        else:
            typer.echo(f"xgdn: serving {settings.model_name} at {', '.join(addresses)}", err=True)

    try:
        serve_app(server_app, listeners, shutdown_seconds, announce)
    except OSError as error:
        _fail(f"{host}:{port}: {error.strerror}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show which backend serves which op here, why the others do not, and whose bits do not depend on the batch."""
    versions = {
        "xgdn": importlib.metadata.version("xgdn"),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    with _errors_in_one_line():
        reports = xgdn.doctor()
    if as_json:
        typer.echo(json.dumps({**versions, "backends": [report._asdict() for report in reports]}))
        return

    backends = list(dict.fromkeys(report.backend for report in reports))
    ops = list(dict.fromkeys(report.op for report in reports))
    by_cell = {(report.op, report.backend): report for report in reports}
    table = Table("op", *backends)
    for op in ops:
        cells = [by_cell[op, backend] for backend in backends]
        words = ["selected" if c.is_selected else "-" if c.why_not else "yes" for c in cells]
        table.add_row(op, *(Text(word, style="bold green" if word == "selected" else "") for word in words))
    console = Console()
    console.print(Text("  ".join(f"{name} {value}" for name, value in versions.items())), soft_wrap=True)
    console.print(table)
    for backend in backends:
        for why in dict.fromkeys(r.why_not for r in reports if r.backend == backend and r.why_not):
            names = [op for op in ops if by_cell[op, backend].why_not == why]
            about = "" if len(names) == len(ops) else f" ({', '.join(names)})"
            console.print(Text(f"{backend}: {why}{about}"), soft_wrap=True)
        invariant = [op for op in ops if by_cell[op, backend].is_batch_invariant]
        if invariant:
            console.print(Text(f"{backend}: batch-invariant: {', '.join(invariant)}"), soft_wrap=True)


def _parse_counts(text: str, option: str) -> list[int]:
    counts = _parse_ids(text, option)
    if any(count < 1 for count in counts):
        raise typer.BadParameter(f"expected counts like 1,8,32, got {text!r}", param_hint=option)
    return counts


class _Row(Protocol):
    def document(self) -> dict[str, Any]: ...


_AnyRow = TypeVar("_AnyRow", bound=_Row)


def _show_rows(rows: Sequence[_AnyRow], print_table: Callable[[Sequence[_AnyRow]], None], as_json: bool) -> None:
    """What was measured, and on which machine."""
    from xgdn.bench.report import machine

    if as_json:
        typer.echo(json.dumps({"machine": machine(), "rows": [row.document() for row in rows]}))
        return
    typer.echo("  ".join(f"{name} {value}" for name, value in machine().items()))
    print_table(rows)


@bench_app.command("ops")
def bench_ops(
    decode: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes of decode.")] = "1,8,32",
    verify: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes of verification, 4 drafts each.")] = "8",
    prefill: Annotated[str, typer.Option(metavar="T,..", help="Prompt lengths.")] = "512,2048,8192",
    threads: Annotated[str, typer.Option(metavar="N,..", help="Numbers of threads.")] = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Per contestant and problem.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """The ops in the shape of Qwen3-Next-80B and Qwen3.5-35B: 16 key heads, 32 value heads, head dims of 128."""
    from xgdn.bench.ops import OpsBenchmark, Plan
    from xgdn.bench.report import print_rows

    plan = Plan(
        decode=_parse_counts(decode, "--decode"),
        verify=_parse_counts(verify, "--verify"),
        prefill=_parse_counts(prefill, "--prefill"),
        threads=_parse_counts(threads, "--threads"),
    )
    torch.manual_seed(0)
    bar = Bar("measuring")
    with torch.no_grad(), _errors_in_one_line():
        try:
            rows = OpsBenchmark(seconds=seconds).run(plan, bar.update)
        finally:
            bar.hide()
    _show_rows(rows, print_rows, as_json)


@bench_app.command("layer")
def bench_layer(
    batch: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes.")] = "1,8,32",
    threads: Annotated[str, typer.Option(metavar="N,..", help="Numbers of threads.")] = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Per contestant and batch size.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """A layer's decode step in bf16, of the same shape, hidden size 2048: what it takes beside its projections."""
    from xgdn.bench.layer import LayerBenchmark
    from xgdn.bench.report import print_layer_rows

    batches, counts = _parse_counts(batch, "--batch"), _parse_counts(threads, "--threads")
    torch.manual_seed(0)
    with torch.no_grad(), _errors_in_one_line():
        benchmark = LayerBenchmark(seconds=seconds)
        rows = [
            benchmark.decode(size, dtype, count)
            for count in counts
            for dtype in (torch.float32, torch.bfloat16)
            for size in batches
        ]
    _show_rows(rows, print_layer_rows, as_json)


@bench_app.command("linear")
def bench_linear(
    tokens: Annotated[str, typer.Option(metavar="T,..", help="Rows of the product.")] = "1,8,32,128,512,2048",
    threads: Annotated[str, typer.Option(metavar="N,..", help="Numbers of threads.")] = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Per contestant and product.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """The projections of a layer of Qwen3.5-0.8B in bf16, beside torch's."""
    from xgdn.bench.linear import SHAPES, LinearBenchmark
    from xgdn.bench.report import print_linear_rows

    sizes, counts = _parse_counts(tokens, "--tokens"), _parse_counts(threads, "--threads")
    torch.manual_seed(0)
    problems = [(matrix, size, count) for count in counts for matrix in SHAPES for size in sizes]
    bar = Bar("measuring")
    rows = []
    with torch.no_grad(), _errors_in_one_line():
        benchmark = LinearBenchmark(seconds=seconds)
        try:
            for i, problem in enumerate(problems):
                bar.update(i, len(problems))
                rows.append(benchmark.run(*problem))
        finally:
            bar.hide()
    _show_rows(rows, print_linear_rows, as_json)


def _parse_rates(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 for rate in rates):  # a NaN is not above 0 either
        raise typer.BadParameter(f"expected requests per second like 1,2.5,inf, got {text!r}", param_hint="--rate")
    return rates


def _parse_range(text: str, option: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    lowest, highest = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= lowest <= highest:
        raise typer.BadParameter(f"expected counts like 32-512 or 64, got {text!r}", param_hint=option)
    return lowest, highest


@bench_app.command("model")
def bench_model(
    model: ModelArgument,
    batch: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes.")] = "1,8,32",
    threads: Annotated[str, typer.Option(metavar="N,..", help="Numbers of threads.")] = "1,2",
    prompt_tokens: Annotated[int, typer.Option(min=1, max=_MAX, metavar="N", help="Of every prompt.")] = 128,
    steps: Annotated[int, typer.Option(min=1, max=_MAX, metavar="N", help="That are timed, at each batch size.")] = 32,
    dtype: DtypeOption = None,
    state_dtype: StateDtypeOption = StateDtype.float32,
    prefill_backend: PrefillBackendOption = "auto",
    decode_backend: DecodeBackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Decode steps of a whole model, and what of them is not its forward. The limit reads its weights once."""
    from xgdn.bench.model import ModelBenchmark
    from xgdn.bench.report import print_model_rows

    batches, counts = _parse_counts(batch, "--batch"), _parse_counts(threads, "--threads")
    with _errors_in_one_line():
        benchmark = ModelBenchmark(
            lambda runner: _load_engine(
                model, runner, dtype, state_dtype, "cpu", prefill_backend, decode_backend, None
            ),
            prompt_tokens=prompt_tokens,
            steps=steps,
        )
        rows = [row for count in counts for row in benchmark.run(batches, count)]
    _show_rows(rows, print_model_rows, as_json)


@bench_app.command("serving")
def bench_serving(
    model: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="What to serve; with --url only its vocabulary counts.")
    ],
    serve_options: Annotated[
        list[str] | None, typer.Argument(metavar="-- SERVE_OPTION", help="Options of `xgdn serve`, after --.")
    ] = None,
    rate: Annotated[str, typer.Option(metavar="R,..", help="Requests per second; inf: all at once.")] = "1,2,4,inf",
    requests: Annotated[int, typer.Option(min=1, max=_MAX, metavar="N", help="At each rate.")] = 100,
    prompt_tokens: Annotated[str, typer.Option(metavar="N-N", help="Of a prompt, evenly drawn.")] = "32-512",
    output_tokens: Annotated[str, typer.Option(metavar="N-N", help="To ask for, evenly drawn.")] = "16-128",
    seed: Annotated[int, typer.Option(min=0, max=_MAX, metavar="N", help="Of arrivals, lengths and token ids.")] = 0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, max=_MAX, metavar="N", help="Requests under way at most; default no limit.")
    ] = None,
    check: Annotated[
        int, typer.Option(min=1, max=_MAX, metavar="N", help="Requests whose answers are compared with those alone.")
    ] = 8,
    min_equal: Annotated[
        float, typer.Option(min=0, max=1, help="Share of them that must be equal; below 1 for bfloat16.")
    ] = 1.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of full length; not every server knows the field.")
    ] = True,
    url: Annotated[str | None, typer.Option(help="Drive the server that runs there instead of an own one.")] = None,
    model_name: Annotated[str | None, typer.Option(help="What it calls the model; default its first one.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="XGDN_API_KEY", help="What /v1 asks for.")] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="A request fails when the server is silent for longer.")
    ] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """A load on `xgdn serve MODEL`, or on any server with OpenAI's interface: latencies and throughput at each rate.

    Requests arrive as a Poisson process; prompts are token ids, answers greedy streams. It is an error when an answer
    under load differs from the one that the same request got alone, or when /metrics disagrees with the answers.
    """
    try:
        from xgdn.bench.client import Target
        from xgdn.bench.report import machine, print_serving_rows
        from xgdn.bench.server_process import running_server, vocab_size
        from xgdn.bench.serving import LoadPlan, ServingBenchmark, problems
        from xgdn.bench.workload import Lengths, Workload
    except ModuleNotFoundError as error:
        _fail(f"`xgdn bench serving` needs {error.name}, which is not installed: pip install 'xgdn[bench]'")

    if url is not None and serve_options:
        raise typer.BadParameter(f"the server of --url takes no options, got {' '.join(serve_options)!r}")
    lengths = [
        Lengths(*_parse_range(prompt_tokens, "--prompt-tokens")),
        Lengths(*_parse_range(output_tokens, "--output-tokens")),
    ]
    plan = LoadPlan(_parse_rates(rate), max_concurrency, check, min_equal)
    bar = Bar("answers")
    with _errors_in_one_line(), ExitStack() as stack:
        workload = Workload(
            requests,
            prompt_tokens=lengths[0],
            output_tokens=lengths[1],
            vocab_size=vocab_size(model),
            seed=seed,
        )
        address = url or stack.enter_context(running_server(model, serve_options or [], api_key))
        target = Target(address.rstrip("/").removesuffix("/v1"), model_name, api_key, ignore_eos, timeout)
        try:
            rows = ServingBenchmark(target, workload, plan).run(bar.update)
        finally:
            bar.hide()
    if as_json:
        drawn = {"requests": requests, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "seed": seed}
        load = {**drawn, "max_concurrency": max_concurrency, "serve_options": serve_options or [], "url": url}
        typer.echo(json.dumps({"machine": machine(), "load": load, "rows": [row.document() for row in rows]}))
    else:
        typer.echo("  ".join(f"{name} {value}" for name, value in machine().items()))
        print_serving_rows(rows)
    if found := [problem for row in rows for problem in problems(row, min_equal)]:
        _fail("; ".join(found))


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"xgdn {importlib.metadata.version('xgdn')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
