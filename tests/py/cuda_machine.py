# SPDX-License-Identifier: Apache-2.0
"""Whether the CUDA tests must run on this machine, or may be skipped."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class CudaMachine:
    """What the backend needs, to be built and to serve."""

    torch_has_cuda: bool
    has_gpu: bool  # as the system sees it: a torch that does not see it is a fault
    has_nvcc: bool

    @classmethod
    def here(cls) -> CudaMachine:
        return cls(
            torch_has_cuda=torch.version.cuda is not None,
            has_gpu=torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*")),
            has_nvcc=bool(os.environ.get("CUDACXX") or shutil.which("nvcc")),
        )

    def may_skip(self, why_not: str) -> bool:
        """Whether the backend's sentence is no fault: it cannot serve here, or could not be built."""
        was_built = "no CUDA backend" not in why_not
        return not (self.torch_has_cuda and self.has_gpu and (was_built or self.has_nvcc))
