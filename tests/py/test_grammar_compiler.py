# SPDX-License-Identifier: Apache-2.0
"""Grammars compiled for a vocabulary: what they admit, what is refused by name, and at what cost."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from json_schemas import KEYWORDS, KeywordCase, keywords_of, random_schemas
from live_server import TOKENIZER
from xgdn.server import grammar_compiler, grammar_guard, json_schema
from xgdn.server.api_error import ApiError
from xgdn.server.grammar_compiler import CompiledGrammar, GrammarCompiler, GrammarError
from xgdn.server.reply_parser import ReplySyntax
from xgdn.vocabulary import Vocabulary

STOP = 0
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 40  # a model's is padded
THOUGHTFUL = ReplySyntax(has_thought=True)
IN_THOUGHT = ReplySyntax(has_thought=True, begins_in_thought=True)
REFUSED = {
    *("oneOf, not disjoint", "not", "if, then, else", "$dynamicRef", "propertyNames", "minProperties"),
    *("minProperties, name twice", "dependentRequired", "dependentSchemas", "dependencies (draft 7)"),
    *("unevaluatedProperties", "uniqueItems", "contains", "minContains", "unevaluatedItems", "pattern, look-ahead"),
    *("format uri-reference", "format json-pointer", "format regex"),
}


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(Vocabulary(TOKENIZER), VOCAB_SIZE, [STOP])


def allowed(matcher: grammar_compiler.GrammarMatcher) -> set[int]:
    mask = torch.full((-(-VOCAB_SIZE // 32),), -1, dtype=torch.int32)
    matcher.write_mask(mask)
    bits = mask[:, None].to(torch.int64) >> torch.arange(32) & 1
    return set(bits.flatten().nonzero().flatten().tolist())


def admits(grammar: CompiledGrammar, text: str) -> bool:
    matcher = grammar.matcher()
    for token in TOKENIZER.encode(text).ids:
        if token not in allowed(matcher):
            return False
        matcher.accept([token])
    return STOP in allowed(matcher)


def refusal(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("case", KEYWORDS, ids=lambda case: case.name)
def test_a_keyword_is_enforced_or_refused(case: KeywordCase) -> None:
    if case.name in REFUSED:
        error = refusal(lambda: compiler().json_schema(case.schema, "s"))
        assert error.code in ("unsupported_parameter", "invalid_grammar")
        words = [*keywords_of(case.schema), "look-around", "Unknown format"]
        assert any(word in error.message for word in words)
    else:
        grammar = compiler().json_schema(case.schema, "s")
        assert admits(grammar, case.good)
        assert not admits(grammar, case.bad)


def test_random_schemas_have_every_enforced_keyword_and_compile() -> None:
    schemas = random_schemas(300)
    assert {keyword for schema in schemas for keyword in keywords_of(schema)} >= json_schema.ENFORCED
    for schema in schemas[:100]:
        compiler().json_schema(schema, "s")


@pytest.mark.parametrize(
    ("schema", "where", "words"),
    [
        ({"properties": {"a": {"items": {"not": {}}}}}, ".properties.a.items.not", "'not' of JSON Schema"),
        ({"anyOf": [{}, {"nullable": True}]}, ".anyOf[1].nullable", "'nullable'"),
        ({"$defs": {"x": {"uniqueItems": True}}}, ".$defs.x.uniqueItems", "'uniqueItems'"),
        ({"x-guidance": {"lenient": True}}, ".x-guidance", "'x-guidance'"),
        ({"items": {"type": "strin"}}, ".items", "Invalid type: strin"),
        ({"type": "array", "items": {"minimum": 3, "maximum": 1, "type": "integer"}, "minItems": 1}, ".items", "Unsat"),
        ({"properties": {"a": 3}}, "", "must be an object or boolean"),
        ({"properties": {"a": {"pattern": "("}}}, ".properties.a", "unclosed group"),
        ({"$ref": "#/$defs/x"}, "", "/$defs/x"),
        ({"$ref": "#"}, "", "no text matches"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "", "several of its schemas may hold"),
        (False, "", "schema is false"),
        ({"minProperties": 2}, ".minProperties", "at most one more than 'required' has, 1, got 2"),
        ({"enum": ["\\u0001", ["\u0001"]]}, ".enum", "no control characters"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place(schema: Any, where: str, words: str) -> None:
    error = refusal(lambda: compiler().json_schema(schema, "s"))
    assert error.param == f"s{where}"
    assert words in error.message


def test_annotations_are_no_rules() -> None:
    schema = {"title": "A", "description": "b", "default": 1, "examples": [2], "x-order": 3, "type": "integer"}
    assert admits(compiler().json_schema(schema, "s"), "17")
    assert admits(compiler().json_schema(True, "s"), '[null,{"a":1e3}]')


def test_a_schema_keeps_its_order_and_bounded_blanks() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}, "required": ["b"]}
    grammar = compiler().json_schema(schema, "s")
    assert admits(grammar, '{"b":1,"a":2}')
    assert admits(grammar, '{\n  "b": 1,\n  "a": 2\n}')
    assert not admits(grammar, '{"a":2,"b":1}')
    assert admits(grammar, '{"b":\n' + " " * 64 + "1}")
    assert not admits(grammar, '{"b":\n' + " " * 65 + "1}")
    assert not admits(grammar, '{"b":\n\n1}')
    compact = compiler().json_schema(schema, "s", is_compact=True)
    assert admits(compact, '{"b":1}')
    assert not admits(compact, '{"b": 1}')
    tabs = compiler().json_schema(schema, "s", whitespace_pattern=r"\t+")
    assert admits(tabs, '{\t\t"b":1}')
    assert not admits(tabs, '{ "b":1}')


def test_regular_expressions_are_of_the_whole_reply() -> None:
    assert admits(compiler().regex("[a-c]+/[0-9]{2}", "r"), "abc/17")
    assert not admits(compiler().regex("b", "r"), "abc")
    assert admits(compiler().regex("^a|b$", "r"), "b")
    error = refusal(lambda: compiler().regex("a(?=b)", "guided_regex"))
    assert error.param == "guided_regex"
    assert "look-around" in error.message


def test_a_choice_is_one_of_its_texts() -> None:
    texts = ["yes", "yes, but", 'a"b\\n', "日本\n", "%json {}", "a.c", "<|endoftext|>"]
    grammar = compiler().choice(texts, "c")
    assert all(admits(grammar, text) for text in texts[:-1])
    assert not any(admits(grammar, text) for text in ["ye", "abc", "yes, but ", ""])
    spelled = compiler().choice(texts[-1:], "c").matcher()
    assert STOP not in allowed(spelled)  # the letters are no token that ends the reply
    assert TOKENIZER.decode(spelled.forced()) == texts[-1]


def test_grammars_in_lark_and_in_gbnf() -> None:
    lark = compiler().grammar('start: "a" %json {"type": "integer"} | WORD\nWORD: /[x-z]+/', "g")
    gbnf = compiler().grammar('root ::= "a" digit+\ndigit ::= [0-9]', "g")
    assert admits(lark, "a17")
    assert admits(lark, "zyx")
    assert admits(gbnf, "a17")
    assert not admits(gbnf, "a")
    for text, words in (("start: b", 'unknown name: "b"'), ('root ::= "\\', "Lark or GBNF"), ("", "Lark or GBNF")):
        error = refusal(lambda text=text: compiler().grammar(text, "guided_grammar"))  # type: ignore[misc]
        assert error.param == "guided_grammar"
        assert words in error.message


def test_a_thought_is_free() -> None:
    for syntax, begin in ((THOUGHTFUL, "<think>"), (IN_THOUGHT, "")):
        grammar = compiler().json_object("r", syntax=syntax)
        assert admits(grammar, begin + '\n{"a": </thin\n</think>\n\n{"a":1}')
        assert admits(grammar, begin + '</think>{"a":1}')
        assert not admits(grammar, begin + '</think>{"a":')
        assert not admits(grammar, begin + "</think></think>{}")
    assert admits(compiler().json_object("r", syntax=THOUGHTFUL), "{}")
    assert not admits(compiler().json_object("r", syntax=IN_THOUGHT), "{}")


def test_tokens_that_no_text_has_never_come() -> None:
    anything = allowed(compiler().regex("(?s:.*)", "r").matcher())
    texts = {token: TOKENIZER.decode([token]) for token in range(1, TOKENIZER.get_vocab_size())}
    assert anything >= {STOP, *(token for token, text in texts.items() if "\ufffd" not in text)}
    assert max(anything) < TOKENIZER.get_vocab_size()
    wild = allowed(compiler().grammar("start: <[*]>", "g").matcher())
    assert max(wild) < TOKENIZER.get_vocab_size()


def test_stop_tokens_come_where_the_grammar_may_end() -> None:
    letter = TOKENIZER.token_to_id("b")
    stopping = GrammarCompiler(Vocabulary(TOKENIZER), VOCAB_SIZE, [STOP, letter, STOP, VOCAB_SIZE + 7])
    matcher = stopping.regex("b?a[bc]?", "r").matcher()
    assert not {STOP, letter} & allowed(matcher)
    matcher.accept(TOKENIZER.encode("a").ids)
    assert allowed(matcher) == {STOP, letter, TOKENIZER.token_to_id("c")}
    matcher.accept(TOKENIZER.encode("c").ids)
    assert allowed(matcher) == {STOP, letter}
    endless = GrammarCompiler(Vocabulary(TOKENIZER), VOCAB_SIZE, [])
    assert "no token of the model ends a reply" in refusal(lambda: endless.regex("a", "r")).message


def test_forced_tokens_are_those_of_the_text() -> None:
    schema = {"properties": {"name": {"const": "é x"}}, "required": ["name"], "additionalProperties": False}
    matcher = compiler().json_schema({"type": "object", **schema}, "s", is_compact=True).matcher()
    tokens: list[int] = []
    while forced := matcher.forced():
        assert forced[0] in allowed(matcher)
        matcher.accept(forced)
        tokens += forced
    assert TOKENIZER.decode(tokens) == '{"name":"é x"}'
    assert allowed(matcher) == {STOP}
    assert matcher.forced() == []


def test_a_normalizer_does_not_change_what_is_forced() -> None:
    state = json.loads(TOKENIZER.to_str())
    state["normalizer"] = {"type": "NFC"}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    normalizing = GrammarCompiler(Vocabulary(tokenizer), VOCAB_SIZE, [STOP])
    decomposed = "e\u0301"
    assert tokenizer.decode(normalizing.choice([decomposed], "c").matcher().forced()) == decomposed
    assert normalizing.choice(["<think>"], "c").matcher().forced() == [tokenizer.token_to_id("<think>")]


def test_branches_do_not_meet() -> None:
    grammar = compiler().regex("aa|bb", "r")
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(TOKENIZER.encode("a").ids)
    second.accept(TOKENIZER.encode("b").ids)
    assert first.forced() == TOKENIZER.encode("a").ids
    assert second.forced() == TOKENIZER.encode("b").ids


def test_a_forbidden_token_is_an_error() -> None:
    matcher = compiler().regex("a+", "r").matcher()
    with pytest.raises(GrammarError, match="cannot go on"):
        matcher.accept(TOKENIZER.encode("b").ids)
    with pytest.raises(GrammarError, match="cannot go on"):
        matcher.forced()


def test_compiled_grammars_are_kept_until_they_are_too_many_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_MAX_COMPILED", 2)
    keeping = GrammarCompiler(Vocabulary(TOKENIZER), VOCAB_SIZE, [STOP])
    first = keeping.regex("a", "r")
    assert keeping.regex("a", "r") is first
    keeping.regex("b", "r")
    assert keeping.regex("a", "r") is first
    keeping.regex("c", "r")  # instead of b
    assert keeping.regex("a", "r") is first
    with pytest.raises(GrammarError):
        first.matcher().accept(TOKENIZER.encode("b").ids)
    assert keeping.regex("a", "r") is not first
    monkeypatch.setattr(grammar_compiler, "_MAX_COMPILED_BYTES", 10 * 2**20)
    large = [keeping.json_schema({"type": "integer", "multipleOf": 30_011 + 2 * i}, "s") for i in range(2)]
    assert all(4 * 2**20 < grammar.num_bytes < 2**24 for grammar in large)
    assert keeping.json_schema({"type": "integer", "multipleOf": 30_013}, "s") is large[1]
    assert keeping.json_schema({"type": "integer", "multipleOf": 30_011}, "s") is not large[0]


def test_a_grammar_that_is_too_large_or_too_slow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(lambda: compiler().regex("a" * 70_000, "r"))
    assert "at most 65536 characters" in error.message
    assert error.param == "r"
    slow = {"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}  # a tenth of a second
    monkeypatch.setattr(grammar_guard, "SECONDS", 0.001)
    assert "within 0.001 s and 512 MiB" in refusal(lambda: compiler().json_schema(slow, "s")).message
    monkeypatch.setattr(grammar_guard, "SECONDS", 30.0)
    assert admits(compiler().json_schema(slow, "s"), '{"p7":1}')  # by a new process


def test_a_grammar_that_would_end_the_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_guard, "SECONDS", 30.0)  # it is not the time that ends the trial
    begin = time.monotonic()
    schemas = {f"{i:x}": {"$ref": f"#/$defs/{i + 1:x}"} for i in range(1900)}
    chain = {"$ref": "#/$defs/0", "$defs": {**schemas, "76c": {"type": "integer"}}}
    both = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(64)]}
    rules = "".join(f"r{i:x}: r{i + 1:x}\n" for i in range(4700))
    for work in (
        lambda: compiler().json_schema(chain, "s"),
        lambda: compiler().json_schema(both, "s"),
        lambda: compiler().grammar(f'start: r0\n{rules}r125c: "a"', "s"),
    ):
        error = refusal(work)
        assert (error.param, error.code) == ("s", "invalid_value")
        assert "compiles within" in error.message
    assert time.monotonic() - begin < 30
    assert admits(compiler().regex("[0-9]quick", "r"), "1quick")


def test_who_waits_too_long_for_others_grammars_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(grammar_compiler, "_NUM_GUARDS", 0)
    with pytest.raises(ApiError) as caught:
        GrammarCompiler(Vocabulary(TOKENIZER), VOCAB_SIZE, [STOP]).regex("a", "r")
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert caught.value.headers == {"Retry-After": "1"}


def test_a_guard_ends_with_its_compiler() -> None:
    compiling = GrammarCompiler(Vocabulary(TOKENIZER), VOCAB_SIZE, [STOP])
    compiling.regex("a", "r")
    (process,) = [it for it in map(lambda guard: guard._process, compiling._free_guards.queue) if it is not None]
    assert process.poll() is None
    del compiling
    gc.collect()
    assert process.returncode is not None


def test_random_walks_end_in_valid_documents() -> None:
    chance = random.Random(0)
    num_ended = 0
    for schema in random_schemas(12, seed=5):
        matcher = compiler().json_schema(schema, "s", is_compact=True).matcher()
        tokens: list[int] = []
        while len(tokens) < 60:
            token = chance.choice(sorted(allowed(matcher)))
            if token == STOP:
                json.loads(TOKENIZER.decode(tokens))
                num_ended += 1
                break
            tokens.append(token)
            matcher.accept([token])
    assert num_ended > 3
