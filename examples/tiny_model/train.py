# SPDX-License-Identifier: Apache-2.0
"""Trains a small Qwen3.5 on the source code of Python's standard library.

    python examples/tiny_model/train.py OUT [--steps 600] [--device cuda]

OUT gets a Hugging Face checkpoint in bf16, its tokenizer, a held-out text and a model card with the loss curve. One GPU
is enough. Needs transformers and tokenizers.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
WINDOW = 512
BATCH = 64
WARM_UP = 100
PEAK_LEARNING_RATE = 3e-3
HELD_OUT_SHARE = 50  # one file in so many
HELD_OUT_CHARACTERS = 100_000
REPORT_EVERY = 100


# ---- text ------------------------------------------------------------------------------------------------------------


def library_files() -> list[Path]:
    """Sources of the standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def is_held_out(path: Path) -> bool:
    return hashlib.sha256(path.name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor([token for e in tokenizer.encode_batch(texts) for token in (*e.ids, end)], dtype=torch.long)


# ---- model -----------------------------------------------------------------------------------------------------------


def make_model(end_of_text: int) -> transformers.Qwen3_5ForCausalLM:
    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=None,
    )
    return transformers.Qwen3_5ForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARM_UP:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Weight decay for matrices only: norms, gates and biases are left free."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def train(model: torch.nn.Module, tokens: Tensor, steps: int) -> list[tuple[int, float]]:
    """Returns (step, mean loss since the last entry)."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    generator = torch.Generator(device=device).manual_seed(0)
    optimizer = make_optimizer(model)
    offsets = torch.arange(WINDOW, device=device)
    curve: list[tuple[int, float]] = []
    losses: list[Tensor] = []
    begin = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        begins = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=generator, device=device)
        ids = tokens[begins + offsets]
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % REPORT_EVERY == 0:
            curve.append((step + 1, torch.stack(losses).mean().item()))
            losses.clear()
            print(f"step {step + 1}: loss {curve[-1][1]:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return curve


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: Tensor) -> float:
    """Over windows of WINDOW tokens that do not overlap, in float32; each window starts from nothing."""
    device = next(model.parameters()).device
    count = len(tokens) // WINDOW
    windows = tokens[: count * WINDOW].view(count, WINDOW).to(device)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.double() for ids in windows.split(1)]
    return torch.stack(losses).mean().exp().item()


# ---- what is saved ---------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: en
library_name: xgdn
---
# A small Qwen3.5 that writes Python

{parameters:,} parameters, architecture of Qwen3.5 (three gated-delta-rule layers to one attention layer; 2 key heads
for 4 value heads of dim 64), byte-level BPE of {vocab} tokens. It is here to be run, not to be used: its text looks
like Python and means nothing.

- **Data**: the sources of the standard library of Python {python} ({files} files, {tokens:,} tokens; its tests left
  out), under the Python Software Foundation License 2. One file in {share} is held out; the first {held:,} characters
  of those are `held_out.txt`.
- **Training**: `python examples/tiny_model/train.py OUT --steps {steps}` with torch {torch} and transformers
  {transformers} on {device}: batches of {batch} x {window} tokens, bf16 autocast, AdamW, seed 0, {elapsed:.0f} s.
- **Held-out perplexity** of `held_out.txt` ({held_tokens:,} tokens, windows of {window}, float32 arithmetic, the bf16
  weights that are shipped): **{perplexity:.4f}** by transformers; {per_byte:.3f} per byte.
- **Licence** of the weights: Apache 2.0.

## Loss

| step | training loss |
|---|---|
{curve}
"""


def save_model(model: transformers.PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 8192}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    files = library_files()
    texts = [read(path) for path in files if not is_held_out(path)]
    held_out = "".join(read(path) for path in files if is_held_out(path))[:HELD_OUT_CHARACTERS]
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    held_out_tokens = torch.tensor(tokenizer.encode(held_out).ids)
    model = make_model(tokenizer.token_to_id(END_OF_TEXT)).to(args.device)
    print(f"{len(texts)} files, {len(tokens):,} tokens; {model.num_parameters():,} parameters", flush=True)

    begin = time.perf_counter()
    curve = train(model, tokens, args.steps)
    elapsed = time.perf_counter() - begin

    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).config.dtype = torch.bfloat16
    save_model(model, tokenizer, args.out)
    (args.out / "held_out.txt").write_text(held_out, encoding="utf-8", newline="")
    torch.set_float32_matmul_precision("highest")
    held_out_perplexity = perplexity(model.float().eval(), held_out_tokens)
    nats = math.log(held_out_perplexity) * len(held_out_tokens)
    every = max(1, len(curve) // 20)
    rows = curve[::every] + ([curve[-1]] if (len(curve) - 1) % every else [])
    card = CARD.format(
        parameters=model.num_parameters(),
        vocab=VOCAB_SIZE,
        python=platform.python_version(),
        files=len(texts),
        tokens=len(tokens),
        share=HELD_OUT_SHARE,
        held=len(held_out),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        steps=args.steps,
        batch=BATCH,
        window=WINDOW,
        elapsed=elapsed,
        held_tokens=len(held_out_tokens),
        perplexity=held_out_perplexity,
        per_byte=math.exp(nats / len(held_out.encode())),
        curve="\n".join(f"| {step:,} | {loss:.3f} |" for step, loss in rows),
    )
    (args.out / "README.md").write_text(card)
    print(f"held-out perplexity {held_out_perplexity:.4f}")


if __name__ == "__main__":
    main()
