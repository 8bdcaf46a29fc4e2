# SPDX-License-Identifier: Apache-2.0
"""`xgdn bench`: decode steps of a model, and a server under load."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from xgdn.bench.workload import Lengths, LoadPlan, Workload
from xgdn.cli.failure import errors_in_one_line, fail
from xgdn.cli.load import load_engine
from xgdn.cli.options import MAX, JsonOption, ModelArgument, parse_counts, parse_range, parse_rates, with_engine_args
from xgdn.engine import EngineArgs
from xgdn.progress import Bar

app = typer.Typer(no_args_is_help=True, help="Measures a model's decode steps, and a server under load.")


@app.command()
@with_engine_args(
    "dtype",
    "state_dtype",
    "replay_states",
    "kv_dtype",
    "quantize",
    "activation_bits",
    "device",
    "tensor_parallel",
    "prefill_backend",
    "decode_backend",
    "prefill_accuracy",
)
def model(
    model: ModelArgument,
    batch: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes.")] = "1,8,32",
    threads: Annotated[str, typer.Option(metavar="N,..", help="Numbers of threads.")] = "1,2",
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=MAX, metavar="N", help="Length of each prompt in tokens.")
    ] = 128,
    steps: Annotated[int, typer.Option(min=1, max=MAX, metavar="N", help="Timed decode steps per batch size.")] = 32,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a step goes: each op, and the gaps between them.")
    ] = False,
    *,
    engine_args: EngineArgs,
    as_json: JsonOption = False,
) -> None:
    """Measure decode steps of a whole model against the roofline, and the share of them spent outside its forward.

    The roofline reads the weights once, and reads and writes the states once. With --profile, two more tables, of the
    steps with prompts and of the decode steps: the ops by their time, and the time that passes before them.
    """
    from xgdn.bench.model import ModelBenchmark
    from xgdn.bench.report import print_model_rows, show

    batches, counts = parse_counts(batch, "--batch"), parse_counts(threads, "--threads")
    with errors_in_one_line():
        benchmark = ModelBenchmark(
            partial(load_engine, model), engine_args, prompt_tokens=prompt_tokens, steps=steps, profile=profile
        )
        rows = [row for count in counts for row in benchmark.run(batches, count)]
    show(rows, print_model_rows, as_json)


@app.command()
def serving(
    model: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="Model to serve; with --url, only its config.json is read."),
    ],
    serve_options: Annotated[
        list[str] | None, typer.Argument(metavar="-- SERVE_OPTION", help="Options of `xgdn serve`, after --.")
    ] = None,
    rate: Annotated[
        str, typer.Option(metavar="R,..", help="Request rates, per second; inf: all at once.")
    ] = "1,2,4,inf",
    requests: Annotated[int, typer.Option(min=1, max=MAX, metavar="N", help="Requests per rate.")] = 100,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N-N", help="Range of prompt lengths in tokens, drawn uniformly.")
    ] = "32-512",
    output_tokens: Annotated[
        str, typer.Option(metavar="N-N", help="Range of requested output lengths in tokens, drawn uniformly.")
    ] = "16-128",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Random seed of arrivals, lengths and token ids.")
    ] = 0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, max=MAX, metavar="N", help="Maximum number of requests in flight (default: no limit)."),
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            min=1, max=MAX, metavar="N", help="Requests whose answers are compared with those they get alone."
        ),
    ] = LoadPlan.check,
    min_equal: Annotated[
        float, typer.Option(min=0, max=1, help="Share of compared answers that must be equal; below 1 for bfloat16.")
    ] = LoadPlan.min_equal,
    ignore_eos: Annotated[
        bool, typer.Option(help="Request answers of full length; not every server supports the field.")
    ] = True,
    url: Annotated[
        str | None, typer.Option(help="Benchmark a running server at this URL (default: start `xgdn serve`).")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model on the server (default: the first that it lists).")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="XGDN_API_KEY", help="Key to send to /v1.")] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time without data after which a request has failed.")
    ] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Load `xgdn serve MODEL`, or any server with OpenAI's interface; report latencies and throughput at each rate.

    Requests arrive as a Poisson process; prompts are token ids, answers greedy streams. It is an error when an answer
    under load differs from the one that the same request got alone, or when /metrics disagrees with the answers.
    """
    try:
        from xgdn.bench.client import Target
        from xgdn.bench.report import print_serving_rows, show
        from xgdn.bench.server_process import running_server, vocab_size
        from xgdn.bench.serving import ServingBenchmark, problems
    except ModuleNotFoundError as error:
        fail(f"`xgdn bench serving` needs {error.name}, which is not installed: pip install 'xgdn[bench]'")

    options = serve_options or []
    if url is not None and options:
        raise typer.BadParameter(f"the server of --url takes no options, got {' '.join(options)!r}")
    prompts = Lengths(*parse_range(prompt_tokens, "--prompt-tokens"))
    outputs = Lengths(*parse_range(output_tokens, "--output-tokens"))
    plan = LoadPlan(parse_rates(rate, "--rate"), max_concurrency, check, min_equal)
    bar = Bar("answers")
    with errors_in_one_line(), ExitStack() as stack:
        workload = Workload(
            requests, prompt_tokens=prompts, output_tokens=outputs, vocab_size=vocab_size(model), seed=seed
        )
        address = url or stack.enter_context(running_server(model, options, api_key))
        target = Target(address.rstrip("/").removesuffix("/v1"), model_name, api_key, ignore_eos, timeout)
        try:
            rows = ServingBenchmark(target, workload, plan).run(bar.update)
        finally:
            bar.hide()
    drawn = {"requests": requests, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "seed": seed}
    load = {**drawn, "max_concurrency": max_concurrency, "serve_options": options, "url": url}
    show(rows, print_serving_rows, as_json, load=load)
    if found := [problem for row in rows for problem in problems(row, min_equal)]:
        fail("; ".join(found))
