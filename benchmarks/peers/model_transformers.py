# SPDX-License-Identifier: Apache-2.0
"""Decode steps of transformers' own model, greedy, with its cache, and prompts; run by compare_models.py.

    python model_transformers.py MODEL THREADS PROMPT_TOKENS STEPS REPETITIONS BATCH,.. PROMPT,..

The least that a step can be: the forward of one token a sequence and the argmax, without `generate`. Of a prompt, only
the last token's logits are computed.
"""

import json
import sys
import time

import torch
import transformers


def main() -> None:
    model_dir, threads, prompt_tokens, steps, repetitions = sys.argv[1], *map(int, sys.argv[2:6])
    batches, lengths = ([int(word) for word in words.split(",") if word] for words in sys.argv[6:])
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(0, model.config.vocab_size, (prompt_tokens,), generator=generator) for _ in range(batch)
        ]
        times = []
        with torch.inference_mode():
            out = model(torch.stack(prompts), use_cache=True, logits_to_keep=1)
            for _ in range(steps):
                tokens = out.logits[:, -1:].argmax(-1)
                start = time.perf_counter()
                out = model(tokens, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps({"kind": "decode", "size": batch, "times": times[1:]}), flush=True)
    for length in lengths:
        prompt = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        times = []
        with torch.inference_mode():
            for _ in range(1 + repetitions):
                start = time.perf_counter()
                model(prompt, use_cache=True, logits_to_keep=1)
                times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps({"kind": "prompt", "size": length, "times": times[1:]}), flush=True)


if __name__ == "__main__":
    main()
