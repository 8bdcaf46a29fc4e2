# SPDX-License-Identifier: Apache-2.0
"""`xgdn plan`: the memory of a model before anything is loaded."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xgdn import engine
from xgdn.cli.failure import errors_in_one_line, fail
from xgdn.cli.options import MAX, JsonOption, ModelArgument, readable_bytes, with_engine_args
from xgdn.engine import EngineArgs, Plan

_LENGTHS = [512, 2048, 8192]  # without --length


@with_engine_args(
    "dtype",
    "state_dtype",
    "replay_states",
    "speculate",
    "draft_tokens",
    "kv_dtype",
    "quantize",
    "activation_bits",
    "tensor_parallel",
    "max_batch_size",
    "max_cached_tokens",
    "kv_block_size",
    "max_tokens_per_step",
    "prefix_cache_slots",
    "memory_limit",
)
def plan(
    model: ModelArgument,
    engine_args: EngineArgs,
    length: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX, metavar="N", help="Length of a sequence in tokens; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the memory that a model would take, and how many sequences fit into a limit, before anything is loaded."""
    limit = engine_args.memory_limit
    with errors_in_one_line():
        planned = engine.plan(
            model,
            dtype=engine_args.dtype,
            state_dtype=engine_args.state_dtype,
            replay_states=engine_args.replay_states,
            speculate=engine_args.speculate,
            draft_tokens=engine_args.draft_tokens,
            kv_dtype=engine_args.kv_dtype,
            quantize=engine_args.quantize,
            activation_bits=engine_args.activation_bits,
            tensor_parallel=engine_args.tensor_parallel,
            runner=engine_args.runner_options(),
        )
    fits = {} if limit is None else {str(n): planned.max_sequences(n, limit) for n in length or _LENGTHS}
    if as_json:
        names = [name for name in dir(planned) if name.endswith("_bytes") or name.startswith(("num_", "max_context"))]
        numbers = {name: getattr(planned, name) for name in names}
        typer.echo(json.dumps({**numbers, "memory_limit": limit, "max_sequences": fits}))
    else:
        _print_plan(planned, limit, fits)
    if limit is not None and planned.total_bytes > limit:
        fail(f"expected {planned.total_bytes} bytes to fit into --memory-limit, got {limit}")


def _print_plan(planned: Plan, limit: int | None, fits: dict[str, int]) -> None:
    slots = f"{planned.num_state_slots} sequences"
    if planned.num_prefix_slots:
        slots += f" and {planned.num_prefix_slots} cached prefixes"
    slots += f" of {planned.state_slot_bytes}"
    blocks = f"{planned.num_kv_blocks} blocks of {planned.kv_block_bytes}, {planned.kv_block_size} tokens each"
    table = Table("what", "bytes", "", "made of")
    for what, num_bytes, parts in [
        ("weights", planned.weight_bytes, ""),
        ("states", planned.state_bytes, slots),
        ("KV cache", planned.kv_bytes, blocks),
        ("largest step", planned.workspace_bytes, "at most"),
        ("total", planned.total_bytes, "" if limit is None else f"of {limit}"),
    ]:
        table.add_row(what, Text(str(num_bytes), justify="right"), readable_bytes(num_bytes), parts)
    console = Console()
    console.print(table)
    if planned.max_context:
        console.print(f"a sequence may have {planned.max_context} tokens")
    for length, count in fits.items():
        console.print(Text(f"{count} sequences of {length} tokens fit into {limit} bytes"), soft_wrap=True)
