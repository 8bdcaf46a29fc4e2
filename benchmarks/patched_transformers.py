# SPDX-License-Identifier: Apache-2.0
"""transformers with and without `xgdn.patch_transformers()`: a prompt and decode steps of a whole model, and its ops.

    python benchmarks/patched_transformers.py [--dtype bf16 f32] [--cases ops decode prompt] [--batch 1 8]
        [--prompt 2048] [--layers 24] [--rounds 3] [--threads 2]

The model has the shape of Qwen3.5-0.8B and random weights. "functions" is `patch_transformers()`, "layers"
`patch_transformers(layers=True)`. The three take turns in one process; a time is the shortest of the rounds, of which
short cases have more, in milliseconds. The products with the weights alone, of a prompt those of the layers, are timed
too, by torch and by `linear`: no step and no prompt takes less. What `xgdn.report()` counted comes last.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

import xgdn
from markdown_table import markdown
from random_checkpoint import QWEN3_5_0_8B
from xgdn.bench.report import machine

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
CONTEXT = 128  # tokens before the decode steps that are timed
SHORT = 0.02  # seconds that a measurement takes at least
ENOUGH = 2.0  # seconds after which a case has no more rounds than asked for
MODES: dict[str, Callable[[], Any]] = {
    "transformers": xgdn.unpatch_transformers,
    "functions": xgdn.patch_transformers,
    "layers": partial(xgdn.patch_transformers, layers=True),
}


def build(dtype: torch.dtype, num_layers: int) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    config = transformers.Qwen3_5TextConfig(**QWEN3_5_0_8B | {"num_hidden_layers": num_layers})
    model = transformers.Qwen3_5ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def timed(call: Callable[[], Any]) -> float:
    """The time of one call, in milliseconds; of a short one the mean of several. One before is not timed: what the mode
    before has left free is not what this one needs, so that it has memory which nobody has used yet.
    """
    call()
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < SHORT:
        call()
        count += 1
    return (time.perf_counter() - begin) * 1e3 / count


def shortest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each call in the mode that it names."""
    times: dict[str, list[float]] = {mode: [] for mode in calls}
    begin = time.perf_counter()
    while len(times["transformers"]) < rounds or time.perf_counter() - begin < ENOUGH:
        for mode, call in calls.items():
            MODES[mode]()
            times[mode].append(timed(call))
    return {mode: min(t) for mode, t in times.items()}


def row(name: str, dtype: str, times: dict[str, float]) -> list[str]:
    host = times["transformers"]
    cells = [name, dtype, f"{host:,.2f}"]
    for mode in list(MODES)[1:]:
        cells += [f"{times[mode]:,.2f}", f"{host / times[mode]:.1f} x"] if mode in times else ["", ""]
    return cells


def model_cases(model: Any, args: argparse.Namespace) -> dict[str, dict[str, Callable[[], Any]]]:
    cases: dict[str, dict[str, Callable[[], Any]]] = {}
    if "decode" in args.cases:
        for batch in args.batch:
            calls = {}
            for mode in MODES:
                MODES[mode]()
                ids = torch.randint(1, model.config.vocab_size, (batch, CONTEXT))
                cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
                calls[mode] = partial(model, ids[:, :1], past_key_values=cache, use_cache=True)
            cases[f"decode step, batch {batch}"] = calls
            cases[f"the products of batch {batch}"] = products(model, batch)
    if "prompt" in args.cases:
        ids = torch.randint(1, model.config.vocab_size, (1, args.prompt))
        call = partial(model, ids, use_cache=True, logits_to_keep=1)
        cases[f"prompt of {args.prompt:,} tokens"] = dict.fromkeys(MODES, call)
        cases[f"the products of {args.prompt:,} tokens"] = products(model.model, args.prompt)
    return cases


def products(model: Any, count: int) -> dict[str, Callable[[], Any]]:
    """Each product of `count` tokens with the weights, on other tokens."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    tokens = {n: torch.randn(count, n).to(model.dtype) for n in {module.in_features for module in linears}}

    def multiply(product: Callable[[Tensor, Tensor], Tensor]) -> None:
        for module in linears:
            product(tokens[module.in_features], module.weight)

    by_torch = partial(multiply, torch.nn.functional.linear)
    return {"transformers": by_torch, "layers": partial(multiply, xgdn.ops.linear)}


def rule(dtype: torch.dtype, batch: int, length: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of the rule as a layer makes them, and a state."""
    heads, dim = QWEN3_5_0_8B["linear_num_value_heads"], QWEN3_5_0_8B["linear_key_head_dim"]
    q, k, v = torch.randn(batch, length, 3, heads, dim).to(dtype).unbind(2)
    gates = torch.rand(batch, length, heads)
    return (q, k, v, -gates, gates.to(dtype)), torch.randn(batch, heads, dim, dim)


def op_cases(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict[str, Callable[[], Any]]]:
    """What a layer computes between its projections, for a prompt and for a token, function by function and together;
    with `layers` a token is one op.
    """
    heads, dim = QWEN3_5_0_8B["linear_num_value_heads"], QWEN3_5_0_8B["linear_key_head_dim"]
    channels = 3 * heads * dim
    taps = torch.randn(channels, 4).to(dtype)
    norm = modeling.Qwen3_5RMSNormGated(dim).to(dtype)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    cases: dict[str, dict[str, Callable[[], Any]]] = {}

    def add(name: str, layers: Callable[[], Any] | None = None, **functions: Callable[[], Any]) -> None:
        functions["together"] = partial(lambda calls: [call() for call in calls], list(functions.values()))
        for function, call in functions.items():
            cases[f"{name}: {function}"] = dict.fromkeys(list(MODES)[:2], call)
        if layers is not None:
            cases[f"{name}: together"]["layers"] = layers

    def normed(rows: int) -> Callable[[], Any]:
        return partial(norm, *torch.randn(2, rows * heads, dim).to(dtype))

    tokens, _ = rule(dtype, 1, args.prompt)
    x = torch.randn(1, args.prompt, channels).to(dtype).transpose(1, 2)
    # The functions are looked up when they are called, since that is where the patch is.
    add(
        f"prompt of {args.prompt:,}",
        rule=lambda: modeling.torch_chunk_gated_delta_rule(*tokens, **options),
        convolution=lambda: modeling.causal_conv1d_fn(x, taps, activation="silu"),
        norm=normed(args.prompt),
    )
    for batch in args.batch:
        token, state = rule(dtype, batch, 1)
        one, history = torch.randn(batch, channels, 1).to(dtype), torch.randn(batch, channels, 4).to(dtype)
        add(
            f"token, batch {batch}",
            fused_step(dtype, batch, taps),
            rule=partial(
                lambda token, state: modeling.torch_recurrent_gated_delta_rule(*token, initial_state=state, **options),
                token,
                state.transpose(-1, -2),
            ),
            convolution=partial(lambda *a: modeling.causal_conv1d_update(*a, None, "silu"), one, history, taps),
            norm=normed(batch),
        )
    return cases


def fused_step(dtype: torch.dtype, batch: int, taps: Tensor) -> Callable[[], Any]:
    _, state = rule(dtype, batch, 1)
    heads, dim, channels = state.shape[1], state.shape[2], taps.shape[0]
    return partial(
        xgdn.ops.gdn_decode_step,
        torch.randn(batch, channels + heads * dim + 2 * heads).to(dtype),
        taps,
        torch.randn(batch, 3, channels).to(dtype),
        torch.zeros(heads),
        torch.zeros(heads),
        state,
        torch.ones(dim),
        state_indices=torch.arange(batch, dtype=torch.int32),
        cu_seqlens=torch.arange(batch + 1, dtype=torch.int32),
        may_have_padding=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=("ops", "decode", "prompt"), default=["ops", "decode", "prompt"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=QWEN3_5_0_8B["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {**machine(), "transformers": transformers.__version__, "layers": args.layers, "threads": args.threads}
    print("  ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    lines, reports = [], []
    with torch.inference_mode():
        for name in args.dtype:
            cases = op_cases(DTYPES[name], args) if "ops" in args.cases else {}
            if len(args.cases) > ("ops" in args.cases):
                cases |= model_cases(build(DTYPES[name], args.layers), args)
            xgdn.report(reset=True)
            for case, calls in cases.items():
                lines.append(row(case, name, shortest(calls, args.rounds)))
                print("  ".join(lines[-1]), flush=True)
            reports.append(f"{name}: {xgdn.report(reset=True)}")
    headings = ["ms", "dtype", "transformers", "functions", "", "layers", ""]
    print("\n" + markdown(headings, lines), *reports, sep="\n\n")


if __name__ == "__main__":
    main()
