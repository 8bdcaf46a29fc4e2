# SPDX-License-Identifier: Apache-2.0
"""The tokenizer over HTTP, with the paths and fields of vLLM: /tokenize, /detokenize, /tokenizer_info."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator
from tokenizers import Tokenizer

from xgdn.server.chat_template import ChatTemplate
from xgdn.server.schemas import Message, parse
from xgdn.server.strict_body import MISSING, StrictBody, refuse_field
from xgdn.server.tool_schemas import Tools
from xgdn.tokenizer_files import token_names

_Token = Annotated[int, Field(ge=0, lt=2**31)]
_SPECIAL = ("eos_token", "bos_token", "pad_token", "unk_token")


class TokenizeBody(StrictBody):
    """Request of /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # default: those of a prompt; none for messages, whose template has its own
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            if self.prompt is None:
                refuse_field("prompt", "required", MISSING)
            refuse_field("messages", "expected either 'prompt' or 'messages'")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            refuse_field("tools" if self.tools else "chat_template_kwargs", "expected 'messages' with it")
        return self


class DetokenizeBody(StrictBody):
    """Request of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[_Token], Field(fail_fast=True)]


class Tokenization:
    """Any thread may call it, and it takes as long as the text is long."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        encode: Callable[..., list[list[int]]],
        chat_template: ChatTemplate,
        tokenizer_config: Mapping[str, Any],
        max_context: int,
        check_model: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = encode  # raises ApiError for a text that no request could have
        self._chat_template = chat_template
        self._config = tokenizer_config
        self._max_context = max_context
        self._check_model = check_model  # raises ApiError for another one than there is

    def tokenize(self, data: bytes) -> dict[str, Any]:
        """Return the answer to a body; raises ApiError."""
        body = parse(TokenizeBody, data)
        self._check_model_of(body)
        if body.messages is None:
            text, is_special = body.prompt or "", body.add_special_tokens is not False
        else:
            text = self._chat_template.render(body.messages, body.chat_template_kwargs, body.tools or [])
            is_special = bool(body.add_special_tokens)
        (ids,) = self._encode([text], "prompt", add_special_tokens=is_special)
        names = [self._tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": self._max_context, "tokens": ids, "token_strs": names}

    def detokenize(self, data: bytes) -> dict[str, Any]:
        """Return the answer to a body, with special tokens by their names; raises ApiError."""
        body = parse(DetokenizeBody, data)
        self._check_model_of(body)
        return {"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)}

    def _check_model_of(self, body: TokenizeBody | DetokenizeBody) -> None:
        if body.model is not None:
            self._check_model(body.model)

    def info(self) -> dict[str, Any]:
        """Return the special tokens by their roles, null for one that there is not, and the chat template's source."""
        special = {role: next(iter(token_names(self._config.get(role))), None) for role in _SPECIAL}
        return {
            "tokenizer_class": self._config.get("tokenizer_class"),
            **special,
            "chat_template": self._chat_template.source,
            "model_max_length": self._max_context,
        }
