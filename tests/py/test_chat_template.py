# SPDX-License-Identifier: Apache-2.0
"""Chat templates render as transformers renders them, from every file that may hold one; a broken one costs chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from live_server import CHAT, CHECKPOINT, GOOD, TOKENIZER, engine, live, post
from xgdn.cli import app as cli_app
from xgdn.server import serve
from xgdn.server.api_error import ApiError
from xgdn.server.chat_template import ChatTemplate
from xgdn.server.schemas import Message

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'é <b> & "日本"\n'},
    {"role": "assistant", "content": "  Well.  "},
    {"role": "user", "content": "Again?"},
]
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "added_tokens_decoder": {},
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "__type": "AddedToken"},
    "add_bos_token": False,
    "image_token": "<image>",
}


def make(folder: Path, template: object = None, config: dict[str, Any] | None = None, **files: str) -> Path:
    """A directory with a tokenizer; `files` by their path, with `__` for a dot and `___` for a slash."""
    TOKENIZER.save(str(folder / "tokenizer.json"))
    chosen = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | (config or {}) | chosen))
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return folder


def rendered(folder: Path, **variables: Any) -> str:
    return ChatTemplate(folder).render([Message(**message) for message in MESSAGES], variables)


def by_transformers(folder: Path, **variables: Any) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **variables))


TEMPLATES = {
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {%- endgeneration %}\n{% endfor %}",
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "tojson": "{{ messages | tojson }}",
    "tojson in ascii": "{{ messages | tojson(ensure_ascii=True) }}{{ messages[1] | tojson(true) }}",
    "tojson with an indent": "{{ messages | tojson(indent=2) }}{{ messages | tojson(false, 1) }}",
    "tojson with separators": "{{ messages | tojson(separators=(',', ':')) }}{{ messages | tojson(indent='\t') }}",
    "tojson sorted": "{{ {'b': 1, 'a': [none, true]} | tojson(sort_keys=true) }}",
    "trimmed": "{% for m in messages %}\n  {% if m.content %}\n {{ m.content | trim }}\n  {% endif %}\n{% endfor %}\n",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token is defined }}{{ add_bos_token }}",
    "documents": "{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}{{ thinking is defined }}",
    "strftime_now": "{{ strftime_now('%Y') }}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['x'], 2) | tojson }}",
    "methods": "{% for m in messages[::-1] %}{{ m.content.split(' ')[-1].strip() }}{{ m['role'] | upper }}{% endfor %}",
    "variables": "{{ thinking }}{{ messages | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_rendered_as_by_transformers(name: str, tmp_path: Path) -> None:
    make(tmp_path, TEMPLATES[name])
    variables = {"thinking": ["a", 1]} if name == "variables" else {}
    text = rendered(tmp_path, **variables)
    assert text == by_transformers(tmp_path, **variables)
    assert text


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('no ' + messages[0].role) }}", "no system"),
        ("{{ namespace(_x=1) }}", "_x"),
        ("{{ dict.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[9].content }}", "no element 9"),
    ],
)
def test_what_a_template_refuses_is_told(template: str, word: str, tmp_path: Path) -> None:
    make(tmp_path, template)
    with pytest.raises(ApiError, match=word) as info:
        rendered(tmp_path)
    assert (info.value.status, info.value.param) == (400, "messages")
    with pytest.raises(Exception, match=word):
        by_transformers(tmp_path)


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
PLACES: dict[str, dict[str, Any]] = {
    "in the tokenizer's config": {"template": "of config"},
    "by name": {"template": NAMED},
    "in a file": {"template": "of config", "chat_template__jinja": "of file"},
    "in a file, with others": {
        "template": "of config",
        "chat_template__jinja": "of file",
        "additional_chat_templates___rag__jinja": "of another",
    },
    "as the default among others": {
        "template": "of config",
        "additional_chat_templates___default__jinja": "of the folder",
        "additional_chat_templates___rag__jinja": "of another",
    },
    "in a file, of several names": {"template": NAMED, "chat_template__jinja": "of file"},
    "in a file, the processor has one": {"chat_template__jinja": "of file", "chat_template__json": "{}"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_where_transformers_finds_it(place: str, tmp_path: Path) -> None:
    make(tmp_path, **PLACES[place])
    assert rendered(tmp_path) == by_transformers(tmp_path)


def test_the_processor_s_template_counts_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    make(tmp_path, chat_template__json='{"chat_template": "of the processor"}')
    assert rendered(tmp_path) == "of the processor"
    make(tmp_path, "of the tokenizer")
    assert rendered(tmp_path) == by_transformers(tmp_path) == "of the tokenizer"


def test_special_tokens_of_older_directories(tmp_path: Path) -> None:
    make(tmp_path, "{{ bos_token }}{{ eos_token }}", special_tokens_map__json='{"eos_token": {"content": "<end>"}}')
    assert rendered(tmp_path) == by_transformers(tmp_path) == "<s></s>"
    config = {key: value for key, value in CONFIG.items() if key != "added_tokens_decoder"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ eos_token }}"}))
    assert rendered(tmp_path) == by_transformers(tmp_path) == "<end>"


BROKEN = {
    "unknown tag": ("{% frobnicate %}", "frobnicate"),
    "open block": ("{% for m in messages %}", "end of template"),
    "nested too deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "no text": (3, "got int"),
    "no default": ([{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}], "rag, tool_use"),
    "no names": ([{"template": "a"}], "name and template"),
    "no text by name": ([{"name": "default", "template": None}], ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_costs_chat_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, word = BROKEN[name]
    for file in CHECKPOINT.iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file.name).symlink_to(file)
    make(tmp_path, template)
    with live(engine(tmp_path), tmp_path) as url:
        assert post(url, GOOD | {"max_tokens": 1}).status_code == 200
        answer = post(url, CHAT, "/v1/chat/completions")
    error = answer.json()["error"]
    code = "no_chat_template" if name == "no text by name" else "invalid_chat_template"
    assert (answer.status_code, error["code"], error["type"]) == (400, code, "invalid_request_error")
    assert word in error["message"]

    monkeypatch.setattr(serve, "serve", lambda *_, **__: None)
    result = CliRunner().invoke(cli_app, ["serve", str(tmp_path), "--port", "0"])
    assert result.exit_code == 0
    assert ("chat is not served" in result.stderr) == (code == "invalid_chat_template")
    assert word in result.stderr
