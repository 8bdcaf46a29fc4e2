# SPDX-License-Identifier: Apache-2.0
"""The chat template of a model directory, which renders messages as the text of a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.schemas import Message
from xgdn.server.template_environment import template_environment
from xgdn.tokenizer_files import read_json_object, read_tokenizer_config, token_names


class ChatTemplate:
    """The template that transformers would take; there may be none, or one that cannot be used.

    Raises:
        ValueError: tokenizer_config.json is damaged.
    """

    def __init__(self, model_dir: Path) -> None:
        config = read_tokenizer_config(model_dir)
        self._special_tokens = _special_tokens(config)
        self._template: Template | None = None
        self.problem = ""  # reason why chat is not served although there is a template
        try:
            source = _choose(_read_templates(model_dir, config))
            if source is not None:
                self._template = template_environment().from_string(source)
        except Exception as error:  # compiling may also raise Python's errors, for example for too deep a nesting
            self.problem = f"{model_dir}: the chat template cannot be used: {_in_one_line(error)}"

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """Return the prompt for the assistant's next message, rendered with further variables; raises ApiError."""
        if self.problem:
            raise ApiError(400, "invalid_chat_template", f"{self.problem}. Use /v1/completions.")
        if self._template is None:
            raise bad_request(
                "This model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
                "use /v1/completions.",
                code="no_chat_template",
            )
        own = {
            "messages": [{"role": _role(message), "content": message.text()} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        if taken := sorted(own.keys() & (variables or {}).keys()):
            name = f"chat_template_kwargs.{taken[0]}"
            raise bad_request(f"'{name}' is not supported.", name, "unsupported_parameter")
        try:
            return self._template.render({**self._special_tokens, **(variables or {}), **own})
        except Exception as error:  # a template computes with the client's input, so it may raise anything
            raise bad_request(f"The model's chat template refused the messages: {error}.", "messages") from None


def _read_templates(model_dir: Path, config: Mapping[str, Any]) -> object:
    """Return a template, or several by name, from the first source that has one: files, tokenizer or processor JSON."""
    files = {path.stem: path for path in sorted(model_dir.glob("additional_chat_templates/*.jinja"))}
    if (model_dir / "chat_template.jinja").is_file():
        files["default"] = model_dir / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if config.get("chat_template") is not None:
        return config["chat_template"]
    return read_json_object(model_dir / "chat_template.json").get("chat_template")


def _choose(templates: object) -> str | None:
    """Return the template for a chat without tools.

    Raises:
        ValueError: there are some, but none of this kind.
    """
    if isinstance(templates, list):  # the form of tokenizer_config.json
        if not all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in templates):
            raise ValueError("expected objects with name and template in the list chat_template")
        templates = {entry["name"]: entry["template"] for entry in templates}
    if isinstance(templates, Mapping):
        if "default" not in templates:
            raise ValueError(f"expected a template called default, got {', '.join(map(str, templates)) or 'none'}")
        templates = templates["default"]
    if templates is not None and not isinstance(templates, str):
        raise ValueError(f"expected a text as chat_template, got {type(templates).__name__}")
    return templates


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return variables such as eos_token: the special tokens of the tokenizer and those that the model adds."""
    more = config.get("extra_special_tokens")
    entries = {key: value for key, value in config.items() if key.endswith("_token")}
    entries |= more if isinstance(more, Mapping) else {}
    named = {key: token_names(value) for key, value in entries.items() if not isinstance(value, list)}
    return {key: names[0] for key, names in named.items() if names}


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _role(message: Message) -> str:
    # OpenAI's newer name; the templates of Qwen's models only know the older one.
    return "system" if message.role == "developer" else message.role
