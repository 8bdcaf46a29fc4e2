# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the small model's held-out text: every backend and type of state beside transformers in float32.

    python examples/tiny_model/perplexity.py [--windows 8] [--device npu:0] [--dtype bfloat16] [--quantize int8]
                                             [--kv-dtype int8]

Prefill reads a window at once; decode reads the same window token by token, all windows in one batch. `--dtype` is that
of weights and activations; `--quantize` rounds the weights of products to 8 or 4 bits, `--kv-dtype` the cached keys and
values. A backend that refuses a row has its sentence there.
"""

import argparse
import importlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

import xgdn
from xgdn.runtime import BatchBuilder, HybridDecoder, KvCache, SegmentKind, SequenceStep, StatePool, load_decoder

MODEL = Path(__file__).parent / "checkpoint"
WINDOW = 512  # tokens; each window starts from nothing


def held_out_windows(count: int) -> Tensor:
    """[count, WINDOW]"""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode((MODEL / "held_out.txt").read_text(encoding="utf-8")).ids
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def perplexity(logits: Tensor, windows: Tensor) -> float:
    """`logits` [count, WINDOW, vocab]; what a window's first token costs is not counted."""
    predictions = logits[:, :-1].double().flatten(0, 1)
    return torch.nn.functional.cross_entropy(predictions, windows[:, 1:].flatten()).exp().item()


def by_transformers(windows: Tensor) -> float:
    model = transformers.Qwen3_5ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return perplexity(torch.stack([model(input_ids=window[None]).logits[0] for window in windows]), windows)


@dataclass(frozen=True)
class Numbers:
    """How a model keeps its numbers."""

    dtype: torch.dtype = torch.float32  # of weights and activations
    state_dtype: torch.dtype = torch.float32
    quantize: str | None = None
    kv_dtype: torch.dtype | None = None
    activation_bits: int = 16  # beside weights in 8 or 4 bits


class Reader:
    """A model with its pools, one slot for each window."""

    def __init__(self, num_windows: int, numbers: Numbers, *, device: str) -> None:
        num_blocks = num_windows * WINDOW // 16
        self.decoder: HybridDecoder = load_decoder(str(MODEL), device=device, **asdict(numbers))
        self.states = StatePool(self.decoder.state_specs(), num_slots=num_windows, device=device, poison_freed=True)
        self.kv = KvCache(self.decoder, num_blocks=num_blocks, block_size=16)
        self.slots = list(range(num_windows))
        self.blocks = [self.kv.allocate(WINDOW // 16) for _ in range(num_windows)]
        self.builder = BatchBuilder(
            num_slots=num_windows,
            num_kv_blocks=num_blocks,
            kv_block_size=16,
            vocab_size=2048,
            has_attention=True,
            device=device,
        )

    def step(self, kind: SegmentKind, tokens: Tensor, num_cached: int) -> Tensor:
        """`tokens` [windows, any number]; logits [windows, vocab] after the last of each."""
        steps = [
            SequenceStep(
                kind=kind,
                tokens=row.tolist(),
                num_cached=num_cached,
                state_slots=[slot],
                has_initial_state=num_cached > 0,
                kv_blocks=blocks,
            )
            for row, slot, blocks in zip(tokens, self.slots, self.blocks, strict=True)
        ]
        return self.decoder.forward(self.builder.build(steps).input, self.states, self.kv).cpu()

    def decode(self, windows: Tensor) -> Tensor:
        logits = [self.step(SegmentKind.PREFILL, windows[:, :1], 0)]
        logits += [self.step(SegmentKind.DECODE, windows[:, i : i + 1], i) for i in range(1, WINDOW)]
        return torch.stack(logits, dim=1)


def by_prefill(windows: Tensor, numbers: Numbers, *, device: str = "cpu") -> float:
    engine = xgdn.Engine(MODEL, device=device, **asdict(numbers))
    return perplexity(torch.stack([engine.prompt_logits(window.tolist()).cpu() for window in windows]), windows)


def by_decode(windows: Tensor, numbers: Numbers, *, device: str = "cpu") -> float:
    reader = Reader(len(windows), numbers, device=device)
    return perplexity(reader.decode(windows), windows)


def figures(
    windows: Tensor,
    backends: tuple[str, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize: str | None = None,
    kv_dtype: torch.dtype | None = None,
    activation_bits: int = 16,
) -> dict[tuple[str, str, str], float | str]:
    """(backend, phase, type of the states) -> perplexity, or why the backend refuses."""
    found: dict[tuple[str, str, str], float | str] = {}
    for backend in backends:
        for phase, measure in (("prefill", by_prefill), ("decode", by_decode)):
            for state, state_dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
                numbers = Numbers(dtype, state_dtype, quantize, kv_dtype, activation_bits)
                try:
                    with xgdn.use_backend(prefill=backend, decode=backend):
                        figure = measure(windows, numbers, device=device)
                except xgdn.errors.UnsupportedError as error:
                    figure = str(error)
                found[backend, phase, state] = figure
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or "npu:0"')
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations"
    )
    parser.add_argument("--quantize", choices=("int8", "int4"), help="rounds the weights of products; default: plain")
    parser.add_argument("--activation-bits", type=int, choices=(16, 8), default=16, help="beside weights in few bits")
    parser.add_argument("--kv-dtype", choices=("int8",), help="of cached keys and values; default: --dtype")
    args = parser.parse_args()
    backends: tuple[str, ...] = ("cpu", "reference")
    kind = args.device.partition(":")[0]
    if kind == "npu":
        importlib.import_module("torch_npu")  # it names the device
    if kind != "cpu":
        backends = (kind,)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    windows = held_out_windows(args.windows)
    table = Table("backend", "phase", "state", "perplexity")
    table.add_row("transformers, float32", "prefill", "f32", f"{by_transformers(windows):.4f}")
    found = figures(
        windows,
        backends,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        quantize=args.quantize,
        kv_dtype=None if args.kv_dtype is None else getattr(torch, args.kv_dtype),
        activation_bits=args.activation_bits,
    )
    for key, figure in found.items():
        table.add_row(*key, escape(figure) if isinstance(figure, str) else f"{figure:.4f}")
    console = Console()
    rounded = f", weights of products rounded to {args.quantize}" if args.quantize else ""
    if args.activation_bits != 16:
        rounded += f", activations beside them in {args.activation_bits} bits"
    if args.kv_dtype:
        rounded += f", keys and values {args.kv_dtype}"
    console.print(f"{windows.numel()} held-out tokens, weights and activations {args.dtype}{rounded}")
    console.print(table)


if __name__ == "__main__":
    main()
