# SPDX-License-Identifier: Apache-2.0
"""`xgdn generate`: continue prompts, in text or in token ids."""

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from xgdn.cli.failure import errors_in_one_line
from xgdn.cli.load import eos_token_ids, load_engine, load_tokenizer, sampling_defaults
from xgdn.cli.options import MAX, GenerationConfigOption, ModelArgument, parse_ids, with_engine_args
from xgdn.cli.reply import Reply
from xgdn.engine import Engine, EngineArgs, FinishReason, Request, RequestEvent, SamplingParams
from xgdn.progress import Bar
from xgdn.sampling_defaults import SamplingDefaults, first_given
from xgdn.vocabulary import Vocabulary

_SAMPLING = SamplingParams()  # of neither options nor the model


@with_engine_args()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, used verbatim; repeatable.")] = None,
    prompt_ids: Annotated[list[str] | None, typer.Option(help="A prompt as token ids: 1,2,3; repeatable.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Maximum length of a reply in tokens.")
    ] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help=f"Sampling temperature; 0 is greedy (default: the model's, else {_SAMPLING.temperature:g})."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX,
            metavar="N",
            help=f"Sample from the k most probable tokens; 0: all (default: the model's, else {_SAMPLING.top_k}).",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the smallest set of tokens whose probabilities add up to this "
            f"(default: the model's, else {_SAMPLING.top_p:g})."
        ),
    ] = None,
    generation_config: GenerationConfigOption = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Random seed; reply i of a prompt uses seed + i.")
    ] = _SAMPLING.seed,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=MAX, metavar="N", help="Replies per prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX,
            metavar="K",
            help="With --json: log-probabilities of each token and of the K most probable alternatives, K up to 20.",
        ),
    ] = None,
    *,
    engine_args: EngineArgs,
    stop_token_ids: Annotated[str, typer.Option(help="Additional token ids that end a reply: 1,2,3.")] = "",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after an end-of-sequence token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document per reply.")] = False,
) -> None:
    """Continue prompts. A prompt in text is answered in text, a prompt in token ids in token ids.

    A single reply is printed as it is generated. Several are printed as each finishes, with a number: [2] is the reply
    to the third prompt; with --n, [2.1] is the second reply to it.
    """
    if bool(prompt) == bool(prompt_ids):
        raise typer.BadParameter("give prompts either as --prompt or as --prompt-ids")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("expected --json with it", param_hint="--logprobs")
    stop_ids = parse_ids(stop_token_ids, "--stop-token-ids")
    defaults = sampling_defaults(generation_config, model)
    tokenizer = load_tokenizer(model) if prompt or (model / "tokenizer.json").is_file() else None
    if tokenizer is not None and not ignore_eos:
        stop_ids += eos_token_ids(model, tokenizer)
    if prompt and tokenizer is not None:
        prompts = [tokenizer.encode(text).ids for text in prompt]
    else:
        prompts = [parse_ids(text, "--prompt-ids") for text in prompt_ids or []]

    with errors_in_one_line():
        engine = load_engine(model, engine_args)
        sampling = _sampling(temperature, top_k, top_p, seed, logprobs, defaults)
        requests = [
            Request(
                ids,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_token_ids=stop_ids,
                ignore_eos=ignore_eos,
                n=n,
            )
            for ids in prompts
        ]
        vocabulary = Vocabulary(tokenizer) if tokenizer is not None and (prompt or as_json) else None
        succeeded = _Output(requests, as_json).run(engine, vocabulary)
    if not succeeded:
        raise typer.Exit(1)


def _sampling(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    logprobs: int | None,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """What was asked for, completed by the model's defaults, which are named on stderr."""
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    taken = [name for name, value in asked.items() if value is not None]
    recommended = defaults.without([*taken, "max_new_tokens"])  # --max-new-tokens has a default of its own
    if recommended.values():
        typer.echo(f"xgdn: {recommended}, as the model's generation_config.json says", err=True)
    return SamplingParams(
        temperature=first_given(temperature, defaults.temperature, _SAMPLING.temperature),
        top_k=first_given(top_k, defaults.top_k, _SAMPLING.top_k),
        top_p=first_given(top_p, defaults.top_p, _SAMPLING.top_p),
        min_p=first_given(defaults.min_p, _SAMPLING.min_p),
        repetition_penalty=first_given(defaults.repetition_penalty, _SAMPLING.repetition_penalty),
        seed=seed,
        logprobs=logprobs,
    )


class _Output:
    """Replies printed as they come, and the progress of prefill on stderr."""

    def __init__(self, requests: Sequence[Request], as_json: bool) -> None:
        self._requests = requests
        self._as_json = as_json
        self._is_single = sum(request.n for request in requests) == 1 and not as_json
        self._bar = Bar("prefill")
        self._succeeded = True

    def run(self, engine: Engine, vocabulary: Vocabulary | None) -> bool:
        """Run the requests; False when one of them ended with an error."""
        ids = [engine.submit(request) for request in self._requests]
        replies = {
            (ids[index], branch): Reply(index, branch, request, vocabulary)
            for index, request in enumerate(self._requests)
            for branch in range(request.n)
        }
        num_prefilled = dict.fromkeys(ids, 0)
        num_prompt_tokens = sum(len(request.prompt) for request in self._requests)
        self._bar.update(0, num_prompt_tokens)
        try:
            while not engine.is_idle():
                events = engine.step()
                num_prefilled.update((event.id, event.num_prefilled) for event in events)
                self._bar.update(sum(num_prefilled.values()), num_prompt_tokens)
                for event in events:
                    self._print(event, replies[event.id, event.branch])
        finally:
            self._bar.hide()
        return self._succeeded

    def _print(self, event: RequestEvent, reply: Reply) -> None:
        piece = reply.apply(event)
        is_finished = event.finish_reason != FinishReason.RUNNING
        if is_finished or (self._is_single and piece):
            self._bar.hide()
        if self._is_single:
            typer.echo(piece, nl=is_finished and bool(reply.text))
        elif is_finished:
            typer.echo(json.dumps(reply.document(event)) if self._as_json else f"[{reply.name}] {reply.text}")
        if event.error:
            self._succeeded = False
            typer.echo(f"xgdn: prompt {reply.name}: {event.error}", err=True)
