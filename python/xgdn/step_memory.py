# SPDX-License-Identifier: Apache-2.0
"""Memory that the ops of a forward pass share for their results."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xgdn import _C

__all__ = ["empty", "step_memory"]


class _Entered(threading.local):
    count = 0


_entered = _Entered()


@contextlib.contextmanager
def step_memory() -> Iterator[None]:
    """Lend the ops that this thread calls on the CPU a memory for their results and temporaries.

    A result lies where another one lay that nobody has any more, on pages that exist, where those of large tensors are
    otherwise made for each of them anew. Results may outlive the scope. What is traced by `torch.compile` takes no
    part.
    """
    with _C.StepMemory():
        _entered.count += 1
        try:
            yield
        finally:
            _entered.count -= 1


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a result on the device of `like`, of its type unless another is given, in the step memory if any."""
    if torch.compiler.is_compiling() or _entered.count == 0 or type(like) is not Tensor:
        return like.new_empty(shape, dtype=dtype)
    return _C.allocate_temporary(shape, like, dtype)
