# SPDX-License-Identifier: Apache-2.0
"""The chat template of a model directory: messages in, the prompt's text out."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xgdn.server.api_error import bad_request
from xgdn.server.schemas import Message


class ChatTemplate:
    """Of chat_template.jinja, else of tokenizer_config.json; there may be none.

    Raises:
        ValueError: the files cannot be read or hold no template.
    """

    def __init__(self, model_dir: Path) -> None:
        self._special_tokens: dict[str, str] = {}
        self._template: Template | None = None
        source = self._read(model_dir)
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except TemplateError as error:
                raise ValueError(f"{model_dir}: chat template: {error}") from None

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that asks for the assistant's next message, with further variables; raises ApiError."""
        if self._template is None:
            raise bad_request(
                "This model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
                "use /v1/completions.",
                code="no_chat_template",
            )
        own = {
            "messages": [{"role": _role(message), "content": message.text()} for message in messages],
            "tools": None,
            "add_generation_prompt": True,
        }
        if taken := sorted(own.keys() & (variables or {}).keys()):
            name = f"chat_template_kwargs.{taken[0]}"
            raise bad_request(f"'{name}' is not supported.", name, "unsupported_parameter")
        try:
            return self._template.render({**self._special_tokens, **(variables or {}), **own})
        except Exception as error:  # a template computes with what the client sent, so anything may be raised
            raise bad_request(f"The model's chat template refused the messages: {error}.", "messages") from None

    def _read(self, model_dir: Path) -> str | None:
        config_path = model_dir / "tokenizer_config.json"
        config: Any = {}
        if config_path.is_file():
            config = json.loads(config_path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"{config_path}: expected a JSON object")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = config.get(name)
            self._special_tokens[name] = str(token.get("content", "") if isinstance(token, dict) else token or "")

        template_path = model_dir / "chat_template.jinja"
        if template_path.is_file():
            return template_path.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{config_path}: expected a text as chat_template")
        return template


def _role(message: Message) -> str:
    # OpenAI's newer name; the templates of Qwen's models know the older one alone.
    return "system" if message.role == "developer" else message.role


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: object, indent: int | None = None) -> str:
    """Unlike jinja's own, for a prompt instead of a page: nothing is escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
