# SPDX-License-Identifier: Apache-2.0
"""From the bodies of requests to what the engine is to do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from xgdn.engine import Engine, Request
from xgdn.server.answer import Answer
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.api_keys import Client
from xgdn.server.chat_template import ChatTemplate
from xgdn.server.embedding import Pooling
from xgdn.server.formats import ChatFormat, CompletionFormat, Format
from xgdn.server.generation import Generation
from xgdn.server.grammar_compiler import CompiledGrammar, GrammarCompiler
from xgdn.server.json_schema import check_keywords
from xgdn.server.metrics import Metrics
from xgdn.server.order import Order
from xgdn.server.prompt_encoder import PromptEncoder, TooManyTokens
from xgdn.server.prompt_field import each
from xgdn.server.prompt_reports import EchoedPrompt
from xgdn.server.reply_parser import THOUGHT, ReplySyntax
from xgdn.server.response_store import ResponseStore, StoredResponse
from xgdn.server.responses import ResponseAnswer, ResponsesFormat
from xgdn.server.responses_schemas import ResponseBody, as_asked, messages_of_output
from xgdn.server.schemas import ChatBody, CompletionBody, EmbeddingBody, GenerationBody, check, parse
from xgdn.server.sessions import Sessions, Turn
from xgdn.server.settings import Settings
from xgdn.server.structured_output import structured_output
from xgdn.server.tokenization import Tokenization
from xgdn.server.tool_call_formats import FORMATS
from xgdn.server.tool_grammar import needs_grammar, tool_grammar
from xgdn.tokenizer_files import eos_token_ids, read_tokenizer_config
from xgdn.vocabulary import Vocabulary

_MAX_TOKENS = 2**31 - 1  # of a sequence, if neither the model nor the pools have a maximum


class Preparation:
    """Checks bodies and makes orders of them. Any thread may call it, and it takes as long as the body is long.

    Args:
        engine: tells the sizes of the model.
        tokenizer: of the model.
        settings: of the server.
        metrics: for the answers.
        responses: where responses are kept for later turns.
        sessions: that requests may go on with.
        max_prompts: of a request.

    Raises:
        ValueError: the files of the model directory's tokenizer cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: Settings,
        metrics: Metrics,
        responses: ResponseStore,
        sessions: Sessions,
        max_prompts: int,
    ) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.max_context = engine.max_context or _MAX_TOKENS
        self.eos_token_ids = eos_token_ids(settings.model_dir, tokenizer)  # the engine knows those of the model
        self.chat_template = ChatTemplate(settings.model_dir, settings.tool_call_format)
        self.pooling = Pooling(settings.model_dir)
        self.tokenization = Tokenization(
            tokenizer,
            self._encode,
            self.chat_template,
            read_tokenizer_config(settings.model_dir),
            self.max_context,
            self.check_model,
        )
        self._settings = settings
        self._sampling_defaults = settings.sampling_defaults
        self._vocab_size = engine.vocab_size
        self._encoder = PromptEncoder(tokenizer)
        self._grammars = GrammarCompiler(
            self.vocabulary, engine.vocab_size, [*engine.eos_token_ids, *self.eos_token_ids]
        )
        self._metrics = metrics
        self._responses = responses
        self._sessions = sessions
        self._max_prompts = max_prompts

    def check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            message = f"The model '{name}' does not exist; this server has '{self._settings.model_name}'."
            raise ApiError(404, "model_not_found", message, param="model")

    def completion(self, data: bytes, client: Client) -> Order:
        """Return what continues the prompts; the prompt of a session's request follows its tokens."""
        body = parse(CompletionBody, data)
        self.check_model(body.model)
        param = CompletionFormat.prompt_param
        with self._turn(body, client, len(each(body.prompt))) as turn:
            before = [] if turn is None else turn.tokens
            ids = [[*before, *it] for it in self._encode_each(body.prompt, param, add_special_tokens=not before)]
            return replace(self._complete(body, ids), turn=turn)

    def _complete(self, body: CompletionBody, ids: Sequence[Sequence[int]]) -> Order:
        texts = [it if isinstance(it, str) else None for it in each(body.prompt)]
        echoes = [EchoedPrompt(*it, self.vocabulary) for it in zip(ids, texts, strict=True)] if body.echo else []
        grammar = self._grammar(body, ReplySyntax())
        return self._order(body, ids, body.max_tokens, CompletionFormat(echoes), grammar)

    def chat(self, data: bytes, client: Client) -> Order:
        """Return what answers a conversation, which becomes that of the request's session."""
        body = parse(ChatBody, data)
        self.check_model(body.model)
        with self._turn(body, client, 1) as turn:
            return replace(self._order_chat(body, ChatFormat), turn=turn)

    @contextmanager
    def _turn(self, body: GenerationBody, client: Client, num_prompts: int) -> Iterator[Turn | None]:
        """Have the session of a request, if it names one, until its order has ended or cannot be made."""
        if body.session_id is None:
            yield None
            return
        body.check_session(num_prompts)
        turn = self._sessions.begin(client, body.session_id)
        try:
            yield turn
        except BaseException:
            turn.end()
            raise

    def _order_chat(self, body: ChatBody, form_of: Callable[[ReplySyntax], ChatFormat]) -> Order:
        text = self.chat_template.render(body.messages, body.chat_template_kwargs, body.callable_tools)
        syntax = self._reply_syntax(body, text)
        form = form_of(syntax)
        ids = self._encode([text], form.prompt_param, add_special_tokens=False)
        max_tokens = body.max_completion_tokens or body.max_tokens
        return self._order(body, ids, max_tokens, form, self._chat_grammar(body, syntax))

    def response(self, data: bytes, client: Client) -> Order:
        body = parse(ResponseBody, data)
        self.check_model(body.model)
        messages: list[Mapping[str, Any]] = []
        if body.previous_response_id is not None:
            previous = self._responses.get(client.name, body.previous_response_id)
            if previous is None:
                name = "previous_response_id"
                message = f"'{name}': there is no response '{body.previous_response_id}', or no longer."
                raise bad_request(message, name, "previous_response_not_found")
            messages += previous.messages
        messages += body.messages()
        try:
            order = self._order_chat(check(ChatBody, body.chat(messages)), ResponsesFormat)
        except ApiError as error:
            raise as_asked(error) from None

        size = len(data) + sum(len(message["content"] or "") for message in messages)

        def keep(document: Mapping[str, Any]) -> None:
            whole = [*messages, *messages_of_output(document["output"])]
            self._responses.put(client.name, StoredResponse(document, whole, size))

        syntax, defaults = order.form.syntax, self._sampling_defaults
        return replace(order, respond=lambda it: ResponseAnswer(it, body, syntax, defaults, self._metrics, keep))

    def _reply_syntax(self, body: ChatBody, prompt: str) -> ReplySyntax:
        tool_calls = None
        if tools := body.callable_tools:
            parameters = {tool.function.name: tool.parameters for tool in tools}
            tool_calls = FORMATS[self.chat_template.call_format()](parameters)
        has_thought = self._settings.has_reasoning and self.chat_template.has_thought
        return ReplySyntax(
            has_thought=has_thought,
            begins_in_thought=has_thought and prompt.rstrip().endswith(THOUGHT),
            tool_calls=tool_calls,
            max_calls=1 if body.parallel_tool_calls is False else None,
        )

    def _grammar(self, body: GenerationBody, syntax: ReplySyntax) -> CompiledGrammar | None:
        grammar = structured_output(body, self._grammars, syntax)
        if grammar is not None and body.ignore_eos:
            raise bad_request("'ignore_eos': expected no grammar of the replies with it.", "ignore_eos")
        return grammar

    def _chat_grammar(self, body: ChatBody, syntax: ReplySyntax) -> CompiledGrammar | None:
        grammar = self._grammar(body, syntax)
        tools, choice = body.callable_tools, body.tool_choice or "auto"
        if grammar is not None and tools:
            message = "'tools': expected 'tool_choice' to be none where a grammar restricts the replies."
            raise bad_request(message, "tools")
        is_parallel = body.parallel_tool_calls is not False
        if not needs_grammar(tools, choice, is_parallel=is_parallel):
            return grammar
        if body.ignore_eos:
            raise bad_request("'ignore_eos': expected tools that the reply is free to call with it.", "ignore_eos")
        for i, tool in enumerate(tools):
            check_keywords(tool.function.parameters, f"tools[{i}].function.parameters")
        text = tool_grammar(
            self.chat_template.call_format(),
            tools,
            choice,
            is_parallel=is_parallel,
            has_thought=syntax.has_thought,
            begins_in_thought=syntax.begins_in_thought,
        )
        return self._grammars.grammar(text, "tools")

    def embedding(self, data: bytes) -> tuple[EmbeddingBody, list[Request]]:
        body = parse(EmbeddingBody, data)
        self.check_model(body.model)
        self.pooling.check()
        prompts = self._encode_each(body.input, "input", add_special_tokens=True)
        for ids in prompts:
            self._check_prompt(ids, 0, "input")
        return body, [Request(list(ids), max_new_tokens=0, wants_hidden=True) for ids in prompts]

    def _encode_each(self, value: Any, param: str, *, add_special_tokens: bool) -> Sequence[Sequence[int]]:
        """Return the token ids of each text; those that are token ids already stay."""
        prompts = each(value)
        if len(prompts) > self._max_prompts:
            raise bad_request(f"'{param}': expected at most {self._max_prompts} texts, got {len(prompts)}.", param)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        ids = [it for it in prompts if not isinstance(it, str)]
        return ids or self._encode(texts, param, add_special_tokens=add_special_tokens)

    def _encode(self, texts: Sequence[str], param: str, *, add_special_tokens: bool) -> list[list[int]]:
        try:
            return self._encoder.encode(texts, self.max_context, add_special_tokens=add_special_tokens)
        except TooManyTokens as error:
            raise self._too_long(f"at least {error.count} of the prompt", param) from None

    def _too_long(self, what: str, param: str) -> ApiError:
        message = f"This model's maximum context length is {self.max_context} tokens, got {what}."
        return bad_request(message, param, "context_length_exceeded")

    def _check_prompt(self, ids: Sequence[int], max_tokens: int, param: str) -> None:
        if not ids:
            raise bad_request(f"'{param}': expected at least one token, got none.", param, "empty_prompt")
        if max(ids) >= self._vocab_size:
            raise bad_request(f"'{param}': expected token ids below {self._vocab_size}, got {max(ids)}.", param)
        if len(ids) + max_tokens > self.max_context:
            total = len(ids) + max_tokens
            raise self._too_long(f"{total}: {len(ids)} of the prompt and up to {max_tokens} to generate", param)

    def _order(
        self,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None,
        form: Format,
        grammar: CompiledGrammar | None,
    ) -> Order:
        is_default = max_tokens is None
        if max_tokens is None:  # the format's default, as far as the context has room
            rest = max(1, self.max_context - max(map(len, prompts), default=0))
            max_tokens = min(form.default_max_tokens or self._sampling_defaults.max_new_tokens or rest, rest)
        for ids in prompts:
            self._check_prompt(ids, max_tokens, form.prompt_param)
        sampling = body.sampling_params(
            self._sampling_defaults,
            lambda words: self._encode(words, "bad_words", add_special_tokens=False),
            vocab_size=self._vocab_size,
            max_tokens=max_tokens,
            logprobs=body.num_logprobs,
        )
        reports_prompt = body.prompt_logprobs is not None

        def respond(generation: Generation) -> Answer:
            return Answer(generation, form, body.model, self._metrics, reports_prompt=reports_prompt)

        return Order(body, prompts, max_tokens, sampling, form, grammar, is_default, respond)
