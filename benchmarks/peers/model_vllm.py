# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prompts of vLLM's engine in its own process and environment; run by compare_models.py and, with the
plugin that VLLM_PLUGINS names, by vllm_plugin.py.

    python model_vllm.py MODEL THREADS PROMPT_TOKENS STEPS REPETITIONS BATCH,.. PROMPT,..

The engine is stepped in this process, without its server and without a tokenizer; recurrent states are float32, or of
STATE_DTYPE. VLLM_EAGER=1 leaves torch.compile out. With TAKES_TURNS=1 each step and each prompt waits for a line on
standard input, after it has printed one of kind "turn".
"""

import json
import os
import sys
import time


def take_turn() -> None:
    if os.environ.get("TAKES_TURNS") == "1":
        print(json.dumps({"kind": "turn"}), flush=True)
        if not sys.stdin.readline():
            sys.exit("nobody gives turns")


def main() -> None:
    model_dir, threads, prompt_tokens, steps, repetitions = sys.argv[1], *map(int, sys.argv[2:6])
    batches, lengths = ([int(word) for word in words.split(",") if word] for words in sys.argv[6:])
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_dir,
        skip_tokenizer_init=True,
        max_num_seqs=max(batches, default=1),
        max_model_len=max([2 * (prompt_tokens + steps), *(length + 1 for length in lengths)]),
        dtype="bfloat16",
        mamba_ssm_cache_dtype=os.environ.get("STATE_DTYPE", "float32"),
        enable_prefix_caching=False,
        enforce_eager=os.environ.get("VLLM_EAGER") == "1",
    )
    engine = llm.llm_engine
    vocab_size = llm.model_config.get_vocab_size()
    sampling = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True, detokenize=False)
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        for i in range(batch):
            prompt = torch.randint(0, vocab_size, (prompt_tokens,), generator=generator)
            engine.add_request(f"{batch}-{i}", {"prompt_token_ids": prompt.tolist()}, sampling)
        times = []
        while engine.has_unfinished_requests():
            take_turn()
            start = time.perf_counter()
            outputs = engine.step()
            elapsed = 1e3 * (time.perf_counter() - start)
            if len(outputs) == batch and all(len(o.outputs[0].token_ids) > 4 for o in outputs):
                times.append(elapsed)
        print(json.dumps({"kind": "decode", "size": batch, "times": times[:steps]}), flush=True)
    one_token = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    for length in lengths:
        times = []
        for i in range(1 + repetitions):
            prompt = torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(i))
            engine.add_request(f"prompt-{length}-{i}", {"prompt_token_ids": prompt.tolist()}, one_token)
            take_turn()
            start = time.perf_counter()
            while engine.has_unfinished_requests():
                engine.step()
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps({"kind": "prompt", "size": length, "times": times[1:]}), flush=True)
    if os.environ.get("VLLM_PLUGINS") == "xgdn":
        import xgdn

        report = xgdn.report()
        print(
            json.dumps({"kind": "report", "served": report.served, "fallbacks": report.fallbacks, "text": str(report)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
