# SPDX-License-Identifier: Apache-2.0
"""The torch path of transformers' Qwen3-Next. Its states are [N, HV, K, V] and out of place."""

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

from peers import OUT_TOLERANCE, STATE_TOLERANCE
from xgdn.bench import Contestant, DecodeProblem, PrefillProblem, VerifyProblem

REQUIREMENT = None  # of the environment
NAME = "transformers"


def load(_: Path) -> str:
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that its optional kernels are absent, which is what is compared here
    return f"{NAME} {importlib.metadata.version('transformers')}"


def decode(problem: DecodeProblem) -> list[Contestant]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    if problem.pool.dtype != torch.float32:
        return []
    pool = problem.pool.make().transpose(2, 3).contiguous()
    results: tuple[Tensor, Tensor] = (pool, pool)

    def call(i: int) -> None:
        nonlocal results
        slots = problem.pool.slots(i)
        results = torch_recurrent_gated_delta_rule(
            problem.q[:, None],
            problem.k[:, None],
            problem.v[:, None],
            problem.gates.g[:, None],
            problem.gates.beta[:, None],
            initial_state=pool[slots[0] : slots[-1] + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    def result() -> tuple[Tensor, Tensor]:
        return results[0][:, 0], results[1].transpose(2, 3)

    return [Contestant(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(_: VerifyProblem) -> list[Contestant]:
    return []


def prefill(problem: PrefillProblem) -> list[Contestant]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    if len(problem.lengths) > 1:
        return []
    results: tuple[Tensor, Tensor] = (problem.v, problem.v)

    def call(_: int) -> None:
        nonlocal results
        results = torch_chunk_gated_delta_rule(
            problem.q[None],
            problem.k[None],
            problem.v[None],
            problem.gates.g[None],
            problem.gates.beta[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    def result() -> tuple[Tensor, Tensor]:
        return results[0][0], results[1].transpose(2, 3)

    return [Contestant(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]
