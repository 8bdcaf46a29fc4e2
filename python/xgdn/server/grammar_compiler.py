# SPDX-License-Identifier: Apache-2.0
"""Grammars that restrict a reply, compiled by llguidance for the model's vocabulary."""

import json
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from xgdn.server import grammar_guard
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.grammar_guard import LIMITS, GrammarGuard
from xgdn.server.json_schema import check_keywords, engine_schema, path, subschemas
from xgdn.server.reply_parser import END_OF_THOUGHT, THOUGHT, ReplySyntax
from xgdn.vocabulary import Vocabulary

_MAX_SOURCE = 64 * 2**10  # characters of a grammar
_MAX_COMPILED, _MAX_COMPILED_BYTES = 64, 2**30  # kept; what they hold
_NUM_GUARDS = 4
_WAIT_SECONDS = 2.0  # for a guard that is free
_MAX_LOCATED = 200  # parts of a schema that are compiled to find the one that is wrong

_ANY = ReplySyntax()

_Source = dict[str, Any]  # a grammar as llguidance takes it: json_schema or lark_grammar


class GrammarError(RuntimeError):
    """A reply cannot go on: it met a limit of the engine, or a token that the grammar forbids."""


class GrammarMatcher:
    """The state of one reply in its grammar. One thread at a time may use it."""

    def __init__(self, matcher: LLMatcher, known: torch.Tensor, fail: Callable[[], None]) -> None:
        self._matcher = matcher
        self._known = known
        self._fail = fail

    def write_mask(self, mask: torch.Tensor) -> None:
        """Set bit i % 32 of word i // 32 of `mask`, int32 [ceil(vocab_size / 32)], where token i may come next.

        Raises GrammarError.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        self._check()
        torch.bitwise_and(mask, self._known, out=mask)

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on behind the tokens of the reply, which the mask allowed one after the other. Raises GrammarError."""
        if not self._matcher.consume_tokens(list(tokens)):
            self._check()

    def forced(self) -> list[int]:
        """Return the tokens that must follow; empty where there is a choice. Raises GrammarError."""
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            self._fail()
            raise GrammarError(f"The grammar of the reply cannot go on: {_reason(self._matcher.get_error())}.")


class CompiledGrammar:
    """A grammar that the engine can follow, see `xgdn.grammar`."""

    def __init__(self, matcher: LLMatcher, num_bytes: int, known: torch.Tensor, forget: Callable[[], None]) -> None:
        self.num_bytes = num_bytes
        self._matcher = matcher
        self._known = known
        self._forget = forget

    def matcher(self) -> GrammarMatcher:
        """Return a matcher at the beginning of a reply."""
        return GrammarMatcher(self._matcher.deep_copy(), self._known, self._forget)


class GrammarCompiler:
    """Compiles grammars for a vocabulary and keeps those that were used last. Any thread may call it.

    Each method takes the name of the request's field that the grammar comes from, for errors, and the syntax of the
    reply: the grammar begins behind a thought. All raise ApiError: the grammar is wrong, too large, or takes too long.

    Args:
        vocab_size: of the model, which may be larger than the tokenizer's.
        stop_token_ids: tokens that end a reply, which they may where the grammar may end.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        self._tokens = _Tokens(vocabulary, vocab_size, stop_token_ids)
        stops = [token for token in dict.fromkeys(stop_token_ids) if token < vocab_size]
        self._tokenizer = LLTokenizer(TokenizerWrapper(self._tokens), eos_token=stops) if stops else None
        self._tokens.greedy = None if self._tokenizer is None else self._tokenizer.greedy_tokenize
        self._known = _bits([token in self._tokens.known for token in range(vocab_size)])
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self._free_guards: queue.LifoQueue[GrammarGuard] = queue.LifoQueue()  # so that no more start than are needed
        for _ in range(_NUM_GUARDS):
            guard = GrammarGuard(vocab_size, vocabulary.special_tokens)
            weakref.finalize(self, guard.stop)
            self._free_guards.put(guard)

    def json_object(self, param: str, *, syntax: ReplySyntax = _ANY) -> CompiledGrammar:
        return self.json_schema({"type": "object"}, param, syntax=syntax)

    def json_schema(
        self,
        schema: object,
        param: str,
        *,
        syntax: ReplySyntax = _ANY,
        whitespace_pattern: str | None = None,
        is_compact: bool = False,
    ) -> CompiledGrammar:
        """Compile a JSON schema: an object, true or false. Whitespace between tokens is free unless said otherwise."""
        check_keywords(schema, param)

        def source(part: object) -> _Source:
            return {"json_schema": engine_schema(part, whitespace_pattern=whitespace_pattern, is_compact=is_compact)}

        try:
            return self._compile(source(schema), param, syntax)
        except ApiError as error:
            if error.code != "invalid_grammar":
                raise
            raise self._locate(schema, source, param, error) from None

    def regex(self, pattern: str, param: str, *, syntax: ReplySyntax = _ANY) -> CompiledGrammar:
        """Compile a regular expression, which the whole reply matches."""
        (source,) = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
        return self._compile({"lark_grammar": source["lark_grammar"]}, param, syntax)

    def choice(self, choices: Sequence[str], param: str, *, syntax: ReplySyntax = _ANY) -> CompiledGrammar:
        """Compile the choice of one of several texts."""
        return self.regex("|".join(map(_literal, choices)), param, syntax=syntax)

    def grammar(self, text: str, param: str, *, syntax: ReplySyntax = _ANY) -> CompiledGrammar:
        """Compile a grammar in llguidance's dialect of Lark, or in the EBNF of llama.cpp (GBNF)."""
        try:
            lark = any_to_lark(text)
        except Exception as error:  # the converter raises what Python's operations raise
            raise bad_request(f"'{param}': expected a grammar in Lark or GBNF. {error}.", param) from None
        return self._compile({"lark_grammar": lark}, param, syntax)

    def _compile(self, source: _Source, param: str, syntax: ReplySyntax) -> CompiledGrammar:
        text = _text(source, syntax)
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        if self._tokenizer is None:
            raise bad_request(f"'{param}' is not supported: no token of the model ends a reply.", param)
        num_bytes = self._try(text, param)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        first = matcher.deep_copy()
        if not first.is_error():
            mask = torch.empty_like(self._known)
            first.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if first.is_error():
            raise _invalid_grammar(first.get_error(), param)
        grammar = CompiledGrammar(matcher, num_bytes, self._known, lambda: self._forget(text))
        self._keep(text, grammar)
        return grammar

    def _try(self, text: str, param: str) -> int:
        """Return how many bytes a grammar takes that can be compiled; raises ApiError."""
        if len(text) > _MAX_SOURCE:
            message = f"'{param}': expected a grammar of at most {_MAX_SOURCE} characters, got {len(text)}."
            raise bad_request(message, param)
        try:
            guard = self._free_guards.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            message = "The server is busy with the grammars of other requests."
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "1"}) from None
        try:
            trial = guard.compile(text)
        finally:
            self._free_guards.put(guard)
        if trial is None:
            most = f"{grammar_guard.SECONDS:g} s and {grammar_guard.MAX_BYTES // 2**20} MiB"
            raise bad_request(f"'{param}': expected a grammar that compiles within {most}.", param)
        if trial.error:
            raise _invalid_grammar(trial.error, param)
        return trial.num_bytes

    def _keep(self, text: str, grammar: CompiledGrammar) -> None:
        with self._lock:
            self._compiled[text] = grammar
            num_bytes = sum(it.num_bytes for it in self._compiled.values())
            while len(self._compiled) > _MAX_COMPILED or num_bytes > _MAX_COMPILED_BYTES:
                num_bytes -= self._compiled.popitem(last=False)[1].num_bytes

    def _forget(self, text: str) -> None:
        """Compile a grammar anew for later requests: what a matcher has met may be the end of all that share it."""
        with self._lock:
            self._compiled.pop(text, None)

    def _locate(self, schema: object, source: Callable[[object], _Source], param: str, error: ApiError) -> ApiError:
        """Return the error with the innermost part of the schema that is wrong by itself."""
        parts = [(place, part) for place, part in subschemas(schema) if place and "$ref" not in json.dumps(part)]
        for place, part in sorted(parts[:_MAX_LOCATED], key=lambda entry: -len(entry[0])):
            try:
                self._try(_text(source(part), _ANY), path(param, place))
            except ApiError as found:
                if found.code == error.code:
                    return found
        return error


class _Tokens:
    """The vocabulary as llguidance takes it: bytes of every token, which no text has if they begin with 0xff."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = vocabulary.tokenizer
        self.eos_token_id = next(iter(stop_token_ids), 0)
        texts = [vocabulary.bytes(token) for token in range(vocab_size)]
        for token in stop_token_ids:  # they end the reply wherever they stand, so no text may need them
            if token < vocab_size:
                texts[token] = None
        self.known = {
            token
            for token, text in enumerate(texts)
            if text or token in vocabulary.special_tokens or token in stop_token_ids
        }
        names = vocabulary.special_tokens
        self.tokens = [text or b"\xff" + names.get(token, f"<[{token}]>").encode() for token, text in enumerate(texts)]
        self.special_token_ids = [token for token, text in enumerate(texts) if not text]
        self.greedy: Callable[[str], list[int]] | None = None

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text that is forced, as the model would write it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        # A tokenizer may normalize a text, put a blank before it or find a special token in it.
        if self.greedy is None or b"".join(self.tokens[token] for token in ids) == text.encode():
            return ids
        return self.greedy(text)


def _text(source: _Source, syntax: ReplySyntax) -> str:
    """Return the grammar of a reply as llguidance takes it."""
    return json.dumps({"grammars": [*_grammars_before(syntax), {"name": "answer", **source}]})


def _grammars_before(syntax: ReplySyntax) -> list[_Source]:
    """Return the grammars that the one of the answer is part of."""
    if not syntax.has_thought:
        return []
    begun = "thought BLANKS @answer"
    start = begun if syntax.begins_in_thought else f"/{_literal(THOUGHT)}/ {begun} | @answer"
    rules = [f"start: {start}", f"thought[lazy]: /(?s:.*){_literal(END_OF_THOUGHT)}/", "BLANKS: /[ \\n]{0,8}/"]
    return [{"lark_grammar": "\n".join(rules)}]


def _literal(text: str) -> str:
    """Return a regular expression for exactly this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _bits(flags: Sequence[bool]) -> torch.Tensor:
    """Return the flags as int32 words, the first in the lowest bit."""
    words = torch.zeros(-(-len(flags) // 32) * 32, dtype=torch.int64)
    words[: len(flags)] = torch.tensor(flags, dtype=torch.int64)
    return (words.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)


def _invalid_grammar(message: str, param: str) -> ApiError:
    return bad_request(f"'{param}': {_reason(message)}.", param, "invalid_grammar")


def _reason(message: str) -> str:
    """Return the engine's message in one line, in words for clients."""
    line = " ".join(message.replace("<non-verbose/>", "").split()).rstrip(".")
    return next((words for start, words in _REASONS.items() if line.startswith(start)), line)


_REASONS = {
    "NoExtension": "no text matches",
    "oneOf constraints are not supported": "oneOf is not supported where several of its schemas may hold at once",
}
