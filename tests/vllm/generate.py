# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM once, as a process of its own: `python generate.py JOB`, where JOB and the last line printed are JSON.

A job has `model`, `options` of `LLM`, and `rounds`: each a list of [prompt, number of tokens], which are generated at
once. Its `version` is what vLLM says of itself, if it shall say anything else. The line has the tokens and their log
probabilities, round by round, how many tokens of the prompts were cached, and xgdn's report of each process.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    job = json.loads(sys.argv[1])
    import vllm

    vllm.__version__ = job.get("version", vllm.__version__)
    llm = vllm.LLM(
        job["model"],
        skip_tokenizer_init=True,
        max_model_len=512,
        worker_extension_cls="xgdn.integrations.vllm_plugin.WorkerExtension",
        **job["options"],
    )
    result: dict[str, Any] = {"tokens": [], "logprobs": [], "cached": []}
    for requests in job["rounds"]:
        sampling = [
            vllm.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
            for _, count in requests
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], sampling, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        result["tokens"].append([list(answer.token_ids) for answer in answers])
        result["logprobs"].append(
            [[at[t].logprob for t, at in zip(a.token_ids, a.logprobs, strict=True)] for a in answers]
        )
        result["cached"].append([output.num_cached_tokens for output in outputs])
    result["reports"] = llm.collective_rpc("xgdn_report")
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
