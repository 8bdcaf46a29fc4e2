# SPDX-License-Identifier: Apache-2.0
"""Decode steps of transformers' own model, greedy, with its cache, and prompts. Run by compare_models.py, gpu/model.py.

    python model_transformers.py MODEL THREADS PROMPT_TOKENS STEPS REPETITIONS BATCH,.. PROMPT,.. [DEVICE]

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
    batches, lengths = ([int(word) for word in words.split(",") if word] for words in sys.argv[6:8])
    device = sys.argv[8] if len(sys.argv) > 8 else "cpu"
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval().to(device)

    def timed(tokens: torch.Tensor, **cache: object) -> tuple[transformers.utils.ModelOutput, float]:
        """Return the outputs of a forward and its milliseconds."""
        start = time.perf_counter()
        out = model(tokens, **cache, use_cache=True, logits_to_keep=1)
        if device != "cpu":
            torch.accelerator.synchronize()
        return out, 1e3 * (time.perf_counter() - start)

    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(0, model.config.vocab_size, (prompt_tokens,), generator=generator) for _ in range(batch)
        ]
        times = []
        with torch.inference_mode():
            out, _ = timed(torch.stack(prompts).to(device))
            for _ in range(steps):
                tokens = out.logits[:, -1:].argmax(-1)
                out, milliseconds = timed(tokens, past_key_values=out.past_key_values)
                times.append(milliseconds)
        print(json.dumps({"kind": "decode", "size": batch, "times": times[1:]}), flush=True)
    for length in lengths:
        prompt = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            times = [timed(prompt.to(device))[1] for _ in range(1 + repetitions)]
        print(json.dumps({"kind": "prompt", "size": length, "times": times[1:]}), flush=True)


if __name__ == "__main__":
    main()
