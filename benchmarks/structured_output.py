# SPDX-License-Identifier: Apache-2.0
"""Structured output: engines for grammars, answers of a model to random schemas, and the time that grammars add.

    python benchmarks/structured_output.py vocabulary FILE
    python benchmarks/structured_output.py engines FILE [--schemas 300] [--tokens 64]
    python benchmarks/structured_output.py answers [MODEL] [--schemas 300] [--tokens 512]
    python benchmarks/structured_output.py overhead MODEL FILE [--batch 32] [--steps 60] [--rounds 4]

`engines` compares llguidance and xgrammar, as far as they are installed: what each does with every keyword of JSON
Schema, the times to compile, to compute a mask and to accept a token. `vocabulary` makes the tokenizer for it, of the
size that Qwen3.5's has, from the text files that are installed beside this Python (a minute and a half).

`answers` asks a model for an answer to each of some random schemas and validates those that have ended by jsonschema,
another library. `overhead` measures steps of a batch in which every sequence has a grammar, and of one without, in
turns; the grammars are of FILE's vocabulary, whatever the model's own.
"""

import importlib.metadata
import json
import random
import statistics
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import xgdn
from json_schemas import KEYWORDS, KeywordCase, invalid, random_schemas
from markdown_table import markdown
from xgdn.bench.report import machine
from xgdn.engine import FinishReason
from xgdn.server.grammar_compiler import CompiledGrammar, GrammarCompiler
from xgdn.tokenizer_files import load_tokenizer
from xgdn.vocabulary import Vocabulary

SMALL = Path(__file__).parents[1] / "examples" / "tiny_model" / "checkpoint"

VOCAB_SIZE = 248_320  # of Qwen3.5, with its padding
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STOP = 0  # <|endoftext|>
# As Qwen's: words with the character before them, single digits, runs of other characters.
WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".json", ".h", ".c", ".html", ".js"}
MAX_FILE = 300_000  # bytes

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)


@app.command()
def vocabulary(file: Path, size: int = VOCAB_SIZE - 300) -> None:
    """Write a byte-level BPE tokenizer that is trained on the text files of this Python's installation."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.save(str(file))
    print(f"{file}: {tokenizer.get_vocab_size()} tokens")


def _texts() -> Iterator[str]:
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
    for root in sorted(roots):
        for file in sorted(root.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file() and file.stat().st_size < MAX_FILE:
                yield file.read_text(encoding="utf-8", errors="replace")


class Matcher(Protocol):
    def fill(self, mask: torch.Tensor) -> None: ...

    def accept(self, token: int) -> bool: ...


class Engine(Protocol):
    """A library; its matchers begin with every compiled schema. `compile` raises ValueError."""

    name: str

    def compile(self, schema: str) -> Callable[[], Matcher]: ...


class Llguidance:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import llguidance

        self.name = f"llguidance {importlib.metadata.version('llguidance')}"
        self._library = llguidance
        known = Vocabulary(tokenizer)
        names = [known.bytes(token) for token in range(vocab_size)]

        class Tokens:
            eos_token_id = STOP
            bos_token_id = None
            special_token_ids = [token for token, name in enumerate(names) if name is None]  # noqa: RUF012
            tokens = [b"\xff<%d>" % token if name is None else name for token, name in enumerate(names)]  # noqa: RUF012

            def __call__(self, text: str) -> list[int]:
                return list(tokenizer.encode(text, add_special_tokens=False).ids)

        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()))

    def compile(self, schema: str) -> Callable[[], Matcher]:
        source = self._library.LLMatcher.grammar_from_json_schema(schema)
        matcher = self._library.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return lambda: _LlguidanceMatcher(matcher.deep_copy())


class _LlguidanceMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask: torch.Tensor) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.consume_token(token))


class Xgrammar:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import xgrammar

        self.name = f"xgrammar {importlib.metadata.version('xgrammar')}"
        self._library = xgrammar
        words = [tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size())]
        kind = xgrammar.VocabType.BYTE_LEVEL
        tokens = xgrammar.TokenizerInfo(words, kind, vocab_size=vocab_size, stop_token_ids=[STOP])
        self._compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)

    def compile(self, schema: str) -> Callable[[], Matcher]:
        try:
            grammar = self._compiler.compile_json_schema(schema, strict_mode=False)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return lambda: _XgrammarMatcher(self._library.GrammarMatcher(grammar))


class _XgrammarMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask: torch.Tensor) -> None:
        self._matcher.fill_next_token_bitmask(mask.unsqueeze(0))

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))


@app.command()
def engines(file: Path, schemas: int = 300, tokens: int = 64, vocab_size: int = VOCAB_SIZE) -> None:
    """Compare the installed engines over a tokenizer."""
    tokenizer = Tokenizer.from_file(str(file))
    found: list[Engine] = []
    for kind in (Llguidance, Xgrammar):
        begin = time.perf_counter()
        try:
            found.append(kind(tokenizer, vocab_size))
        except ImportError as error:
            print(f"{kind.__name__}: {error}")
            continue
        print(f"{found[-1].name}: vocabulary prepared in {time.perf_counter() - begin:.2f} s")
    print(machine())
    cases = [[case.name, *(_verdict(engine, tokenizer, case, vocab_size) for engine in found)] for case in KEYWORDS]
    print(markdown(["keyword", *(engine.name for engine in found)], cases))
    lines = [_times(engine, random_schemas(schemas), tokens, vocab_size) for engine in found]
    headings = ["refused", "compile ms: median", "p99", "max", "first mask ms: median", "max"]
    headings += ["mask us: median", "p99", "max", "accept us: median", "p99", "releases Python's lock"]
    rows = [[heading, *(line[i] for line in lines)] for i, heading in enumerate(headings)]
    print(markdown(["", *(engine.name for engine in found)], rows))


def _verdict(engine: Engine, tokenizer: Tokenizer, case: KeywordCase, vocab_size: int) -> str:
    """Return what becomes of a keyword: enforced, refused, ignored, or too strict."""
    try:
        begin = engine.compile(json.dumps(case.schema))
    except ValueError:
        return "refused"
    if _admits(begin(), tokenizer, case.bad, vocab_size):
        return "**ignored**"
    return "enforced" if _admits(begin(), tokenizer, case.good, vocab_size) else "too strict"


def _admits(matcher: Matcher, tokenizer: Tokenizer, text: str, vocab_size: int) -> bool:
    if not all(matcher.accept(token) for token in tokenizer.encode(text, add_special_tokens=False).ids):
        return False
    mask = _new_mask(vocab_size)
    matcher.fill(mask)
    return bool(mask[STOP // 32] >> STOP % 32 & 1)


def _new_mask(vocab_size: int) -> torch.Tensor:
    return torch.zeros(-(-vocab_size // 32), dtype=torch.int32)


def _allowed(mask: torch.Tensor) -> np.ndarray[Any, np.dtype[np.intp]]:
    return np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little"))


def _times(engine: Engine, schemas: Sequence[dict[str, Any]], num_tokens: int, vocab_size: int) -> list[str]:
    """Walk through every schema by tokens that are drawn from those it allows; measure the processor's time."""
    compiles, firsts, fills, accepts = [], [], [], []
    num_refused = 0
    mask = _new_mask(vocab_size)
    last: Callable[[], Matcher] | None = None
    for i, schema in enumerate(schemas):
        chance = random.Random(i)
        source = json.dumps(schema)
        begin = time.process_time()
        try:
            last = engine.compile(source)
        except ValueError:
            num_refused += 1
            continue
        compiles.append(time.process_time() - begin)
        matcher = last()
        for step in range(num_tokens):
            begin = time.process_time()
            matcher.fill(mask)
            (fills if step else firsts).append(time.process_time() - begin)
            token = int(chance.choice(_allowed(mask)))
            if token == STOP:
                break
            begin = time.process_time()
            matcher.accept(token)
            accepts.append(time.process_time() - begin)
    assert last is not None
    ms = [f"{1e3 * value:.2f}" for value in (*_summary(compiles), statistics.median(firsts), max(firsts))]
    us = [f"{1e6 * value:.0f}" for value in (*_summary(fills), *_summary(accepts)[:2])]
    return [str(num_refused), *ms, *us, "yes" if _releases_lock(last(), mask) else "no"]


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), float(np.quantile(values, 0.99)), max(values)


def _releases_lock(matcher: Matcher, mask: torch.Tensor, seconds: float = 2.0) -> bool:
    """Return whether another thread runs Python code while masks are computed."""
    gate = threading.Lock()
    has_run = threading.Event()

    def run() -> None:
        with gate:
            has_run.set()

    before = sys.getswitchinterval()
    gate.acquire()
    thread = threading.Thread(target=run)
    thread.start()
    sys.setswitchinterval(1000 * seconds)  # Python's lock goes to nobody else unless it is released
    try:
        gate.release()
        end = time.perf_counter() + seconds
        while not has_run.is_set() and time.perf_counter() < end:
            matcher.fill(mask)
        return has_run.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join()


@app.command()
def answers(model: Path = SMALL, schemas: int = 300, tokens: int = 512, seed: int = 0, compact: bool = False) -> None:
    """Validate the answers of a model to random schemas."""
    tokenizer = load_tokenizer(model)
    engine = xgdn.Engine(model, runner=xgdn.RunnerOptions(max_batch_size=32, max_cached_tokens=32 * (tokens + 64)))
    compiler = GrammarCompiler(Vocabulary(tokenizer), engine.vocab_size, engine.eos_token_ids)
    prompt = tokenizer.encode("The answer as JSON: ").ids
    asked = random_schemas(schemas, seed)
    requests = [
        xgdn.Request(
            prompt,
            max_new_tokens=tokens,
            grammar=compiler.json_schema(schema, "schema", is_compact=compact),
            sampling=xgdn.SamplingParams(temperature=1.0, seed=i),
        )
        for i, schema in enumerate(asked)
    ]
    begin = time.perf_counter()
    ids = [engine.submit(request) for request in requests]
    replies: dict[int, list[int]] = {request: [] for request in ids}
    reasons: dict[int, FinishReason] = {}
    while not engine.is_idle():
        for event in engine.step():
            replies[event.id] += event.tokens
            reasons[event.id] = event.finish_reason
            if event.finish_reason == FinishReason.ERROR:
                print(f"schema {ids.index(event.id)}: {event.error}")
    seconds = time.perf_counter() - begin
    num_wrong = 0
    for request, schema in zip(ids, asked, strict=True):
        if reasons[request] == FinishReason.STOP:
            text = tokenizer.decode(replies[request])
            problem = invalid(schema, text)
            num_wrong += bool(problem)
            if problem:
                print(f"{json.dumps(schema)}\n{text!r}: {problem}")
    counts = {reason.name.lower(): list(reasons.values()).count(reason) for reason in set(reasons.values())}
    print(machine())
    print(
        f"{schemas} schemas: {counts}, {num_wrong} invalid, {sum(map(len, replies.values()))} tokens, {seconds:.0f} s"
    )
    if num_wrong or FinishReason.ERROR in reasons.values():
        raise typer.Exit(1)


@app.command()
def overhead(model: Path, file: Path, batch: int = 32, steps: int = 60, rounds: int = 4) -> None:
    """Compare the steps of a batch with grammars and without."""
    runner = xgdn.RunnerOptions(max_batch_size=batch, max_cached_tokens=batch * (steps + 64))
    engine = xgdn.Engine(model, runner=runner)
    compiler = GrammarCompiler(Vocabulary(Tokenizer.from_file(str(file))), engine.vocab_size, [STOP])
    # Documents without an end, of the kinds of text that grammars have.
    value = {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]}
    record = {"properties": {"name": {"type": "string"}, "value": value}, "required": ["name", "value"]}
    schema = {"type": "array", "items": {"type": "object", **record, "additionalProperties": False}, "minItems": 1000}
    grammar = compiler.json_schema(schema, "schema")
    times: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    # As in a server, another thread steps than the one that has loaded, so OpenMP's threads sleep between parallel
    # regions. Where they turn, they take the processors from the threads that compute masks.
    with ThreadPoolExecutor(1) as stepping:
        for _ in range(rounds):
            for name in times:
                of_round = stepping.submit(_step_times, engine, batch, steps, grammar if name == "with" else None)
                times[name].append(of_round.result())
    rows, added = [], []
    for i, (free, bound) in enumerate(zip(times["without"], times["with"], strict=True)):
        added.append([100 * (b / f - 1) for f, b in zip(free, bound, strict=True)])
        figures = [(f"{1e3 * f:.1f}", f"{1e3 * b:.1f}") for f, b in zip(free, bound, strict=True)]
        rows.append([str(i + 1), *figures[0], f"{added[-1][0]:+.1f}", *figures[1], f"{added[-1][1]:+.1f}"])
    print(machine())
    headings = ["round", "ms per step without", "with", "%", "processor ms without", "with", "%"]
    print(markdown(headings, rows))
    wall, processor = (statistics.median(column) for column in zip(*added, strict=True))
    print(f"batch {batch}, median: {wall:+.1f} % of a step, {processor:+.1f} % of its processor time")


def _step_times(engine: xgdn.Engine, batch: int, steps: int, grammar: CompiledGrammar | None) -> tuple[float, float]:
    """Return the medians of a decode step's time and of the process's time on processors, all sequences sampled."""
    for i in range(batch):
        sampling = xgdn.SamplingParams(temperature=1.0, seed=i)
        engine.submit(xgdn.Request([i + 1] * 8, max_new_tokens=steps, sampling=sampling, grammar=grammar))
    times = []
    while not engine.is_idle():
        begin, processor = time.perf_counter(), time.process_time()
        events = engine.step()
        if len(events) == batch and all(event.finish_reason == FinishReason.RUNNING for event in events):
            times.append((time.perf_counter() - begin, time.process_time() - processor))
    wall, processor_times = zip(*times, strict=True)
    return statistics.median(wall), statistics.median(processor_times)


if __name__ == "__main__":
    app()
