# SPDX-License-Identifier: Apache-2.0
"""The torch path of transformers' Qwen3-Next. Its states are [N, HV, K, V] and out of place."""

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

from kernels.cases import DecodeCase, PrefillCase, VerifyCase
from kernels.compare import Provider
from peers import OUT_TOLERANCE, STATE_TOLERANCE

REQUIREMENT = None  # of the environment
NAME = "transformers"


def load(_: Path) -> str:
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that its optional kernels are absent, which is what is compared here
    return f"{NAME} {importlib.metadata.version('transformers')}"


def decode(case: DecodeCase) -> list[Provider]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    if case.pool.dtype != torch.float32:
        return []
    pool = case.pool.make().transpose(2, 3).contiguous()
    results: tuple[Tensor, Tensor] = (pool, pool)

    def call(i: int) -> None:
        nonlocal results
        slots = case.pool.slots(i)
        results = torch_recurrent_gated_delta_rule(
            case.q[:, None],
            case.k[:, None],
            case.v[:, None],
            case.gates.g[:, None],
            case.gates.beta[:, None],
            initial_state=pool[slots[0] : slots[-1] + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    def result() -> tuple[Tensor, Tensor]:
        return results[0][:, 0], results[1].transpose(2, 3)

    return [Provider(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(_: VerifyCase) -> list[Provider]:
    return []


def prefill(case: PrefillCase) -> list[Provider]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    if len(case.lengths) > 1:
        return []
    results: tuple[Tensor, Tensor] = (case.v, case.v)

    def call(_: int) -> None:
        nonlocal results
        results = torch_chunk_gated_delta_rule(
            case.q[None],
            case.k[None],
            case.v[None],
            case.gates.g[None],
            case.gates.beta[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    def result() -> tuple[Tensor, Tensor]:
        return results[0][0], results[1].transpose(2, 3)

    return [Provider(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]
