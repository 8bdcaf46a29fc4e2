# SPDX-License-Identifier: Apache-2.0
"""Why a call is left to its host: the sentences that hosts share."""

import torch

__all__ = ["name_of", "why_not_activation", "why_not_dtype", "why_not_taps"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TAPS = (2, 3, 4)  # of the convolution's kernels


def why_not_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"dtype {name_of(dtype)}"


def why_not_taps(taps: int) -> str | None:
    return None if taps in _TAPS else f"a convolution of {taps} taps"


def why_not_activation(activation: object) -> str | None:
    return None if activation in ("silu", "swish") else f"activation {activation}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
