# SPDX-License-Identifier: Apache-2.0
"""The chat template of a model directory, which renders messages as the text of a prompt."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.reply_parser import END_OF_THOUGHT, THOUGHT
from xgdn.server.schemas import Message
from xgdn.server.template_environment import template_environment
from xgdn.server.tool_call_formats import format_of
from xgdn.server.tool_schemas import Tool
from xgdn.tokenizer_files import read_json_object, read_tokenizer_config, token_names

_DEFAULT, _WITH_TOOLS = "default", "tool_use"  # transformers' names


class ChatTemplate:
    """The templates that transformers would take; there may be none, or some that cannot be used.

    Args:
        model_dir: the directory with the templates.
        tool_call_format: the format in which the model writes calls; "auto": the one that its template tells it.

    Raises:
        ValueError: tokenizer_config.json is damaged.
    """

    def __init__(self, model_dir: Path, tool_call_format: str = "auto") -> None:
        config = read_tokenizer_config(model_dir)
        self._special_tokens = _special_tokens(config)
        self._tool_call_format = tool_call_format
        self._sources: dict[str, str] = {}
        self._templates: dict[str, Template] = {}
        self.problem = ""  # reason why chat is not served although there is a template
        try:
            self._sources = _by_name(_read_templates(model_dir, config))
            environment = template_environment()
            self._templates = {name: environment.from_string(source) for name, source in self._sources.items()}
        except Exception as error:  # compiling may also raise Python's errors, for example for too deep a nesting
            self.problem = f"{model_dir}: the chat template cannot be used: {_in_one_line(error)}"

    @property
    def is_usable(self) -> bool:
        """Return whether there is a template, and all could be compiled."""
        return bool(self._templates)

    @property
    def has_thought(self) -> bool:
        """Return whether the template is one of a model that writes its thoughts first."""
        return any(THOUGHT in source and END_OF_THOUGHT in source for source in self._sources.values())

    @property
    def source(self) -> str | None:
        """The text of the template for a chat without tools; None where there is none."""
        return self._sources.get(_DEFAULT)

    def call_format(self) -> str:
        """Return the name of the format in which the model writes calls of tools; raises ApiError."""
        source = self._sources.get(_name(has_tools=True, names=self._sources), "")
        name = format_of(source) if self._tool_call_format == "auto" else self._tool_call_format
        if "tools" not in source or name is None:
            what = "takes no tools" if "tools" not in source else "has no format of calls that --tool-call-format knows"
            raise bad_request(f"'tools': the model's chat template {what}.", "tools", "unsupported_parameter")
        return name

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None, tools: Sequence[Tool] = ()
    ) -> str:
        """Return the prompt for the assistant's next message, rendered with further variables; raises ApiError."""
        if self.problem:
            raise ApiError(400, "invalid_chat_template", f"{self.problem}. Use /v1/completions.")
        if not self._templates:
            raise bad_request(
                "This model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
                "use /v1/completions.",
                code="no_chat_template",
            )
        own = {
            "messages": [_document(message) for message in messages],
            "tools": [tool.document for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": True,
        }
        if taken := sorted(own.keys() & (variables or {}).keys()):
            name = f"chat_template_kwargs.{taken[0]}"
            raise bad_request(f"'{name}' is not supported.", name, "unsupported_parameter")
        template = self._templates[_name(has_tools=bool(tools), names=self._templates)]
        try:
            return template.render({**self._special_tokens, **(variables or {}), **own})
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


def _by_name(templates: object) -> dict[str, str]:
    """Return the template for a chat without tools, and the one with tools if it is another.

    Raises:
        ValueError: there are some, but none for a chat without tools.
    """
    if isinstance(templates, list):  # the form of tokenizer_config.json
        if not all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in templates):
            raise ValueError("expected objects with name and template in the list chat_template")
        templates = {entry["name"]: entry["template"] for entry in templates}
    if not isinstance(templates, Mapping):
        templates = {_DEFAULT: templates}
    if _DEFAULT not in templates:
        raise ValueError(f"expected a template called default, got {', '.join(map(str, templates)) or 'none'}")
    chosen: dict[str, str] = {}
    for name in (_DEFAULT, _WITH_TOOLS):
        template = templates.get(name)
        if isinstance(template, str):
            chosen[name] = template
        elif template is not None:
            raise ValueError(f"expected a text as chat_template, got {type(template).__name__}")
    return chosen if _DEFAULT in chosen else {}


def _name(*, has_tools: bool, names: Container[str]) -> str:
    return _WITH_TOOLS if has_tools and _WITH_TOOLS in names else _DEFAULT


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return variables such as eos_token: the special tokens of the tokenizer and those that the model adds."""
    more = config.get("extra_special_tokens")
    entries = {key: value for key, value in config.items() if key.endswith("_token")}
    entries |= more if isinstance(more, Mapping) else {}
    named = {key: token_names(value) for key, value in entries.items() if not isinstance(value, list)}
    return {key: names[0] for key, names in named.items() if names}


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _document(message: Message) -> dict[str, Any]:
    """Return a message as transformers gives it to templates."""
    # "developer" is OpenAI's newer name; the templates of Qwen's models only know the older one.
    role = "system" if message.role == "developer" else message.role
    document: dict[str, Any] = {"role": role, "content": message.text()}
    if message.reasoning_content is not None:
        document["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        document["tool_calls"] = [
            {"id": it.id, "type": it.type, "function": {"name": it.function.name, "arguments": it.function.values()}}
            for it in message.tool_calls
        ]
    if message.role == "tool":
        document["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            document["name"] = message.name
    return document
